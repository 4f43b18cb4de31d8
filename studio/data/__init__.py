"""Data: files of rows, recognised, checked, and turned into what a training method reads. No torch."""

from studio.data.of_recipe import both_rows, held_out_rows, rows_of, training_rows
from studio.data.reading import check_rows, read_all, read_examples, read_rows
from studio.data.rows import (
    Example,
    Labelled,
    Message,
    PlainText,
    Preference,
    Row,
    RowKind,
    Sequence,
    sequences,
    wanted_sequences,
)

__all__ = [
    "Example",
    "Labelled",
    "Message",
    "PlainText",
    "Preference",
    "Row",
    "RowKind",
    "Sequence",
    "both_rows",
    "check_rows",
    "held_out_rows",
    "read_all",
    "read_examples",
    "read_rows",
    "rows_of",
    "sequences",
    "training_rows",
    "wanted_sequences",
]
