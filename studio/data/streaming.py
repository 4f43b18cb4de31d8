"""Rows of data that is larger than memory: read one at a time, shuffled in a bounded buffer, mixed without end.

    first_rows(path, …)     a sample, for the plan and the profile
    trl_rows(path, …)       every row as TRL's trainers read it, one at a time
    shuffled(rows, …)       each row, with a random one of a buffer in between
    endless_rows(…)         what a trainer reads: the sources in their shares, pass after pass

A file is not checked beforehand: a bad row stops the reading where it stands, with its file and line. `studio validate`
reads a streamed file to its end.

Most rows are plain conversations that TRL reads as they stand. `plain_conversation` sees that at a glance and hands
them on without an object for each turn; every other row takes the way of all data.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from studio.data.files import Progress
from studio.data.mixture import Chooser, Phase
from studio.data.reading import Reading, converted, empty_file, iter_rows, problems_of
from studio.data.rows import Place, Row, RowKind, row_of, sides_apart
from studio.errors import DataError, Problem
from studio.methods import METHODS

if TYPE_CHECKING:
    from studio.recipe import Recipe
    from studio.recipe_mixture import DataSource

T = TypeVar("T")
TrlRow = dict[str, Any]

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


def trl_rows(path: Path, kinds: Sequence[RowKind], reading: Reading, apart: bool = False) -> Iterator[TrlRow]:
    """The rows at `path` in their order, as TRL's trainers read them, each with its "place".

    Args:
        apart: each pair as two labelled rows.

    Raises:
        DataError: as `good_rows`.
    """
    quick = "example" in kinds and reading.format == "auto" and not reading.columns
    found = False
    for raw, outcome in converted(path, kinds, reading, quick=plain_conversation if quick else None):
        found = True
        if isinstance(outcome, dict):
            assert raw is not None
            outcome["place"] = Place(raw.file, raw.line, raw.counted)
            yield outcome
        elif isinstance(outcome, tuple):
            yield from map(_with_place, sides_apart([outcome[1]]) if apart else (outcome[1],))
        else:
            raise DataError(list(problems_of(raw, outcome)))
    if not found:
        raise DataError([empty_file(path)])


def _with_place(row: Row) -> TrlRow:
    return {**row.as_row(), "place": row.place}


def plain_conversation(values: Any) -> TrlRow | None:
    """A row of a file as TRL reads it, where it is a conversation that needs no more than a look: {"messages": […]} or
    {"prompt": text, "completion": text}, of roles and text alone. None for any other row, good or bad.
    """
    if not isinstance(values, dict):
        return None
    messages = values.get("messages")
    if messages is None and values.keys() <= _PAIR and len(values) >= 2:
        prompt, completion = values.get("prompt"), values.get("completion")
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        if not isinstance(prompt, str) or not isinstance(completion, str) or _looks_like_list(prompt, completion):
            return None
    elif not values.keys() <= _CONVERSATION:
        return None
    if type(messages) is not list or len(messages) < 2:
        return None
    roles = []
    for turn in messages:
        if type(turn) is not dict or len(turn) != 2 or not _is_plain(turn.get("content")):
            return None
        roles.append(role := turn.get("role"))
        if role not in _ROLES:
            return None
    if roles[-1] != "assistant" or roles[-2] != "user" or "system" in roles[1:]:
        return None
    return {"prompt": messages[:-1], "completion": messages[-1:]}


_PAIR, _CONVERSATION = {"prompt", "completion", "source"}, {"messages", "source"}
_ROLES = ("user", "assistant", "system")
_SURROGATE = re.compile("[\ud800-\udfff]")


def _looks_like_list(*texts: str) -> bool:
    return any(text.lstrip().startswith("[") for text in texts)


def _is_plain(content: Any) -> bool:
    """Whether a turn's text needs no look at its reasoning, and has nothing of what makes a text unfit."""
    return (
        type(content) is str
        and content != ""
        and not content.isspace()
        and "\0" not in content
        and "<think>" not in content
        and (content.isascii() or _SURROGATE.search(content) is None)
    )


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
    rows: Iterable[T],
    rng: random.Random,
    size_of: Callable[[T], int],
    most_rows: int = BUFFER_ROWS,
    most_characters: int = BUFFER_CHARACTERS,
) -> Iterator[T]:
    """All `rows` in another order: each takes the place of a random one in the full buffer, which comes out.

    Args:
        size_of: characters of a row. A row larger than `most_characters` is handed on alone.
    """
    buffer: list[T] = []
    sizes: list[int] = []
    held, draw = 0, rng.random
    for row in rows:
        size = size_of(row)
        if len(buffer) < most_rows:
            buffer.append(row)
            sizes.append(size)
            held += size
        else:
            place = int(draw() * most_rows)
            chosen, buffer[place] = buffer[place], row
            held += size - sizes[place]
            sizes[place] = size
            yield chosen
        while held > most_characters:
            place = int(draw() * len(buffer))
            chosen, buffer[place] = buffer[place], buffer[-1]
            held -= sizes[place]
            sizes[place] = sizes[-1]
            buffer.pop()
            sizes.pop()
            yield chosen
    rng.shuffle(buffer)
    yield from buffer


def trl_characters(row: TrlRow) -> int:
    """Characters of a row as TRL reads it: of its turns with reasoning and calls, and of its tools; or of its text."""
    count = 0
    for part in row.values():
        if type(part) is list:
            for turn in part:
                count += len(turn["content"]) if len(turn) == 2 and "content" in turn else len(str(turn))
        elif type(part) is str:
            count += len(part)
    return count


def endless(rows: Callable[[], Iterator[T]], size_of: Callable[[T], int], seed: str) -> Iterator[T]:
    """What `rows` gives, at least one row, shuffled in a buffer, pass after pass.

    Raises:
        DataError: at a bad row.
    """
    number = 0
    while True:
        yield from shuffled(rows(), random.Random(f"{seed}/{number}"), size_of)
        number += 1


def endless_rows(
    sources: Sequence[DataSource],
    phases: Sequence[Phase],
    kinds: Sequence[RowKind],
    reading: Reading,
    seed: int,
    tokens_of: Callable[[Row], int] | None = None,
    apart: bool = False,
) -> Iterator[TrlRow]:
    """Rows of the sources in the shares of the phases, as TRL's trainers read them, without end.

    Args:
        tokens_of: of a row, where phases end by tokens.
        apart: each pair as two labelled rows.

    Raises:
        DataError: at a bad row.
    """
    chooser = Chooser(phases)
    seeds = [f"{seed}/{number}" for number in range(len(sources))]
    streams = [
        endless(partial(trl_rows, source.path, kinds, reading, apart), trl_characters, of)
        for source, of in zip(sources, seeds, strict=True)
    ]
    if len(streams) == 1:
        yield from streams[0]
    while True:
        row = next(streams[chooser.next()])
        if tokens_of is not None:
            chooser.read(tokens_of(row_of(row)))
        yield row
