"""REINFORCE Leave-One-Out (arXiv 2402.14740), through TRL's `RLOOTrainer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

from studio.data import Example
from studio.jobs import Job
from studio.recipe import Recipe
from studio.trainers.online import OnlineTrainer, train_online


def train(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, rows: Sequence[Example], job: Job
) -> dict[str, Any]:
    """As `studio.trainers.online.train_online`."""
    return train_online(_Trainer, RLOOConfig, model, tokenizer, recipe, rows, job)


class _Trainer(OnlineTrainer, RLOOTrainer):
    pass
