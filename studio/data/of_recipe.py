"""The rows that a recipe trains on and is measured on: the one place where the rest of the studio gets them.

    sources ── read, named ──▶ rows ── split off eval_fraction ──▶ rows ── drop easiest, hardest ──▶ training rows
                                              ╰──▶ held-out rows, or those of the file `data.eval`

Which of the training rows are read when, and how often, is said by studio/data/curriculum.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from studio.data.hard_examples import Scored, choose, scored
from studio.data.reading import WRITTEN, Reading, check_rows, refuse
from studio.data.rows import Row
from studio.data.split import split
from studio.data.streaming import first_rows
from studio.errors import DataError, FileProblem, Problem, StudioError
from studio.methods import METHODS

if TYPE_CHECKING:
    from studio.recipe import Recipe

SAMPLE_ROWS = 2000
"""Rows of each source that stand for all of it where the data is streamed."""


DROPPED = "dropped_rows.jsonl"
"""File of a job that lists the rows left out: {"file", "line", "reason"} each."""


@dataclass(frozen=True)
class RecipeRows:
    """The rows of a recipe.

    Attributes:
        train: the good rows, one source after the other; with `data.streaming` the first `SAMPLE_ROWS` of each.
        held_out: empty where the recipe has no held-out rows.
        dropped: what is wrong with the rows left out under `data.bad_rows: drop`, each with its file and line.
        kept, left_out: what the selection by loss made of the training rows; both empty without one.
    """

    train: list[Row]
    held_out: list[Row]
    dropped: tuple[Problem, ...] = ()
    kept: tuple[Scored, ...] = ()
    left_out: tuple[Scored, ...] = ()


def recipe_rows(recipe: Recipe) -> RecipeRows:
    """Training rows, held-out rows, and what was left out.

    Raises:
        DataError: the problems of all files in one error, of rows under `data.bad_rows: refuse`, of files always; a
            split that leaves one side empty.
        ProfileError: the selection by loss needs scores that are not there.
    """
    data = recipe.data
    sources, train, held_out, dropped = _read(recipe)
    if not (data.drop_easiest or data.drop_hardest):
        return RecipeRows(train, held_out, dropped)
    kept, left_out = choose(scored(recipe, sources, train), data.drop_easiest, data.drop_hardest)
    return RecipeRows([entry.row for entry in kept], held_out, dropped, tuple(kept), tuple(left_out))


def selection(recipe: Recipe, drop_easiest: float, drop_hardest: float) -> tuple[list[Scored], list[Scored]]:
    """(kept, left out) of the recipe's training rows with these shares instead of its own.

    Raises:
        DataError, ProfileError: as `recipe_rows`.
    """
    sources, train, *_ = _read(recipe)
    return choose(scored(recipe, sources, train), drop_easiest, drop_hardest)


def _read(recipe: Recipe) -> tuple[list[list[Row]], list[Row], list[Row], tuple[Problem, ...]]:
    """(rows of each source, those to train on, those held out, what is wrong with rows that were dropped)."""
    data, reading = recipe.data, Reading.of(recipe)
    sources, bad = source_rows(recipe, reading)
    held_out, bad_held_out = _rows(recipe, data.eval, reading.for_other(data.eval) if data.eval else reading)
    refuse([*(refused(recipe, rows, found) for rows, found in zip(sources, bad, strict=True)),
            refused(recipe, held_out, bad_held_out)])  # fmt: skip
    train, dropped = [row for rows in sources for row in rows], (*(p for found in bad for p in found), *bad_held_out)
    if data.eval_fraction is not None:
        train, held_out = _split(recipe, train, data.eval_fraction)
    return sources, train, held_out, dropped


def source_rows(recipe: Recipe, reading: Reading) -> tuple[list[list[Row]], list[list[Problem]]]:
    """(good rows, problems) of each source; of a mixture the rows have their source's name."""
    data, kinds = recipe.data, METHODS[recipe.training.method].rows
    if data.streaming:
        found = [(first_rows(source.path, SAMPLE_ROWS, kinds, reading), list[Problem]()) for source in data.sources]
    else:
        found = [_rows(recipe, source.path, reading) for source in data.sources]
    rows = [
        [replace(row, source=source.label) for row in good] if data.mixed else good
        for source, (good, _) in zip(data.sources, found, strict=True)
    ]
    return rows, [problems for _, problems in found]


