"""Rows as the model reads them, with what of them is learned: through the encoding that trains them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from studio.data.rows import Preference, Row, sequences


class ReportPart(BaseModel):
    """A part of what `inspect_data` found: frozen, and written as JSON as it stands."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Segment(ReportPart):
    """Text of neighbouring tokens that are all learned, or all not."""

    text: str
    tokens: int
    trained: bool


class Rendered(ReportPart):
    """A row as the model reads it.

    Attributes:
        title: which side of a pair, or whether a labelled row is wanted; "" for other rows.
        cut: whether it was cut to the longest length.
    """

    file: str
    line: int
    counted: str
    title: str
    segments: tuple[Segment, ...]
    tokens: int
    trained_tokens: int
    cut: bool


def rendered_rows(
    directory: Path, rows: Sequence[Row], max_length_tokens: int, loss_on: Any
) -> tuple[tuple[Rendered, ...], list[str]]:
    """The rows through the encoding that trains them, and a note where the chat template cannot write one."""
    if not rows:
        return (), []
    from studio.base_model import load_tokenizer

    tokenizer = load_tokenizer(directory)
    shown: list[Rendered] = []
    notes: list[str] = []
    for row in rows:
        sides = sequences([row])
        for title, sequence in zip(_titles(row), sides, strict=True):
            try:
                shown.append(_render(tokenizer, row, title, sequence, max_length_tokens, loss_on))
            except Exception as error:  # a chat template is code of the checkpoint, and raises what it likes
                place = f"{row.place.counted} {row.place.line}: " if row.place else ""
                notes.append(f"{place}the chat template cannot write this row: {error}")
    return tuple(shown), notes


def _titles(row: Row) -> tuple[str, ...]:
    if isinstance(row, Preference):
        return "chosen", "rejected"
    return ("",) if row.kind != "labelled" else ("wanted" if getattr(row, "label", False) else "not wanted",)


def _render(tokenizer: Any, row: Row, title: str, sequence: Any, max_length_tokens: int, loss_on: Any) -> Rendered:
    from studio.encoding import IGNORED, encode

    ids, labels = encode(tokenizer, sequence, max_length_tokens + 1, loss_on)
    cut = len(ids) > max_length_tokens
    ids, labels = ids[:max_length_tokens], labels[:max_length_tokens]
    trained = [label != IGNORED for label in labels]
    edges = [0, *(i for i in range(1, len(ids)) if trained[i] != trained[i - 1]), len(ids)]
    segments = tuple(
        Segment(text=tokenizer.decode(ids[a:b], skip_special_tokens=False), tokens=b - a, trained=trained[a])
        for a, b in pairwise(edges)
        if b > a
    )
    place = row.place
    return Rendered(
        file=place.file if place else "",
        line=place.line if place else 0,
        counted=place.counted if place else "line",
        title=title,
        segments=segments,
        tokens=len(ids),
        trained_tokens=sum(trained),
        cut=cut,
    )
