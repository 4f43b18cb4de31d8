"""Trainers: the only place that imports TRL. One file a method; `studio.methods.METHODS` lists them.

train(model, tokenizer, recipe, rows, job) trains the adapters of a PeftModel in place
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from studio.methods import METHODS


def trainer_for(method: str) -> Callable[..., dict[str, Any]]:
    """The `train` function of a method of the recipe's `Literal`."""
    train: Callable[..., dict[str, Any]] = import_module(METHODS[method].trainer).train
    return train
