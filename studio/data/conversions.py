"""From a row's columns to one of the studio's rows, for each format of studio/data/formats.py.

Each conversion raises RowProblems with everything that is wrong with the row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from studio.data.json_text import RowProblems
from studio.data.rows import Example, Labelled, Message, PlainText, Preference, Row, Turns
from studio.data.turns import are_messages, content_problem, from_json, text_or_turns, tools_of, turns
from studio.recipe_text import describe

Values = Mapping[str, Any]

CONVERSATIONS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "question", "query", "problem")
COMPLETIONS = ("completion", "response", "answer", "output", "solution")
INPUTS = ("input", "context")
SYSTEMS = ("system", "system_prompt", "system_message")
TEXTS = ("text", "content")


def first_of(values: Values, names: Sequence[str]) -> str:
    """The first of `names` that is a column of the row; "" for none."""
    for name in names:
        if name in values:
            return name
    return ""


def one_of(values: Values, names: Sequence[str], ours: str) -> str:
    """The column that is `ours`: under its own name, else under the one of the other `names` that is there."""
    there = [ours] if ours in values else [name for name in names if name in values]
    if len(there) > 1:
        raise RowProblems((ours, f"may be {' or '.join(there)}; say which in data.columns, as {ours}: {there[0]}"))
    if not there:
        raise RowProblems((ours, "is missing"))
    return there[0]


def filled_of(values: Values, names: Sequence[str]) -> str:
    """The one of `names` whose column says something, the first of them before the others; "" where none does."""
    if values.get(names[0]) not in (None, ""):
        return names[0]
    there = [name for name in names[1:] if values.get(name) not in (None, "")]
    if len(there) > 1:
        raise RowProblems((names[0], f"may be {' or '.join(there)}; say which in data.columns"))
    return there[0] if there else ""


def from_conversation(values: Values) -> Row:
    return _from_turns(values)


def _from_turns(values: Values) -> Example:
    name = one_of(values, CONVERSATIONS, "messages")
    found = _with_system(values, turns(name, values[name]), name)
    if len(found) < 2 or found[-1].role != "assistant":
        raise RowProblems((name, "needs a user turn and, last, an assistant turn"))
    _check_prompt(name, found[:-1])
    return Example(found[:-1], _learned(name, found[-1:]), tools=_tools(values))


def from_alpaca(values: Values) -> Row:
    return _example(values, *_instruction(values), one_of(values, COMPLETIONS, "output"))


def from_prompt_completion(values: Values) -> Row:
    return _example(values, *_prompt_and_completion(values))


def _prompt_and_completion(values: Values) -> tuple[str, Any, str]:
    """(prompt's column, its value, completion's column), with both said where both are missing."""
    if missing := [ours for ours, names in _PAIR if not first_of(values, (ours, *names))]:
        alone = "; prompts alone are for grpo, rloo and rejection" if missing == ["completion"] else ""
        raise RowProblems(*((name, f"is missing{alone}") for name in missing))
    prompt = one_of(values, PROMPTS, "prompt")
    return prompt, values[prompt], one_of(values, COMPLETIONS, "completion")


_PAIR = (("prompt", PROMPTS), ("completion", COMPLETIONS))


def from_kto(values: Values) -> Row:
    if "label" not in values:
        raise RowProblems(("label", "is missing"))
    if first_of(values, CONVERSATIONS) and not first_of(values, COMPLETIONS):
        whole = _from_turns(values)
        return Labelled(whole.prompt, whole.completion, _label(values["label"]), tools=whole.tools)
    instruction = "instruction" in values and not first_of(values, PROMPTS)
    parts = (*_instruction(values), one_of(values, COMPLETIONS, "completion")) if instruction else ()
    example = _example(values, *(parts or _prompt_and_completion(values)))
    label = _label(values["label"])
    return Labelled(example.prompt, example.completion, label, tools=example.tools)


def _label(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    named = str(value).strip().lower() if isinstance(value, str | int | float) else ""
    named = named.replace(" ", "_").replace("-", "_")
    if named not in LABELS:
        raise RowProblems(("label", f"is true or false, or {LABEL_WORDS}; received {describe(value)}"))
    return LABELS[named]


LABELS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False} | {
    word: wanted
    for pair in (("yes", "no"), ("good", "bad"), ("up", "down"), ("thumbs_up", "thumbs_down"), ("like", "dislike"))
    for word, wanted in zip(pair, (True, False), strict=True)
}
"""Tables hold labels as numbers with a point where one of the column is missing; ratings are words."""

LABEL_WORDS = "1 or 0, yes or no, good or bad, up or down, thumbs_up or thumbs_down, like or dislike"


def from_preference(values: Values) -> Row:
    if missing := [name for name in ("chosen", "rejected") if name not in values]:
        raise RowProblems(*((name, "is missing") for name in missing))
    before = first_of(values, CONVERSATIONS) if not first_of(values, (*PROMPTS, "instruction")) else ""
    if before:
        prompt: tuple[str, Any] = (before, values[before])
    elif "instruction" in values and not first_of(values, PROMPTS):
        prompt = _instruction(values)
    else:
        name = one_of(values, PROMPTS, "prompt")
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


def from_implicit(values: Values) -> Row:
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
    return _preference(
        prompt, _learned("chosen", chosen[start:]), _learned("rejected", rejected[start:]), _tools(values)
    )


def _check_stated_prompt(values: Values, prompt: Turns) -> None:
    """A prompt beside whole conversations must be the start of these, or its last turn."""
    name = first_of(values, PROMPTS)
    if name and text_or_turns(name, values[name], "user")[-1:] != prompt[-1:]:
        raise RowProblems((name, "is not what chosen and rejected begin with; map or remove the column"))


SPEAKER = re.compile(r"\s*(Human|Assistant): ?")
_SPEAKERS = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def _whole(field: str, value: Any) -> Turns:
    """A conversation from its start: messages, or a transcript of "\\n\\nHuman: …" and "\\n\\nAssistant: …"."""
    if not isinstance(value, str) or are_messages(from_json(value)):
        return turns(field, value)
    parts = _SPEAKERS.split(value)
    if len(parts) < 3 or parts[0].strip():
        raise RowProblems((field, 'is a conversation: messages, or a text of "Human: …" and "Assistant: …"'))
    said = zip(parts[1::2], parts[2::2], strict=True)
    return turns(
        field, [{"from": speaker.replace("Assistant", "gpt"), "value": text.strip()} for speaker, text in said]
    )


def from_prompt(values: Values) -> Row:
    """A prompt alone: a conversation up to the user's turn, or a prompt without a completion."""
    if name := first_of(values, CONVERSATIONS):
        found = turns(name, values[name])
    elif "instruction" in values and not first_of(values, PROMPTS):
        name, value = _instruction(values)
        found = text_or_turns(name, value, "user")
    else:
        name = one_of(values, PROMPTS, "prompt")
        found = text_or_turns(name, values[name], "user")
    prompt = _with_system(values, found, name)
    _check_prompt(name, prompt)
    return Example(prompt, (), tools=_tools(values), kind="prompt")


