"""The prompts that an export is verified with: the user's own held-out data where there is any. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.verify.run import BUILT_IN, Prompt
from studio.data import Example, read_examples
from studio.errors import DataError, ExportError, JobError
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
        file: JSON Lines as a recipe's data, or any text with one prompt a line.

    Raises:
        ExportError: `file` holds no prompts.
        DataError: `file` ends in .jsonl and has rows that cannot be read.
    """
    if file is not None:
        return _from_file(file)
    held_out = _held_out_file(job) if job else None
    if held_out is not None:
        examples = read_examples(held_out)[:MOST]
        return Prompts(
            conversations(examples), f"the first {len(examples)} held-out examples of the job's {held_out.name}"
        )
    return Prompts(BUILT_IN, f"{len(BUILT_IN)} built-in texts: no held-out data was at hand")


def _held_out_file(job: Path) -> Path | None:
    """The job's evaluation data, if it has any and it is still there and readable."""
    try:
        file = open_job(job).recipe().data.eval
        return file if file and read_examples(file) else None
    except (JobError, DataError):
        return None


def _from_file(file: Path) -> Prompts:
    if file.suffix == ".jsonl":
        examples = read_examples(file)[:MOST]
        return Prompts(conversations(examples), f"the first {len(examples)} examples of {file.name}")
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"{file}: the prompts cannot be read: {error}") from None
    if not lines:
        raise ExportError(f"{file} holds no prompts; expected one a line, or JSON Lines in a file named *.jsonl")
    return Prompts(tuple(lines[:MOST]), f"the first {min(MOST, len(lines))} lines of {file.name}")


def conversations(examples: Sequence[Example]) -> tuple[Prompt, ...]:
    """Each example as one conversation, its answer included."""
    rows = (example.as_row() for example in examples)
    return tuple([*row["prompt"], *row["completion"]] for row in rows)
