"""A recipe's mixture and curriculum, from its settings to what each source gives to the training.

phases_of(recipe, sizes) ─▶ phases       what the recipe says, in rows
contributions(recipe, rows) ─▶ Mixed     what the plan shows: of each source its rows, share and epochs
in_training_order(recipe, rows) ─▶ rows  what a trainer reads, front to back
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from studio.data.mixture import Order, Phase, mixed_order, shares
from studio.data.rows import Row, sides_apart
from studio.errors import DataError, Problem

if TYPE_CHECKING:
    from studio.recipe import Recipe


class SourcePlan(BaseModel):
    """What one source gives to the training.

    Attributes:
        rows: it has. read: it gives, over the whole training; expected ones where the data is streamed.
        share: of all rows read. epochs: passes over its rows. None where it is streamed and not counted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    rows: int | None
    read: int
    share: float
    epochs: float | None


class PhasePlan(BaseModel):
    """One phase of a curriculum.

    Attributes:
        steps: optimizer steps that it lasts; the last one may be shared with the next phase where tokens end it.
        rows: read in it. shares: by source, as wanted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: float
    rows: int
    shares: dict[str, float]


class Mixed(BaseModel):
    """The mixture as planned; `phases` has one entry where it never changes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: tuple[SourcePlan, ...]
    phases: tuple[PhasePlan, ...]


