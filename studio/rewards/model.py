"""A trained reward model as a reward. No torch at import: the model is loaded when the first completion is scored.

The job of a reward model leaves a head beside its adapter (studio/reward_model.py), and merged it is a model directory
with a head (studio/score_head.py). Either is loaded once more, beside the model in training, and only to be read from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.checkpoint import read_json_object
from studio.data.rows import Example, Message
from studio.errors import CheckpointError, JobError, RewardError
from studio.jobs import open_job
from studio.methods import REWARD_HEAD
from studio.rewards.scoring import Attempt, Score

if TYPE_CHECKING:
    from studio.recipe_training import RewardSettings

Scorer = Callable[[Sequence[Example]], list[float]]
"""One score for each conversation: higher is better, in units of the reward model's own."""


def reward_model(settings: RewardSettings) -> Score:
    """The score of the prompt with the whole completion, thinking included, as the reward model gives it."""
    assert settings.job is not None
    job = settings.job

    def scores(attempts: Sequence[Attempt]) -> list[float]:
        return load_scorer(job)([_conversation(attempt) for attempt in attempts])

    return scores


def _conversation(attempt: Attempt) -> Example:
    return replace(attempt.row, completion=(Message("assistant", attempt.completion),), kind="example")


@cache
def load_scorer(directory: Path) -> Scorer:
    """The reward model of a job directory, or of a merged model's, loaded at the first call and kept.

    Raises:
        StudioError: base, adapter or head are not there, or are not of each other.
    """
    from studio.rewards.scorer import merged_scorer, scorer

    return merged_scorer(directory) if is_merged(directory) else scorer(directory)


def is_merged(directory: Path) -> bool:
    """Whether a directory holds a merged model with a head."""
    try:
        return "reward_head" in read_json_object(directory / "config.json")
    except CheckpointError:
        return False


def check_reward_model(settings: RewardSettings) -> None:
    """Looks for the job, its adapter and its head, without loading any.

    Raises:
        RewardError: one is not there.
    """
    assert settings.job is not None
    if is_merged(settings.job):
        return
    try:
        job = open_job(settings.job)
    except JobError as error:
        raise RewardError(f"reward_model: {error}") from None
    if not (job.path / "adapter" / REWARD_HEAD).is_file():
        raise RewardError(
            f"reward_model: {job.path / 'adapter'} holds no {REWARD_HEAD}; expected the finished job of a reward "
            "model, or what studio merge makes of one"
        )
