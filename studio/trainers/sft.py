"""Supervised fine-tuning through TRL's `SFTTrainer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from studio.data import Example
from studio.jobs import Job
from studio.recipe import Recipe
from studio.trainers.chunked_loss import use_small_tiles
from studio.trainers.common import StudioTrainer, callbacks, finish, options, training_dataset
from studio.trainers.llama4 import repair_for_trl
from studio.trainers.router import watch_router


def train(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, rows: Sequence[Example], job: Job
) -> dict[str, Any]:
    """Trains the adapters of `model` in place.

    Returns, raises:
        as `studio.trainers.common.finish`; and
        TargetError: the recipe's section `router` asks for what this model cannot have.
    """
    watch = watch_router(model, tokenizer, recipe, rows, job)
    use_small_tiles()
    repair_for_trl(cast(PreTrainedModel, model.get_base_model()))
    settings = options(
        recipe,
        job,
        completion_only_loss=recipe.training.loss_on == "completion",
        max_length=recipe.data.max_length_tokens,
        router_aux_loss_coef=0.0,  # the studio's own losses on the routing are in studio/trainers/router.py
    )
    trainer = _Trainer(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=training_dataset(recipe, rows),
        processing_class=tokenizer,
        callbacks=callbacks(job, watch),
    )
    trainer.watch = watch
    return finish(trainer)


class _Trainer(StudioTrainer, SFTTrainer):
    pass
