"""The formats of rows: what each looks like, and how a row of it becomes one of the studio's.

    recognise(values, kinds) ─▶ the one format that a row fits, of those that give what the training method reads
    FORMATS[name].convert(values) ─▶ Example | PlainText | Preference | Labelled

Each row is recognised by itself, so a file may mix formats. A row that fits two of them is refused: `data.format` says
which is meant, and `data.columns` which column is what.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from studio.data.conversions import (
    COMPLETIONS,
    CONVERSATIONS,
    PROMPTS,
    SPEAKER,
    TEXTS,
    Values,
    first_of,
    from_alpaca,
    from_conversation,
    from_implicit,
    from_kto,
    from_preference,
    from_prompt,
    from_prompt_completion,
    from_text,
)
from studio.data.json_text import RowProblems
from studio.data.rows import Row, RowKind
from studio.data.turns import OTHER_ROLES, from_json
from studio.errors import Problem, RecipeError
from studio.methods import reading_kind

COLUMNS = (
    *("messages", "prompt", "completion", "chosen", "rejected", "label", "text"),
    *("instruction", "input", "output", "system", "tools", "source"),
)
"""What `data.columns` may map to: the names under which the formats read."""

OPTIONAL = ("input", "system", "tools", "source")

KINDS: dict[RowKind, str] = {
    "example": "a conversation",
    "text": "plain text",
    "preference": "a preference pair",
    "labelled": "a labelled completion",
    "prompt": "a prompt without a completion",
}


@dataclass(frozen=True)
class Format:
    """One form of rows.

    Attributes:
        title: in words.
        looks_like: a row, shortened.
        kind: of the rows that it gives.
        columns: a row of this format has at least one of them.
        fits: whether the columns of such a row are this format's.
        convert: the row; raises RowProblems with everything that is wrong with it.
    """

    title: str
    looks_like: str
    kind: RowKind
    columns: frozenset[str]
    fits: Callable[[Values], bool]
    convert: Callable[[Values], Row]


def recognise(values: Values, kinds: Sequence[RowKind]) -> str:
    """The name of the format that a row fits.

    Raises:
        RowProblems: it fits none, or several of what the training method reads.
    """
    fitting = fits(values, prompts="prompt" in kinds)
    read = [name for name in fitting if FORMATS[name].kind in kinds]
    classed = "label" in values and first_of(values, CONVERSATIONS)
    if not read and classed and "labelled" in kinds and "example" not in kinds:
        return "kto"  # a conversation whose label is a word or a number, which other methods take for a class
    read = read or fitting
    if len(read) > 1:
        listed = " and ".join(read)
        raise RowProblems(("", f"fits the formats {listed}; keep one of the two forms, or say which in data.format"))
    if read:
        return read[0]
    if first_of(values, (*PROMPTS, *COMPLETIONS)):
        return "prompt_completion"  # whose conversion says what is missing
    found = ", ".join(list(values)[:6]) or "nothing"
    mapping = "; columns with other names are mapped in data.columns: {prompt: …, completion: …}" if values else ""
    raise RowProblems(("", f"needs messages, or prompt and completion; received {found}{mapping}"))


def fits(values: Values, prompts: bool = True) -> list[str]:
    """The names of all formats that the columns of a row fit.

    Args:
        prompts: a prompt alone is a row; else it is one whose completion is missing.
    """
    found = [name for name, entry in FORMATS.items() if not entry.columns.isdisjoint(values) and entry.fits(values)]
    if "prompt" in found:
        found = ["prompt"] if prompts else [name for name in found if name != "prompt"]
    return found or (["text"] if _is_text(values) else [])


# -------------------------------------------------------------------- what fits


def _is_sharegpt(values: Values) -> bool:
    value = from_json(values.get(first_of(values, CONVERSATIONS)))
    first = value[0] if isinstance(value, list) and value else None
    shared = isinstance(first, dict) and "from" in first and "role" not in first
    return shared and not _is_pair(values) and not _is_labelled_conversation(values)


def _is_messages(values: Values) -> bool:
    others = (_is_sharegpt, _continues_a_conversation, _is_labelled_conversation)
    return bool(first_of(values, CONVERSATIONS)) and not any(other(values) for other in others)


def _continues_a_conversation(values: Values) -> bool:
    """Whether conversation, chosen and rejected are the three parts of one pair."""
    return _is_pair(values) and not first_of(values, PROMPTS)


def _is_labelled_conversation(values: Values) -> bool:
    """Whether a conversation has a label for its last turn: true or false, and no number, as classes have."""
    return bool(first_of(values, CONVERSATIONS)) and str(values.get("label")).strip().lower() in ("true", "false")


def _is_pair(values: Values) -> bool:
    return "chosen" in values or "rejected" in values


def _is_whole(value: Any) -> bool:
    """Whether one side of a pair is a conversation from its start: begins with another's turn, or is a transcript."""
    value = from_json(value)
    if isinstance(value, str):
        return bool(SPEAKER.match(value))
    first = value[0] if isinstance(value, list) and value else None
    role = first.get("role", first.get("from")) if isinstance(first, dict) else None
    return isinstance(role, str) and role.lower() in ("system", "developer", "user", "human", "prompter")


