"""From YAML text to plain values, keeping the line of every key.

ruamel.yaml's round-trip loader gives the line marks; what leaves this module are dicts, lists and scalars. Anchors,
aliases and tags are refused: a recipe is complete and reads top to bottom.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent, NodeEvent

from studio.errors import Problem, RecipeError

MAX_CHARACTERS = 200_000
MAX_DEPTH = 20


def read_mapping(text: str, source: str | None) -> tuple[dict[str, Any], CommentedMap]:
    """The values of the YAML mapping `text`, and the marked mapping that `line_of` reads.

    Raises:
        RecipeError: not YAML, not one mapping, a duplicate key, an anchor, alias or tag.
    """
    if len(text) > MAX_CHARACTERS:
        raise _refused(f"the text has {len(text):,} characters, a recipe has at most {MAX_CHARACTERS:,}", None, source)
    try:
        _refuse_unusual(text, source)
        marked = YAML().load(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise _refused(f"not valid YAML: {error.problem or error.context}", line, source) from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise _refused(f"not valid YAML: {str(error).splitlines()[0]}", None, source) from None
    if not isinstance(marked, CommentedMap):
        raise _refused(f"a recipe is a mapping of sections, received {describe(plain(marked))}", None, source)
    return plain(marked), marked


def line_of(marked: CommentedMap, location: Sequence[str | int]) -> int | None:
    """1-based line of the key or list item at `location`, or of the nearest section that holds it."""
    node: Any = marked
    line: int | None = None
    for step in location:
        if isinstance(node, CommentedMap) and step in node:
            line = node.lc.key(step)[0] + 1
        elif isinstance(node, CommentedSeq) and isinstance(step, int) and step < len(node):
            line = node.lc.item(step)[0] + 1
        else:
            break
        node = node[step]
    return line


def plain(node: Any) -> Any:
    """`node` without ruamel's subclasses of dict, list, float and int."""
    if isinstance(node, dict):
        return {plain(key): plain(value) for key, value in node.items()}
    if isinstance(node, CommentedSeq | list):
        return [plain(value) for value in node]
    if isinstance(node, bool):
        return node
    for kind in (int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def describe(value: Any) -> str:
    """A value as an error message names it: its kind, and itself where that is short."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, str):
        return f'the text "{value}"' if len(value) <= 40 else f'the text "{value[:40]}…"'
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return f"a {type(value).__name__}"


def _refuse_unusual(text: str, source: str | None) -> None:
    depth = 0
    for event in YAML().parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > MAX_DEPTH:  # at once: the scanner takes minutes over a text of opening brackets
            raise _refused(f"is nested more than {MAX_DEPTH} levels deep", event.start_mark.line + 1, source)
        if not isinstance(event, NodeEvent):
            continue
        tag = getattr(event, "tag", None)
        if event.anchor is not None or tag is not None:
            what = f'the tag "{tag}"' if event.anchor is None else f'the anchor or alias "{event.anchor}"'
            line = event.start_mark.line + 1
            raise _refused(f"{what} is not allowed: write the value itself", line, source)


def _refused(message: str, line: int | None, source: str | None) -> RecipeError:
    return RecipeError([Problem("", line, message, source)])
