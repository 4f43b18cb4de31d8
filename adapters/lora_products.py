"""The products of LoRA on routed experts, for a group of experts at a time: forward and backward by hand.

One adapter adds scale · (x Aᵀ) B to a pair, A (r, in) and B (r, out) those of the pair's expert. The factors of all
experts lie one after the other, A (R, in) and B (R, out). Two ways:

    Each       a product for each expert of the group
    Grouped    CUDA in bfloat16: torch's grouped matmul, smaller ranks filled up with zeros

Dimension legend: P pairs of a group, G experts of a group, r LoRA rank, R sum of the ranks of all experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from adapters.dropout import keep_mask
from adapters.products import ROW_BYTES, Group, grouped_linear, grouped_outer


@dataclass(frozen=True)
class LoraRanks:
    """One adapter's ranks, by expert, the scale of its products, and the share of its inputs that are dropped."""

    ranks: tuple[int, ...]
    scale: float
    dropout: float = 0.0

    def rows(self, expert: int) -> slice:
        """The rows of the flat (R, ·) factors that belong to `expert`."""
        start = self.starts[expert]
        return slice(start, start + self.ranks[expert])

    def span(self, group: Group) -> slice:
        """The rows from the group's first expert to its last, those of idle experts between included."""
        return slice(self.rows(group.experts[0]).start, self.rows(group.experts[-1]).stop)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first row of each expert in the flat factors, and after the last their number."""
        return (0, *accumulate(self.ranks))


@dataclass(frozen=True)
class Lora:
    """One adapter's factors on one projection: adds scale · (x Aᵀ) B, expert by expert. A (R, in), B (R, out).

    `seed` is that of its dropout in this call.
    """

    spec: LoraRanks
    a: Tensor
    b: Tensor
    seed: int = 0

    def keep(self, x: Tensor, pairs_P: Tensor) -> Tensor | None:
        """What x (P, in) is multiplied by before A, the same each time; None without dropout."""
        if not self.spec.dropout:
            return None
        return keep_mask(self.seed, pairs_P, x.shape[1], self.spec.dropout, x.dtype)


@dataclass(frozen=True)
class Each:
    """One adapter's factors for a group, and products for each of its experts on its own.

    Attributes:
        a: (R, in), b: (R, out), of all experts.
        counts: pairs of each expert of the group. rows: its part of the factors.
        rank: of each expert where all have the same, else None.
    """

    a: Tensor
    b: Tensor
    counts: tuple[int, ...]
    rows: tuple[slice, ...]
    rank: int | None

    @classmethod
    def of(cls, lora: Lora, group: Group) -> Each | None:
        """None where no expert of the group has a rank."""
        ranks = {lora.spec.ranks[expert] for expert in group.experts}
        rows = tuple(lora.spec.rows(expert) for expert in group.experts)
        return cls(lora.a, lora.b, group.counts, rows, min(ranks) if len(ranks) == 1 else None) if any(ranks) else None

    def narrow(self, x: Tensor, factor: Tensor) -> Tensor:
        """x (P, ·) times each expert's factor, transposed → (P, r), r the largest rank; smaller ones filled with 0."""
        factors = self._factors(factor, x.dtype)
        if len(factors) == 1:
            return x @ factors[0].t()
        widest = self.rank or max(rows.stop - rows.start for rows in self.rows)
        hidden = (x.new_empty if self.rank else x.new_zeros)(x.shape[0], widest)
        for rows, own, values in zip(x.split(self.counts), self._split(hidden), factors, strict=True):
            torch.mm(rows, values.t(), out=own)
        return hidden

    def add_wide(self, y: Tensor, hidden: Tensor, factor: Tensor, scale: float) -> None:
        """y (P, ·) += scale · hidden @ factor, expert by expert."""
        factors = self._factors(factor, y.dtype)
        for rows, own, values in zip(y.split(self.counts), self._split(hidden), factors, strict=True):
            rows.addmm_(own, values, alpha=scale)

    def add_outer(self, gradient: Tensor, hidden: Tensor, x: Tensor) -> None:
        """The group's rows of a factor's gradient (R, ·) += hiddenᵀ x, expert by expert."""
        for place, rows, own in zip(self.rows, x.split(self.counts), self._split(hidden), strict=True):
            if gradient.dtype == x.dtype:
                gradient[place].addmm_(own.t(), rows)
            else:
                gradient[place] += own.t() @ rows

    def _factors(self, factor: Tensor, dtype: torch.dtype) -> list[Tensor]:
        return [factor[place].to(dtype) for place in self.rows]

    def _split(self, hidden: Tensor) -> list[Tensor]:
        """The pairs of each expert, as many columns as it has ranks."""
        parts = hidden.split(self.counts)
        if self.rank:
            return list(parts)
        return [part[:, : place.stop - place.start] for part, place in zip(parts, self.rows, strict=True)]