def _is_implicit(values: Values) -> bool:
    return "chosen" in values and "rejected" in values and _is_whole(values["chosen"]) and _is_whole(values["rejected"])


def _is_alpaca(values: Values) -> bool:
    return "instruction" in values and bool(first_of(values, COMPLETIONS)) and "label" not in values


def _is_prompt_completion(values: Values) -> bool:
    return bool(first_of(values, PROMPTS) and first_of(values, COMPLETIONS)) and "label" not in values


def _is_kto(values: Values) -> bool:
    parts = first_of(values, (*PROMPTS, "instruction")) and first_of(values, COMPLETIONS)
    return bool(parts and "label" in values) or _is_labelled_conversation(values)


def _is_prompt(values: Values) -> bool:
    """Whether nothing in the row answers: a table has null where other rows have a completion."""
    if _is_pair(values) or "label" in values or any(values.get(name) is not None for name in COMPLETIONS):
        return False
    if name := first_of(values, CONVERSATIONS):
        value = from_json(values[name])
        last = value[-1] if isinstance(value, list) and value else None
        role = last.get("role", last.get("from")) if isinstance(last, dict) else None
        return isinstance(role, str) and OTHER_ROLES.get(role.lower(), role.lower()) in ("user", "tool")
    return bool(first_of(values, (*PROMPTS, "instruction"))) and not _is_text(values)


def _is_text(values: Values) -> bool:
    """Of a row that fits no other format: many of these have a column text besides. A message alone is no text."""
    return bool(first_of(values, TEXTS)) and not any(name in values for name in ("prompt", "completion", "role"))


FORMATS: dict[str, Format] = {
    "messages": Format(
        "messages (ChatML)",
        '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}',
        "example",
        frozenset(CONVERSATIONS),
        _is_messages,
        from_conversation,
    ),
    "sharegpt": Format(
        "ShareGPT",
        '{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}',
        "example",
        frozenset(CONVERSATIONS),
        _is_sharegpt,
        from_conversation,
    ),
    "alpaca": Format(
        "Alpaca",
        '{"instruction": "…", "input": "…", "output": "…"}',
        "example",
        frozenset(("instruction",)),
        _is_alpaca,
        from_alpaca,
    ),
    "prompt_completion": Format(
        "prompt and completion",
        '{"prompt": "…" or messages, "completion": "…" or messages}',
        "example",
        frozenset(PROMPTS),
        _is_prompt_completion,
        from_prompt_completion,
    ),
    "preference": Format(
        "preference pairs with a prompt",
        '{"prompt": "…" or messages, "chosen": "…" or messages, "rejected": "…" or messages}',
        "preference",
        frozenset(("chosen", "rejected")),
        lambda values: not _is_implicit(values),
        from_preference,
    ),
    "preference_implicit": Format(
        "preference pairs of whole conversations",
        '{"chosen": [the common start …, answer], "rejected": [the common start …, answer]}',
        "preference",
        frozenset(("chosen", "rejected")),
        _is_implicit,
        from_implicit,
    ),
    "kto": Format(
        "completions with labels (KTO)",
        '{"prompt": "…" or messages, "completion": "…" or messages, "label": true}',
        "labelled",
        frozenset(("label",)),
        _is_kto,
        from_kto,
    ),
    "prompt": Format(
        "prompts alone, for grpo, rloo and rejection",
        '{"prompt": "…" or messages} or {"messages": [{"role": "user", "content": "…"}]}',
        "prompt",
        frozenset((*CONVERSATIONS, *PROMPTS, "instruction")),
        _is_prompt,
        from_prompt,
    ),
    "text": Format("plain text", '{"text": "…"}', "text", frozenset(), _is_text, from_text),
}


