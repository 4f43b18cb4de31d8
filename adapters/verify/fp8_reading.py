"""FP8 files as engines read them: by names and by quantization_config alone. No code is shared with the writer.

vLLM: `compressed_tensors.py` (`ignore` by names; weight and weight_scale of every other linear layer),
`compressed_tensors_w8a8_fp8.py` (strategy "channel": one scale for each output), `FusedMoE.make_expert_params_mapping`
(gate_proj is w1, up_proj w3, down_proj w2; w13 holds w1 above w3); as of autumn 2026.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.checkpoint import TensorInfo, read_json_object
from adapters.errors import ExportError
from adapters.tensor_files import read_tensor
from adapters.verify import Check

DECLARED = "weights: quantised as config.json says"
WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
IN_OUT = ("llama4", "llama4_text")
"""Families whose stacks are (E, in, out) in their own files."""


def read_matrix(index: Mapping[str, TensorInfo], model_type: str, key: str, expert: int | None) -> Tensor:
    """One matrix of the base's tensor `key` as an engine holds it, in the base's axis order.

    Returns:
        (rows, cols) float32 where it is quantised, else as in the file.

    Raises:
        ExportError: an engine finds no such tensor.
    """
    prefix, _, projection = key.rpartition(".")
    if key in index or expert is None or projection not in STACKS:
        return _linear(index, key, expert)
    fused = torch.cat([_linear(index, f"{prefix}.{expert}.{part}.weight", None) for part in STACKS[projection]])
    return fused.t().contiguous() if model_type in IN_OUT else fused


def _linear(index: Mapping[str, TensorInfo], name: str, expert: int | None) -> Tensor:
    if name not in index:
        raise ExportError(f"an engine looks for {name}, and the export has no such tensor")
    weight = read_tensor(index[name], expert)
    if weight.dtype != torch.float8_e4m3fn:
        return weight
    if f"{name}_scale" not in index:
        raise ExportError(f"an engine looks for {name}_scale, and the export has no such tensor")
    return weight.float() * read_tensor(index[f"{name}_scale"])


def check_declared(directory: Path, index: Mapping[str, TensorInfo]) -> Check:
    """Whether engines take for quantised just what is: every linear layer is, but those that `ignore` names."""
    found = read_json_object(directory / "config.json").get("quantization_config")
    problems = list(_problems(found if isinstance(found, dict) else {}, index))
    linear = sum(info.dtype == "F8_E4M3" for info in index.values())
    detail = "; ".join(problems[:8]) or f"{linear} linear layers in FP8 with a scale for each output, no other"
    return Check(DECLARED, "failed" if problems else "passed", detail, {"fp8": linear})


def _problems(config: Mapping[str, Any], index: Mapping[str, TensorInfo]) -> list[str]:
    groups = list(config.get("config_groups", {}).values())
    problems = [] if config.get("quant_method") == "compressed-tensors" else ["quant_method is not compressed-tensors"]
    if len(groups) != 1 or groups[0].get("targets") != ["Linear"] or groups[0].get("weights") != WEIGHTS:
        problems.append(f"config_groups are {groups}, expected one for Linear with weights {WEIGHTS}")
    ignored = set(config.get("ignore", ()))
    for key, info in sorted(index.items()):
        module = key.removesuffix(".weight")
        if module == key or len(info.shape) != 2 or module.endswith("embed_tokens"):
            continue
        if (info.dtype == "F8_E4M3") == (module in ignored):
            problems.append(f"{module} is {info.dtype} and {'' if module in ignored else 'not '}in `ignore`")
        scale = index.get(f"{key}_scale")
        if info.dtype == "F8_E4M3" and scale and (scale.shape, scale.dtype) != ((info.shape[0], 1), "F32"):
            problems.append(f"{key}_scale is {scale.dtype} {scale.shape}, expected F32 {(info.shape[0], 1)}")
    return problems
