"""Training and evaluation examples, from JSON Lines files.

A row is one of
    {"messages": [{"role": "user", "content": "…"}, …, {"role": "assistant", "content": "…"}]}
    {"prompt": "…" or [messages], "completion": "…" or [messages]}
and becomes an Example, the conversational prompt-completion form that TRL reads. A row may name its data source with
"source": "…", up to 60 characters; without it, that is the file's name. A file is checked to its end: its first 20
problems are reported together, and nothing is started.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from studio.errors import SHOWN_PROBLEMS, DataError, Problem
from studio.recipe_text import describe

ROLES = ("system", "user", "assistant")

LONGEST_SOURCE = 60
RESERVED_SOURCES = ("all", "all sources")
"""What tables and pictures call all sources together."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. `role` is system, user or assistant; `content` is never empty."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """A prompt that ends with the user's turn, the assistant's completion of it, and the data source it is from."""

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    source: str = ""

    def as_row(self) -> dict[str, list[dict[str, str]]]:
        """The example as TRL's conversational prompt-completion row."""
        return {
            "prompt": [{"role": m.role, "content": m.content} for m in self.prompt],
            "completion": [{"role": m.role, "content": m.content} for m in self.completion],
        }


class RowProblems(Exception):
    """What is wrong with one row, as (field, message) pairs; `read_examples` adds the line."""

    def __init__(self, *problems: tuple[str, str]):
        self.problems = problems


def read_examples(path: Path | str) -> list[Example]:
    """Every example in the JSON Lines file at `path`, in file order. Blank lines are passed over.

    Raises:
        DataError: no such file, an empty file, or any row that cannot be trained on.
    """
    examples, problems = check_examples(path)
    if problems:
        raise DataError(problems[:SHOWN_PROBLEMS], hidden_count=max(0, len(problems) - SHOWN_PROBLEMS))
    return examples


def read_all(*paths: Path | None) -> list[list[Example]]:
    """The examples of several files, with the problems of all files in one error. None gives an empty list.

    Raises:
        DataError: as `read_examples`.
    """
    checked = [check_examples(path) if path else ([], []) for path in paths]
    shown = [problem for _, problems in checked for problem in problems[:SHOWN_PROBLEMS]]
    if shown:
        raise DataError(shown, hidden_count=sum(len(problems) for _, problems in checked) - len(shown))
    return [examples for examples, _ in checked]


def check_examples(path: Path | str) -> tuple[list[Example], list[Problem]]:
    """The good rows of the file at `path` and the problems of all others."""
    examples: list[Example] = []
    problems: list[Problem] = []
    file = str(path)
    try:
        for number, line in _lines(Path(path)):
            try:
                examples.append(_example(line, Path(path).stem))
            except RowProblems as row:
                problems += [Problem(field, number, message, file) for field, message in row.problems]
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        problems.append(Problem("", None, f"cannot be read: {reason}", file))
    if not examples and not problems:
        problems.append(Problem("", None, "the file is empty; it needs at least one row", file))
    return examples, problems


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield number, line


def _example(line: bytes, file_name: str) -> Example:
    """The row's example; its source is `file_name` where the row names none."""
    row = _json_object(line)
    example = _from_row(row)
    return replace(example, source=_source(row.get("source"), file_name))


def _source(named: Any, file_name: str) -> str:
    """The name of a row's data source. Data sets use the key for other things too: what is no text is passed over."""
    name = named.strip() if isinstance(named, str) and named.isprintable() else ""
    name = (name or file_name)[:LONGEST_SOURCE]
    return f"{name} (source)" if name in RESERVED_SOURCES else name


def _from_row(row: dict[str, Any]) -> Example:
    if "messages" in row and ("prompt" in row or "completion" in row):
        raise RowProblems(("", "has both messages and prompt/completion; keep one of the two forms"))
    if "messages" in row:
        return _from_messages(row["messages"])
    missing = [name for name in ("prompt", "completion") if name not in row]
    if len(missing) == 2:
        found = ", ".join(list(row)[:6]) or "nothing"
        raise RowProblems(("", f"needs messages, or prompt and completion; received {found}"))
    if missing:
        raise RowProblems((missing[0], "is missing"))
    return _from_pair(row["prompt"], row["completion"])


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise RowProblems(("", f"is not UTF-8 text (byte {error.start + 1} of the line)")) from None
    except json.JSONDecodeError as error:
        raise RowProblems(("", f"is not valid JSON: {error.msg}, column {error.colno}")) from None
    except (ValueError, RecursionError) as error:
        raise RowProblems(("", f"is not valid JSON: {error}")) from None
    if not isinstance(row, dict):
        raise RowProblems(("", f"each line is one JSON object, received {describe(row)}"))
    return row


def _from_messages(value: Any) -> Example:
    messages = _messages("messages", value)
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise RowProblems(("messages", "needs a user turn and, last, an assistant turn"))
    _check_prompt("messages", messages[:-1])
    return Example(messages[:-1], messages[-1:])


def _from_pair(prompt: Any, completion: Any) -> Example:
    problems: list[tuple[str, str]] = []
    turns: dict[str, tuple[Message, ...]] = {}
    for name, value, role in (("prompt", prompt, "user"), ("completion", completion, "assistant")):
        try:
            turns[name] = _messages(name, [{"role": role, "content": value}] if isinstance(value, str) else value)
        except RowProblems as error:
            as_text = isinstance(value, str)
            problems += [(name if as_text else field, message) for field, message in error.problems]
    if problems:
        raise RowProblems(*problems)
    _check_prompt("prompt", turns["prompt"])
    if any(message.role != "assistant" for message in turns["completion"]):
        raise RowProblems(("completion", "holds assistant turns alone"))
    return Example(turns["prompt"], turns["completion"])


def _check_prompt(field: str, prompt: tuple[Message, ...]) -> None:
    if prompt[-1].role != "user":
        raise RowProblems((field, f"the turn before the answer is the user's, received {prompt[-1].role}"))
    if any(message.role == "system" for message in prompt[1:]):
        raise RowProblems((field, "a system turn can only come first"))


def _messages(name: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list):
        kind = "a list of messages" if name == "messages" else "text or a list of messages"
        raise RowProblems((name, f"is {kind}, received {describe(value)}"))
    if not value:
        raise RowProblems((name, "is an empty list"))
    problems = [problem for i, item in enumerate(value) for problem in _message_problems(f"{name}[{i}]", item)]
    if problems:
        raise RowProblems(*problems)
    return tuple(Message(item["role"], item["content"]) for item in value)


def _message_problems(where: str, item: Any) -> list[tuple[str, str]]:
    if not isinstance(item, dict):
        return [(where, f'is {{"role": …, "content": …}}, received {describe(item)}')]
    problems = [(f"{where}.{name}", "is missing") for name in ("role", "content") if name not in item]
    if "role" in item and item["role"] not in ROLES:
        problems.append((f"{where}.role", f"is system, user or assistant, received {describe(item['role'])}"))
    if "content" in item and (message := _content_problem(item["content"])):
        problems.append((f"{where}.content", message))
    return problems


def _content_problem(content: Any) -> str | None:
    if not isinstance(content, str):
        return f"is text, received {describe(content)}"
    if not content.strip():
        return "is empty" if not content else "is only white space"
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which is not text"
    return None
