"""The formats of rows: what each looks like, and how a row of it becomes one of the studio's.

    recognise(values, kinds) ─▶ the one format that a row fits, of those that give what the training method reads
    FORMATS[name].convert(values) ─▶ Example | PlainText | Preference | Labelled

Each row is recognised by itself, so a file may mix formats. A row that fits two of them is refused: `data.format` says
which is meant, and `data.columns` which column is what.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from studio.data.json_text import RowProblems
from studio.data.rows import Example, Labelled, Message, PlainText, Preference, Row, RowKind, Turns
from studio.data.turns import content_problem, from_json, text_or_turns, tools_of, turns
from studio.recipe_text import describe

Values = Mapping[str, Any]

CONVERSATIONS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "question", "query", "problem")
COMPLETIONS = ("completion", "response", "answer", "output", "solution")
INPUTS = ("input", "context")
SYSTEMS = ("system", "system_prompt", "system_message")
TEXTS = ("text", "content")
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
    fitting = fits(values)
    read = [name for name in fitting if FORMATS[name].kind in kinds] or fitting
    if len(read) > 1:
        listed = " and ".join(read)
        raise RowProblems(("", f"fits the formats {listed}; keep one of the two forms, or say which in data.format"))
    if read:
        return read[0]
    if _first(values, (*PROMPTS, *COMPLETIONS)):
        return "prompt_completion"  # whose conversion says what is missing
    found = ", ".join(list(values)[:6]) or "nothing"
    raise RowProblems(("", f"needs messages, or prompt and completion; received {found}"))


def fits(values: Values) -> list[str]:
    """The names of all formats that the columns of a row fit."""
    found = [name for name, entry in FORMATS.items() if not entry.columns.isdisjoint(values) and entry.fits(values)]
    return found or (["text"] if _is_text(values) else [])


def _first(values: Values, names: Sequence[str]) -> str:
    for name in names:
        if name in values:
            return name
    return ""


def _one(values: Values, names: Sequence[str], ours: str) -> str:
    """The column that is `ours`: under its own name, else under the one of the other `names` that is there."""
    there = [ours] if ours in values else [name for name in names if name in values]
    if len(there) > 1:
        raise RowProblems((ours, f"may be {' or '.join(there)}; say which in data.columns, as {ours}: {there[0]}"))
    if not there:
        raise RowProblems((ours, "is missing"))
    return there[0]


# -------------------------------------------------------------------- what fits


def _is_sharegpt(values: Values) -> bool:
    value = from_json(values.get(_first(values, CONVERSATIONS)))
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and "from" in first and "role" not in first and not _is_pair(values)


def _is_messages(values: Values) -> bool:
    return bool(_first(values, CONVERSATIONS)) and not _is_sharegpt(values) and not _continues_a_conversation(values)


def _continues_a_conversation(values: Values) -> bool:
    """Whether conversation, chosen and rejected are the three parts of one pair."""
    return _is_pair(values) and not _first(values, PROMPTS)


def _is_pair(values: Values) -> bool:
    return "chosen" in values or "rejected" in values


def _is_whole(value: Any) -> bool:
    """Whether one side of a pair is a conversation from its start: begins with another's turn, or is a transcript."""
    value = from_json(value)
    if isinstance(value, str):
        return bool(_SPEAKER.match(value))
    first = value[0] if isinstance(value, list) and value else None
    role = first.get("role", first.get("from")) if isinstance(first, dict) else None
    return isinstance(role, str) and role.lower() in ("system", "developer", "user", "human", "prompter")


def _is_implicit(values: Values) -> bool:
    return "chosen" in values and "rejected" in values and _is_whole(values["chosen"]) and _is_whole(values["rejected"])


def _is_alpaca(values: Values) -> bool:
    return "instruction" in values and bool(_first(values, COMPLETIONS)) and "label" not in values