def _split(recipe: Recipe, rows: list[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    train, held_out = split(rows, fraction)
    left = {row.source for row in train}
    empty = [source.label for source in recipe.data.sources if recipe.data.mixed and source.label not in left]
    if not held_out or empty:
        what = f"all rows of {empty[0]} would be held out" if empty else "all rows have the same prompt"
        message = f"{what}: {len(rows):,} rows cannot be split by data.eval_fraction; give a file data.eval"
        raise DataError([Problem("", None, message, str(recipe.data.sources[0].path))])
    return train, held_out


def both_rows(recipe: Recipe) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows; the second list is empty where the recipe has no held-out ones.

    Raises:
        DataError, ProfileError: as `recipe_rows`.
    """
    found = recipe_rows(recipe)
    return found.train, found.held_out


def training_rows(recipe: Recipe) -> list[Row]:
    """The training rows alone, without a look at the file of the held-out ones.

    Raises:
        DataError, ProfileError: as `recipe_rows`.
    """
    alone = recipe.data.model_copy(update={"eval": None})
    return recipe_rows(recipe.model_copy(update={"data": alone})).train


def held_out_rows(recipe: Recipe) -> list[Row]:
    """The held-out rows; none where the recipe has none.

    Raises:
        DataError
    """
    if recipe.data.eval_fraction is not None:
        whole = recipe.data.model_copy(update={"drop_easiest": 0.0, "drop_hardest": 0.0})  # not asked for their scores
        return recipe_rows(recipe.model_copy(update={"data": whole})).held_out
    reading = Reading.of(recipe)
    reading = reading.for_other(recipe.data.eval) if recipe.data.eval else reading
    rows, problems = _rows(recipe, recipe.data.eval, reading)
    refuse([refused(recipe, rows, problems)])
    return rows


def refused(recipe: Recipe, rows: Sequence[Row], problems: Sequence[Problem]) -> Sequence[Problem]:
    """Of a file's problems those that end the work: all, or under `data.bad_rows: drop` those of the file as a whole.

    A file of which no row is left is refused with all of them.
    """
    if recipe.data.bad_rows == "refuse" or not rows:
        return problems
    return [problem for problem in problems if isinstance(problem, FileProblem)]


def count_of(problems: Sequence[Problem]) -> int:
    """How many rows the problems are of: a row may have several."""
    return len({(problem.file, problem.line) for problem in problems})


def dropped_lines(problems: Sequence[Problem]) -> str:
    """The text of DROPPED: one JSON object a row, with all that is wrong with it."""
    reasons: dict[tuple[str | None, int | None], list[str]] = {}
    for problem in problems:
        said = f"{problem.field}: {problem.message}" if problem.field else problem.message
        reasons.setdefault((problem.file, problem.line), []).append(said)
    rows = ({"file": file, "line": line, "reason": "; ".join(said)} for (file, line), said in reasons.items())
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def written_by_template(base: str) -> tuple[str, ...]:
    """Of reasoning, tool calls and tools, what the base's chat template names; all where it cannot be read here."""
    from studio.chat_template import chat_template
    from studio.models import resolve_base

    try:
        text = chat_template(resolve_base(base)).text
    except (StudioError, OSError, UnicodeDecodeError):
        return WRITTEN  # whoever needs the base says what is wrong with it
    return tuple(name for name in WRITTEN if name in text or (name == WRITTEN[0] and THINKING.search(text)))


THINKING = re.compile(r"[.]thinking\b|['\"]thinking['\"]")
"""How gpt-oss's template asks for a turn's reasoning; a switch called enable_thinking is something else."""


def _rows(recipe: Recipe, path: Path | None, reading: Reading) -> tuple[list[Row], list[Problem]]:
    return check_rows(path, METHODS[recipe.training.method].rows, reading) if path else ([], [])
