"""A reward model, of a finished job or merged, as a function from conversations to scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adapters.checkpoint import read_index, read_json_object
from adapters.layouts import layout_for
from adapters.loading import load_base
from adapters.tensor_files import read_tensor
from adapters.verify.reference import put_on, reading_on
from studio.base_model import load_recipe_base, load_tokenizer
from studio.data import Example
from studio.encoding import template
from studio.errors import CheckpointError
from studio.jobs import open_job
from studio.models import compute_dtype, has_gpu, resolve_base
from studio.reward_model import RewardModel, load_reward_head, set_reward_head
from studio.rewards.model import Scorer

BATCH = 16
"""Conversations that are scored together."""


def scorer(directory: Path) -> Scorer:
    """
    Raises:
        StudioError: base, adapter or head are not there, or are not of each other.
    """
    job = open_job(directory)
    recipe = job.recipe()
    model, tokenizer = load_recipe_base(recipe)
    adapter = job.path / "adapter"
    layout, held = layout_for(model.config.model_type), recipe.model.quantization != "none"
    on = recipe.model.model_dump(mode="json") if held else None  # of a LoftQ adapter then what was trained alone
    put_on(model, reading_on(adapter, resolve_base(recipe.model.base), layout, on), layout)
    load_reward_head(model, adapter)
    return _scorer_of(model, tokenizer)


def merged_scorer(directory: Path) -> Scorer:
    """
    Raises:
        StudioError: the directory is no merged reward model, or not whole.
    """
    tensor = read_json_object(directory / "config.json")["reward_head"]["tensor"]
    index = read_index(directory)
    if tensor not in index:
        raise CheckpointError(directory, [f"{tensor}, the head of the reward model, is in no file"])
    dtype = getattr(torch, compute_dtype("auto"))
    model = load_base(directory, quantize="none", dtype=dtype, device="cuda" if has_gpu() else "cpu")
    set_reward_head(model, read_tensor(index[tensor]), directory)
    return _scorer_of(model, load_tokenizer(directory))


def _scorer_of(model: Any, tokenizer: Any) -> Scorer:
    scoring = RewardModel(model).eval()

    def scores(examples: Sequence[Example]) -> list[float]:
        rows = [template(tokenizer, example, example.turns, add_generation_prompt=False) for example in examples]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found = [0.0] * len(rows)
        with torch.inference_mode():
            for start in range(0, len(order), BATCH):
                chosen = order[start : start + BATCH]
                for i, value in zip(chosen, _score(scoring, [rows[i] for i in chosen], tokenizer), strict=True):
                    found[i] = value
        return found

    return scores


def _score(scoring: Any, rows: list[list[int]], tokenizer: Any) -> list[float]:
    longest, device = max(map(len, rows)), scoring.model.device
    ids = [row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    output = scoring(torch.tensor(ids, device=device), torch.tensor(mask, device=device))
    values: list[float] = output.logits[:, 0].tolist()
    return values