def _is_prompt_completion(values: Values) -> bool:
    return bool(_first(values, PROMPTS) and _first(values, COMPLETIONS)) and "label" not in values


def _is_kto(values: Values) -> bool:
    return bool(_first(values, (*PROMPTS, "instruction")) and _first(values, COMPLETIONS)) and "label" in values


def _is_text(values: Values) -> bool:
    """Of a row that fits no other format: many of these have a column text besides."""
    return bool(_first(values, TEXTS)) and "prompt" not in values and "completion" not in values


# -------------------------------------------------------------------- conversions


def _from_conversation(values: Values) -> Row:
    name = _one(values, CONVERSATIONS, "messages")
    found = _with_system(values, turns(name, values[name]), name)
    if len(found) < 2 or found[-1].role != "assistant":
        raise RowProblems((name, "needs a user turn and, last, an assistant turn"))
    _check_prompt(name, found[:-1])
    return Example(found[:-1], found[-1:], tools=_tools(values))


def _from_alpaca(values: Values) -> Row:
    return _example(values, *_instruction(values), _one(values, COMPLETIONS, "output"))


def _from_prompt_completion(values: Values) -> Row:
    return _example(values, *_prompt_and_completion(values))


def _prompt_and_completion(values: Values) -> tuple[str, Any, str]:
    """(prompt's column, its value, completion's column), with both said where both are missing."""
    if missing := [ours for ours, names in _PAIR if not _first(values, (ours, *names))]:
        raise RowProblems(*((name, "is missing") for name in missing))
    prompt = _one(values, PROMPTS, "prompt")
    return prompt, values[prompt], _one(values, COMPLETIONS, "completion")


_PAIR = (("prompt", PROMPTS), ("completion", COMPLETIONS))


def _from_kto(values: Values) -> Row:
    if "label" not in values:
        raise RowProblems(("label", "is missing"))
    instruction = "instruction" in values and not _first(values, PROMPTS)
    parts = (*_instruction(values), _one(values, COMPLETIONS, "completion")) if instruction else ()
    example = _example(values, *(parts or _prompt_and_completion(values)))
    label = _label(values["label"])
    return Labelled(example.prompt, example.completion, label, tools=example.tools)


def _label(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "false": False, "1": True, "0": False}
    named = value.strip().lower() if isinstance(value, str) else str(value) if type(value) is int else ""
    if named not in words:
        raise RowProblems(("label", f"is true or false, received {describe(value)}"))
    return words[named]


def _from_preference(values: Values) -> Row:
    if missing := [name for name in ("chosen", "rejected") if name not in values]:
        raise RowProblems(*((name, "is missing") for name in missing))
    before = _first(values, CONVERSATIONS) if not _first(values, (*PROMPTS, "instruction")) else ""
    if before:
        prompt: tuple[str, Any] = (before, values[before])
    elif "instruction" in values and not _first(values, PROMPTS):
        prompt = _instruction(values)
    else:
        name = _one(values, PROMPTS, "prompt")
        prompt = (name, values[name])
    problems: list[tuple[str, str]] = []
    sides: list[Example] = []
    for side in ("chosen", "rejected"):
        try:
            sides.append(_example(values, *prompt, side))
        except RowProblems as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise RowProblems(*problems)
    return _preference(sides[0].prompt, sides[0].completion, sides[1].completion, _tools(values))


def _preference(prompt: Turns, chosen: Turns, rejected: Turns, tools: tuple[Mapping[str, Any], ...]) -> Preference:
    if chosen == rejected:
        raise RowProblems(("rejected", "is the same as chosen; there is nothing to prefer"))
    return Preference(prompt, chosen, rejected, tools=tools)


