"""Rewards that look at the text alone: exact match, regular expression, length, the form of the thinking. No torch."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from studio.rewards.scoring import Attempt, Score, each

if TYPE_CHECKING:
    from studio.recipe_training import RewardSettings

NOT_JSON = object()


def parsed(text: str) -> Any:
    """The JSON value that `text` is, white space around it aside; NOT_JSON where it is none.

    NaN and Infinity, and a key that comes twice, are not JSON here, whatever Python's reader takes.
    """

    def refuse(_constant: str) -> None:
        raise ValueError

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError
        return dict(pairs)

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return NOT_JSON


def _lenient(text: str) -> str:
    words = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return words.strip(".,;:!?'\"` ")


def _json(text: str) -> str:
    """As a text that equal values share: key order and white space aside; 1 and 1.0 differ, as do true and 1."""
    value = parsed(text)
    return text if value is NOT_JSON else json.dumps(value, sort_keys=True)


NORMALISED: dict[str, Callable[[str], str]] = {"ends": str.strip, "lenient": _lenient, "json": _json}
"""`rewards[].normalise` → what is compared. ends: white space at both ends is passed over. lenient: also case,
Unicode form (NFKC), runs of white space, and punctuation at the ends. json: equal JSON values."""


def exact_match(settings: RewardSettings) -> Score:
    """1 where the answer is the reference, after `normalise`; else 0."""
    normal = NORMALISED[settings.normalise]

    def score(attempt: Attempt) -> float:
        if not attempt.row.completion:
            raise ValueError("the row is a prompt alone, and exact_match compares with a completion")
        return float(normal(attempt.answer) == normal(attempt.reference))

    return each(score)


def json_fields(settings: RewardSettings) -> Score:
    """The share of the reference's top-level fields that the answer has with the same value; an answer that is no JSON
    object, or has fields that the reference has not, gets 0."""

    def score(attempt: Attempt) -> float:
        wanted, answer = parsed(attempt.reference), parsed(attempt.answer)
        if not isinstance(wanted, dict) or not wanted:
            raise ValueError("the row's reference is no JSON object with fields, which json_fields compares with")
        if not isinstance(answer, dict) or answer.keys() - wanted.keys():
            return 0.0
        return sum(name in answer and _same(answer[name], value) for name, value in wanted.items()) / len(wanted)

    return each(score)


def _same(left: Any, right: Any) -> bool:
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def regex(settings: RewardSettings) -> Score:
    """1 where the pattern is found in the answer (or, with part: completion, anywhere); else 0."""
    pattern = re.compile(settings.pattern or "")
    whole = settings.part == "completion"
    return each(lambda attempt: float(bool(pattern.search(attempt.completion if whole else attempt.answer))))


def length(settings: RewardSettings) -> Score:
    """1 up to `longest_characters` of the answer, then falling in a line to 0 at twice that."""
    longest = settings.longest_characters or 1
    return each(lambda attempt: min(1.0, max(0.0, 2 - len(attempt.answer) / longest)))


def thinking(settings: RewardSettings) -> Score:
    """1 where the completion is one closed think block (its opening tag may stand in the prompt) and then an answer."""

    def score(attempt: Attempt) -> float:
        text = attempt.completion.strip()
        once = text.count("</think>") == 1 and text.count("<think>") <= 1
        return float(once and text.find("<think>") <= 0 and bool(attempt.answer))

    return each(score)
