"""Group Relative Policy Optimization (arXiv 2402.03300), through TRL's `GRPOTrainer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from studio.data import Example
from studio.jobs import Job
from studio.recipe import Recipe
from studio.trainers.online import OnlineTrainer, train_online


def train(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, rows: Sequence[Example], job: Job
) -> dict[str, Any]:
    """As `studio.trainers.online.train_online`."""
    return train_online(_Trainer, GRPOConfig, model, tokenizer, recipe, rows, job)


class _Trainer(OnlineTrainer, GRPOTrainer):
    pass
