"""What a job holds in memory beside the model that it trains: reward models, lm-eval with its tasks. No torch.

    beside(recipe) ─▶ Beside(reward_models_bytes, tasks_bytes)        two parts of the plan's memory

A reward model is a second base with its adapter, held as its own recipe says, to be read from alone: each counts once,
whoever names it. What lm-eval takes is measured (`LM_EVAL_BYTES` and its kin), since it is another library's code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.checkpoint import read_index
from studio.jobs import open_job
from studio.models import compute_dtype, resolve_base
from studio.placing import read_placement
from studio.recipe import Recipe
from studio.recipe_model import ModelSettings
from studio.rewards.model import is_merged
from studio.weights import BYTES, HeldAs, base_in, start_parameters, tensor_classes

LM_EVAL_BYTES = 30_000_000
LM_EVAL_NAMES_BYTES = 75_000_000
"""Resident memory of lm-eval beside the trainer: its modules; and the list of its own tasks, which is read where a task
is given by name."""


@dataclass(frozen=True)
class Beside:
    """Bytes, in every step."""

    reward_models_bytes: int
    tasks_bytes: int


def beside(recipe: Recipe) -> Beside:
    """
    Raises:
        StudioError: the job of a reward model, or its base, is not there.
    """
    jobs = {reward.job for reward in recipe.rewards if reward.function == "reward_model" and reward.job}
    return Beside(sum(map(_reward_model_bytes, jobs)), _tasks_bytes(recipe.evaluation.tasks))


def held_as(model: ModelSettings) -> HeldAs:
    """How a recipe holds its base, the computation's dtype settled."""
    return HeldAs(model.quantization, model.double_quant, model.int8_experts, compute_dtype(model.dtype))


def _reward_model_bytes(directory: Path) -> int:
    """Base and adapter of a finished job, the adapter in float32, or a merged model; the head is one row, and not worth
    counting."""
    if is_merged(directory):
        return sum(info.parameters for info in read_index(directory).values()) * BYTES[compute_dtype("auto")]
    job = open_job(directory)
    recipe, placement = job.recipe(), read_placement(job.path / "placement.json")
    base = base_in(resolve_base(recipe.model.base), recipe.model.base)
    classes = tensor_classes(base, held_as(recipe.model), placement)
    adapter = sum(entry.trainable_parameters for entry in classes)
    if placement.method.start == "pissa":  # of loftq only what was trained is put onto the quantised base
        adapter += start_parameters(base, placement)
    return sum(entry.bytes for entry in classes) + 4 * adapter


def _tasks_bytes(tasks: Sequence[str]) -> int:
    if not tasks:
        return 0
    named = any(not task.endswith((".yaml", ".yml")) for task in tasks)
    return LM_EVAL_BYTES + named * LM_EVAL_NAMES_BYTES
