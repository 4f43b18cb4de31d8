"""Packing, as far as a plan needs it: how many packed rows there will be, and where it would be wrong. No torch."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from studio.activations import attention_of
from studio.errors import Problem, RecipeError
from studio.recipe import Recipe
from studio.weights import Base


def packs(recipe: Recipe) -> bool:
    return bool(recipe.trl.get("packing"))


def packed_rows(lengths_tokens: Sequence[int], limit_tokens: int) -> int:
    """Rows of at most `limit_tokens` that examples of these lengths are packed into: best fit, the longest first.

    Lengths are cut to the limit, as `trl.packing_strategy: bfd` finds them.
    """
    spaces: list[int] = []
    rows = 0
    for length in sorted((min(length, limit_tokens) for length in lengths_tokens), reverse=True):
        place = bisect_left(spaces, length)
        if place == len(spaces):
            rows += 1
            left = limit_tokens - length
        else:
            left = spaces.pop(place) - length
        if left:
            insort(spaces, left)
    return rows


def check_packing(recipe: Recipe, base: Base) -> None:
    """Refuses packing where packed examples would not be computed as they are alone.

    Raises:
        RecipeError: a layer carries a state from token to token; or Llama 4's attention, whose temperature on layers
            without positions grows with the place in the row, would meet places where it differs.
    """
    if not packs(recipe):
        return
    limit, floor = recipe.data.max_length_tokens, base.config.get("floor_scale", 8192)
    if any(attention_of(base, layer, on_gpu=False).kind == "linear" for layer in base.layers):
        reason = f"{base.layout.model_type} has linear-attention layers, which would carry one example into the next"
    elif base.config.get("attn_temperature_tuning") and limit >= floor:
        reason = (
            f"{base.layout.model_type} scales attention by the place in the row from {floor} tokens on, and "
            f"data.max_length_tokens is {limit}"
        )
    else:
        return
    raise RecipeError([Problem("trl.packing", None, f"is refused: {reason}; set it to false")])
