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

from studio.data.lengths import problem_of
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
    "reward_names",
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
        compares: it compares with the row's own completion, so that a prompt alone is refused.
    """

    build: Callable[[RewardSettings], Score]
    low: float
    high: float
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    compares: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        return (*self.needs, *self.reads)


REWARDS: dict[str, RewardKind] = {
    "exact_match": RewardKind(exact_match, 0, 1, reads=("normalise",), compares=True),
    "json_fields": RewardKind(json_fields, 0, 1, compares=True),
    "json_schema": RewardKind(json_schema, 0, 1, needs=("json_schema",)),
    "regex": RewardKind(regex, 0, 1, needs=("pattern",), reads=("part",)),
    "code": RewardKind(code, 0, 1, reads=("tests", "timeout_seconds", "memory_bytes")),
    "length": RewardKind(length, 0, 1, needs=("longest_characters",)),
    "thinking": RewardKind(thinking, 0, 1),
    "reward_model": RewardKind(reward_model, -math.inf, math.inf, needs=("job",)),
}


def rewards_of(recipe: Recipe) -> list[Reward]:
    """The rewards of a recipe, built.

    Raises:
        RewardError: an option that cannot work.
    """
    found = []
    for name, settings in zip(reward_names(recipe), recipe.rewards, strict=True):
        kind = REWARDS[settings.function]
        found.append(Reward(name, settings.weight, kind.low, kind.high, kind.build(settings)))
    return found


def reward_names(recipe: Recipe) -> list[str]:
    """What the rewards of a recipe are called: by their function, with a number where it has one twice."""
    counts = Counter(settings.function for settings in recipe.rewards)
    used: Counter[str] = Counter()
    names = []
    for settings in recipe.rewards:
        name = str(settings.function)
        used[name] += 1
        names.append(f"{name}_{used[name]}" if counts[settings.function] > 1 else name)
    return names


def check_rewards(recipe: Recipe, rows: Sequence[Row]) -> None:
    """Refuses, before any work, rewards that cannot be computed on these rows; loads no model.

    Raises:
        RewardError: an option that cannot work: a schema that is none, a file or job that is not there.
        DataError: rows that lack what a reward compares with, each with its file and line.
    """
    problems: list[Problem] = []
    for settings in recipe.rewards:
        if settings.function == "reward_model":
            check_reward_model(settings)
        else:
            REWARDS[settings.function].build(settings)
        problems += _row_problems(settings, [row for row in rows if isinstance(row, Example)])
    problems = list(dict.fromkeys(problems))  # a recipe may have a function twice
    if problems:
        raise DataError(problems[:SHOWN_PROBLEMS], max(0, len(problems) - SHOWN_PROBLEMS))


def _row_problems(settings: RewardSettings, rows: Sequence[Example]) -> list[Problem]:
    """What is wrong with the rows for a reward."""
    function = settings.function
    if function == "code":
        return [] if settings.tests else _half_tested(rows)
    if not REWARDS[function].compares:
        return []
    others = ", ".join(name for name, kind in REWARDS.items() if not kind.compares)
    said = f"is a prompt alone, and the reward {function} compares with a completion; add one, or take one of {others}"
    problems = [problem_of(row, "", said) for row in rows if not row.completion]
    if function == "json_fields":
        said = "its completion is no JSON object, which the reward json_fields compares with"
        answers = ((row, parsed(Attempt("", row).reference)) for row in rows if row.completion)
        problems += [problem_of(row, "", said) for row, answer in answers if not isinstance(answer, dict) or not answer]
    return problems


def _half_tested(rows: Sequence[Example]) -> list[Problem]:
    """Rows without tests, where others have some: their reward would mean another thing."""
    without = [row for row in rows if not row.tests]
    said = 'has no "tests", while other rows have; give tests to every row or to none, or to all as rewards[].tests'
    return [] if len(without) == len(rows) else [problem_of(row, "tests", said) for row in without]


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
