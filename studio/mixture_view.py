"""What the command line shows of mixtures, leaks and scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from studio.data.leakage import leaks_text
from studio.quantities import SPARKS, as_percent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from studio.data.curriculum import Mixed
    from studio.data.leakage import LeakPlan
    from studio.plan import Plan
    from studio.recipe import Recipe

HISTOGRAM_BINS = 40
LONGEST_LIST = 8
"""Phases that a plan shows one by one."""


def data_lines(plan: Plan) -> list[tuple[str, str]]:
    """(name, words) of what the plan knows of the data: counts, steps, sources, phases, what was left out, leaks."""
    sampled = " read for this plan; the rest is streamed" if plan.sampled else " to train on"
    words = f"{plan.train_examples:,} examples{sampled}, {plan.eval_examples:,} held out · {plan.total_steps:,} steps"
    if plan.left_out_examples:
        words += f" · {plan.left_out_examples:,} left out by their loss"
    lines = [("Data", words), *(_mixture_lines(plan.mixture) if plan.mixture else [])]
    if plan.leaks is not None and not plan.leaks.found:
        lines.append(("Leaks", leaks_text(plan.leaks)))
    return lines


def _mixture_lines(mixed: Mixed) -> list[tuple[str, str]]:
    lines = []
    for source in mixed.sources:
        words = f"{_clean(source.name)}: {as_percent(source.share)} of the rows read, {source.read:,}"
        if source.rows is not None and source.epochs is not None:
            words += f", of {source.rows:,} rows: {source.epochs:.2f} epochs"
        lines.append(("Source", words))
    phases = mixed.phases if len(mixed.phases) > 1 else ()
    for number, phase in enumerate(phases[:LONGEST_LIST], 1):
        parts = " · ".join(f"{_clean(name)} {as_percent(share)}" for name, share in phase.shares.items() if share)
        lines.append((f"Phase {number}", f"{phase.steps:,.4g} steps, {phase.rows:,} rows: {parts}"))
    return lines


def leak_lines(leaks: LeakPlan | None) -> list[str]:
    """What was found of held-out rows in the training data: the counts, then the first of them."""
    if leaks is None:
        return []
    lines = [leaks_text(leaks), *(f"  {said}" for said in leaks.shown)]
    hidden = leaks.found - len(leaks.shown)
    return [_clean(line) for line in [*lines, *([f"  … and {hidden:,} more"] if hidden else [])]]


def read_streams(recipe: Recipe, console: Console, quiet: bool) -> int | None:
    """Reads every source of a recipe that streams its data to its end, and counts the rows; None for another recipe.

    Raises:
        DataError: the first bad row of a source.
    """
    from studio.data.streaming import count_rows

    if not recipe.data.streaming:
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bars:
        task = bars.add_task("reading", total=None)
        return count_rows(recipe, lambda done, total: bars.update(task, completed=done, total=total))


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else "�" for c in text)


# -------------------------------------------------------------------- scores


def scores_view(rows: Sequence[dict[str, Any]], scores: Sequence[float]) -> RenderableType:
    """For each source how many rows are kept and between which scores, and how the scores of all lie."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("Source", "Rows", "Easiest", "Hardest", "Kept: least", "median", "largest"):
        table.add_column(name, justify="left" if name == "Source" else "right")
    for row in rows:
        between = row["kept"] or {}
        numbers = [f"{between[name]:.3f}" if between else "–" for name in ("least", "median", "largest")]
        counts = [f"{row[name]:,}" for name in ("rows", "easiest", "hardest")]
        table.add_row(Text(_clean(row["source"])), *counts, *numbers)
    low, high, strip = histogram(scores)
    return Group(table, "", Text(f"{low:.3f} {strip} {high:.3f}  nats a token"))


def histogram(scores: Sequence[float]) -> tuple[float, float, str]:
    """(least, largest, a character for each of 40 stretches between them, as high as the rows in it)."""
    low, high = min(scores, default=0.0), max(scores, default=0.0)
    width = (high - low) / HISTOGRAM_BINS or 1.0
    counts = [0] * HISTOGRAM_BINS
    for score in scores:
        counts[min(HISTOGRAM_BINS - 1, int((score - low) / width))] += 1
    top = max(counts) or 1
    return low, high, "".join(SPARKS[round(n / top * (len(SPARKS) - 1))] if n else "·" for n in counts)
