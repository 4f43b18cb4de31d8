"""Data: files of rows, recognised, checked, and turned into what a training method reads. No torch."""

from studio.data.of_recipe import RecipeRows, both_rows, held_out_rows, recipe_rows, training_rows
from studio.data.reading import Reading, check_rows, iter_rows, read_all, read_examples, read_rows
from studio.data.rows import (
    Example,
    Labelled,
    Message,
    Place,
    PlainText,
    Preference,
    Row,
    RowKind,
    Sequence,
    asked_sequences,
    sequences,
    wanted_sequences,
)

__all__ = [
    "Example",
    "Labelled",
    "Message",
    "Place",
    "PlainText",
    "Preference",
    "Reading",
    "RecipeRows",
    "Row",
    "RowKind",
    "Sequence",
    "asked_sequences",
    "both_rows",
    "check_rows",
    "held_out_rows",
    "iter_rows",
    "read_all",
    "read_examples",
    "read_rows",
    "recipe_rows",
    "sequences",
    "training_rows",
    "wanted_sequences",
]
