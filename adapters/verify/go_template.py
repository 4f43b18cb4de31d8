"""The part of Go's template language that our Modelfiles use, evaluated: to hold them against the Jinja template.

    {{ range .Messages }} … {{ end }}      {{ if eq A B }} … {{ else if eq A B }} … {{ else }} … {{ end }}
    {{ $name := "text" }}      {{ $name = .Role }}      {{ .Content }}      {{ "text" }}

Anything else is refused, so that nothing is passed over in silence. pkg.go.dev/text/template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from adapters.errors import ExportError

ACTION = re.compile(r"\{\{(- )?\s*(.*?)\s*( -)?\}\}", re.DOTALL)
WORD = re.compile(r'"(?:[^"\\]|\\.)*"|\S+')

Words = list[str]
Message = Mapping[str, str]


@dataclass(frozen=True)
class Said:
    """A value that is written out, or kept under a name."""

    value: str
    name: str = ""


@dataclass(frozen=True)
class Range:
    body: list[Node]


@dataclass(frozen=True)
class If:
    """(the two words that must be equal, what is said then), in order; no words: otherwise."""

    branches: list[tuple[Words, list[Node]]]


Node = str | Said | Range | If


def render(template: str, messages: Sequence[Message]) -> str:
    """What Ollama's runner would be given for these messages ({"role", "content"}).

    Raises:
        ExportError: the template uses something that is not in the list above, or does not close what it opens.
    """
    tokens = list(_tokens(template))
    nodes = _block(tokens)
    if tokens:
        raise ExportError(f"the template has {tokens[0]} without a beginning")
    return "".join(_say(nodes, {}, None, messages))


def _tokens(template: str) -> Iterator[str | Words]:
    """Text, and the words of each action."""
    place, trim = 0, False
    for match in ACTION.finditer(template):
        text = template[place : match.start()]
        text = text.lstrip() if trim else text
        yield text.rstrip() if match[1] else text
        yield WORD.findall(match[2])
        place, trim = match.end(), bool(match[3])
    yield template[place:].lstrip() if trim else template[place:]


def _block(tokens: list[str | Words]) -> list[Node]:
    """Takes the nodes up to the {{ end }} or {{ else }} that closes this block from the front of `tokens`."""
    nodes: list[Node] = []
    while tokens and (isinstance(tokens[0], str) or tokens[0][:1] not in (["end"], ["else"])):
        token = tokens.pop(0)
        nodes.append(token if isinstance(token, str) else _node(token, tokens))
    return nodes


def _node(words: Words, tokens: list[str | Words]) -> Node:
    if words == ["range", ".Messages"]:
        body = _block(tokens)
        _closing(tokens, "range")
        return Range(body)
    if words[:2] == ["if", "eq"] and len(words) == 4:
        return _branches(words[2:], tokens)
    if len(words) == 3 and words[1] in (":=", "="):
        return Said(words[2], words[0])
    if len(words) == 1 and words[0] not in ("if", "range"):
        return Said(words[0])
    raise ExportError(f"the template has {{{{ {' '.join(words)} }}}}, which this studio does not know")


def _branches(condition: Words, tokens: list[str | Words]) -> If:
    branches = [(condition, _block(tokens))]
    while (words := _closing(tokens, "if", otherwise=True)) != ["end"]:
        if words != ["else"] and (words[:3] != ["else", "if", "eq"] or len(words) != 5):
            raise ExportError(f"the template has {{{{ {' '.join(words)} }}}}, which this studio does not know")
        branches.append((words[3:], _block(tokens)))
    return If(branches)


def _closing(tokens: list[str | Words], opened: str, otherwise: bool = False) -> Words:
    words = tokens.pop(0) if tokens else []
    if isinstance(words, str) or not (words == ["end"] or (otherwise and words[:1] == ["else"])):
        raise ExportError(f"the template has a {opened} without an end")
    return words


def _say(
    nodes: Sequence[Node], names: dict[str, str], message: Message | None, messages: Sequence[Message]
) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif isinstance(node, Range):
            for each in messages:
                yield from _say(node.body, names, each, messages)
        elif isinstance(node, If):
            holds = (body for words, body in node.branches if not words or _equal(words, names, message))
            yield from _say(next(holds, []), names, message, messages)
        elif node.name:
            names[node.name] = _value(node.value, names, message)
        else:
            yield _value(node.value, names, message)


def _equal(words: Words, names: Mapping[str, str], message: Message | None) -> bool:
    one, two = (_value(word, names, message) for word in words)
    return one == two


def _value(word: str, names: Mapping[str, str], message: Message | None) -> str:
    if word.startswith('"'):
        return str(json.loads(word))
    if word in names:
        return names[word]
    if message is not None and word in (".Role", ".Content"):
        return message[word[1:].lower()]
    raise ExportError(f"the template has {word!r}, which this studio does not know here")
