"""Base + adapter as values: read tensor by tensor, expert by expert, a few rows at a time; nothing written.

Everything is held against the base before anything is read: its fingerprint where the adapter records it, the name and
shape of every tensor, and that no layer is left out. Merged values are float32: W + scale · B A; whoever writes them
rounds once, to the format at hand.

    MergedWeights(base, adapter, held) ─▶ .read(key, expert, rows)     merged, float32; as in the file if not changed
                                       ─▶ .weight(key, expert, rows)   the same without the delta
                                       ─▶ .delta(key, expert, rows)    what the adapter adds
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.adapter_files import AdapterFile, LinearFactors, read_adapter, without_start
from adapters.checkpoint import TensorInfo, check_links, read_config, read_index
from adapters.errors import AdapterFileError, CheckpointError, listed
from adapters.layouts import LAYER, PROJECTIONS, ExpertLayout, layout_for, moe_shapes
from adapters.sidecar import check_base, read_sidecar
from adapters.tensor_files import read_values

Rows = tuple[int, int]
"""The first row of a matrix and the one behind the last."""


@dataclass(frozen=True)
class Part:
    """What one base tensor gets of an adapter.

    Attributes:
        name: of the factors in the adapter.
        stack: whether they are those of a stack of experts.
        expert: whose the tensor is; None where it is the whole stack, or no expert's.
        first_row: of the expert's fused matrix, with which the tensor begins.
    """

    name: str
    stack: bool
    expert: int | None = None
    first_row: int = 0


class MergedWeights:
    """The weights of a model with an adapter in them.

    Args:
        base: a model directory.
        adapter: a PEFT adapter directory for it; None for the base as it is.
        held: how training held the base ({"quantization", "int8_experts", "double_quant", "dtype"}), where the adapter
            is to be merged into just those quantised values; None merges into the base's own.

    Attributes:
        config: the base's config.json.
        layout: of its family.
        index: every tensor of the base's files by its key there.
        adapter: what was read of the adapter. directory: the one that it lies in, or None.
        changed: keys that the adapter changes. An expert that was given no adapter is not among them.
        experts_changed: expert matrices that are really adapted.
        warnings: what is different about the base since the training, in words, and does not change its weights.

    Raises:
        CheckpointError: the base cannot be read, or is not whole.
        AdapterFileError: the adapter cannot be read, or does not fit; all misfits are listed.
    """

    def __init__(self, base: Path, adapter: Path | None, held: Mapping[str, Any] | None = None):
        check_links(base)
        self.base, self.config, self.index = base, read_config(base), read_index(base)
        self.directory = adapter
        self.layout = layout_for(self.config, self.index)
        self._check_experts()
        self.adapter: AdapterFile | None = None
        self.warnings: list[str] = []
        self._parts: dict[str, Part] = {}
        self._adapts: dict[str, tuple[bool, ...]] = {}
        if adapter is not None:
            self._plan(adapter, held is not None)
        self.changed = frozenset(key for key in self._parts if self.adapts(key))
        self._held = _held_base(self, held)

    def _plan(self, directory: Path, quantized: bool) -> None:
        sidecar = read_sidecar(directory)
        self.adapter = read_adapter(directory, self.layout, self._stack_sizes)
        if quantized and sidecar is not None and sidecar.start == "loftq":
            self.adapter = without_start(self.adapter, self.layout)
        self._parts = plan_parts(self.adapter, self.layout, self.index)
        if problems := left_out(self.adapter, self.layout, self.index):
            raise AdapterFileError(listed(f"{directory} is not whole", problems))
        if sidecar is not None:
            self.warnings = check_base(sidecar, self.base)
        for name, stack in self.adapter.experts.items():
            self._adapts[name] = tuple(map(stack.adapts, range(len(stack.A))))

    def _check_experts(self) -> None:
        keys = (
            source.key
            for stack, count in self.stacks()
            for e in range(count)
            for source in self.layout.sources(stack, e)
        )
        if missing := sorted({key for key in keys if key not in self.index}):
            raise CheckpointError(self.base, [f"{key} is missing" for key in missing])

    def stacks(self) -> Iterator[tuple[str, int]]:
        """The stack of each projection of each MoE layer, by its name in the model, and how many experts it has."""
        for shape in moe_shapes(self.layout, self.index, self.config):
            for projection in PROJECTIONS:
                yield (
                    f"model.layers.{shape.layer}.{self.layout.block}.{self.layout.experts}.{projection}",
                    shape.experts,
                )

    def _stack_sizes(self, name: str) -> tuple[int, int]:
        sources = self.layout.sources(name, 0)
        missing = [source.key for source in sources if source.key not in self.index]
        if missing:
            raise AdapterFileError(f"{missing[0]} is adapted, but the base has no such tensor")
        rows, cols = self.index[sources[0].key].shape[-2:]
        return (cols, rows) if self.layout.stack_order == "in_out" else (len(sources) * rows, cols)

    @property
    def experts_changed(self) -> int:
        matrices = [part for part in self._parts.values() if part.stack]
        return sum(
            sum(self._adapts[part.name]) if part.expert is None else self._adapts[part.name][part.expert]
            for part in matrices
        )

    def adapts(self, key: str, expert: int | None = None) -> bool:
        """Whether the adapter changes that matrix of the tensor."""
        part = self._parts.get(key)
        if part is None or not part.stack:
            return part is not None
        chosen = expert if part.expert is None else part.expert
        return any(self._adapts[part.name]) if chosen is None else self._adapts[part.name][chosen]

    def matrices(self, key: str) -> int:
        """How many matrices the tensor is read as: E for a stack, else 1."""
        shape = self.index[key].shape
        return shape[0] if len(shape) == 3 else 1

    def computed(self, key: str) -> bool:
        """Whether the values are any other than those in the file."""
        return key in self.changed or (self._held is not None and self._held.covers(key))

    def read(self, key: str, expert: int | None = None, rows: Rows | None = None) -> Tensor:
        """The tensor, or with `expert` that matrix of a stack, or with `rows` some rows of the matrix.

        Fewer rows than 64 may differ from those of the whole matrix in their last bits: BLAS multiplies them otherwise.

        Returns:
            float32 where the values are computed, else as in the file.
        """
        if not self.computed(key) or len(self.index[key].shape) < 3 or expert is not None:
            return self._matrix(key, expert, rows)
        tensor = torch.empty(self.index[key].shape)
        for number in range(len(tensor)):
            tensor[number] = self._matrix(key, number)
        return tensor

    def _matrix(self, key: str, expert: int | None, rows: Rows | None = None) -> Tensor:
        weight, delta = self.weight(key, expert, rows), self.delta(key, expert, rows)
        if not self.computed(key):
            return weight
        weight = weight.float()
        return weight if delta is None else weight.add_(delta)

    def weight(self, key: str, expert: int | None = None, rows: Rows | None = None) -> Tensor:
        """The base's values, quantised and dequantised where they were held so; without the delta."""
        if self._held is not None and self._held.covers(key):
            return self._held.read(key, expert, rows)
        return read_rows(self.index[key], expert, rows)

    def delta(self, key: str, expert: int | None = None, rows: Rows | None = None) -> Tensor | None:
        """What is added to the matrix, or to some of its rows, in the file's axis order; None where nothing is.

        Returns:
            (rows, cols) float32; (E, rows, cols) of a stack without `expert`.
        """
        part = self._parts.get(key)
        if part is None or not self.adapts(key, expert):
            return None
        assert self.adapter is not None
        if not part.stack:
            factors = self.adapter.linear[part.name]
            return self._with_magnitude(key, rows, factors, _product(factors, rows))
        if part.expert is None and expert is None:
            return torch.stack([_whole(self.delta(key, e), self.index[key]) for e in range(self.matrices(key))])
        chosen = part.expert if part.expert is not None else expert
        assert chosen is not None
        factors = self.adapter.experts[part.name].of(chosen)
        if part.expert is None:
            return _product(factors, rows, transposed=self.layout.stack_order == "in_out")
        first, last = rows or (0, self.index[key].shape[0])
        return _product(factors, (part.first_row + first, part.first_row + last))

    def _with_magnitude(self, key: str, rows: Rows | None, factors: LinearFactors, product: Tensor) -> Tensor:
        """What a DoRA changes: its rows have the norm that it says, those without one are LoRA's."""
        if factors.magnitude is None:
            return product
        weight, magnitude = self.weight(key, None, rows).float(), factors.magnitude.float()
        return scaled_rows(weight, product, magnitude if rows is None else magnitude[slice(*rows)]).sub_(weight)


