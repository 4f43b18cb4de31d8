"""Rows of data from files, checked: a good row, or what is wrong with it, with file and line; nothing is left out.

    iter_rows(path, kinds) ─▶ Row | Problem …     one row or one record batch in memory
    check_rows(path, kinds) ─▶ (rows, problems)   of the whole file
    read_all(path, …) ─▶ [rows, …]                or DataError, with the problems of all files

studio/data/files.py says which files are read, studio/data/formats.py which rows. A row may name its data source with
"source": "…", up to 60 characters; without it, that is the file's name; a conversation may have
"tests": ["assert …"], for the reward `code`. A file is checked to its end: its first 20
problems are reported together, and nothing is started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from studio.data.files import Progress, Raw, raw_rows, source_name
from studio.data.formats import KINDS, OPTIONAL, OtherKindError, convert, mapped
from studio.data.json_text import Broken, RowProblems
from studio.data.rows import Example, Labelled, Place, PlainText, Row, RowKind
from studio.data.turns import thinking_as_text
from studio.errors import SHOWN_PROBLEMS, DataError, FileProblem, Problem, ProblemGroups

if TYPE_CHECKING:
    from studio.recipe import Recipe

__all__ = ["KINDS", "Reading", "check_rows", "iter_rows", "read_all", "read_examples", "read_rows"]

LONGEST_SOURCE = 60
RESERVED_SOURCES = ("all", "all sources")
"""What tables and pictures call all sources together."""

WRITTEN = ("reasoning_content", "tool_calls", "tools")
"""Parts of a conversation that some chat templates write and others pass over."""


@dataclass(frozen=True)
class Reading:
    """How rows are read, beyond what their file says of itself.

    Attributes:
        format: a name in FORMATS, or auto.
        columns: our name of a column → the file's.
        written: of `WRITTEN`, what the model's chat template writes. Reasoning that it would pass over is kept as
            text between <think> tags; a row whose tools or calls it would pass over is refused.
    """

    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    written: tuple[str, ...] = WRITTEN

    @classmethod
    def of(cls, recipe: Recipe) -> Reading:
        """As the recipe says, for its base model's chat template."""
        from studio.data.of_recipe import written_by_template

        return cls(recipe.data.format, recipe.data.columns, written_by_template(recipe.model.base))

    def for_other(self, path: Path | str) -> Reading:
        """For a file of held-out rows, which may have another shape than the training rows: without format and columns
        of the recipe where its first row has none of these columns, and not all of them under our names.
        """
        needed = [ours for ours in self.columns if ours not in OPTIONAL]
        with suppress(OSError, Broken):  # said when the rows are read
            values = next((raw.values for raw in raw_rows(path)), None)
            there = set(values) if isinstance(values, dict) else set(needed)
            if not there.issuperset(needed) and there.isdisjoint(self.columns[ours] for ours in needed):
                return replace(self, format="auto", columns={})
        return self


def read_examples(path: Path | str) -> list[Example]:
    """Every example in the file at `path`, in file order. Blank lines are passed over.

    Raises:
        DataError: no such file, an empty file, or any row that is no conversation or cannot be trained on.
    """
    return cast(list[Example], read_rows(path, ("example",)))


def read_rows(path: Path | str, kinds: Sequence[RowKind], reading: Reading | None = None) -> list[Row]:
    """Every row of the file at `path`, in file order, all of one of the `kinds` that a training method reads.

    Raises:
        DataError: no such file, an empty file, a row of another kind, or one that cannot be trained on.
    """
    return read_all(path, kinds=kinds, reading=reading)[0]


def read_all(
    *paths: Path | str | None, kinds: Sequence[RowKind] = ("example",), reading: Reading | None = None
) -> list[list[Row]]:
    """The rows of several files, with the problems of all files in one error. None gives an empty list.

    Raises:
        DataError: as `read_rows`.
    """
    checked = [check_rows(path, kinds, reading) if path else ([], []) for path in paths]
    refuse([problems for _, problems in checked])
    return [rows for rows, _ in checked]


def refuse(problems_by_file: Sequence[Sequence[Problem]]) -> None:
    """
    Raises:
        DataError: there are problems: the first 20 of each file and how many more; its text has equal ones once.
    """
    shown = [problem for problems in problems_by_file for problem in problems[:SHOWN_PROBLEMS]]
    if shown:
        groups = ProblemGroups(problem for problems in problems_by_file for problem in problems)
        raise DataError(shown, sum(map(len, problems_by_file)) - len(shown), groups)


def check_rows(
    path: Path | str, kinds: Sequence[RowKind] = ("example",), reading: Reading | None = None
) -> tuple[list[Row], list[Problem]]:
    """The good rows of the file at `path` and the problems of all others."""
    rows: list[Row] = []
    problems: list[Problem] = []
    for found in iter_rows(path, kinds, reading):
        if isinstance(found, Problem):
            problems.append(found)
        else:
            rows.append(found)
    return rows, problems


