"""Which row of which source comes next: shares, phases, and an order that keeps to them. Numbers alone, no files.

    shares(sizes, weights, temperature) ─▶ the part of each source
    Chooser(phases)                     one source after the other, in these parts
    mixed_order(sizes, phases, …)       the places of the rows in training order

The chooser is no lottery. Each row comes from the source that is furthest behind its share, so that at every moment of
a phase a source has had its share of the rows to within one row too many, and each batch is mixed alike. Chance
decides within a source alone: its rows are shuffled anew for every pass, and none comes twice in one pass.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field


def shares(sizes: Sequence[int], weights: Sequence[float] | None = None, temperature: float = 1.0) -> tuple[float, ...]:
    """The part of the rows that each source gives; they add up to 1.

    With weights p_i = w_i / Σ w_j. Without, p_i = n_i^(1/T) / Σ n_j^(1/T) for sources of n_i rows: temperature
    sampling as Arivazhagan et al. have it (arXiv 1907.05019, on imbalanced languages). T = 1 takes every row equally
    often, T → ∞ every source. The exponent that mT5 calls α (arXiv 2010.11934) is 1/T.

    Args:
        sizes: rows of each source, at least 1. weights: at least 0, and one above; they go before the sizes.
    """
    parts = list(weights) if weights is not None else [_power(size, max(sizes), temperature) for size in sizes]
    return tuple(part / sum(parts) for part in parts)


def _power(size: int, largest: int, temperature: float) -> float:
    """(n / n_max)^(1/T): the same shares as n^(1/T), and no overflow at small T."""
    return float((size / largest) ** (1 / temperature))


@dataclass(frozen=True)
class Phase:
    """A stretch with one mixture.

    Attributes:
        shares: of each source; 0 gives no rows.
        until_rows, until_tokens: read since the start of the training, where it ends; both None: never.
    """

    shares: tuple[float, ...]
    until_rows: int | None = None
    until_tokens: int | None = None


@dataclass
class Chooser:
    """Names the source of one row after the other; `read` says how many tokens the row had, where a phase ends by them.

    Attributes:
        phase: number of the phase that the last row was of.
        rows, tokens: read so far.
        drawn: rows by phase and source.
    """

    phases: Sequence[Phase]
    phase: int = 0
    rows: int = 0
    tokens: int = 0
    drawn: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.drawn = [[0] * len(phase.shares) for phase in self.phases]

    def next(self) -> int:
        """The source that is furthest behind its share of the phase; of two as far the one with the larger share."""
        while self._is_over(self.phases[self.phase]):
            self.phase += 1
        counts, parts = self.drawn[self.phase], self.phases[self.phase].shares
        total = sum(counts) + 1
        source = max(range(len(parts)), key=lambda i: (parts[i] * total - counts[i], parts[i]))
        counts[source] += 1
        self.rows += 1
        return source

    def read(self, tokens: int) -> None:
        self.tokens += tokens

    def _is_over(self, phase: Phase) -> bool:
        rows, tokens = phase.until_rows, phase.until_tokens
        return (rows is not None and self.rows >= rows) or (tokens is not None and self.tokens >= tokens)


def passes(size: int, seed: str) -> Iterator[int]:
    """The places 0 … size - 1 in a random order, then in another, and so on without end."""
    number = 0
    while True:
        order = list(range(size))
        random.Random(f"{seed}/{number}").shuffle(order)
        yield from order
        number += 1


@dataclass(frozen=True)
class Order:
    """What is read, in order.

    Attributes:
        places: of each row read: its place among the rows of all sources, which stand one source after the other.
        drawn: rows by phase and source.
        tokens: read in each phase; 0 where nothing counted them.
    """

    places: array[int]
    drawn: tuple[tuple[int, ...], ...]
    tokens: tuple[int, ...]


def mixed_order(
    sizes: Sequence[int],
    phases: Sequence[Phase],
    rows: int,
    seed: int,
    tokens_of: Callable[[int], int] | None = None,
) -> Order:
    """`rows` rows of sources with `sizes` rows each, phase by phase.

    Args:
        tokens_of: the tokens of the row at a place, where phases end by tokens.
    """
    starts = [sum(sizes[:source]) for source in range(len(sizes))]
    within = [passes(size, f"{seed}/{source}") for source, size in enumerate(sizes)]
    chooser, places, tokens = Chooser(phases), array("q"), [0] * len(phases)
    for _ in range(rows):
        source = chooser.next()
        place = starts[source] + next(within[source])
        places.append(place)
        if tokens_of is not None:
            chooser.read(tokens_of(place))
            tokens[chooser.phase] += tokens_of(place)
    return Order(places, tuple(map(tuple, chooser.drawn)), tuple(tokens))
