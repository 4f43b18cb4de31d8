"""The rows that a recipe trains on and is measured on: the one place where the rest of the studio gets them.

    sources ── read, named ──▶ rows ── split off eval_fraction ──▶ rows ── drop easiest, hardest ──▶ training rows
                                              ╰──▶ held-out rows, or those of the file `data.eval`

`rows_of` keeps where each row came from; `both_rows`, `training_rows` and `held_out_rows` give the rows alone. Which
of the training rows are read when, and how often, is said by studio/data/curriculum.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from studio.data.hard_examples import Scored, selected
from studio.data.placed import Placed, placed
from studio.data.reading import read_all
from studio.data.rows import Row
from studio.data.split import split
from studio.data.streaming import first_rows
from studio.errors import DataError, Problem
from studio.methods import METHODS

if TYPE_CHECKING:
    from studio.recipe import Recipe

SAMPLE_ROWS = 2000
"""Rows of each source that stand for all of it where the data is streamed."""


@dataclass(frozen=True)
class RecipeRows:
    """The rows of a recipe with their places.

    Attributes:
        train: one source after the other; with data.streaming the first `SAMPLE_ROWS` of each.
        dropped: rows that the selection by loss left out, with their scores. kept: those that it kept; () without one.
    """

    train: tuple[Placed, ...]
    held_out: tuple[Placed, ...]
    kept: tuple[Scored, ...] = ()
    dropped: tuple[Scored, ...] = ()


def rows_of(recipe: Recipe) -> RecipeRows:
    """The recipe's rows, read, split and selected.

    Raises:
        DataError: the problems of all files in one error; nothing left on one side of the split.
        ProfileError: the selection needs scores that are not there.
    """
    data, kinds = recipe.data, METHODS[recipe.training.method].rows
    most = SAMPLE_ROWS if data.streaming else None
    paths = [source.path for source in data.sources]
    *of_sources, of_eval = (
        first_rows(paths, data.eval, most, kinds) if most else read_all(*paths, data.eval, kinds=kinds)
    )
    named = [
        [replace(row, source=source.label) for row in rows] if data.mixed else rows
        for source, rows in zip(data.sources, of_sources, strict=True)
    ]
    train = [entry for path, rows in zip(paths, named, strict=True) for entry in placed(rows, path)]
    held_out = placed(of_eval, data.eval) if data.eval else []
    if data.eval_fraction is not None:
        train, held_out = _split(recipe, train, data.eval_fraction)
    if not (data.drop_easiest or data.drop_hardest):
        return RecipeRows(tuple(train), tuple(held_out))
    kept, dropped = selected(recipe, train, data.drop_easiest, data.drop_hardest)
    return RecipeRows(tuple(row.placed for row in kept), tuple(held_out), tuple(kept), tuple(dropped))


def _split(recipe: Recipe, rows: list[Placed], fraction: float) -> tuple[list[Placed], list[Placed]]:
    train, held_out = split(rows, fraction)
    left = {entry.row.source for entry in train}
    empty = [source.label for source in recipe.data.sources if recipe.data.mixed and source.label not in left]
    if not held_out or empty:
        what = f"all rows of {empty[0]} would be held out" if empty else "all rows have the same prompt"
        message = f"{what}: {len(rows):,} rows cannot be split by data.eval_fraction; give a file data.eval"
        raise DataError([Problem("", None, message, str(rows[0].file))])
    return train, held_out


def both_rows(recipe: Recipe) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows; the second list is empty where the recipe has no held-out ones.

    Raises:
        DataError, ProfileError: as `rows_of`.
    """
    found = rows_of(recipe)
    return [entry.row for entry in found.train], [entry.row for entry in found.held_out]


def training_rows(recipe: Recipe) -> list[Row]:
    """The training rows alone.

    Raises:
        DataError, ProfileError: as `rows_of`.
    """
    return both_rows(recipe)[0]


def held_out_rows(recipe: Recipe) -> list[Row]:
    """The held-out rows; none where the recipe has none.

    Raises:
        DataError
    """
    if recipe.data.eval_fraction is not None:
        return both_rows(recipe)[1]
    return read_all(recipe.data.eval, kinds=METHODS[recipe.training.method].rows)[0]
