"""What `studio data inspect` says besides what it counts, each in words for whoever is to train on the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from studio.data.inspection import _Seen as Seen
    from studio.data.reading import Reading

RATINGS = ("rating", "thumbs", "feedback", "score", "vote", "liked", "labels", "is_good", "desirable")
"""Columns that often say whether an answer was wanted, as the format kto reads it in `label`."""

SHOWN_COLUMNS = 12
CUT = "the rest of the file was not read, and is not counted here: see the problem that ends it"


def of_columns(form: str, columns: Sequence[str]) -> list[str]:
    """How columns are mapped where no row fits a format (`form` is ""), with the names of the first row's."""
    if form or not columns:
        return []
    listed = ", ".join(columns[:SHOWN_COLUMNS]) + (", …" if len(columns) > SHOWN_COLUMNS else "")
    return [
        f"no format fits the columns {listed}: say which of them is what, as --columns prompt=NAME --columns "
        "completion=NAME, and in a recipe as data: {columns: {prompt: NAME, completion: NAME}}; for plain text it is "
        "{text: NAME}"
    ]


def of_formats(seen: Seen, reading: Reading, looked_at: int, detected: Counter[str]) -> list[str]:
    notes = []
    if len(seen.formats) > 1:
        listed = ", ".join(f"{name} {count:,}" for name, count in seen.formats.most_common())
        notes.append(f"the file mixes formats: {listed}; each row was read as its own")
    if "reasoning_content" not in reading.written and seen.traits["reasoning"]:
        notes.append("the chat template writes no reasoning of its own: it is kept in the text, between <think> tags")
    if several := {name: count for name, count in detected.items() if 0 < count < looked_at}:
        doubtful = sum(detected.values()) - looked_at
        if doubtful > 0 and len(several) > 1:
            notes.append(f"some rows fit several formats ({', '.join(several)}); data.format says which is meant")
    return notes


def of_ratings(seen: Seen, unread: Counter[str]) -> list[str]:
    """That a column beside prompts and completions looks like labels, and how they are read."""
    rated = [name for name in unread if name.lower() in RATINGS] if seen.kinds["example"] else []
    return [
        f"a column {name} is not read; where it says which answers are wanted, map it for training.method kto: "
        f"data.columns: {{label: {name}}}"
        for name in rated
    ]
