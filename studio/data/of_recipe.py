"""The rows that a recipe trains on and is measured on, of the kinds that its training method reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from studio.data.reading import read_all
from studio.data.rows import Row
from studio.methods import METHODS

if TYPE_CHECKING:
    from studio.recipe import Recipe


def both_rows(recipe: Recipe) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows; the second list is empty where the recipe has no held-out file.

    Raises:
        DataError: the problems of both files in one error.
    """
    train, held_out = read_all(recipe.data.train, recipe.data.eval, kinds=METHODS[recipe.training.method].rows)
    return train, held_out


def training_rows(recipe: Recipe) -> list[Row]:
    """The training rows alone.

    Raises:
        DataError
    """
    return read_all(recipe.data.train, kinds=METHODS[recipe.training.method].rows)[0]


def held_out_rows(recipe: Recipe) -> list[Row]:
    """The held-out rows; none where the recipe has no file of them.

    Raises:
        DataError
    """
    return read_all(recipe.data.eval, kinds=METHODS[recipe.training.method].rows)[0]
