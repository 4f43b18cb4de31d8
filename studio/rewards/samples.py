"""Rewarded completions as the rows that a job keeps to be looked at, and the rewards of held-out answers. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from studio.data.rows import Example, Row
from studio.metrics import Measure, Scores, measure
from studio.rewards.scoring import Attempt, Reward, Scored, score_all

SAMPLES = "samples.jsonl"
"""In the job directory: of each generation the completions of one prompt, with their rewards."""

DIGITS = 6


def as_sample(scored: Scored) -> dict[str, Any]:
    """{"prompt", "completion", "reference", "reward", "rewards": {function: value}}; no reference of a prompt alone."""
    attempt = scored.attempt
    return {
        "prompt": attempt.prompt,
        "completion": attempt.completion,
        "reference": attempt.reference if attempt.row.completion else None,
        "reward": round(scored.total, DIGITS),
        "rewards": {name: round(value, DIGITS) for name, value in scored.each.items()},
    }


def reward_measures(rewards: Sequence[Reward], rows: Sequence[Row], completions: Sequence[str]) -> dict[str, Measure]:
    """ "reward", the weighted total, and "reward/FUNCTION" of each function, of one completion for each row.

    Raises:
        RewardError
    """
    examples = [row for row in rows if isinstance(row, Example)]
    attempts = [Attempt(text, row) for text, row in zip(completions, examples, strict=True)]
    scored = score_all(rewards, attempts)
    columns = {"reward": [one.total for one in scored]}
    columns |= {f"reward/{reward.name}": [one.each[reward.name] for one in scored] for reward in rewards}
    return {name: measure(_scores(values)) for name, values in columns.items()}


def _scores(values: Sequence[float]) -> Scores:
    """As a share where all values are 0 or 1: the error of a mean is 0 where all are alike, Wilson's is not."""
    found = tuple(map(float, values))
    return Scores("share" if set(found) <= {0.0, 1.0} else "mean", "higher", found)
