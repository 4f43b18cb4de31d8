"""The prompts that an export is verified with: the user's own held-out data where there is any. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from adapters.verify.run import BUILT_IN, Prompt
from studio.data import Example, Row, asked_sequences, held_out_rows, read_rows
from studio.data.files import COMPRESSED, JSON, TABLES
from studio.data.reading import KINDS
from studio.data.rows import as_turns
from studio.errors import DataError, ExportError, JobError, ProfileError
from studio.jobs import open_job

MOST = 8


@dataclass(frozen=True)
class Prompts:
    """Texts or conversations, and where they came from, in words for the certificate."""

    items: tuple[Prompt, ...]
    origin: str


def held_out_prompts(*, job: Path | None = None, file: Path | None = None) -> Prompts:
    """The first prompts of `file`; else of the job's held-out data; else a few built-in texts.

    Args:
        file: rows in a file as a recipe's data may be in; or a .txt or .md with one prompt a line.

    Raises:
        ExportError: `file` holds no prompts.
        DataError: `file` has rows that cannot be read.
    """
    if file is not None:
        return _from_file(file)
    file_name, rows = _held_out(job) if job else ("", [])
    if found := prompts_of(rows):
        return Prompts(found, f"the first {len(found)} held-out examples of the job's {file_name}")
    return Prompts(BUILT_IN, f"{len(BUILT_IN)} built-in texts: no held-out data was at hand")


def _held_out(job: Path) -> tuple[str, list[Row]]:
    """Name and rows of the job's evaluation data, if it has any and they are still there and readable."""
    try:
        recipe = open_job(job).recipe()
        name = recipe.data.eval.name if recipe.data.eval else recipe.data.sources[0].path.name
        return name, held_out_rows(recipe)
    except (JobError, DataError, ProfileError):
        return "", []


def _from_file(file: Path) -> Prompts:
    if file.suffix in (*JSON, *TABLES, *COMPRESSED):
        found = prompts_of(read_rows(file, tuple(KINDS)))
        return Prompts(found, f"the first {len(found)} examples of {file.name}")
    lines = lines_of(file, MOST)
    return Prompts(lines, f"the first {len(lines)} lines of {file.name}")


def lines_of(file: Path, most: int) -> tuple[str, ...]:
    """The first lines of a file that are not blank.

    Raises:
        ExportError: it cannot be read, or has none.
    """
    try:
        with file.open(encoding="utf-8-sig") as opened:
            lines = tuple(line.rstrip("\n") for line in islice(filter(str.strip, opened), most))
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"{file}: the prompts cannot be read: {error}") from None
    if not lines:
        raise ExportError(
            f"{file} holds no prompts; expected one a line, or rows in a file named *.jsonl or as another data file"
        )
    return lines


def prompts_of(rows: Sequence[Row], most: int = MOST) -> tuple[Prompt, ...]:
    """The first rows, each as one conversation with its answer if it has one, or as text."""
    found = asked_sequences(rows[:most])
    return tuple(as_turns(each.turns) if isinstance(each, Example) else each.text for each in found)
