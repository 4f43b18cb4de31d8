"""Turns of a conversation from the forms in which data sets write them.

    {"role": "user", "content": "…"}                    content: text, or parts {"type": "text", "text": "…"}
    {"from": "human", "value": "…"}                     ShareGPT
    {"role": "assistant", "tool_calls": [{"function": {"name": "…", "arguments": {…} or JSON text}}]}
    {"role": "assistant", "function_call": {"name": "…", "arguments": {…} or JSON text}}      the older form
    {"role": "assistant", "content": "<think>…</think>…"}, or beside the content reasoning_content, reasoning, thinking
    {"role": "assistant", "content": "…", "weight": 0}, or "train": false                     a turn that is not learned

Every problem is a (field, message) pair of a `RowProblems`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from studio.data.json_text import RowProblems
from studio.data.rows import Message, Turns
from studio.recipe_text import describe

ROLES = ("system", "user", "assistant", "tool")
OTHER_ROLES = {
    "developer": "system",
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""Names that data sets have for the roles; `function_call` is an assistant's turn whose text is the call."""

CALL_ROLES = ("function_call", "tool_call")
_PLAIN = {"role", "content"}
THINKING = ("reasoning_content", "reasoning", "thinking")
OPEN, CLOSE = "<think>", "</think>"


def turns(field: str, value: Any) -> Turns:
    """The messages in `value`, a list, or a list as JSON text as tables hold it.

    Raises:
        RowProblems: of all messages together.
    """
    value = from_json(value)
    if not isinstance(value, list):
        kind = "a list of messages" if field not in ("prompt", "completion", "chosen", "rejected") else ""
        raise RowProblems((field, f"is {kind or 'text or a list of messages'}, received {describe(value)}"))
    if not value:
        raise RowProblems((field, "is an empty list"))
    found: list[Message] = []
    problems: list[tuple[str, str]] = []
    for number, item in enumerate(value):
        try:
            found.append(_message(f"{field}[{number}]", item))
        except RowProblems as error:
            problems += error.problems
    if problems:
        raise RowProblems(*problems)
    return tuple(found)


def text_or_turns(field: str, value: Any, role: str) -> Turns:
    """A value that is one turn's text, one message, or messages."""
    if isinstance(value, dict):
        return (_message(field, value),)
    if isinstance(value, str) and not are_messages(from_json(value)):
        return (_with_content(field, Message(role, value)),)
    return turns(field, value)


def from_json(value: Any) -> Any:
    """`value`; where it is the text of a JSON list of objects, that list."""
    if isinstance(value, str) and value.lstrip().startswith("[") and value.rstrip().endswith("]"):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        if found and isinstance(found, list) and all(isinstance(item, dict) for item in found):
            return found
    return value


def are_messages(value: Any) -> bool:
    """Whether a list of objects is meant as messages; a text may well be JSON of something else."""
    return isinstance(value, list) and all("role" in item or "from" in item for item in value)


def content_problem(content: Any) -> str | None:
    """Why `content` is no text that a model can learn, or None."""
    if not isinstance(content, str):
        return f"is text, received {describe(content)}"
    if not content.strip():
        return "is empty" if not content else "is only white space"
    if (place := content.find("\0")) >= 0:
        return f"holds a NUL character (character {place + 1}); text has none"
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"holds half of a surrogate pair (character {error.start + 1}), which is not text"
    return None


def tools_of(value: Any) -> tuple[Mapping[str, Any], ...]:
    """A row's tool schemas, each {"type": "function", "function": {…}}, from such a list or its JSON text.

    Raises:
        RowProblems
    """
    if value is None or value == "":
        return ()
    value = from_json(value)
    if value == "[]" or value == []:
        return ()
    if not isinstance(value, list):
        raise RowProblems(("tools", f"is a list of tool schemas, received {describe(value)}"))
    return tuple(_tool(f"tools[{number}]", item) for number, item in enumerate(value))


def _tool(where: str, item: Any) -> Mapping[str, Any]:
    inner = item.get("function") if isinstance(item, dict) and "function" in item else item
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise RowProblems((where, f'is {{"type": "function", "function": {{"name": …}}}}, received {describe(item)}'))
    _check_plain(where, item)
    return item if inner is not item else {"type": "function", "function": item}


