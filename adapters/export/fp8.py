"""The format "fp8": compressed-tensors' layout of FP8 with dynamic activations, as vLLM, SGLang and TGI read it.

Each matrix is float8_e4m3fn (out, in) with a scale for each output channel, `weight_scale` (out, 1) float32; the engine
quantises activations, token by token. Experts lie as separate matrices, `experts.{e}.{gate,up,down}_proj.weight`,
also where the base has stacks: that is what the engines' loaders of this form know. Sources: the format of
compressed-tensors ("float-quantized", strategy "channel"), and vLLM's compressed_tensors_w8a8_fp8.py and
compressed_tensors_moe.py. Router, head, embeddings, norms and linear attention stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.checkpoint import TensorInfo
from adapters.errors import ExportError
from adapters.export import Options, Progress, Source
from adapters.export.quantized_files import Encoding, Matrix, Specs, check_encoded, write_encoded
from adapters.merged import MergedWeights
from adapters.verify import Check, Evidence
from adapters.verify.fp8_reading import check_declared, read_matrix
from adapters.verify.weights import Rounding

FP8 = torch.float8_e4m3fn
MOST = 448.0
"""The largest value of float8_e4m3fn."""

STACKED = ("llama4", "llama4_text", "qwen3_5_moe", "qwen3_5_moe_text")
"""Families with stacks whose experts engines know as separate matrices of these names too."""

NEVER = ("linear_attn.", "kv_b_proj")
"""Not quantised: state-space parts, and the matrix that engines fold into attention."""


class Fp8(Encoding):
    """FP8 of one model.

    Raises:
        ExportError: a family whose experts the layout does not hold.
    """

    title = "FP8 in the compressed-tensors layout"
    rounding = Rounding(relative=0.05, ulp=None, exact=False)
    limits = "fp8"
    split = STACKED

    def __init__(self, merged: MergedWeights):
        super().__init__(merged)
        layout = merged.layout
        if layout.has_experts and layout.checkpoint == "stacked" and layout.model_type not in STACKED:
            raise ExportError(
                f"FP8 in the compressed-tensors layout holds experts as separate matrices, and no engine documents "
                f"their names for {layout.model_type}; supported are the families with one tensor an expert and "
                f"{', '.join(STACKED)}. Take safetensors or gguf"
            )

    def quantizes(self, key: str) -> bool:
        return super().quantizes(key) and not any(part in key for part in NEVER)

    def parts(self, matrix: Matrix) -> Specs:
        scales = (matrix.shape[0], 1)
        return {f"{matrix.name}.weight": (FP8, matrix.shape), f"{matrix.name}.weight_scale": (torch.float32, scales)}

    def encode(self, matrix: Matrix, values: Tensor) -> Iterator[Tensor]:
        """Each channel's largest value becomes 448."""
        scale = values.abs().amax(1, keepdim=True).div_(MOST).clamp_(min=torch.finfo(torch.float32).tiny)
        yield (values / scale).clamp_(-MOST, MOST).to(FP8)
        yield scale

    def read_back(self, index: Mapping[str, TensorInfo], key: str, expert: int | None) -> Tensor:
        """By the engines' names, which are written down apart from this writer's."""
        return read_matrix(index, self.merged.layout.model_type, key, expert)

    def declared(self, directory: Path, index: Mapping[str, TensorInfo]) -> list[Check]:
        return [check_declared(directory, index)]

    def config(self) -> dict[str, Any]:
        weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
        activations = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": activations,
            "output_activations": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": self.left(),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


def write_fp8(source: Source, directory: Path, options: Options, progress: Progress | None = None) -> dict[str, Any]:
    """The format "fp8"."""
    return write_encoded(Fp8(source.open()), directory, progress)


def check_fp8(directory: Path, source: Source, evidence: Evidence, options: Options) -> list[Check]:
    """Every value against base + adapter; what the engine makes of it is said by stock transformers on these values.

    That the engines themselves load it cannot be seen on a machine without one.
    """
    checks = check_encoded(Fp8(source.open()), directory, source, evidence, options, stock=False)
    detail = "vLLM, SGLang or TGI load this form; none is on this machine. The values were verified as they dequantise"
    return [*checks, Check("loads in its engine", "not run", detail)]
