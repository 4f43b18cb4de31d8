"""What a reward is given, what it gives back, and the weighted sum that a trainer learns from. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from studio.data.rows import Example
from studio.errors import RewardError

SHOWN = 160
"""Characters of a prompt or completion in an error."""


@dataclass(frozen=True)
class Attempt:
    """One completion that a model wrote, and the row of data that it was asked with.

    Attributes:
        completion: its text as decoded, special tokens aside.
        row: the example: its prompt, its reference completion, its tests.
    """

    completion: str
    row: Example

    @property
    def answer(self) -> str:
        return answer_of(self.completion)

    @property
    def prompt(self) -> str:
        """The last turn before the completion."""
        return self.row.prompt[-1].content

    @property
    def reference(self) -> str:
        """The last turn of the row's own completion, its thinking aside; "" of a prompt alone."""
        return answer_of(self.row.completion[-1].content) if self.row.completion else ""


Score = Callable[[Sequence[Attempt]], list[float]]
"""One number for each attempt, in order."""


def answer_of(completion: str) -> str:
    """What comes after the thinking: after the last `</think>`; nothing where a `<think>` was never closed.

    The opening tag may be missing, since some templates write it into the prompt. Without tags all of it is the answer.
    """
    _, closed, answer = completion.rpartition("</think>")
    if closed:
        return answer.strip()
    return "" if completion.lstrip().startswith("<think>") else completion


def each(score: Callable[[Attempt], float]) -> Score:
    """A reward that looks at one attempt at a time; its exception names the attempt."""

    def scores(attempts: Sequence[Attempt]) -> list[float]:
        found = []
        for attempt in attempts:
            try:
                found.append(float(score(attempt)))
            except RewardError:
                raise
            except Exception as error:
                raise failed(f"{type(error).__name__}: {error}", attempt) from error
        return found

    return scores


def failed(what: str, attempt: Attempt) -> RewardError:
    """The error of a reward that has no number for this attempt."""
    place = attempt.row.place
    row = f"{place.file} {place.counted} {place.line}, " if place else ""
    reference = f"reference {_shown(attempt.reference)}" if attempt.row.completion else "no reference"
    return RewardError(
        f"{what}. Row: {row}prompt {_shown(attempt.prompt)}, {reference}; completion {_shown(attempt.completion)}"
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}…")


@dataclass(frozen=True)
class Reward:
    """One entry of the recipe's `rewards`, ready to be called.

    Attributes:
        name: of the function, with a number where a recipe has it twice: it names the columns that are logged.
        low, high: the range that its values lie in.
    """

    name: str
    weight: float
    low: float
    high: float
    score: Score

    def __call__(self, attempts: Sequence[Attempt]) -> list[float]:
        """
        Raises:
            RewardError: it failed, or gave a value that is no number or out of its range; with the row.
        """
        try:
            values = self.score(attempts)
        except RewardError as error:
            raise RewardError(f"the reward {self.name} failed: {error}") from error
        if len(values) != len(attempts):
            raise RewardError(f"the reward {self.name} gave {len(values)} values for {len(attempts)} completions")
        for value, attempt in zip(values, attempts, strict=True):
            if not (math.isfinite(value) and self.low <= value <= self.high):
                raise failed(f"the reward {self.name} gave {value}; allowed: {self.low:g} to {self.high:g}", attempt)
        return values


@dataclass(frozen=True)
class Scored:
    """Rewards of one attempt: of each function, by name, and their weighted sum."""

    attempt: Attempt
    each: dict[str, float]
    total: float


def score_all(rewards: Sequence[Reward], attempts: Sequence[Attempt]) -> list[Scored]:
    """Every reward of every attempt.

    Raises:
        RewardError: as `Reward`.
    """
    columns = {reward.name: reward(attempts) for reward in rewards}
    weights = {reward.name: reward.weight for reward in rewards}
    found = []
    for place, attempt in enumerate(attempts):
        values = {name: column[place] for name, column in columns.items()}
        found.append(Scored(attempt, values, sum(weights[name] * value for name, value in values.items())))
    return found