def _check_plain(where: str, value: Any) -> None:
    """Refuses a schema or call with text that is none, or numbers that JSON has not."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\\u0000", "\0")
    except (ValueError, RecursionError) as error:
        raise RowProblems((where, f"cannot be written as JSON: {error}")) from None
    if problem := content_problem(text):
        raise RowProblems((where, problem))


# -------------------------------------------------------------------- one message


def _message(where: str, item: Any) -> Message:
    if not isinstance(item, dict):
        raise RowProblems((where, f'is {{"role": …, "content": …}}, received {describe(item)}'))
    if item.keys() == _PLAIN and item["role"] in ROLES and content_problem(item["content"]) is None:
        return _split(f"{where}.content", Message(item["role"], item["content"]))  # most messages: nothing more to ask
    role_key, text_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    calls: tuple[Mapping[str, Any], ...] = ()
    problems: list[tuple[str, str]] = []
    if role_key not in item:
        problems.append((f"{where}.{role_key}", "is missing"))
    given = item.get(role_key)
    role = _role(given)
    if role_key in item and role is None:
        said = "system, user, assistant or tool"
        problems.append((f"{where}.{role_key}", f"is {said}, received {describe(given)}"))
    content = item.get(text_key)
    given_calls = item.get("tool_calls") or item.get("function_call")
    learned = _is_learned(where, item, problems)
    try:
        if isinstance(given, str) and given.lower() in CALL_ROLES:
            calls, content = _calls(f"{where}.{text_key}", content), ""
        elif given_calls:
            content = "" if content is None else content
            calls = _calls(f"{where}.{'tool_calls' if item.get('tool_calls') else 'function_call'}", given_calls)
    except RowProblems as error:
        problems += error.problems
    if calls and role != "assistant":
        problems.append((f"{where}.tool_calls", "belong to an assistant's turn"))
    if text_key not in item and not given_calls:
        problems.append((f"{where}.{text_key}", "is missing"))
    elif problem := _text_problem(content, bool(calls or given_calls)):
        problems.append((f"{where}.{text_key}", problem))
    name = item.get("name") if role == "tool" else ""
    name = name if isinstance(name, str) else ""
    if name and (problem := content_problem(name)):
        problems.append((f"{where}.name", problem))
    if problems:
        raise RowProblems(*problems)
    message = Message(
        role or "",
        _as_text(content),
        _thinking(where, item, role),
        calls,
        name,
        learned,
    )
    return _split(f"{where}.{text_key}", message)


def _is_learned(where: str, item: Mapping[str, Any], problems: list[tuple[str, str]]) -> bool:
    """What a turn's `weight` (0 or 1) or `train` (true or false) says; what else they hold is a problem."""
    said = {name: item[name] for name in ("weight", "train") if item.get(name) is not None}
    problems += [
        (f"{where}.{name}", f"is 0 or 1, false or true, received {describe(value)}")
        for name, value in said.items()
        if value not in (0, 1)
    ]
    return all(said.values())


def _role(given: Any) -> str | None:
    name = given.strip().lower() if isinstance(given, str) else ""
    if name in CALL_ROLES:
        return "assistant"
    return name if name in ROLES else OTHER_ROLES.get(name)


def _text_problem(content: Any, calls: bool) -> str | None:
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                kind = describe(part.get("type")) if isinstance(part, dict) else describe(part)
                return f"has a part that is no text ({kind}); only text is trained on"
    text = _as_text(content)
    return None if calls and text == "" else content_problem(text)


def _as_text(content: Any) -> Any:
    """The text of a content given in parts; any other content as it is."""
    return "".join(part["text"] for part in content) if isinstance(content, list) and content else content


def _with_content(field: str, message: Message) -> Message:
    if problem := content_problem(message.content):
        raise RowProblems((field, problem))
    return _split(field, message)


# -------------------------------------------------------------------- reasoning


def _thinking(where: str, item: Mapping[str, Any], role: str | None) -> str:
    """The reasoning that a message has beside its content."""
    for name in THINKING:
        value = item.get(name)
        if value and not (isinstance(value, str) and not value.strip()):
            if problem := content_problem(value):
                raise RowProblems((f"{where}.{name}", problem))
            if role != "assistant":
                raise RowProblems((f"{where}.{name}", "belongs to an assistant's turn"))
            return str(value).strip()
    return ""


def _split(field: str, message: Message) -> Message:
    """The message, with reasoning at the start of an assistant's content taken out of it."""
    start = message.content.lstrip()
    if message.role != "assistant" or not start.startswith(OPEN):
        return message
    thinking, closed, answer = start.removeprefix(OPEN).partition(CLOSE)
    if not closed:
        raise RowProblems((field, f"opens {OPEN} and does not close it; the reasoning may have been cut"))
    if not answer.strip() and not message.tool_calls:
        raise RowProblems((field, f"has nothing after {CLOSE}; the answer is missing"))
    if not thinking.strip():
        return message
    if message.thinking:
        raise RowProblems((field, "has reasoning, and the message has reasoning beside it; keep one of them"))
    return replace(message, content=answer.strip("\n"), thinking=thinking.strip())


def thinking_as_text(message: Message) -> Message:
    """The message with its reasoning in the content, between <think> tags, for templates that write none."""
    if not message.thinking:
        return message
    content = f"{OPEN}\n{message.thinking}\n{CLOSE}\n\n{message.content}"
    return replace(message, content=content, thinking="")


# -------------------------------------------------------------------- tool calls


def _calls(where: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    if isinstance(value, str):
        value = _json(where, value)
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not value:
        raise RowProblems((where, f"is a list of calls, received {describe(value)}"))
    return tuple(_call(f"{where}[{number}]", item) for number, item in enumerate(value))


def _call(where: str, item: Any) -> Mapping[str, Any]:
    inner = item.get("function", item) if isinstance(item, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise RowProblems((where, f'is {{"function": {{"name": …, "arguments": …}}}}, received {describe(item)}'))
    arguments = inner.get("arguments", inner.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json(f"{where}.arguments", arguments) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise RowProblems((f"{where}.arguments", f"is a mapping or its JSON text, received {describe(arguments)}"))
    call = {"type": "function", "function": {"name": inner["name"], "arguments": arguments}}
    _check_plain(where, call)
    return call


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowProblems((where, f"is not valid JSON: {error}")) from None
