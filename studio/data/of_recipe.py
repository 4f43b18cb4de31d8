"""The rows that a recipe trains on and is measured on, of the kinds that its training method reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from studio.data.reading import WRITTEN, Reading, check_rows, refuse
from studio.data.rows import Row
from studio.errors import FileProblem, Problem, StudioError
from studio.methods import METHODS

if TYPE_CHECKING:
    from studio.recipe import Recipe


DROPPED = "dropped_rows.jsonl"
"""File of a job that lists the rows left out: {"file", "line", "reason"} each."""


@dataclass(frozen=True)
class RecipeRows:
    """The rows of a recipe.

    Attributes:
        train, held_out: the good rows; the second is empty where the recipe has no held-out file.
        dropped: what is wrong with the rows left out under `data.bad_rows: drop`, each with its file and line.
    """

    train: list[Row]
    held_out: list[Row]
    dropped: tuple[Problem, ...] = ()


def recipe_rows(recipe: Recipe) -> RecipeRows:
    """Training rows, held-out rows, and what was left out.

    Raises:
        DataError: the problems of both files in one error, of rows under `data.bad_rows: refuse`, of files always.
    """
    reading = Reading.of(recipe)
    train, bad = _rows(recipe, recipe.data.train, reading)
    held_out, bad_held_out = _rows(recipe, recipe.data.eval, reading)
    refuse([refused(recipe, train, bad), refused(recipe, held_out, bad_held_out)])
    return RecipeRows(train, held_out, (*bad, *bad_held_out))


def both_rows(recipe: Recipe) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows; the second list is empty where the recipe has no held-out file.

    Raises:
        DataError: the problems of both files in one error.
    """
    found = recipe_rows(recipe)
    return found.train, found.held_out


def training_rows(recipe: Recipe) -> list[Row]:
    """The training rows alone.

    Raises:
        DataError
    """
    return _good_rows(recipe, recipe.data.train)


def held_out_rows(recipe: Recipe) -> list[Row]:
    """The held-out rows; none where the recipe has no file of them.

    Raises:
        DataError
    """
    return _good_rows(recipe, recipe.data.eval)


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
    return tuple(name for name in WRITTEN if name in text)


def _good_rows(recipe: Recipe, path: Path | None) -> list[Row]:
    rows, problems = _rows(recipe, path, Reading.of(recipe))
    refuse([refused(recipe, rows, problems)])
    return rows


def _rows(recipe: Recipe, path: Path | None, reading: Reading) -> tuple[list[Row], list[Problem]]:
    return check_rows(path, METHODS[recipe.training.method].rows, reading) if path else ([], [])