def scaled_rows(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """m · (W + Δ) / ‖W + Δ‖ of rows (rows, in) with their magnitudes (rows,): DoRA (arXiv 2402.09353, equation 5)."""
    changed = weight + delta
    return changed.mul_((magnitude / changed.norm(dim=1))[:, None])


def _whole(delta: Tensor | None, info: TensorInfo) -> Tensor:
    return torch.zeros(info.shape[-2:]) if delta is None else delta


def _product(factors: LinearFactors, rows: Rows | None, transposed: bool = False) -> Tensor:
    """scale · B A in float32, (out, in) or transposed; of `rows` alone."""
    left, right = factors.B.float(), factors.A.float()
    if transposed:
        left, right = right.t(), left.t()
    return (left if rows is None else left[slice(*rows)]).matmul(right).mul_(factors.scale)


def read_rows(info: TensorInfo, expert: int | None = None, rows: Rows | None = None) -> Tensor:
    """The tensor as it is in its file; of a stack, one expert's matrix; of a matrix, some rows."""
    shape = info.shape if expert is None or len(info.shape) < 3 else info.shape[1:]
    start = 0 if shape == info.shape else (expert or 0) * int(torch.Size(shape).numel())
    if rows is not None:
        row = int(torch.Size(shape[1:]).numel())
        start, shape = start + rows[0] * row, (rows[1] - rows[0], *shape[1:])
    return read_values(info, start, int(torch.Size(shape).numel())).view(shape)


def _held_base(merged: MergedWeights, held: Mapping[str, Any] | None) -> Any:
    if held is None:
        return None
    from adapters.held import HeldBase

    return HeldBase(merged.index, merged.layout, tuple(merged.stacks()), held)


def plan_parts(adapter: AdapterFile, layout: ExpertLayout, index: Mapping[str, TensorInfo]) -> dict[str, Part]:
    """Which base tensor gets what, shapes checked.

    Raises:
        AdapterFileError: listing every adapter tensor without a base tensor, or of another shape.
    """
    problems: list[str] = []
    parts: dict[str, Part] = {}
    for name, shape in adapter.shapes.items():
        for key, wanted, part in _found(name, shape, layout):
            if key not in index:
                problems.append(f"{key} is adapted, but the base has no such tensor")
            elif index[key].shape != wanted:
                problems.append(f"{key} is {index[key].shape} in the base, the adapter is for {wanted}")
            else:
                parts[key] = part
    if problems:
        raise AdapterFileError(listed("the adapter does not fit this base", problems))
    return parts


def _found(name: str, shape: tuple[int, ...], layout: ExpertLayout) -> Iterator[tuple[str, tuple[int, ...], Part]]:
    """(key in the files, shape that it must have, what it gets) of each base tensor that one LoRA is for."""
    if len(shape) == 2:
        yield layout.checkpoint_key(name), shape, Part(name, stack=False)
        return
    experts, outputs, inputs = shape
    if layout.checkpoint == "stacked":
        sides = (inputs, outputs) if layout.stack_order == "in_out" else (outputs, inputs)
        yield layout.checkpoint_key(name), (experts, *sides), Part(name, stack=True)
        return
    for expert in range(experts):
        sources = layout.sources(name, expert)
        rows = outputs // len(sources)
        for number, source in enumerate(sources):
            yield source.key, (rows, inputs), Part(name, True, expert, number * rows)


def left_out(adapter: AdapterFile, layout: ExpertLayout, index: Mapping[str, TensorInfo]) -> list[str]:
    """Tensors that the adapter's config targets and its file has nothing for: lost, in one layer or in all of them."""
    names = {name: len(info.shape) for key, info in index.items() if (name := layout.model_key(key))}
    return [
        f"{name} is targeted by adapter_config.json and has no lora_A and lora_B"
        for name in sorted(set(names) - set(adapter.shapes))
        if _targeted(adapter.config, name, names[name])
    ]


def _targeted(config: Mapping[str, Any], name: str, dimensions: int) -> bool:
    """Whether an adapter with this config adapts the tensor `name`, as PEFT matches names.

    A target module is a linear layer: stacks of experts and norms are none, whatever a pattern says of their names.
    """
    module, layers, layer = name.removesuffix(".weight"), config.get("layers_to_transform"), LAYER.search(name)
    if layers is not None and layer and int(layer[1]) not in ([layers] if isinstance(layers, int) else layers):
        return False
    if _matches(config.get("exclude_modules"), module):
        return False
    linear = module != name and dimensions == 2
    return _matches(config.get("target_parameters"), name) or (
        linear and _matches(config.get("target_modules"), module)
    )


def _matches(wanted: str | Sequence[str] | None, name: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in wanted or ())
