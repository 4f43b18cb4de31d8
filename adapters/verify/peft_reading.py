"""An adapter file as PEFT itself reads it: the verification's own way, which shares no code with the merge.

PEFT says what a stack's factors mean by the shape of the parameter and by one attribute of the stock class,
`is_transposed` (peft 0.21.2, tuners/lora/layer.py, ParamWrapper.update_layer and get_delta_weight). Both are asked of
the stock model here, built on the meta device. What a module's factors add to its parameter is

    matrix                          scale · B A
    stack (E, d1, d2), transposed   scale · einsum("o r e, e r i -> e i o"), A being (E·r, d1) and B (d2, r·E)
    stack (E, d1, d2), else         scale · einsum("o r e, e r i -> e o i"), A being (E·r, d2) and B (d1, r·E)

Before 0.19.1 PEFT took every stack for a transposed one.

Dimension legend: E experts, r rank, d1 and d2 the axes of an expert's matrix in the parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from adapters.checkpoint import read_json_object
from adapters.errors import AdapterFileError

WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
SWAPPED_BEFORE = (0, 19, 1)


@dataclass(frozen=True)
class Pair:
    """The two factors of one parameter.

    Attributes:
        parameter: its name in the stock model.
        key: of lora_A in the file, up to ".lora_A.weight".
        shape: of the parameter, (out, in) or (E, d1, d2).
        transposed: a stack whose lora_A lies along d1.
    """

    parameter: str
    key: str
    shape: tuple[int, ...]
    rank: int
    scale: float
    transposed: bool = False


class PeftReading:
    """One adapter directory on one base.

    Args:
        adapter: a standard PEFT directory. base: the model directory that it is for.

    Attributes:
        pairs: by the parameter's name.
        keys: of all tensors in the file.

    Raises:
        AdapterFileError: a tensor that belongs to no parameter of the stock model, or does not fit it.
    """

    def __init__(self, adapter: Path, base: Path):
        self.file, self.config = adapter / WEIGHTS, read_json_object(adapter / CONFIG, AdapterFileError)
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(base, trust_remote_code=False)
            self.stock = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        with safe_open(self.file, "pt") as file:
            self.shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        self.keys = frozenset(self.shapes)
        self._kept: tuple[str, Tensor, Tensor] | None = None
        self._whole: tuple[str, ...] | None = None
        found = [self._pair(key.removesuffix(".lora_A.weight")) for key in self.keys if ".lora_A." in key]
        self.pairs: Mapping[str, Pair] = {pair.parameter: pair for pair in found}

    def leave_out_start(self, routers: Iterable[str]) -> None:
        """From now on reads the first half of each pair's ranks alone, and `routers` whole: of an adapter that began
        with what the quantisation lost (LoftQ), what was trained on the quantised weights."""
        self._whole = tuple(routers)

    def factors(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """(lora_A, lora_B) as they lie in the file, float32; those of one pair are kept, as all experts need them."""
        if self._kept is None or self._kept[0] != pair.key:
            with safe_open(self.file, "pt") as file:
                first, second = (file.get_tensor(f"{pair.key}.lora_{side}.weight").float() for side in "AB")
            if self._whole is not None and not pair.parameter.removesuffix(".weight").endswith(self._whole):
                experts = pair.shape[0] if len(pair.shape) == 3 else 1
                first.view(experts, pair.rank, -1)[:, pair.rank // 2 :] = 0
                second.view(len(second), pair.rank, experts)[:, pair.rank // 2 :] = 0
            self._kept = pair.key, first, second
        return self._kept[1:]

    def delta(self, pair: Pair, expert: int | None = None) -> Tensor:
        """What is added to the matrix, or to one expert's of a stack: (out, in) or (d1, d2), float32."""
        first, second = self.factors(pair)
        if expert is None:
            return pair.scale * torch.einsum("or,ri->oi", second, first)
        first = first.reshape(pair.shape[0], pair.rank, -1)[expert]
        second = second.reshape(second.shape[0], pair.rank, pair.shape[0])[..., expert]
        return pair.scale * torch.einsum("or,ri->io" if pair.transposed else "or,ri->oi", second, first)

    def stacked(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """A stack's factors with expert e's matrix (d1, d2) = scale · left[e] right[e]: (E, d1, r) and (E, r, d2)."""
        first, second = self.factors(pair)
        first = first.reshape(pair.shape[0], pair.rank, -1)
        second = second.reshape(second.shape[0], pair.rank, pair.shape[0])
        if pair.transposed:
            return first.transpose(1, 2), second.permute(2, 1, 0)
        return second.permute(2, 0, 1), first

    def _pair(self, key: str) -> Pair:
        module = key.removeprefix(PREFIX)
        parameter, shape = self._parameter(module)
        rank, scale = self._rank_and_scale(parameter if self._by_parameter(parameter) else module)
        transposed = len(shape) == 3 and self._is_transposed(parameter.rpartition(".")[0])
        experts, (outputs, inputs) = (shape[0] if len(shape) == 3 else 1), shape[-2:]
        if transposed:
            outputs, inputs = inputs, outputs
        expected = (experts * rank, inputs), (outputs, experts * rank)
        got = self.shapes[f"{key}.lora_A.weight"], self.shapes.get(f"{key}.lora_B.weight")
        if got != expected:
            raise AdapterFileError(
                f"{key}: lora_A and lora_B are {got}; PEFT expects {expected} for {parameter} {shape}"
            )
        return Pair(parameter, key, shape, rank, scale, transposed)

    def _parameter(self, module: str) -> tuple[str, tuple[int, ...]]:
        """Name and shape of the parameter that the module's factors are for; PEFT nests one wrapper in another."""
        inner = re.sub(r"(\.base_layer)+$", "", module)
        try:
            stock = self.stock.get_submodule(inner)
        except AttributeError:
            raise AdapterFileError(f"{module} is adapted, but the base has no such module") from None
        if hasattr(stock, "weight"):
            return f"{inner}.weight", tuple(cast(Tensor, stock.weight).shape)
        targeted = {name.rpartition(".")[2] for name in self._targets() if inner.endswith(name.rpartition(".")[0])}
        # the wrappers go round the module in the order of its parameters: the first one is the innermost
        own = [name for name, _ in stock.named_parameters(recurse=False) if name in targeted]
        depth = module.removeprefix(inner).count(".base_layer")
        if depth >= len(own):
            raise AdapterFileError(f"{module} is adapted, but target_parameters names {sorted(targeted)} of {inner}")
        name = own[len(own) - 1 - depth]
        return f"{inner}.{name}", tuple(getattr(stock, name).shape)

    def _targets(self) -> list[str]:
        return list(self.config.get("target_parameters") or ())

    def _by_parameter(self, parameter: str) -> bool:
        return parameter.endswith(tuple(self._targets()))

    def _rank_and_scale(self, name: str) -> tuple[int, float]:
        ranks, alphas = self.config.get("rank_pattern") or {}, self.config.get("alpha_pattern") or {}
        rank = int(ranks.get(first_match(ranks, name), self.config["r"]))
        alpha = float(alphas.get(first_match(alphas, name), self.config["lora_alpha"]))
        return rank, alpha / (rank**0.5 if self.config.get("use_rslora") else rank)

    def _is_transposed(self, module: str) -> bool:
        version = re.match(r"(\d+)\.(\d+)\.(\d+)", str(self.config.get("peft_version") or ""))
        old = version is not None and tuple(map(int, version.groups())) < SWAPPED_BEFORE
        return old or bool(getattr(self.stock.get_submodule(module), "is_transposed", False))

    def is_dora(self, pair: Pair) -> bool:
        return f"{pair.key}.lora_magnitude_vector" in self.keys

    def dora(self, pair: Pair, weight: Tensor, delta: Tensor) -> Tensor:
        """What a DoRA changes of `weight` (out, in), whose LoRA adds `delta`: PEFT's DoraLinearVariant.merge_safe."""
        with safe_open(self.file, "pt") as file:
            magnitude = file.get_tensor(f"{pair.key}.lora_magnitude_vector").float()
        weight = weight.float()
        summed = weight + delta
        return magnitude.view(-1, 1) / torch.linalg.norm(summed, dim=1, keepdim=True) * summed - weight

    def unused(self) -> list[str]:
        """Tensors of the file that are no factor of any pair."""
        used = {f"{pair.key}.lora_{side}.weight" for pair in self.pairs.values() for side in "AB"}
        if self.config.get("use_dora"):
            used |= {f"{pair.key}.lora_magnitude_vector" for pair in self.pairs.values()}
        return sorted(self.keys - used)


def first_match(patterns: Iterable[str], name: str) -> str:
    """The first pattern that is the end of `name`, else `name`: peft.utils.other.get_pattern_key, whose import takes
    longer than a small model's whole verification."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", name)), name)
