"""Trainers: the only place that imports TRL. One file a method, one line in `TRAINERS`.

train(model, tokenizer, recipe, examples, job) trains the adapters of a PeftModel in place
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

TRAINERS: dict[str, str] = {"sft": "studio.trainers.sft"}
"""`training.method` → the module whose `train` runs it."""


def trainer_for(method: str) -> Callable[..., dict[str, Any]]:
    """The `train` function of a method of the recipe's `Literal`."""
    train: Callable[..., dict[str, Any]] = import_module(TRAINERS[method]).train
    return train