def _from_implicit(values: Values) -> Row:
    if missing := [name for name in ("chosen", "rejected") if name not in values]:
        raise RowProblems(*((name, "is missing") for name in missing))
    chosen, rejected = (_whole(name, values[name]) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise RowProblems(("rejected", "is the same as chosen; there is nothing to prefer"))
    start = 0
    while start < min(len(chosen), len(rejected)) and chosen[start] == rejected[start]:
        start += 1
    while start and chosen[start - 1].role not in ("user", "tool"):
        start -= 1
    if not start:
        raise RowProblems(("rejected", "has no user turn in common with the start of chosen, so there is no prompt"))
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not side[start:] or any(turn.role != "assistant" for turn in side[start:]):
            raise RowProblems((name, "holds assistant turns alone after the start that both sides share"))
    _check_stated_prompt(values, chosen[:start])
    prompt = _with_system(values, chosen[:start], "chosen")
    _check_prompt("chosen", prompt)
    return _preference(prompt, chosen[start:], rejected[start:], _tools(values))


def _check_stated_prompt(values: Values, prompt: Turns) -> None:
    """A prompt beside whole conversations must be the start of these, or its last turn."""
    name = _first(values, PROMPTS)
    if name and text_or_turns(name, values[name], "user")[-1:] != prompt[-1:]:
        raise RowProblems((name, "is not what chosen and rejected begin with; map or remove the column"))


_SPEAKER = re.compile(r"\s*(Human|Assistant): ?")
_SPEAKERS = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def _whole(field: str, value: Any) -> Turns:
    """A conversation from its start: messages, or a transcript of "\\n\\nHuman: …" and "\\n\\nAssistant: …"."""
    if not isinstance(value, str) or isinstance(from_json(value), list):
        return turns(field, value)
    parts = _SPEAKERS.split(value)
    if len(parts) < 3 or parts[0].strip():
        raise RowProblems((field, 'is a conversation: messages, or a text of "Human: …" and "Assistant: …"'))
    said = zip(parts[1::2], parts[2::2], strict=True)
    return turns(
        field, [{"from": speaker.replace("Assistant", "gpt"), "value": text.strip()} for speaker, text in said]
    )


def _from_text(values: Values) -> Row:
    name = _one(values, TEXTS, "text")
    if message := content_problem(values[name]):
        raise RowProblems((name, message))
    return PlainText(values[name])


# -------------------------------------------------------------------- parts


def _instruction(values: Values) -> tuple[str, Any]:
    """Alpaca's prompt: earlier turns in `history`, then the instruction and, below an empty line, its input."""
    if "instruction" not in values:
        raise RowProblems(("instruction", "is missing"))
    text, more = values["instruction"], values.get(_first(values, INPUTS))
    if message := content_problem(text):
        raise RowProblems(("instruction", message))
    if more is not None and not isinstance(more, str):
        raise RowProblems((_first(values, INPUTS), f"is text, received {describe(more)}"))
    text = f"{text}\n\n{more}" if more and more.strip() else text
    history = values.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowProblems(("history", f"is a list of [question, answer] pairs, received {describe(history)}"))
    earlier = [
        {"role": role, "content": said}
        for pair in history
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]
    return "instruction", [*earlier, {"role": "user", "content": text}]


def _example(values: Values, prompt_name: str, prompt: Any, completion_name: str) -> Example:
    problems: list[tuple[str, str]] = []
    found: dict[str, Turns] = {}
    for part, value, role in ((prompt_name, prompt, "user"), (completion_name, values[completion_name], "assistant")):
        try:
            found[part] = text_or_turns(part, value, role)
        except RowProblems as error:
            problems += error.problems
    if problems:
        raise RowProblems(*problems)
    before = _with_system(values, found[prompt_name], prompt_name)
    _check_prompt(prompt_name, before)
    if any(message.role != "assistant" for message in found[completion_name]):
        raise RowProblems((completion_name, "holds assistant turns alone"))
    return Example(before, found[completion_name], tools=_tools(values))


def _check_prompt(field: str, prompt: Turns) -> None:
    if prompt[-1].role not in ("user", "tool"):
        raise RowProblems((field, f"the turn before the answer is the user's, received {prompt[-1].role}"))
    if any(message.role == "system" for message in prompt[1:]):
        raise RowProblems((field, "a system turn can only come first"))
    if not any(message.role == "user" for message in prompt):
        raise RowProblems((field, "needs a user turn"))


def _with_system(values: Values, prompt: Turns, field: str) -> Turns:
    """The turns after the row's system prompt, if it has one in a column of its own."""
    name = _first(values, SYSTEMS)
    value = values.get(name)
    if value is None or value == "":
        return prompt
    if message := content_problem(value):
        raise RowProblems((name, message))
    if prompt[0].role != "system":
        return (Message("system", value), *prompt)
    if prompt[0].content != value:
        raise RowProblems((name, f"differs from the system turn in {field}; keep one of them"))
    return prompt


def _tools(values: Values) -> tuple[Mapping[str, Any], ...]:
    return tools_of(values.get("tools"))


FORMATS: dict[str, Format] = {
    "messages": Format(
        "messages (ChatML)",
        '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}',
        "example",
        frozenset(CONVERSATIONS),
        _is_messages,
        _from_conversation,
    ),
    "sharegpt": Format(
        "ShareGPT",
        '{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}',
        "example",
        frozenset(CONVERSATIONS),
        _is_sharegpt,
        _from_conversation,
    ),
    "alpaca": Format(
        "Alpaca",
        '{"instruction": "…", "input": "…", "output": "…"}',
        "example",
        frozenset(("instruction",)),
        _is_alpaca,
        _from_alpaca,
    ),
    "prompt_completion": Format(
        "prompt and completion",
        '{"prompt": "…" or messages, "completion": "…" or messages}',
        "example",
        frozenset(PROMPTS),
        _is_prompt_completion,
        _from_prompt_completion,
    ),
    "preference": Format(
        "preference pairs with a prompt",
        '{"prompt": "…" or messages, "chosen": "…" or messages, "rejected": "…" or messages}',
        "preference",
        frozenset(("chosen", "rejected")),
        lambda values: not _is_implicit(values),
        _from_preference,
    ),
    "preference_implicit": Format(
        "preference pairs of whole conversations",
        '{"chosen": [the common start …, answer], "rejected": [the common start …, answer]}',
        "preference",
        frozenset(("chosen", "rejected")),
        _is_implicit,
        _from_implicit,
    ),
    "kto": Format(
        "completions with labels (KTO)",
        '{"prompt": "…" or messages, "completion": "…" or messages, "label": true}',
        "labelled",
        frozenset(("label",)),
        _is_kto,
        _from_kto,
    ),
    "text": Format("plain text", '{"text": "…"}', "text", frozenset(), _is_text, _from_text),
}


def convert(values: Values, kinds: Sequence[RowKind], form: str = "auto") -> tuple[str, Row]:
    """(name of the format, the row) of a file's row; `form` names the format, auto recognises it.

    Raises:
        RowProblems
    """
    name = recognise(values, kinds) if form == "auto" else form
    row = FORMATS[name].convert(values)
    if row.kind not in kinds:
        wanted = " or ".join(KINDS[kind] for kind in kinds)
        raise RowProblems(("", f"is {KINDS[row.kind]}; this training method reads {wanted}"))
    return name, row


def mapped(values: Values, columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with its columns under our names, as `data.columns` maps them ({ours: theirs}).

    Raises:
        RowProblems: a column that is mapped and must be there is not, nor one under our name (as in a held-out file).
    """
    missing = [t for ours, t in columns.items() if t not in values and ours not in values and ours not in OPTIONAL]
    if missing:
        found = ", ".join(list(values)[:8]) or "nothing"
        raise RowProblems(*((name, f"is mapped in data.columns and missing; received {found}") for name in missing))
    taken = set(columns.values())
    rest = {name: value for name, value in values.items() if name not in taken}
    return {**rest, **{ours: values[theirs] for ours, theirs in columns.items() if theirs in values}}