def rows_per_step(recipe: Recipe) -> int:
    """Rows that one optimizer step reads; of GRPO and RLOO prompts, each of which stands for all its completions."""
    rows = recipe.training.batch_size * recipe.training.gradient_accumulation_steps
    if recipe.training.method not in ("grpo", "rloo"):
        return rows
    iterations: Any = recipe.trl.get("num_iterations") or 1
    return max(1, rows // (recipe.sampling.completions * int(iterations)))


def phases_of(recipe: Recipe, sizes: Sequence[int]) -> tuple[Phase, ...]:
    """The phases, one where the recipe lists none; `sizes`: rows of each source."""
    data, per_step = recipe.data, rows_per_step(recipe)
    if not data.phases:
        weights = [source.weight for source in data.sources]
        given = [weight for weight in weights if weight is not None] or None
        return (Phase(shares(sizes, given, data.temperature or 1.0)),)
    return tuple(
        Phase(
            shares(sizes, [phase.weights.get(source.label, 0.0) for source in data.sources]),
            phase.until_steps * per_step if phase.until_steps else None,
            phase.until_tokens,
        )
        for phase in data.phases
    )


def sizes_of(recipe: Recipe, rows: Sequence[Row]) -> list[int]:
    """Rows of each source among the `rows` of a mixture."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.source] = counts.get(row.source, 0) + 1
    return [counts.get(source.label, 0) for source in recipe.data.sources]


def in_training_order(recipe: Recipe, rows: Sequence[Row], steps: int | None = None) -> list[Row]:
    """The rows as the trainer reads them, each as often as it is read; as they are where no mixture is wanted.

    Args:
        rows: of the recipe, one source after the other, as `training_rows` has them.
        steps: optimizer steps to read them for; None: as the recipe says.
    """
    if not recipe.data.mixed or recipe.data.streaming:
        return list(rows)
    read = as_read(recipe, rows)
    return [read[place] for place in order_of(recipe, read, steps).places]


def as_read(recipe: Recipe, rows: Sequence[Row]) -> Sequence[Row]:
    """The rows that make up batches: KTO reads each side of a pair by itself."""
    return list(sides_apart(rows)) if recipe.training.method == "kto" else rows


def order_of(recipe: Recipe, rows: Sequence[Row], steps: int | None = None) -> Order:
    """The order in which a mixture that is held in memory is read. The same every time for one recipe.

    Raises:
        DataError: a source that is to be read has no row left.
    """
    from studio.plan import row_tokens, total_steps

    sizes, total = sizes_of(recipe, rows), (steps or total_steps(recipe, len(rows))) * rows_per_step(recipe)
    phases = phases_of(recipe, sizes)
    _check_not_empty(recipe, sizes, phases)
    tokens_of: Callable[[int], int] | None = None
    if any(phase.until_tokens for phase in recipe.data.phases):
        tokens_of = row_tokens(recipe, list(rows)).__getitem__
    return mixed_order(sizes, phases, total, recipe.training.seed, tokens_of)


def _check_not_empty(recipe: Recipe, sizes: Sequence[int], phases: Sequence[Phase]) -> None:
    said = "has no row left to train on, and a weight above 0; see which rows were dropped, or take the source out"
    problems = [
        Problem("", None, said, str(source.path))
        for place, source in enumerate(recipe.data.sources)
        if not sizes[place] and any(phase.shares[place] for phase in phases)
    ]
    if problems:
        raise DataError(problems)


def contributions(recipe: Recipe, rows: Sequence[Row]) -> Mixed | None:
    """What each source gives; None without a mixture."""
    if not recipe.data.mixed:
        return None
    rows = as_read(recipe, rows)
    sizes = sizes_of(recipe, rows)
    wanted = phases_of(recipe, sizes)
    drawn = _expected(recipe, rows, wanted) if recipe.data.streaming else order_of(recipe, rows).drawn
    read = [sum(of_source) for of_source in zip(*drawn, strict=True)]
    names, total = [source.label for source in recipe.data.sources], sum(read)
    known = not recipe.data.streaming
    return Mixed(
        sources=tuple(
            SourcePlan(
                name=name,
                rows=size if known else None,
                read=round(count),
                share=count / total,
                epochs=count / size if known else None,
            )
            for name, size, count in zip(names, sizes, read, strict=True)
        ),
        phases=tuple(
            PhasePlan(
                steps=sum(of_phase) / rows_per_step(recipe),
                rows=round(sum(of_phase)),
                shares=dict(zip(names, phase.shares, strict=True)),
            )
            for phase, of_phase in zip(wanted, drawn, strict=True)
        ),
    )


def _expected(recipe: Recipe, rows: Sequence[Row], phases: Sequence[Phase]) -> list[list[float]]:
    """Rows by phase and source where nothing is counted beforehand; tokens as in the sample `rows`."""
    from studio.plan import row_tokens, total_steps

    means = [1.0] * len(recipe.data.sources)
    if any(phase.until_tokens for phase in phases):
        found: dict[str, list[int]] = {}
        for row, tokens in zip(rows, row_tokens(recipe, list(rows)), strict=True):
            found.setdefault(row.source, []).append(tokens)
        means = [sum(found[source.label]) / len(found[source.label]) for source in recipe.data.sources]
    total = float(total_steps(recipe, len(rows)) * rows_per_step(recipe))
    begun = begun_tokens = 0.0
    expected = []
    for phase in phases:
        mean = sum(share * tokens for share, tokens in zip(phase.shares, means, strict=True))
        ends = total
        if phase.until_rows is not None:
            ends = float(phase.until_rows)
        elif phase.until_tokens is not None:
            ends = begun + (phase.until_tokens - begun_tokens) / mean
            begun_tokens = float(phase.until_tokens)
        count = max(0.0, min(ends, total) - begun)
        expected.append([share * count for share in phase.shares])
        begun += count
    return expected


def mixture_warnings(recipe: Recipe, mixed: Mixed | None) -> list[str]:
    """What to know of the mixture before the training starts."""
    if mixed is None:
        return []
    never = [number for number, phase in enumerate(mixed.phases, 1) if not phase.rows]
    unread = [source.name for source in mixed.sources if not source.read]
    found = []
    if never:
        listed = ", ".join(map(str, never))
        found.append(f"phase {listed} of data.phases never begins: the training ends before it")
    if unread:
        found.append(f"no row of {', '.join(unread)} is read")
    return found
