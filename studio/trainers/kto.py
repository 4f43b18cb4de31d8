"""Kahneman-Tversky optimisation (arXiv 2402.01306) through TRL's `KTOTrainer`; no second copy of the model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from studio.data import Row
from studio.data.rows import sides_apart
from studio.jobs import Job
from studio.recipe import Recipe
from studio.trainers.common import StudioTrainer, finish
from studio.trainers.encoded import dataset, labelled_answer
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
    sides = list(sides_apart(rows))
    if not recipe.data.ordered:  # TRL takes them as they come
        random.Random(recipe.training.seed).shuffle(sides)
    data = dataset(recipe, sides, partial(labelled_answer, tokenizer, recipe.data.max_length_tokens))
    trainer = _Trainer(
        model=model, ref_model=as_reference(model, recipe), args=KTOConfig(**settings), train_dataset=data, **parts
    )
    trainer.watch = watch
    return finish(trainer)


class _Trainer(StudioTrainer, KTOTrainer):
    def _prepare_dataset(
        self, dataset: Dataset | IterableDataset, _tokenizer: Any, args: KTOConfig, *_: Any
    ) -> Dataset | IterableDataset:
        """Each row gets the answer of the row before it in its batch: from such mismatches the KL is estimated.

        The first of a batch gets that of the last, and a row that is alone in the last batch that of the batch before:
        its own, as TRL has it, would be no mismatch.
        """
        if not self.calculate_KL:
            return dataset
        before: list[list[int]] = []

        def mismatched(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            answers = batch["completion_ids"]
            first = before.pop() if len(answers) == 1 and before else answers[-1]
            before[:] = answers[-1:]
            return {"KL_completion_ids": [first, *answers[:-1]]}

        return dataset.map(mismatched, batched=True, batch_size=args.per_device_train_batch_size)
