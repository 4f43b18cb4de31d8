"""A reward model from preference pairs (Bradley-Terry) through TRL's `RewardTrainer`, with a head of our own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from studio.data import Row
from studio.jobs import Job
from studio.recipe import Recipe
from studio.reward_model import RewardModel
from studio.trainers.common import StudioTrainer, callbacks, finish, options
from studio.trainers.encoded import dataset, whole_pair
from studio.trainers.router import watch_router

LOGGED = ("accuracy", "margin", "mean_reward", "min_reward", "max_reward")


def train(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, rows: Sequence[Row], job: Job
) -> dict[str, Any]:
    """Trains the adapters and the reward head of `model` in place.

    Returns, raises:
        as `studio.trainers.common.finish`; and
        TargetError: the recipe's section `router` asks for what this model cannot have.
    """
    watch = watch_router(model, tokenizer, recipe, rows, job)
    limit = recipe.data.max_length_tokens
    trainer = _Trainer(
        model=cast(PreTrainedModel, RewardModel(model)),
        args=RewardConfig(**options(recipe, job, max_length=limit)),
        train_dataset=dataset(recipe, rows, partial(whole_pair, tokenizer, limit)),
        processing_class=tokenizer,
        callbacks=callbacks(recipe, job, watch, LOGGED),
    )
    trainer.watch = watch
    return finish(trainer)


class _Trainer(StudioTrainer, RewardTrainer):
    pass
