"""What a base model's tensors are, what they take in memory, and how large the adapters on them are: from shapes alone.

    base_in(directory), or Shape.base() ─▶ Base ─▶ tensor_classes(base, …)   bytes and parameters per class

No torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from adapters.checkpoint import TensorInfo, read_config, read_index, text_config
from adapters.errors import CheckpointError, TargetError
from adapters.layouts import (
    QUANTIZED_CLASSES,
    TENSOR_CLASSES,
    ExpertLayout,
    MoeShape,
    TensorClassName,
    layout_for,
    moe_shapes,
)
from adapters.placement import ExpertGrid, Placement

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANT_BLOCK, SCALE_BLOCK = 64, 256


@dataclass(frozen=True)
class Base:
    """A base model as far as its shapes go.

    Attributes:
        name: as the recipe or `--shape` calls it.
        directory: where it lies, None for a published shape.
        config: of its language model.
        layout: of these files.
        index: every tensor of the files.
    """

    name: str
    directory: Path | None
    config: Mapping[str, Any]
    layout: ExpertLayout
    index: Mapping[str, TensorInfo]

    @cached_property
    def moe(self) -> tuple[MoeShape, ...]:
        """The shape of every MoE layer; () for a dense model."""
        return moe_shapes(self.layout, self.index, self.config)

    @property
    def experts(self) -> int:
        """Routed experts of a layer, 0 for a dense model."""
        return self.moe[0].experts if self.moe else 0

    @property
    def top_k(self) -> int:
        """Routed experts of a token, 0 for a dense model."""
        return self.layout.experts_per_token(self.config) if self.moe else 0

    def number(self, key: str) -> int:
        """A whole number of the config.

        Raises:
            CheckpointError: it is missing, or something else.
        """
        value = self.config.get(key)
        if type(value) is not int:
            raise CheckpointError(self.name, [f"config.json: {key} is {value!r}; expected a whole number"])
        return value

    def parameter_counts(self) -> dict[str, int]:
        """Parameters: `total`, of the routed `experts`, and `active`, which one token meets."""
        total = sum(tensor.parameters for tensor in self.tensors)
        experts = sum(tensor.parameters for tensor in self.tensors if tensor.class_name == "routed_experts")
        active = total - experts + (experts * self.top_k // self.experts if self.experts else 0)
        return {"total": total, "experts": experts, "active": active}

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor that is loaded."""
        tied = self.config.get("tie_word_embeddings", False)
        found: dict[str, tuple[str | None, TensorClassName | None, bool]] = {}
        tensors = []
        one_expert = re.compile(rf"\.{re.escape(self.layout.experts)}\.\d+\.")
        for key, info in self.index.items():
            alike = one_expert.sub(f".{self.layout.experts}.0.", key)  # experts of a layer differ in their number alone
            if alike not in found:
                found[alike] = self._described(alike)
            name, class_name, lora = found[alike]
            if name is None or class_name is None or (tied and class_name == "lm_head"):
                continue
            tensors.append(Tensor(name, class_name, info.shape, lora))
        return tuple(tensors)

    def _described(self, key: str) -> tuple[str | None, TensorClassName | None, bool]:
        name = self.layout.model_key(key)
        if name is None:
            return None, None, False
        return name, self.layout.tensor_class(key), self.layout.takes_lora(key)

    @cached_property
    def layers(self) -> tuple[dict[str, tuple[int, ...]], ...]:
        """Of each decoder layer, the shapes of its tensors by their name in it, routed experts left out."""
        layers: list[dict[str, tuple[int, ...]]] = [{} for _ in range(self.number("num_hidden_layers"))]
        for tensor in self.tensors:
            if tensor.class_name != "routed_experts" and (found := re.search(r"\.layers\.(\d+)\.(.+)$", tensor.name)):
                layers[int(found[1])][found[2]] = tensor.shape
        return tuple(layers)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: name in the stock model (of one expert, its stack's), class, shape, and whether LoRA lands on it."""

    name: str
    class_name: TensorClassName
    shape: tuple[int, ...]
    takes_lora: bool

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


def base_in(directory: Path, name: str) -> Base:
    """The base model whose files lie in `directory`.

    Raises:
        CheckpointError, LayoutError: torn or missing files, an unsupported family.
    """
    config, index = read_config(directory), read_index(directory)
    return Base(name, directory, text_config(config), layout_for(config, index), index)


class TensorClass(BaseModel):
    """One class of base tensors.

    Attributes:
        name: see `adapters.layouts.TENSOR_CLASSES`.
        tensors, parameters: how many in the checkpoint.
        dtype: as held while training: the quantisation, or the computation's; "nf4, int8" for a mixture of experts'.
        bytes: held in memory, scales of quantised blocks included.
        rank: LoRA rank, 0 for no adapter; the largest of the routed experts, and of a router that is trained in full
            its number of experts.
        trainable_parameters: of the adapters on this class, each routed expert's by its own rank.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: TensorClassName
    tensors: int
    parameters: int
    dtype: str
    bytes: int
    rank: int
    trainable_parameters: int


@dataclass(frozen=True)
class HeldAs:
    """The form in which weights stay in memory.

    Attributes:
        quantization: nf4, fp4, int8 or none.
        double_quant: of the 4-bit formats.
        int8_experts: ids of routed experts held in int8 instead.
        dtype: of what is not quantised.
    """

    quantization: str
    double_quant: bool
    int8_experts: Collection[int]
    dtype: str

    def expert(self, expert: int) -> str:
        return "int8" if expert in self.int8_experts else self.quantization

    def matrix_bytes(self, rows: int, cols: int, quantization: str) -> int:
        """Bytes of a (rows, cols) matrix."""
        if quantization == "none":
            return rows * cols * BYTES[self.dtype]
        return int8_bytes(rows, cols) if quantization == "int8" else four_bit_bytes(rows * cols, self.double_quant)


def four_bit_bytes(values: int, double_quant: bool) -> int:
    """Bytes of one matrix of `values` in nf4 or fp4: half a byte each, one scale for every 64 (QLoRA, section 3)."""
    blocks = math.ceil(values / QUANT_BLOCK)
    scales = blocks + 4 * math.ceil(blocks / SCALE_BLOCK) + 4 if double_quant else 4 * blocks
    return math.ceil(values / 2) + scales


def int8_bytes(rows: int, cols: int) -> int:
    """Bytes of one matrix in int8: one each, and a float32 scale for every row."""
    return rows * cols + 4 * rows


def tensor_classes(base: Base, held: HeldAs, placement: Placement) -> tuple[TensorClass, ...]:
    """What is held and what is trained, per class of tensors.

    Raises:
        TargetError: an expert of `held.int8_experts` does not exist.
    """
    _check_int8_experts(base, held)
    ranks, trained = placement.class_ranks(), trainable_parameters(base, placement)
    if placement.router_full:
        ranks["router"] = base.experts
    groups: dict[TensorClassName, list[Tensor]] = {name: [] for name in TENSOR_CLASSES}
    for tensor in base.tensors:
        groups[tensor.class_name].append(tensor)
    return tuple(
        TensorClass(
            name=name,
            tensors=len(tensors),
            parameters=sum(tensor.parameters for tensor in tensors),
            dtype=_dtype(name, base, held),
            bytes=_class_bytes(name, tensors, base, held),
            rank=ranks.get(name, 0),
            trainable_parameters=trained.get(name, 0),
        )
        for name, tensors in groups.items()
        if tensors
    )


def _check_int8_experts(base: Base, held: HeldAs) -> None:
    unknown = sorted(expert for expert in held.int8_experts if expert >= base.experts)
    if unknown:
        has = f"this model has experts 0 to {base.experts - 1}" if base.experts else "this model has no routed experts"
        raise TargetError(f"model.int8_experts: experts {unknown} do not exist; {has}")


def _dtype(name: TensorClassName, base: Base, held: HeldAs) -> str:
    if name not in QUANTIZED_CLASSES or held.quantization == "none":
        return held.dtype
    formats = {held.expert(expert) for expert in range(base.experts)} if name == "routed_experts" else set()
    return ", ".join(sorted(formats or {held.quantization}, key=lambda kind: kind == "int8"))


def _class_bytes(name: TensorClassName, tensors: Iterable[Tensor], base: Base, held: HeldAs) -> int:
    if name == "routed_experts":
        biases = sum(tensor.parameters for tensor in tensors if tensor.name.endswith("_bias"))
        return sum(expert_bytes(base, layer, held) for layer in base.moe) + biases * BYTES[held.dtype]
    quantized = name in QUANTIZED_CLASSES
    return sum(
        held.matrix_bytes(tensor.shape[0], tensor.shape[1], held.quantization)
        if quantized and len(tensor.shape) == 2
        else tensor.parameters * BYTES[held.dtype]
        for tensor in tensors
    )


def expert_bytes(base: Base, layer: MoeShape, held: HeldAs) -> int:
    """Bytes of the two stacks of one MoE layer."""
    stacks = base.layout.stack_shapes(layer.experts, layer.hidden, layer.width).values()
    in_int8 = len(set(held.int8_experts)) if held.quantization != "none" else 0
    return sum(
        in_int8 * held.matrix_bytes(rows, cols, "int8")
        + (experts - in_int8) * held.matrix_bytes(rows, cols, held.quantization)
        for experts, rows, cols in stacks
    )


def trainable_parameters(base: Base, placement: Placement) -> dict[str, int]:
    """Parameters of the adapters on each class that has any: rank · (in + out) of each matrix, and out for a DoRA."""
    counts = dict.fromkeys(TENSOR_CLASSES, 0)
    ranks = placement.class_ranks()
    for tensor in base.tensors:
        if tensor.takes_lora and tensor.class_name != "routed_experts":
            rank = ranks.get(tensor.class_name, 0)
            magnitudes = tensor.shape[0] if rank and placement.method.dora else 0
            counts[tensor.class_name] += rank * sum(tensor.shape) + magnitudes
            if tensor.class_name == "router" and placement.router_full:
                counts["router"] += tensor.parameters
    counts["routed_experts"] = expert_grid(base).parameters(placement.routed)
    return {name: count for name, count in counts.items() if count}


def start_parameters(base: Base, placement: Placement) -> int:
    """Frozen parameters beside the adapters: what they began with, where that was not zero (adapters/starts.py)."""
    if not placement.method.doubles:
        return 0
    return sum(count for name, count in trainable_parameters(base, placement).items() if name != "router")


def expert_grid(base: Base) -> ExpertGrid:
    """The routed experts of a base, with what a rank of each costs: A and B of both projections."""
    return ExpertGrid(
        layers=tuple(layer.layer for layer in base.moe),
        experts=base.experts,
        costs=tuple(2 * layer.hidden + 3 * layer.width for layer in base.moe),
    )
