"""A held-out part of the training rows, the same one every time, with equal prompts on one side."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from studio.data.rows import Message, PlainText, Row

SALT = "held out"
"""Of the order in which prompts are held out. It does not go by training.seed: runs with other seeds are measured on
the same rows."""


def folded(text: str) -> str:
    """`text` without regard to case and white space."""
    return " ".join(text.casefold().split())


def prompt_of(row: Row) -> str:
    """What a row asks, folded: its turns before the answer; of plain text the text."""
    return folded(row.text if isinstance(row, PlainText) else "\n".join(map(_written, row.prompt)))


def _written(turn: Message) -> str:
    return turn.content + "".join(map(str, turn.tool_calls))


def split(rows: Sequence[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows), each in the order of `rows`.

    Prompts go to the held-out side in the order of their hashes until it has `fraction` of the rows; all rows of a
    prompt go together, so it may have more. With two prompts or more neither side is empty.

    Returns:
        ([…], []) where all rows have one prompt.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(prompt_of(row), []).append(row)
    held_out: set[str] = set()
    count = 0
    for prompt in sorted(groups, key=_hash)[: len(groups) - 1]:
        if held_out and count >= fraction * len(rows):
            break
        held_out.add(prompt)
        count += len(groups[prompt])
    chosen = {id(row) for prompt in held_out for row in groups[prompt]}
    return [row for row in rows if id(row) not in chosen], [row for row in rows if id(row) in chosen]


def _hash(prompt: str) -> bytes:
    return hashlib.sha256(f"{SALT}\0{prompt}".encode()).digest()
