"""Odds ratio preference optimisation (arXiv 2403.07691) through TRL's `ORPOTrainer`; there is no reference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl.experimental.orpo.orpo_config import ORPOConfig
from trl.experimental.orpo.orpo_trainer import ORPOTrainer

from studio.data import Row
from studio.jobs import Job
from studio.recipe import Recipe
from studio.trainers.common import StudioTrainer, finish
from studio.trainers.encoded import dataset, side_by_side
from studio.trainers.preference import prepared


def train(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, rows: Sequence[Row], job: Job
) -> dict[str, Any]:
    """Trains the adapters of `model` in place.

    Returns, raises:
        as `studio.trainers.common.finish`; and
        TargetError: the recipe's section `router` asks for what this model cannot have.
    """
    watch, settings, parts = prepared(model, tokenizer, recipe, rows, job, remove_unused_columns=False)
    data = dataset(recipe, rows, partial(side_by_side, tokenizer, recipe.data.max_length_tokens))
    trainer = _Trainer(model=model, args=ORPOConfig(**settings), train_dataset=data, **parts)
    trainer.watch = watch
    return finish(trainer)


class _Trainer(StudioTrainer, ORPOTrainer):
    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        return feature