@dataclass(frozen=True)
class Grouped:
    """One adapter's factors for a group, an expert after the other.

    Attributes:
        a: (G, r, in), b: (G, r, out), r the largest rank of the group, or a little more where the matmul wants that.
    """

    a: Tensor
    b: Tensor
    group: Group
    spec: LoraRanks

    @classmethod
    def of(cls, lora: Lora, group: Group, dtype: torch.dtype) -> Grouped | None:
        """None where no expert of the group has a rank."""
        ranks = [lora.spec.ranks[expert] for expert in group.experts]
        rank, step = max(ranks), ROW_BYTES // dtype.itemsize
        if not rank:
            return None
        whole = len(ranks) == 1 or rank % step == 0
        rows = lora.spec.span(group)
        if whole and min(ranks) == rank and rows.stop - rows.start == rank * len(ranks):
            a, b = (factor[rows].to(dtype).reshape(len(ranks), rank, -1) for factor in (lora.a, lora.b))
        else:
            rank = rank if whole else rank + step - rank % step
            a, b = (_padded(factor, lora.spec, group, rank, dtype) for factor in (lora.a, lora.b))
        return cls(a, b, group, lora.spec)

    def narrow(self, x: Tensor, factor: Tensor) -> Tensor:
        """x (P, ·) times each expert's factor (G, r, ·), transposed → (P, r)."""
        return grouped_linear(x, factor, self.group.counts, True)

    def add_wide(self, y: Tensor, hidden: Tensor, factor: Tensor, scale: float) -> None:
        """y (P, ·) += scale · hidden @ factor, expert by expert."""
        y.add_(grouped_linear(hidden, factor, self.group.counts, False), alpha=scale)

    def add_outer(self, gradient: Tensor, hidden: Tensor, x: Tensor) -> None:
        """The group's rows of a factor's gradient (R, ·) += hiddenᵀ x, expert by expert."""
        product = grouped_outer(hidden, x, self.group.counts)
        rows = self.spec.span(self.group)
        ranks = {self.spec.ranks[expert] for expert in self.group.experts}
        if ranks == {product.shape[1]} and rows.stop - rows.start == product.shape[0] * product.shape[1]:
            gradient[rows] += product.view(-1, product.shape[2])
            return
        for place, expert in enumerate(self.group.experts):
            gradient[self.spec.rows(expert)] += product[place, : self.spec.ranks[expert]]


def _padded(factor: Tensor, spec: LoraRanks, group: Group, rank: int, dtype: torch.dtype) -> Tensor:
    result = factor.new_zeros(len(group.experts), rank, factor.shape[1], dtype=dtype)
    for place, expert in enumerate(group.experts):
        result[place, : spec.ranks[expert]] = factor[spec.rows(expert)]
    return result


def factors_of(lora: Lora, group: Group, dtype: torch.dtype, grouped: bool) -> Each | Grouped | None:
    """The factors of a group in `dtype`; None where none of its experts has a rank."""
    return Grouped.of(lora, group, dtype) if grouped else Each.of(lora, group)
