"""The factors of experts in a file as vLLM and SGLang read them: their rules, written down from their sources.

vLLM: `vllm/lora/lora_model.py`, `peft_helper.py`, `lora_weights.py`, `model_manager.py`; SGLang:
`python/sglang/srt/lora/lora.py`, `mem_pool.py`, `layers.py`; both as of autumn 2026. No code is shared with the
writers.

Dimension legend: E experts, r rank, out and in the sides of a matrix; gate before up in a fused (out, in).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from adapters.checkpoint import read_json_object
from adapters.errors import AdapterFileError
from adapters.layouts import ExpertLayout

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXPERT = re.compile(r"^base_model\.model\.(.+)\.experts\.(\d+)\.(\w+)\.lora_A\.weight$")
STACK = re.compile(r"^base_model\.model\.(.+)\.experts(?:\.(base_layer|gate_up_proj|down_proj))?\.lora_A\.weight$")
LINEAR = re.compile(r"^base_model\.model\.(.+)\.lora_A\.weight$")
LAYER = re.compile(r"\.layers\.(\d+)\.")
PARTS = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1, "down_proj": 2, "w2": 2}

Where = tuple[str, int | None, int | str | None]
"""Of one pair of factors: the layer's number (or a linear tensor's name), the expert, and which of its parts."""


class FormFile:
    """The factors of one exported directory as vLLM and SGLang find them: by names, one scale for all.

    Attributes:
        keys: of all tensors. used: of those that a reader has asked for.
        pairs: (layer or name, expert, part) → the key of lora_A.
        rank, scale: of adapter_config.json; patterns in it are passed over, as both engines do.
    """

    def __init__(self, directory: Path, layout: ExpertLayout):
        self.file, self.layout = directory / WEIGHTS, layout
        config = read_json_object(directory / CONFIG, AdapterFileError)
        self.rank = int(config["r"])
        self.scale = config["lora_alpha"] / (self.rank**0.5 if config.get("use_rslora") else self.rank)
        with safe_open(self.file, "pt") as file:
            self.shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        self.keys, self.used = frozenset(self.shapes), set[str]()
        self.pairs = {self._where(key): key for key in sorted(self.keys) if key.endswith(".lora_A.weight")}

    def _where(self, key: str) -> Where:
        if one := EXPERT.match(key):
            return _layer(key), int(one[2]), PARTS.get(one[3], one[3])
        if stack := STACK.match(key):
            return _layer(key), None, stack[2] or "experts"
        module = LINEAR.match(key)
        name = self.layout.model_key(f"{module[1]}.weight") if module else None
        return name or key, None, None

    def factors(self, *where: Any) -> tuple[Tensor, Tensor]:
        """(lora_A, lora_B · scale) as they lie in the file, float64."""
        if where not in self.pairs:
            raise AdapterFileError(f"{self.file.name} has nothing for {' '.join(map(str, where))}")
        first = self.pairs[where]
        second = first.replace(".lora_A.", ".lora_B.")
        if second not in self.keys:
            raise AdapterFileError(f"{first} has no {second}")
        self.used |= {first, second}
        with safe_open(self.file, "pt") as file:
            return file.get_tensor(first).double(), file.get_tensor(second).double() * self.scale

    def linear(self, name: str) -> Tensor:
        a, b = self.factors(name, None, None)
        return b @ a

    def unused(self) -> list[str]:
        """Tensors that belong to nothing in the trained adapter, but for those that add nothing."""
        left = sorted(self.keys - self.used)
        with safe_open(self.file, "pt") as file:
            return [key for key in left if file.get_tensor(key.replace(".lora_A.", ".lora_B.")).any()]


def _layer(key: str) -> str:
    found = LAYER.search(key)
    return found[1] if found else key


# -------------------------------------------------------------------- the engines' rules, one matrix of a stack


def per_expert(file: FormFile, stack: str, expert: int, experts: int) -> Tensor:
    """vLLM pack_moe: w1, w3 and w2 of each expert; SGLang stacks gate's and up's lora_A and copies by halves."""
    layer = _layer(stack)
    if stack.endswith(".down_proj"):
        a, b = file.factors(layer, expert, 2)
        return b @ a
    halves = [file.factors(layer, expert, part) for part in (0, 1)]
    return torch.cat([b @ a for a, b in halves])


def vllm_3d(file: FormFile, stack: str, expert: int, experts: int) -> Tensor:
    """vLLM _stack_moe_lora_weights: A.reshape(E, -1, in), B.reshape(out, -1, E).permute(2, 0, 1)."""
    a, b = file.factors(_layer(stack), None, "experts" if stack.endswith(".down_proj") else "base_layer")
    a3 = a.reshape(experts, -1, a.shape[-1])
    b3 = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
    fused = b3[expert] @ a3[expert]
    alternating = file.layout.model_type == "gpt_oss" and not stack.endswith(".down_proj")
    return torch.cat([fused[::2], fused[1::2]]) if alternating else fused


def sglang_3d(file: FormFile, stack: str, expert: int, experts: int) -> Tensor:
    """SGLang: three dimensions, expert first; normalize_gate_up_proj repeats a fused lora_A for gate and for up."""
    projection = stack.rpartition(".")[2]
    a, b = file.factors(_layer(stack), None, projection)
    if a.ndim != 3 or b.ndim != 3 or len(a) != experts or len(b) != experts:
        raise AdapterFileError(f"{stack} is {tuple(a.shape)} and {tuple(b.shape)}: expected {experts} experts first")
    if projection == "down_proj":
        return b[expert] @ a[expert]
    twice, middle = a[expert].repeat(2, 1), b.shape[1] // 2
    rank = twice.shape[0] // 2
    return torch.cat([b[expert, :middle] @ twice[:rank], b[expert, middle:] @ twice[rank:]])


Reader = Callable[[FormFile, str, int, int], Tensor]
