"""Rows of files that are larger than memory: read one at a time, shuffled in a bounded buffer, mixed without end.

    iter_rows(path, kinds)      every row of a file once, in order, holding one
    shuffled(items, …)          the same, each row with a random one of a buffer in between
    endless_rows(recipe, …)     what a trainer reads: the sources in their shares, pass after pass

A file is not checked beforehand: a bad row stops the reading where it stands, with its file and line. `studio validate`
reads a streamed file to its end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from studio.data.reading import RowProblems, _lines, _row, read_all
from studio.data.rows import Row, RowKind
from studio.errors import DataError, Problem

if TYPE_CHECKING:
    from studio.data.mixture import Phase
    from studio.recipe_mixture import DataSource

BUFFER_ROWS = 4096
BUFFER_BYTES = 64_000_000
"""Most rows, and most bytes of them as the file has them, that the shuffle buffer of one source holds."""

Line = tuple[int, bytes]
"""(1-based line, its bytes)."""


def iter_lines(path: Path) -> Iterator[Line]:
    """The lines of a file that are not blank.

    Raises:
        DataError: it cannot be read.
    """
    try:
        yield from _lines(path)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise DataError([Problem("", None, f"cannot be read: {reason}", str(path))]) from None


def iter_rows(path: Path, kinds: Sequence[RowKind]) -> Iterator[Row]:
    """The rows of a file in file order.

    Raises:
        DataError: at the first row that is no row of one of the `kinds`, or cannot be trained on.
    """
    return (row_of(line, path, kinds) for line in iter_lines(path))


def row_of(line: Line, path: Path, kinds: Sequence[RowKind]) -> Row:
    """The row on a line.

    Raises:
        DataError
    """
    try:
        return _row(line[1], path.stem, kinds)
    except RowProblems as row:
        problems = [Problem(field, line[0], message, str(path)) for field, message in row.problems]
        raise DataError(problems) from None


def first_rows(paths: Sequence[Path], whole: Path | None, count: int, kinds: Sequence[RowKind]) -> list[list[Row]]:
    """The first `count` rows of each of the `paths`, and every row of `whole`; [] where that is None.

    Raises:
        DataError: a bad row among them; an empty file.
    """
    found = [list(islice(iter_rows(path, kinds), count)) for path in paths]
    if empty := [path for path, rows in zip(paths, found, strict=True) if not rows]:
        raise DataError([Problem("", None, "the file is empty; it needs at least one row", str(empty[0]))])
    return [*found, *read_all(whole, kinds=kinds)]


def shuffled(lines: Iterator[Line], rng: random.Random, most_rows: int, most_bytes: int) -> Iterator[Line]:
    """All `lines` in another order: each is put into a buffer, and a random one of the full buffer comes out.

    A line larger than `most_bytes` is handed on alone.
    """
    buffer: list[Line] = []
    held_bytes, draw = 0, rng.random
    for line in lines:
        buffer.append(line)
        held_bytes += len(line[1])
        while len(buffer) > most_rows or held_bytes > most_bytes:
            place = int(draw() * len(buffer))
            chosen, last = buffer[place], buffer.pop()
            if place < len(buffer):
                buffer[place] = last
            held_bytes -= len(chosen[1])
            yield chosen
    rng.shuffle(buffer)
    yield from buffer


def endless(path: Path, kinds: Sequence[RowKind], seed: str) -> Iterator[Row]:
    """The rows of one file, shuffled in a buffer, pass after pass.

    Raises:
        DataError: at a bad row, or where the file has none.
    """
    number, empty = 0, True
    while True:
        lines = shuffled(iter_lines(path), random.Random(f"{seed}/{number}"), BUFFER_ROWS, BUFFER_BYTES)
        for line in lines:
            empty = False
            yield row_of(line, path, kinds)
        if empty:
            raise DataError([Problem("", None, "the file is empty; it needs at least one row", str(path))])
        number += 1


def endless_rows(
    sources: Sequence[DataSource],
    phases: Sequence[Phase],
    kinds: Sequence[RowKind],
    seed: int,
    rename: bool,
    tokens_of: Callable[[Row], int] | None = None,
) -> Iterator[Row]:
    """Rows of the sources in the shares of the phases, without end.

    Args:
        rename: give each row its source's name.
        tokens_of: of a row, where phases end by tokens.

    Raises:
        DataError: at a bad row.
    """
    from studio.data.mixture import Chooser

    streams = [endless(source.path, kinds, f"{seed}/{number}") for number, source in enumerate(sources)]
    chooser = Chooser(phases)
    while True:
        number = chooser.next()
        row = next(streams[number])
        if tokens_of is not None:
            chooser.read(tokens_of(row))
        yield replace(row, source=sources[number].label) if rename else row
