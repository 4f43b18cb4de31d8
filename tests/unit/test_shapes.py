"""Published shapes: name for name what the stock class has, and the parameter counts that are known of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from studio import Recipe, StudioError, make_plan
from studio.shapes import SHAPES, Shape, published_shape

TICKETS = Path(__file__).parents[2] / "recipes" / "data" / "tickets-train.jsonl"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_published_shape_has_the_tensors_of_the_stock_class(shape: Shape) -> None:
    config = AutoConfig.for_model(**shape.config)
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    expected = {name: tuple(tensor.shape) for name, tensor in stock.state_dict().items()}
    index = shape.index()
    assert {name: info.shape for name, info in index.items()} == expected
    assert {info.dtype for info in index.values()} == {"BF16"}


@pytest.mark.parametrize(
    ("name", "billions", "held_gb", "lora_millions"),
    [
        ("llama4-scout", (107.8, 96.6, 17.2), 58.7, (25, 31, 428)),
        ("llama4-maverick", (400.7, 386.5, 17.2), 209.8, (25, 15, 1711)),
    ],
)
def test_published_parameter_counts(
    name: str, billions: tuple[float, ...], held_gb: float, lora_millions: tuple[int, ...]
) -> None:
    counts = published_shape(name).base().parameter_counts().values()
    assert tuple(round(count / 1e9, 1) for count in counts) == billions
    plan = make_plan(recipe(dtype="bfloat16"), name)
    assert round(plan.bytes / 1e9, 1) == held_gb
    adapters = {entry.name: round(entry.trainable_parameters / 1e6) for entry in plan.classes}
    assert tuple(adapters[name] for name in ("attention", "shared_expert", "routed_experts")) == lora_millions


def recipe(**model: Any) -> Recipe:
    return Recipe.model_validate({"model": model, "data": {"train": TICKETS}, "output": {"dir": "unused"}})


def test_a_shape_is_planned_whatever_the_recipe_s_base_is() -> None:
    plan = make_plan(recipe(base="org/name-that-is-not-here"), "llama4-scout")
    assert (plan.model, plan.layers, plan.moe_layers, plan.experts, plan.top_k) == ("llama4-scout", 48, 48, 16, 1)
    assert any("published shape" in words for words in plan.warnings)
    assert make_plan(recipe(base="org/name-that-is-not-here"), "llama4-maverick").moe_layers == 24


def test_an_unknown_shape_names_the_known_ones() -> None:
    with pytest.raises(StudioError, match="llama4-maverick, llama4-scout"):
        published_shape("llama4-skout")
