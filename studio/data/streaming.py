"""Rows of data that is larger than memory: read one at a time, shuffled in a bounded buffer, mixed without end.

    first_rows(path, …)     a sample, for the plan and the profile
    shuffled(rows, …)       each row, with a random one of a buffer in between
    endless_rows(…)         what a trainer reads: the sources in their shares, pass after pass

A file is not checked beforehand: a bad row stops the reading where it stands, with its file and line. `studio validate`
reads a streamed file to its end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from studio.data.files import Progress
from studio.data.mixture import Chooser, Phase
from studio.data.reading import Reading, iter_rows
from studio.data.rows import Example, PlainText, Row, RowKind, sequences
from studio.errors import DataError, Problem
from studio.methods import METHODS

if TYPE_CHECKING:
    from studio.recipe import Recipe
    from studio.recipe_mixture import DataSource

BUFFER_ROWS = 4096
BUFFER_CHARACTERS = 64_000_000
"""Most rows, and most characters of them, that the shuffle buffer of one source holds."""


def good_rows(
    path: Path, kinds: Sequence[RowKind], reading: Reading | None = None, progress: Progress | None = None
) -> Iterator[Row]:
    """The rows at `path` in their order.

    Raises:
        DataError: at the first row that is no row of one of the `kinds`, or cannot be trained on.
    """
    for found in iter_rows(path, kinds, reading, progress):
        if isinstance(found, Problem):
            raise DataError([found])
        yield found


def first_rows(path: Path, count: int, kinds: Sequence[RowKind], reading: Reading | None = None) -> list[Row]:
    """The first `count` rows at `path`, at least one.

    Raises:
        DataError: a bad row among them, or none.
    """
    return list(islice(good_rows(path, kinds, reading), count))


def count_rows(recipe: Recipe, progress: Progress | None = None) -> int:
    """Reads all sources of the recipe to their ends and counts their rows.

    Args:
        progress: called with (bytes read, bytes in all) of the source that is being read.

    Raises:
        DataError: at the first bad row of a source.
    """
    kinds, reading = METHODS[recipe.training.method].rows, Reading.of(recipe)
    return sum(1 for source in recipe.data.sources for _ in good_rows(source.path, kinds, reading, progress))


def shuffled(
    rows: Iterable[Row],
    rng: random.Random,
    most_rows: int = BUFFER_ROWS,
    most_characters: int = BUFFER_CHARACTERS,
) -> Iterator[Row]:
    """All `rows` in another order: each is put into a buffer, and a random one of the full buffer comes out.

    A row larger than `most_characters` is handed on alone.
    """
    buffer: list[tuple[Row, int]] = []
    held, draw = 0, rng.random
    for row in rows:
        size = characters(row)
        buffer.append((row, size))
        held += size
        while len(buffer) > most_rows or held > most_characters:
            place = int(draw() * len(buffer))
            chosen, last = buffer[place], buffer.pop()
            if place < len(buffer):
                buffer[place] = last
            held -= chosen[1]
            yield chosen[0]
    rng.shuffle(buffer)
    yield from (row for row, _ in buffer)


def characters(row: Row) -> int:
    """Characters of a row's text."""
    if isinstance(row, PlainText):
        return len(row.text)
    if isinstance(row, Example):
        return sum(len(turn.content) + len(turn.thinking) for turn in (*row.prompt, *row.completion))
    return sum(map(characters, sequences([row])))


def endless(path: Path, kinds: Sequence[RowKind], reading: Reading | None, seed: str) -> Iterator[Row]:
    """The rows at `path`, shuffled in a buffer, pass after pass.

    Raises:
        DataError: at a bad row, or where there is none.
    """
    number = 0
    while True:
        yield from shuffled(good_rows(path, kinds, reading), random.Random(f"{seed}/{number}"))
        number += 1


def endless_rows(
    sources: Sequence[DataSource],
    phases: Sequence[Phase],
    kinds: Sequence[RowKind],
    reading: Reading | None,
    seed: int,
    tokens_of: Callable[[Row], int] | None = None,
) -> Iterator[Row]:
    """Rows of the sources in the shares of the phases, each with its source's name, without end.

    Args:
        tokens_of: of a row, where phases end by tokens.

    Raises:
        DataError: at a bad row.
    """
    streams = [endless(source.path, kinds, reading, f"{seed}/{number}") for number, source in enumerate(sources)]
    chooser = Chooser(phases)
    while True:
        number = chooser.next()
        row = next(streams[number])
        if tokens_of is not None:
            chooser.read(tokens_of(row))
        yield replace(row, source=sources[number].label)
