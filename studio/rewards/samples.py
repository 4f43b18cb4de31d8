"""Rewarded completions as the rows that a job keeps to be looked at, and the rewards of held-out answers. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from studio.data.rows import Example, Row
from studio.rewards.scoring import Attempt, Reward, Scored, score_all

SAMPLES = "samples.jsonl"
"""In the job directory: of each generation the completions of one prompt, with their rewards."""

DIGITS = 6


def as_sample(scored: Scored) -> dict[str, Any]:
    """{"prompt", "completion", "reference", "reward", "rewards": {function: value}}"""
    attempt = scored.attempt
    return {
        "prompt": attempt.prompt,
        "completion": attempt.completion,
        "reference": attempt.reference,
        "reward": round(scored.total, DIGITS),
        "rewards": {name: round(value, DIGITS) for name, value in scored.each.items()},
    }


def mean_rewards(rewards: Sequence[Reward], rows: Sequence[Row], completions: Sequence[str]) -> dict[str, Any]:
    """{"reward": mean total, "rewards": {function: mean}} of one completion for each row.

    Raises:
        RewardError
    """
    examples = [row for row in rows if isinstance(row, Example)]
    attempts = [Attempt(text, row) for text, row in zip(completions, examples, strict=True)]
    scored = score_all(rewards, attempts)
    count = max(1, len(scored))
    return {
        "reward": round(sum(one.total for one in scored) / count, DIGITS),
        "rewards": {
            reward.name: round(sum(one.each[reward.name] for one in scored) / count, DIGITS) for reward in rewards
        },
    }
