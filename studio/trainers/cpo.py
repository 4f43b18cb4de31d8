"""Contrastive preference optimisation (arXiv 2401.08417) and SimPO (arXiv 2405.14734), by TRL; without a reference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl.experimental.cpo.cpo_config import CPOConfig
from trl.experimental.cpo.cpo_trainer import CPOTrainer

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
    own = {"remove_unused_columns": False, **_alone(recipe)}
    watch, settings, parts = prepared(model, tokenizer, recipe, rows, job, **own)
    data = dataset(recipe, rows, partial(side_by_side, tokenizer, recipe.data.max_length_tokens))
    trainer = _Trainer(model=model, args=CPOConfig(**settings), train_dataset=data, **parts)
    trainer.watch = watch
    return finish(trainer)


def _alone(recipe: Recipe) -> dict[str, Any]:
    """SimPO has no likelihood of the chosen answers beside it, which TRL would add; `trl.cpo_alpha` brings it back."""
    return {"cpo_alpha": 0.0} if recipe.preference.loss_type == ("simpo",) else {}


class _Trainer(StudioTrainer, CPOTrainer):
    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        return feature
