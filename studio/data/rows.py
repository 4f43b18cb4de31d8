"""What a row of data is, whatever file and form it came from.

    Example       a prompt that ends with the user's turn, and its completion      SFT, GRPO, RLOO (as reference)
                  the prompt alone, of kind "prompt"                               GRPO, RLOO, rejection sampling
    PlainText     text without turns                                               continued pretraining
    Preference    a prompt, a better and a worse completion                        DPO, ORPO, CPO, reward models
    Labelled      a prompt, a completion, and whether it is wanted                 KTO

Each row knows its `place`, for what is said about it later; two rows that differ in it alone are equal.

What a model reads is a *sequence*, an Example or a PlainText; `sequences` says which ones a row stands for. Plans,
profiles, the router's probe and the held-out loss work on sequences, whatever the training method.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

RowKind = Literal["example", "text", "preference", "labelled", "prompt"]


class Place(NamedTuple):
    """Where a row stands: its file, and the 1-based line in it, or row where the file has no lines (`counted`)."""

    file: str
    line: int
    counted: str = "line"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: system, user, assistant or tool.
        content: text; empty only where the turn calls tools.
        thinking: an assistant's reasoning before the answer, for templates that read `reasoning_content`.
        tool_calls: an assistant's calls, each {"type": "function", "function": {"name": …, "arguments": {…}}}.
        name: of the tool that answers.
        learned: of an assistant's turn before the last one: whether `training.loss_on: assistant` learns it.
    """

    role: str
    content: str
    thinking: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    name: str = ""
    learned: bool = True

    def as_turn(self) -> dict[str, Any]:
        """The turn as chat templates read it, some of which call the reasoning thinking; what is empty is left out."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.thinking:
            turn["reasoning_content"] = turn["thinking"] = self.thinking
        if self.tool_calls:
            turn["tool_calls"] = [dict(call) for call in self.tool_calls]
        if self.name:
            turn["name"] = self.name
        if not self.learned:
            turn["weight"] = 0
        return turn


Turns = tuple[Message, ...]


@dataclass(frozen=True)
class Example:
    """A prompt that ends with the user's (or a tool's) turn, the completion of it, and the data source it is from.

    Attributes:
        completion: () where the row is a prompt alone, whose kind is then "prompt".
        tools: JSON schemas of the tools that the conversation may call.
        tests: Python statements that the completion's program must survive, for the reward `code`.
    """

    prompt: Turns
    completion: Turns
    source: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    tests: tuple[str, ...] = ()

    kind: RowKind = "example"
    place: Place | None = field(default=None, compare=False, repr=False)

    @property
    def turns(self) -> Turns:
        return (*self.prompt, *self.completion)

    def as_row(self) -> dict[str, Any]:
        """The example as TRL's conversational prompt-completion row."""
        row: dict[str, Any] = {"prompt": as_turns(self.prompt), "completion": as_turns(self.completion)}
        return row | _tools_of(self)


@dataclass(frozen=True)
class PlainText:
    """Text as it stands, every token of which is learned."""

    text: str
    source: str = ""

    kind: RowKind = "text"
    place: Place | None = field(default=None, compare=False, repr=False)

    def as_row(self) -> dict[str, Any]:
        """The text as TRL's language modelling row."""
        return {"text": self.text}


Sequence = Example | PlainText


@dataclass(frozen=True)
class Preference:
    """A prompt, the completion that is preferred, and the one that is not; the two differ."""

    prompt: Turns
    chosen: Turns
    rejected: Turns
    source: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()

    kind: RowKind = "preference"
    place: Place | None = field(default=None, compare=False, repr=False)

    def as_row(self) -> dict[str, Any]:
        """The pair as TRL's conversational preference row with an explicit prompt."""
        return {name: as_turns(getattr(self, name)) for name in ("prompt", "chosen", "rejected")} | _tools_of(self)


@dataclass(frozen=True)
class Labelled:
    """A prompt, a completion, and whether it is wanted (`label`)."""

    prompt: Turns
    completion: Turns
    label: bool
    source: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()

    kind: RowKind = "labelled"
    place: Place | None = field(default=None, compare=False, repr=False)

    def as_row(self) -> dict[str, Any]:
        """The row as TRL's unpaired preference form."""
        row: dict[str, Any] = {"prompt": as_turns(self.prompt), "completion": as_turns(self.completion)}
        return {**row, "label": self.label} | _tools_of(self)


Row = Example | PlainText | Preference | Labelled


def _tools_of(row: Example | Preference | Labelled) -> dict[str, Any]:
    return {"tools": [dict(tool) for tool in row.tools]} if row.tools else {}


def row_of(values: Mapping[str, Any]) -> Row:
    """What `as_row` was made of, but for its source; with the `Place` under the key "place", if there is one."""
    tools, place = tuple(values.get("tools") or ()), values.get("place")
    turns: dict[str, Any] = {name: tuple(map(_message, values[name])) for name in _SIDES if name in values}
    if "text" in values:
        return PlainText(values["text"], place=place)
    if "chosen" in values:
        return Preference(**turns, tools=tools, place=place)
    if "label" in values:
        return Labelled(**turns, label=values["label"], tools=tools, place=place)
    return Example(**turns, tools=tools, place=place)


_SIDES = ("prompt", "completion", "chosen", "rejected")


def _message(turn: Mapping[str, Any]) -> Message:
    thinking, calls = turn.get("reasoning_content") or "", tuple(turn.get("tool_calls") or ())
    return Message(turn["role"], turn["content"], thinking, calls, turn.get("name") or "", turn.get("weight") != 0)


def as_turns(messages: Turns) -> list[dict[str, Any]]:
    """Messages as chat templates read them."""
    return [message.as_turn() for message in messages]


def sequences(rows: Iterable[Row]) -> list[Sequence]:
    """What a model reads of the rows, in order: of a pair first the preferred conversation, then the other."""
    return [_example(row) if isinstance(row, Labelled) else row for row in sides_apart(rows)]


def sides_apart(rows: Iterable[Row]) -> Iterator[Example | PlainText | Labelled]:
    """The rows with each pair as two labelled ones: first the side that is wanted, then the other."""
    for row in rows:
        if isinstance(row, Preference):
            yield Labelled(row.prompt, row.chosen, True, row.source, row.tools, place=row.place)
            yield Labelled(row.prompt, row.rejected, False, row.source, row.tools, place=row.place)
        else:
            yield row


def wanted_sequences(rows: Iterable[Row]) -> list[Sequence]:
    """The sequences that a model should come to write: a pair's preferred side, labelled rows that are wanted.

    Nothing of a prompt alone.
    """
    return [sequence for sequence in asked_sequences(rows) if isinstance(sequence, PlainText) or sequence.completion]


def asked_sequences(rows: Iterable[Row]) -> list[Sequence]:
    """What a model is measured on: the wanted sequences, and prompts alone, which it answers without a reference."""
    return [_example(row) if isinstance(row, Labelled) else row for row in sides_apart(rows) if _is_wanted(row)]


def _is_wanted(row: Row) -> bool:
    return row.label if isinstance(row, Labelled) else True


def _example(row: Labelled) -> Example:
    return Example(row.prompt, row.completion, row.source, row.tools, place=row.place)