class OtherKindError(RowProblems):
    """A row that is good, and of a kind that is not wanted here."""

    def __init__(self, message: str, form: str, row: Row):
        super().__init__(("", message))
        self.form, self.row = form, row


def convert(values: Values, kinds: Sequence[RowKind], form: str = "auto") -> tuple[str, Row]:
    """(name of the format, the row) of a file's row; `form` names the format, auto recognises it.

    Raises:
        RowProblems
    """
    name = recognise(values, kinds) if form == "auto" else form
    row = FORMATS[name].convert(values)
    if row.kind not in kinds:
        wanted = " or ".join(KINDS[kind] for kind in kinds)
        others = ", ".join(reading_kind(row.kind))
        said = f"is {KINDS[row.kind]}; this training method reads {wanted}; for such rows training.method is {others}"
        raise OtherKindError(said, name, row)
    return name, row


def unread_columns(values: Values, form: str, columns: Mapping[str, str]) -> list[str]:
    """The columns of a good row of the format that hold something and are passed over, by the file's names."""
    watched = _Watched(mapped(values, columns))
    FORMATS[form].convert(watched)
    ours = {theirs: name for name, theirs in columns.items()}
    return [
        name
        for name, value in values.items()
        if ours.get(name, name) not in watched.read and value not in (None, "", [], {})
    ]


class _Watched(dict[str, Any]):
    """A row that notes which of its columns are read."""

    def __init__(self, values: Values):
        super().__init__(values)
        self.read = {"source", "tests"}  # by studio/data/reading.py

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)


def mapped(values: Values, columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with its columns under our names, as `data.columns` maps them ({ours: theirs}).

    Raises:
        RowProblems: a column that is mapped and must be there is not, nor one under our name (as in a held-out file).
    """
    missing = [t for ours, t in columns.items() if t not in values and ours not in values and ours not in OPTIONAL]
    if missing:
        raise RowProblems(*((name, _missing(name, tuple(values))) for name in missing))
    taken = set(columns.values())
    rest = {name: value for name, value in values.items() if name not in taken}
    return {**rest, **{ours: values[theirs] for ours, theirs in columns.items() if theirs in values}}


@lru_cache(maxsize=256)
def _missing(name: str, there: tuple[str, ...]) -> str:
    """What is said of a mapped column that a row does not have, with the nearest of those that are there."""
    near = get_close_matches(name, there, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    return f"is mapped in data.columns and missing; received {', '.join(there[:8]) or 'nothing'}{meant}"


def known_columns(columns: Mapping[str, str]) -> Mapping[str, str]:
    """The mapping {ours: theirs}, each of ours being one that the formats read.

    Raises:
        RecipeError: as for `data.columns` in a recipe.
    """
    allowed = f"allowed: {', '.join(COLUMNS)}"
    wrong = [Problem("data.columns", None, f"unknown column {n!r}; {allowed}") for n in columns if n not in COLUMNS]
    if wrong:
        raise RecipeError(wrong)
    return columns
