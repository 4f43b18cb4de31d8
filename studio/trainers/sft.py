"""Supervised fine-tuning, and continued pretraining on plain text, through TRL's `SFTTrainer`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from studio.data import Row
from studio.jobs import Job
from studio.recipe import Recipe
from studio.trainers.chunked_loss import use_small_tiles
from studio.trainers.common import StudioTrainer, callbacks, finish, options
from studio.trainers.encoded import dataset, labelled_tokens
from studio.trainers.llama4 import repair_for_trl
from studio.trainers.packing import PackedRows
from studio.trainers.router import watch_router


def train(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, rows: Sequence[Row], job: Job
) -> dict[str, Any]:
    """Trains the adapters of `model` in place.

    Returns, raises:
        as `studio.trainers.common.finish`; and
        TargetError: the recipe's section `router` asks for what this model cannot have.
    """
    watch = watch_router(model, tokenizer, recipe, rows, job)
    use_small_tiles()
    repair_for_trl(cast(PreTrainedModel, model.get_base_model()))
    limit = recipe.data.max_length_tokens
    settings = options(
        recipe,
        job,
        max_length=limit,
        router_aux_loss_coef=0.0,  # the studio's own losses on the routing are in studio/trainers/router.py
    )
    trainer = _Trainer(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=dataset(recipe, rows, partial(labelled_tokens, tokenizer, limit, recipe.training.loss_on)),
        processing_class=tokenizer,
        callbacks=callbacks(recipe, job, watch),
    )
    trainer.watch = watch
    if settings.get("packing"):
        trainer.data_collator = PackedRows(int(tokenizer.pad_token_id))
    return finish(trainer)


class _Trainer(StudioTrainer, SFTTrainer):
    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "real_tokens" in inputs and model.training:  # TRL counts one row of a packed batch
            self._total_train_tokens += int(inputs["real_tokens"].sum()) - inputs["position_ids"].shape[1]
        return super().compute_loss(model, inputs, *args, **kwargs)
