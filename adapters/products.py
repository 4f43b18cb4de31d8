"""Products of the rows of a group of experts, each row with its own expert's matrix.

    Group             experts computed together, and their slice of the pairs sorted by expert
    linear            one matrix, in float32 on a CPU through oneDNN
    grouped_linear    a matrix for each expert: torch's grouped matmul where it serves, else one product after the other
    grouped_outer     leftᵀ right of each expert's rows: the gradient of such a matrix

Dimension legend: P pairs of a group, G experts of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

ROW_BYTES = 16
"""What torch's grouped matmul wants the rows of its operands to be a multiple of."""


@dataclass(frozen=True)
class Group:
    """Experts computed together: their ids, how many pairs each has, and their slice of the sorted pairs."""

    experts: tuple[int, ...]
    counts: tuple[int, ...]
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    def with_expert(self, expert: int, rows: int, adjoining: bool) -> Group:
        """This group and the next `rows` pairs, of `expert`; `adjoining`: with the idle experts between, too."""
        idle = tuple(range(self.experts[-1] + 1, expert)) if adjoining else ()
        counts = (*self.counts, *(0 for _ in idle), rows)
        return Group((*self.experts, *idle, expert), counts, self.start, self.stop + rows)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (P, in) @ weightᵀ, weight (out, in) with any strides.

    In float32 on a CPU through oneDNN, which took half the time of the default BLAS on AMD (docs/performance.md). Its
    switch is `torch.backends.mkldnn.enabled`. It compiles code for every row count that it meets and keeps it (2 ms and
    half a megabyte or more each), so rows are padded to one of a few counts.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu" or not _onednn():
        return x @ weight.t()
    rows = x.shape[0]
    missing = padded_rows(rows) - rows
    padded = F.pad(x, (0, 0, 0, missing)) if missing else x
    product: Tensor = torch.ops.mkldnn._linear_pointwise(padded, weight, None, "none", [], "")
    return product[:rows]


def padded_rows(rows: int) -> int:
    """The next of the counts 8, 16, …, 64, 80, …, 256, and from there eight an octave: 288, 320, …, 512, 576, …"""
    step = 8 if rows <= 64 else max(16, 1 << ((rows - 1).bit_length() - 4))
    return -(-rows // step) * step


def _onednn() -> bool:
    return bool(torch.backends.mkldnn.enabled) and torch.backends.mkldnn.is_available()


def grouped_linear(x: Tensor, weights: Tensor, counts: Sequence[int], transposed: bool) -> Tensor:
    """x (P, ·) times each group's matrix: x @ W[g]ᵀ when `transposed`, else x @ W[g]. weights (G, ·, ·)."""
    if len(counts) == 1:
        return x @ (weights[0].t() if transposed else weights[0])
    if not _serves(x, weights):
        parts = zip(x.split(list(counts)), weights, strict=True)
        return torch.cat([rows @ (weight.t() if transposed else weight) for rows, weight in parts])
    return F.grouped_mm(x, weights.transpose(1, 2) if transposed else weights, offs=_offsets(counts, x.device))


def grouped_outer(left: Tensor, right: Tensor, counts: Sequence[int]) -> Tensor:
    """left (P, m), right (P, n) → (G, m, n): leftᵀ right of each group's rows."""
    if len(counts) == 1:
        return (left.t() @ right)[None]
    if not _serves(left, right):
        parts = zip(left.split(list(counts)), right.split(list(counts)), strict=True)
        return torch.stack([a.t() @ b for a, b in parts])
    return F.grouped_mm(left.t(), right, offs=_offsets(counts, left.device))


def _serves(*operands: Tensor) -> bool:
    """Whether torch has a grouped matmul for these: the dtype, and rows of whole 16 bytes."""
    dtype, device = operands[0].dtype, operands[0].device.type
    aligned = all(stride * t.itemsize % ROW_BYTES == 0 for t in operands for stride in sorted(t.stride())[1:])
    return aligned and (dtype == torch.bfloat16 or (dtype == torch.float32 and device == "cpu"))


def _offsets(counts: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=device)
