"""Rewards: numbers for completions that a model wrote, for GRPO, RLOO and rejection sampling. No torch at import.

REWARDS              the functions that a recipe may name, with the range of each and the options that it reads
rewards_of(recipe)   the recipe's rewards, ready to be called
check_rewards(…)     everything that can be known to be wrong before any work
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from studio.data.rows import Example
from studio.errors import SHOWN_PROBLEMS, DataError, Problem
from studio.rewards.model import check_reward_model, reward_model
from studio.rewards.programs import code
from studio.rewards.schemas import json_schema
from studio.rewards.scoring import Attempt, Reward, Score, Scored, answer_of, score_all
from studio.rewards.texts import exact_match, json_fields, length, parsed, regex, thinking

if TYPE_CHECKING:
    from studio.data.rows import Row
    from studio.recipe import Recipe
    from studio.recipe_training import RewardSettings

__all__ = [
    "REWARDS",
    "Attempt",
    "Reward",
    "RewardKind",
    "Scored",
    "answer_of",
    "check_rewards",
    "rewards_of",
    "score_all",
    "unknown_option",
]


@dataclass(frozen=True)
class RewardKind:
    """One function that a recipe may name.

    Attributes:
        build: from the recipe's entry to the function; it raises RewardError for options that cannot work.
        low, high: what its values lie between.
        needs: options that it cannot do without. reads: further ones that it looks at.
    """

    build: Callable[[RewardSettings], Score]
    low: float
    high: float
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()

    @property
    def options(self) -> tuple[str, ...]:
        return (*self.needs, *self.reads)


REWARDS: dict[str, RewardKind] = {
    "exact_match": RewardKind(exact_match, 0, 1, reads=("normalise",)),
    "json_fields": RewardKind(json_fields, 0, 1),
    "json_schema": RewardKind(json_schema, 0, 1, needs=("json_schema",)),
    "regex": RewardKind(regex, 0, 1, needs=("pattern",), reads=("part",)),
    "code": RewardKind(code, 0, 1, reads=("timeout_seconds", "memory_bytes")),
    "length": RewardKind(length, 0, 1, needs=("longest_characters",)),
    "thinking": RewardKind(thinking, 0, 1),
    "reward_model": RewardKind(reward_model, -math.inf, math.inf, needs=("job",)),
}


def rewards_of(recipe: Recipe) -> list[Reward]:
    """The rewards of a recipe, built.

    Raises:
        RewardError: an option that cannot work.
    """
    counts = Counter(settings.function for settings in recipe.rewards)
    used: Counter[str] = Counter()
    found = []
    for settings in recipe.rewards:
        kind, name = REWARDS[settings.function], str(settings.function)
        used[name] += 1
        shown = f"{name}_{used[name]}" if counts[settings.function] > 1 else name
        found.append(Reward(shown, settings.weight, kind.low, kind.high, kind.build(settings)))
    return found


def check_rewards(recipe: Recipe, rows: Sequence[Row], file: str) -> None:
    """Refuses, before any work, rewards that cannot be computed on these rows of `file`; loads no model.

    Raises:
        RewardError: an option that cannot work: a schema that is none, a file or job that is not there.
        DataError: rows that lack what a reward compares with.
    """
    for settings in recipe.rewards:
        if settings.function == "reward_model":
            check_reward_model(settings)
        else:
            REWARDS[settings.function].build(settings)
    functions = {settings.function for settings in recipe.rewards}
    problems: list[Problem] = []
    for function, find in ROW_PROBLEMS.items():
        if function in functions:
            problems += [Problem("", None, message, file) for message in find(rows)]
    if problems:
        raise DataError(problems[:SHOWN_PROBLEMS], max(0, len(problems) - SHOWN_PROBLEMS))


def _no_fields(rows: Sequence[Row]) -> list[str]:
    said = "its completion is no JSON object, which the reward json_fields compares with"
    return [
        f"example {number}: {said}"
        for number, row in enumerate(rows, 1)
        if isinstance(row, Example) and not isinstance(parsed(Attempt("", row).reference), dict)
    ]


def _half_tested(rows: Sequence[Row]) -> list[str]:
    """Rows without tests, where others have some: their reward would mean another thing."""
    without = [number for number, row in enumerate(rows, 1) if isinstance(row, Example) and not row.tests]
    said = 'has no "tests", while other rows have; give tests to every row or to none'
    return [] if len(without) == len(rows) else [f"example {number} {said}" for number in without]


ROW_PROBLEMS: dict[str, Callable[[Sequence[Row]], list[str]]] = {"json_fields": _no_fields, "code": _half_tested}
"""What is wrong with the rows for a reward, in words."""


def unknown_option(settings: RewardSettings) -> str | None:
    """What is wrong with the options of an entry, in words: one that is missing, or one that nothing reads."""
    kind = REWARDS[settings.function]
    if missing := [name for name in kind.needs if getattr(settings, name) is None]:
        return f"the reward {settings.function} needs {' and '.join(missing)}"
    fields = type(settings).model_fields
    for name in fields.keys() - {"function", "weight", *kind.options}:
        if getattr(settings, name) != fields[name].default:
            readers = ", ".join(other for other, entry in REWARDS.items() if name in entry.options)
            return f"{name} is given, but the function is {settings.function}; {name} is read by {readers}"
    return None
