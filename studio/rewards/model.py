"""A trained reward model as a reward. No torch at import: the model is loaded when the first completion is scored."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from studio.errors import RewardError
from studio.rewards.scoring import Score

if TYPE_CHECKING:
    from studio.recipe import RewardSettings


def reward_model(settings: RewardSettings) -> Score:
    raise NotImplementedError


def check_reward_model(settings: RewardSettings) -> None:
    raise NotImplementedError
