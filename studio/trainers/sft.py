"""Supervised fine-tuning through TRL's `SFTTrainer`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.trainer.sft_config import SFTConfig

from studio.data import Example
from studio.errors import TrainingError
from studio.jobs import Job
from studio.models import compute_dtype
from studio.recipe import Recipe
from studio.trainers.chunked_loss import use_small_tiles
from studio.trainers.llama4 import repair_for_trl
from studio.trainers.router import RouterTrainer, watch_router

STEP_SECONDS = 0.5
"""How often the step in state.json is brought up to date; each time is a write that reaches the disk."""


def train(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, examples: Sequence[Example], job: Job
) -> dict[str, Any]:
    """Trains the adapters of `model` in place.

    Returns:
        {"steps": optimizer steps done, "loss": mean training loss}.

    Raises:
        TrainingError: the loss became NaN or infinite, or the routing passed a limit of the recipe; says at which step.
        TargetError: the recipe's section `router` asks for what this model cannot have.
    """
    watch = watch_router(model, tokenizer, recipe, examples, job)
    use_small_tiles()
    repair_for_trl(cast(PreTrainedModel, model.get_base_model()))
    trainer = _FiniteLossTrainer(
        model=model,
        args=_config(recipe, job),
        train_dataset=Dataset.from_list([example.as_row() for example in examples]),
        processing_class=tokenizer,
        callbacks=[_Report(job), *([watch] if watch else [])],
    )
    trainer.watch = watch
    outcome = trainer.train()
    if not all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad):
        raise TrainingError(f"the adapter holds NaN or infinity after step {outcome.global_step}; it was not written")
    return {"steps": outcome.global_step, "loss": outcome.training_loss}


def _config(recipe: Recipe, job: Job) -> SFTConfig:
    training, on_gpu = recipe.training, torch.cuda.is_available()
    ours: dict[str, Any] = {
        "output_dir": str(job.path / "checkpoints"),
        "max_steps": training.max_steps or -1,
        "num_train_epochs": training.epochs or 1.0,
        "per_device_train_batch_size": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.lr_scheduler,
        "warmup_steps": training.warmup_fraction,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "gradient_checkpointing": training.gradient_checkpointing,
        "completion_only_loss": training.loss_on == "completion",
        "max_length": recipe.data.max_length_tokens,
        "seed": training.seed,
        "logging_steps": training.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "router_aux_loss_coef": 0.0,  # the studio's own losses on the routing are in studio/trainers/router.py
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not on_gpu,
        "bf16": on_gpu and compute_dtype(recipe.model.dtype) == "bfloat16",
        "dataloader_pin_memory": on_gpu,
    }
    return SFTConfig(**{**ours, **recipe.trl})


class _FiniteLossTrainer(RouterTrainer):
    """Stops at the first loss that is not finite: Trainer would log it as 0.0, go on and save a NaN adapter."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss).all():
            step = self.state.global_step + 1
            raise TrainingError(
                f"the loss became {loss.item()} at step {step}: training stopped and no adapter was written. "
                f"A learning rate lower than {self.args.learning_rate:g} usually helps"
            )
        return loss


class _Report(TrainerCallback):
    """Writes what Trainer logs into the job's metrics.jsonl, and the step into its state."""

    def __init__(self, job: Job):
        self.job = job
        self.last = (time.monotonic(), 0)
        self.shown = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.last = (time.monotonic(), 0)
        self.job.update(phase="training", step=0, total_steps=state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        tokens, now = int(logs.get("num_tokens", 0)), time.monotonic()
        rate = (tokens - self.last[1]) / max(now - self.last[0], 1e-9)
        self.last = (now, tokens)
        names = ("loss", "learning_rate", "grad_norm", "epoch", "mean_token_accuracy", "entropy")
        row = {name: float(logs[name]) for name in names if name in logs}
        self.job.log_metrics(
            {"kind": "train", "step": state.global_step, **row, "tokens_per_second": rate, "time": time.time()}
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if time.monotonic() - self.shown >= STEP_SECONDS:
            self.shown = time.monotonic()
            self.job.update(step=state.global_step)
