"""Base + adapter as values: read tensor by tensor and expert by expert, nothing written.

Every adapter tensor must find its base tensor and fit its shape before anything is read. Merged values are float32:
W + scale · B A; whoever writes them rounds once, to the format at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from adapters.checkpoint import TensorInfo, read_config, read_index
from adapters.errors import AdapterFileError, ExportError, listed
from adapters.layouts import ExpertLayout, layout_for
from adapters.peft_files import AdapterFile, ExpertFactors, read_adapter
from adapters.tensor_files import read_tensor


@dataclass(frozen=True)
class Delta:
    """What is added to one base tensor, matrix by matrix so that one float32 matrix exists at a time.

    Attributes:
        matrices: one for a matrix, one an expert for a stack; each gives (rows, cols) float32 in the base's axis order.
        experts: how many of them are experts that are really adapted.
    """

    matrices: tuple[Callable[[], Tensor], ...]
    experts: int = 0


Found = list[tuple[str, tuple[int, ...], Delta]]
"""(checkpoint key, shape that it must have, what is added to it)."""


class MergedWeights:
    """The weights of a model with an adapter in them.

    Args:
        base: a model directory.
        adapter: a PEFT adapter directory for it; None for the base as it is.
        held: how training held the base, where the adapter is to be merged into just those quantised values.

    Attributes:
        config: the base's config.json.
        layout: of its family.
        index: every tensor of the base's files by its key there.
        adapter: what was read of the adapter.

    Raises:
        CheckpointError: the base cannot be read.
        AdapterFileError: the adapter cannot be read, or does not fit; all misfits are listed.
    """

    def __init__(self, base: Path, adapter: Path | None, held: Mapping[str, Any] | None = None):
        if held is not None:
            raise ExportError("merging into quantised weights is not there")
        self.base, self.config, self.index = base, read_config(base), read_index(base)
        self.layout = layout_for(self.config, self.index)
        self.adapter: AdapterFile | None = read_adapter(adapter, self.layout) if adapter else None
        self._deltas = plan_deltas(self.adapter, self.layout, self.index) if self.adapter else {}

    @property
    def changed(self) -> frozenset[str]:
        """Keys that the adapter changes."""
        return frozenset(self._deltas)

    @property
    def experts_changed(self) -> int:
        """Expert matrices that are really adapted."""
        return sum(delta.experts for delta in self._deltas.values())

    def matrices(self, key: str) -> int:
        """How many matrices the tensor is read as: E for a stack, else 1."""
        shape = self.index[key].shape
        return shape[0] if len(shape) == 3 else 1

    def read(self, key: str, expert: int | None = None) -> Tensor:
        """The tensor, or with `expert` that matrix of a stack; float32 where it is changed, else as in the file."""
        tensor, delta = read_tensor(self.index[key], expert), self._deltas.get(key)
        if delta is None:
            return tensor
        if tensor.ndim == 3:
            tensor = tensor.float()
            for number, matrix in enumerate(delta.matrices):
                tensor[number].add_(matrix())
            return tensor
        return tensor.float().add_(delta.matrices[expert or 0]())

    def delta(self, key: str, expert: int | None = None) -> Tensor | None:
        """What is added to that matrix, float32, in the file's axis order; None where nothing is."""
        delta = self._deltas.get(key)
        return None if delta is None else delta.matrices[expert or 0]()


def plan_deltas(adapter: AdapterFile, layout: ExpertLayout, index: dict[str, TensorInfo]) -> dict[str, Delta]:
    """What to add to which base tensor, shapes checked.

    Raises:
        AdapterFileError: listing every adapter tensor without a base tensor, or of another shape.
    """
    problems: list[str] = []
    deltas: dict[str, Delta] = {}
    found: Found = [
        (layout.checkpoint_key(name), (linear.B.shape[0], linear.A.shape[1]), Delta((linear.delta,)))
        for name, linear in adapter.linear.items()
    ]
    for name, factors in adapter.experts.items():
        found += (
            _stacked_delta(name, factors, layout)
            if layout.checkpoint == "stacked"
            else (_per_expert_deltas(name, factors, layout))
        )
    for key, shape, delta in found:
        if key not in index:
            problems.append(f"{key} is adapted, but the base has no such tensor")
        elif index[key].shape != shape:
            problems.append(f"{key} is {index[key].shape} in the base, the adapter is for {shape}")
        else:
            deltas[key] = delta
    if problems:
        raise AdapterFileError(listed("the adapter does not fit this base", problems))
    return deltas


def _stacked_delta(name: str, factors: ExpertFactors, layout: ExpertLayout) -> Found:
    """(key, shape, delta) of a stack that lies in the files as one tensor."""
    experts, outputs, inputs = factors.B.shape[0], factors.B.shape[1], factors.A.shape[2]
    transposed = layout.stack_order == "in_out"
    shape = (experts, inputs, outputs) if transposed else (experts, outputs, inputs)
    matrices = tuple(partial(_expert_delta, factors, expert, transposed) for expert in range(experts))
    return [(layout.checkpoint_key(name), shape, Delta(matrices, sum(map(factors.adapts, range(experts)))))]


def _per_expert_deltas(name: str, factors: ExpertFactors, layout: ExpertLayout) -> Found:
    """(key, shape, delta) of each tensor that an expert of the stack lies in: its own rows of the expert's delta."""
    experts, outputs, inputs = factors.B.shape[0], factors.B.shape[1], factors.A.shape[2]
    found: Found = []
    for expert in range(experts):
        sources, adapts = layout.sources(name, expert), int(factors.adapts(expert))
        rows = outputs // len(sources)
        for number, source in enumerate(sources):
            delta = Delta((partial(_rows, factors, expert, number * rows, rows),), adapts)
            found.append((source.key, (rows, inputs), delta))
    return found


def _rows(factors: ExpertFactors, expert: int, start: int, rows: int) -> Tensor:
    return factors.delta(expert)[start : start + rows]


def _expert_delta(factors: ExpertFactors, expert: int, transposed: bool) -> Tensor:
    delta = factors.delta(expert)
    return delta.t() if transposed else delta
