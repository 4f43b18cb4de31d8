"""A row with the place it came from, so that what is said about it names file and line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from studio.data.reading import _lines
from studio.data.rows import Row


@dataclass(frozen=True)
class Placed:
    """A row; `number` counts the rows of its file from 0."""

    row: Row
    file: Path
    number: int


def placed(rows: Sequence[Row], file: Path) -> list[Placed]:
    return [Placed(row, file, number) for number, row in enumerate(rows)]


def lines_of(rows: Iterable[Placed]) -> dict[tuple[Path, int], int]:
    """1-based line of each of the `rows`, by file and number. Each file is read once more: blank lines are no rows."""
    wanted: dict[Path, set[int]] = {}
    for row in rows:
        wanted.setdefault(row.file, set()).add(row.number)
    return {
        (file, number): line
        for file, numbers in wanted.items()
        for number, (line, _) in enumerate(_lines(file))
        if number in numbers
    }
