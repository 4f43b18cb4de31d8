"""Rows of data, from JSON Lines files.

A row is one of
    {"messages": [{"role": "user", "content": "…"}, …, {"role": "assistant", "content": "…"}]}
    {"prompt": "…" or [messages], "completion": "…" or [messages]}, with "label": true or false a Labelled row
    {"prompt": "…" or [messages], "chosen": "…" or [messages], "rejected": "…" or [messages]}
    {"text": "…"}
and becomes the Row that studio/data/rows.py has for it. A row may name its data source with "source": "…", up to 60
characters; without it, that is the file's name. A conversation may have "tests": ["assert …"], for the reward `code`.
A file is checked to its end: its first 20 problems are reported together, and nothing is started.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from studio.data.rows import Example, Labelled, Message, PlainText, Preference, Row, RowKind
from studio.errors import SHOWN_PROBLEMS, DataError, Problem
from studio.recipe_text import describe

ROLES = ("system", "user", "assistant")

LONGEST_SOURCE = 60
RESERVED_SOURCES = ("all", "all sources")
"""What tables and pictures call all sources together."""

KINDS: dict[RowKind, str] = {
    "example": "a conversation",
    "text": "plain text",
    "preference": "a preference pair",
    "labelled": "a labelled completion",
}


class RowProblems(Exception):
    """What is wrong with one row, as (field, message) pairs; `read_examples` adds the line."""

    def __init__(self, *problems: tuple[str, str]):
        self.problems = problems


def read_examples(path: Path | str) -> list[Example]:
    """Every example in the JSON Lines file at `path`, in file order. Blank lines are passed over.

    Raises:
        DataError: no such file, an empty file, or any row that is no conversation or cannot be trained on.
    """
    return cast(list[Example], read_rows(path, ("example",)))


def read_rows(path: Path | str, kinds: Sequence[RowKind]) -> list[Row]:
    """Every row of the file at `path`, in file order, all of one of the `kinds` that a training method reads.

    Raises:
        DataError: no such file, an empty file, a row of another kind, or one that cannot be trained on.
    """
    return read_all(path, kinds=kinds)[0]


def read_all(*paths: Path | str | None, kinds: Sequence[RowKind] = ("example",)) -> list[list[Row]]:
    """The rows of several files, with the problems of all files in one error. None gives an empty list.

    Raises:
        DataError: as `read_rows`.
    """
    checked = [check_rows(path, kinds) if path else ([], []) for path in paths]
    shown = [problem for _, problems in checked for problem in problems[:SHOWN_PROBLEMS]]
    if shown:
        raise DataError(shown, hidden_count=sum(len(problems) for _, problems in checked) - len(shown))
    return [rows for rows, _ in checked]


def check_rows(path: Path | str, kinds: Sequence[RowKind] = ("example",)) -> tuple[list[Row], list[Problem]]:
    """The good rows of the file at `path` and the problems of all others."""
    rows: list[Row] = []
    problems: list[Problem] = []
    file = str(path)
    try:
        for number, line in _lines(Path(path)):
            try:
                rows.append(_row(line, Path(path).stem, kinds))
            except RowProblems as row:
                problems += [Problem(field, number, message, file) for field, message in row.problems]
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        problems.append(Problem("", None, f"cannot be read: {reason}", file))
    if not rows and not problems:
        problems.append(Problem("", None, "the file is empty; it needs at least one row", file))
    return rows, problems


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield number, line


def _row(line: bytes, file_name: str, kinds: Sequence[RowKind]) -> Row:
    """The row; its source is `file_name` where it names none."""
    values = _json_object(line)
    row = _from_row(values)
    if row.kind not in kinds:
        wanted = " or ".join(KINDS[kind] for kind in kinds)
        raise RowProblems(("", f"is {KINDS[row.kind]}; this training method reads {wanted}"))
    row = replace(row, source=_source(values.get("source"), file_name))
    return replace(row, tests=_tests(values["tests"])) if isinstance(row, Example) and "tests" in values else row


def _tests(value: Any) -> tuple[str, ...]:
    """The row's tests; data sets use the key for other things too: what is no list is passed over."""
    if not isinstance(value, list):
        return ()
    if not value or not all(isinstance(test, str) and test.strip() for test in value):
        raise RowProblems(("tests", 'is a list of Python statements, such as ["assert f(2) == 4"]'))
    return tuple(value)


def _source(named: Any, file_name: str) -> str:
    """The name of a row's data source. Data sets use the key for other things too: what is no text is passed over."""
    name = named.strip() if isinstance(named, str) and named.isprintable() else ""
    name = (name or file_name)[:LONGEST_SOURCE]
    return f"{name} (source)" if name in RESERVED_SOURCES else name


def _from_row(row: dict[str, Any]) -> Row:
    if "messages" in row and ("prompt" in row or "completion" in row):
        raise RowProblems(("", "has both messages and prompt/completion; keep one of the two forms"))
    if "messages" in row:
        return _from_messages(row["messages"])
    if "chosen" in row or "rejected" in row:
        return _preference(*(_given(row, "prompt", "chosen", "rejected")))
    if "text" in row and "prompt" not in row:
        return _text(row["text"])
    if "prompt" not in row and "completion" not in row:
        found = ", ".join(list(row)[:6]) or "nothing"
        raise RowProblems(("", f"needs messages, or prompt and completion; received {found}"))
    example = _from_pair(*_given(row, "prompt", "completion"))
    if "label" not in row:
        return example
    if not isinstance(row["label"], bool):
        raise RowProblems(("label", f"is true or false, received {describe(row['label'])}"))
    return Labelled(example.prompt, example.completion, row["label"])


def _given(row: dict[str, Any], *names: str) -> list[Any]:
    if missing := [name for name in names if name not in row]:
        raise RowProblems(*((name, "is missing") for name in missing))
    return [row[name] for name in names]


def _text(value: Any) -> PlainText:
    if message := _content_problem(value):
        raise RowProblems(("text", message))
    return PlainText(value)


def _preference(prompt: Any, chosen: Any, rejected: Any) -> Preference:
    better, worse = _from_pair(prompt, chosen, "chosen"), _from_pair(prompt, rejected, "rejected")
    if better.completion == worse.completion:
        raise RowProblems(("rejected", "is the same as chosen; there is nothing to prefer"))
    return Preference(better.prompt, better.completion, worse.completion)


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


def _from_pair(prompt: Any, completion: Any, name: str = "completion") -> Example:
    problems: list[tuple[str, str]] = []
    turns: dict[str, tuple[Message, ...]] = {}
    for part, value, role in (("prompt", prompt, "user"), (name, completion, "assistant")):
        try:
            turns[part] = _messages(part, [{"role": role, "content": value}] if isinstance(value, str) else value)
        except RowProblems as error:
            as_text = isinstance(value, str)
            problems += [(part if as_text else field, message) for field, message in error.problems]
    if problems:
        raise RowProblems(*problems)
    _check_prompt("prompt", turns["prompt"])
    if any(message.role != "assistant" for message in turns[name]):
        raise RowProblems((name, "holds assistant turns alone"))
    return Example(turns["prompt"], turns[name])


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