def iter_rows(
    path: Path | str,
    kinds: Sequence[RowKind] = ("example",),
    reading: Reading | None = None,
    progress: Progress | None = None,
) -> Iterator[Row | Problem]:
    """Each row at `path` in order, or its problems in its place (one for each thing wrong with it).

    A problem of the file as a whole is a `FileProblem`, and the last that comes.
    """
    found = False
    for raw, outcome in converted(path, kinds, reading or Reading(), progress):
        found = True
        if isinstance(outcome, RowProblems | FileProblem):
            yield from problems_of(raw, outcome)
        else:
            yield cast(tuple[str, Row], outcome)[1]
    if not found:
        yield empty_file(path)


def problems_of(raw: Raw | None, outcome: RowProblems | FileProblem) -> Iterator[Problem]:
    """The problems of one row with its place; one of a file as it is."""
    if isinstance(outcome, RowProblems) and raw is not None:
        yield from (Problem(name, raw.line, said, raw.file, raw.counted) for name, said in outcome.problems)
    elif isinstance(outcome, FileProblem):
        yield outcome


def empty_file(path: Path | str) -> FileProblem:
    return FileProblem("", None, "the file is empty; it needs at least one row", str(path))


def converted(
    path: Path | str,
    kinds: Sequence[RowKind],
    reading: Reading,
    progress: Progress | None = None,
    quick: Callable[[Any], dict[str, Any] | None] | None = None,
) -> Iterator[tuple[Raw | None, tuple[str, Row] | dict[str, Any] | RowProblems | FileProblem]]:
    """Each raw row with its (format, row) or its problems; a problem of the file has no raw row, and comes last.

    Args:
        quick: what it makes of a row's values takes the place of (format, row), unless that is None.
    """
    source = source_name(path)
    try:
        for raw in raw_rows(path, progress):
            yield raw, (quick and quick(raw.values)) or _convert(raw, source, kinds, reading)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        yield None, FileProblem("", None, f"cannot be read: {reason}", str(path))
    except Broken as broken:
        yield None, FileProblem("", broken.line, broken.message, str(path))


def _convert(raw: Raw, source: str, kinds: Sequence[RowKind], reading: Reading) -> tuple[str, Row] | RowProblems:
    if isinstance(raw.values, RowProblems):
        return raw.values
    try:
        values = mapped(raw.values, reading.columns) if reading.columns else raw.values
        name, row = convert(values, kinds, reading.format)
        row = replace(row, tests=_tests(values["tests"])) if isinstance(row, Example) and "tests" in values else row
        row = as_written(row, reading.written) if len(reading.written) < len(WRITTEN) else row
    except OtherKindError as other:
        other.row = _placed(other.row, raw, values, source)
        return other
    except RowProblems as problems:
        return problems
    return name, _placed(row, raw, values, source)


def _placed(row: Row, raw: Raw, values: Mapping[str, Any], source: str) -> Row:
    return replace(row, source=_source(values.get("source"), source), place=Place(raw.file, raw.line, raw.counted))


def _tests(value: Any) -> tuple[str, ...]:
    """The row's tests; data sets use the key for other things too: what is no list is passed over."""
    if not isinstance(value, list):
        return ()
    if not value or not all(isinstance(test, str) and test.strip() for test in value):
        raise RowProblems(("tests", 'is a list of Python statements, such as ["assert f(2) == 4"]'))
    return tuple(value)


def _source(named: Any, file_name: str) -> str:
    """The name of a row's data source. Data sets use the key for other things too: what is no text is passed over."""
    name = named.strip() if isinstance(named, str) and named.isprintable() else ""
    name = (name or file_name)[:LONGEST_SOURCE]
    return f"{name} (source)" if name in RESERVED_SOURCES else name


def as_written(row: Row, written: Sequence[str]) -> Row:
    """The row as a chat template that writes only the parts `written` can write it whole.

    Raises:
        RowProblems: it calls tools, or lists them, and the template would pass over that in silence.
    """
    if isinstance(row, PlainText):
        return row
    names = ("prompt", "completion") if isinstance(row, Example | Labelled) else ("prompt", "chosen", "rejected")
    turns = {name: getattr(row, name) for name in names}
    if "tool_calls" not in written and any(turn.tool_calls for part in turns.values() for turn in part):
        raise RowProblems(("", "calls tools, which this model's chat template does not write"))
    if "tools" not in written and row.tools:
        raise RowProblems(("tools", "are given, which this model's chat template does not write"))
    if "reasoning_content" in written or not any(turn.thinking for part in turns.values() for turn in part):
        return row
    changed: dict[str, Any] = {name: tuple(map(thinking_as_text, part)) for name, part in turns.items()}
    return replace(row, **changed)
