"""What DPO, KTO, ORPO and CPO do alike around TRL's trainers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from studio.data import Row, held_out_rows, wanted_sequences
from studio.encoding import encode
from studio.jobs import Job
from studio.preference import TokenIds, reference_kl
from studio.preference_losses import options_of
from studio.recipe import Recipe
from studio.trainers.chunked_loss import use_small_tiles
from studio.trainers.common import callbacks, options
from studio.trainers.llama4 import repair_for_trl
from studio.trainers.router import RouterWatch, watch_router

PROBE_EXAMPLES = 8

LOGGED = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"
)  # fmt: skip
"""Of a method's own values, those that are kept in metrics.jsonl, with an underscore for the slash."""


def prepared(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, rows: Sequence[Row], job: Job, **method: Any
) -> tuple[RouterWatch | None, dict[str, Any], dict[str, Any]]:
    """(the watch over the routing, options of TRL's class, what its trainer is made with beside the data).

    Raises:
        TargetError: the recipe's section `router` asks for what this model cannot have.
    """
    watch = watch_router(model, tokenizer, recipe, rows, job)
    use_small_tiles()
    repair_for_trl(cast(PreTrainedModel, model.get_base_model()))
    ours = {**options_of(recipe.training.method, recipe.preference), "max_length": recipe.data.max_length_tokens}
    settings = options(recipe, job, **{**ours, **method})
    told = [*callbacks(recipe, job, watch, LOGGED), ReferenceKl(model, probe(tokenizer, recipe, rows), job)]
    return watch, settings, {"processing_class": tokenizer, "callbacks": told}


def probe(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, rows: Sequence[Row]) -> list[TokenIds]:
    """The first held-out answers that are wanted (training ones where there are no others), for the KL."""
    found = wanted_sequences((held_out_rows(recipe) or rows)[:PROBE_EXAMPLES])
    return [encode(tokenizer, sequence, recipe.data.max_length_tokens) for sequence in found]


class ReferenceKl(TrainerCallback):
    """Writes {"kind": "reference", "step", "kl"} at each logging step: how far the policy is from the base.

    Args:
        probe: the same answers each time; `kl` is the mean over their tokens.
    """

    def __init__(self, model: PeftModel, probe: list[TokenIds], job: Job):
        self.model, self.probe, self.job = model, probe, job

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs and self.probe:
            kl = reference_kl(self.model, self.probe)
            self.job.log_metrics({"kind": "reference", "step": state.global_step, "kl": kl})
