"""Direct preference optimisation (arXiv 2305.18290) and its kin through TRL's `DPOTrainer`; the model is there once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from studio.data import Row
from studio.jobs import Job
from studio.recipe import Recipe
from studio.trainers.common import StudioTrainer, finish
from studio.trainers.encoded import dataset, pair
from studio.trainers.preference import prepared
from studio.trainers.reference import as_reference


def train(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, rows: Sequence[Row], job: Job
) -> dict[str, Any]:
    """Trains the adapters of `model` in place, against what they begin with as reference.

    Returns, raises:
        as `studio.trainers.common.finish`; and
        TargetError: the recipe's section `router` asks for what this model cannot have.
    """
    watch, settings, parts = prepared(model, tokenizer, recipe, rows, job, router_aux_loss_coef=0.0)
    data = dataset(recipe, rows, partial(pair, tokenizer, recipe.data.max_length_tokens))
    trainer = _Trainer(
        model=model, ref_model=as_reference(model, recipe), args=DPOConfig(**settings), train_dataset=data, **parts
    )
    trainer.watch = watch
    return finish(trainer)


class _Trainer(StudioTrainer, DPOTrainer):
    def _prepare_dataset(self, dataset: Dataset | IterableDataset, *_: Any) -> Dataset | IterableDataset:
        return dataset
