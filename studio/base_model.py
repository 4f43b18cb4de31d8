"""The base model of a recipe, loaded as the recipe says, with its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from adapters.loading import load_base
from studio.chat_template import chat_template
from studio.models import compute_dtype, has_gpu, packed_cache, resolve_base
from studio.plan import recipe_base
from studio.recipe import Recipe


def load_recipe_base(
    recipe: Recipe, progress: Callable[[int, int], None] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the base, quantised as the recipe says, and its tokenizer, which can pad.

    Args:
        progress: called with (bytes read, bytes in all).

    Raises:
        StudioError: the base is not here, or its weights must not be trained on.
    """
    directory, shapes = resolve_base(recipe.model.base), recipe_base(recipe)
    model = load_base(
        directory,
        quantize=recipe.model.quantization,
        int8_experts=recipe.model.int8_experts,
        double_quant=recipe.model.double_quant,
        dtype=getattr(torch, compute_dtype(recipe.model.dtype)),
        device="cuda" if has_gpu() else "cpu",
        progress=progress,
        cache=packed_cache(recipe.model.quantization, sum(info.size_bytes for info in shapes.index.values())),
    )
    return model, load_tokenizer(directory)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """A base's tokenizer, which can pad and has a chat template: its own, or its family's default."""
    tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(directory, trust_remote_code=False))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = chat_template(directory).text
    return tokenizer