def from_text(values: Values) -> Row:
    name = one_of(values, TEXTS, "text")
    if message := content_problem(values[name]):
        raise RowProblems((name, message))
    return PlainText(values[name])


# -------------------------------------------------------------------- parts


def _instruction(values: Values) -> tuple[str, Any]:
    """Alpaca's prompt: earlier turns in `history`, then the instruction and, below an empty line, its input."""
    if "instruction" not in values:
        raise RowProblems(("instruction", "is missing"))
    input_name = filled_of(values, INPUTS)
    text, more = values["instruction"], values.get(input_name)
    if message := content_problem(text):
        raise RowProblems(("instruction", message))
    if more is not None and not isinstance(more, str):
        raise RowProblems((input_name, f"is text, received {describe(more)}"))
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
    return Example(before, _learned(completion_name, found[completion_name]), tools=_tools(values))


def _learned(field: str, completion: Turns) -> Turns:
    """A completion as it is; what comes last in a row is what the row is for."""
    if not all(turn.learned for turn in completion):
        raise RowProblems((field, "ends with a turn that is not to be learned (weight 0); leave that turn out"))
    return completion


def _check_prompt(field: str, prompt: Turns) -> None:
    if prompt[-1].role not in ("user", "tool"):
        raise RowProblems((field, f"the turn before the answer is the user's, received {prompt[-1].role}"))
    if any(message.role == "system" for message in prompt[1:]):
        raise RowProblems((field, "a system turn can only come first"))
    if not any(message.role == "user" for message in prompt):
        raise RowProblems((field, "needs a user turn"))


def _with_system(values: Values, prompt: Turns, field: str) -> Turns:
    """The turns after the row's system prompt, if it has one in a column of its own."""
    name = filled_of(values, SYSTEMS)
    if not name:
        return prompt
    value = values[name]
    if message := content_problem(value):
        raise RowProblems((name, message))
    if prompt[0].role != "system":
        return (Message("system", value), *prompt)
    if prompt[0].content != value:
        raise RowProblems((name, f"differs from the system turn in {field}; keep one of them"))
    return prompt


def _tools(values: Values) -> tuple[Mapping[str, Any], ...]:
    return tools_of(values.get("tools"))
