"""Published shapes of models that need not be on this machine: their config, and the tensors that follow from it.

    SHAPES ─ name ─▶ Shape ─▶ .index()   {tensor name: TensorInfo}, as the published bfloat16 checkpoint has it
                            ─▶ .base()    what a plan is made of

So a recipe can be planned for a model of 800 GB without a download: `studio plan RECIPE --shape llama4-scout`. Another
model of a family in `TENSORS` is one entry in `SHAPES`; another family is one function more. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.checkpoint import TensorInfo
from adapters.layouts import layout_for
from studio.errors import StudioError
from studio.weights import Base

Config = Mapping[str, Any]
Tensors = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Shape:
    """A published model.

    Attributes:
        name: as `--shape` takes it.
        title: what people call it.
        config: the keys of its language model's config.json that decide shapes.
    """

    name: str
    title: str
    config: Config

    def index(self) -> dict[str, TensorInfo]:
        """Every tensor of the language model, as `read_index` would find it in the checkpoint."""
        tensors = TENSORS[self.config["model_type"]](self.config)
        return {key: TensorInfo(Path(self.name), "BF16", shape, 0, 2 * math.prod(shape)) for key, shape in tensors}

    def base(self) -> Base:
        """The model as far as its shapes go."""
        index = self.index()
        return Base(self.name, None, self.config, layout_for(self.config, index), index)


def published_shape(name: str) -> Shape:
    """The shape called `name`.

    Raises:
        StudioError: there is none.
    """
    if name not in SHAPES:
        raise StudioError(f"no published shape {name!r}; allowed: {', '.join(sorted(SHAPES))}")
    return SHAPES[name]


def llama4_tensors(config: Config) -> Tensors:
    """Names and shapes of `Llama4ForCausalLM`: experts stacked (E, in, out), a shared expert beside them."""
    hidden, width, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        yield from _attention(f"{name}.self_attn", config)
        if (layer + 1) % config["interleave_moe_layer_step"] == 0:
            yield f"{name}.feed_forward.router.weight", (experts, hidden)
            yield f"{name}.feed_forward.experts.gate_up_proj", (experts, hidden, 2 * width)
            yield f"{name}.feed_forward.experts.down_proj", (experts, width, hidden)
            yield from _mlp(f"{name}.feed_forward.shared_expert", hidden, width)
        else:
            yield from _mlp(f"{name}.feed_forward", hidden, config["intermediate_size_mlp"])
        yield f"{name}.input_layernorm.weight", (hidden,)
        yield f"{name}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def _attention(name: str, config: Config) -> Tensors:
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield f"{name}.q_proj.weight", (queries, hidden)
    yield f"{name}.k_proj.weight", (keys, hidden)
    yield f"{name}.v_proj.weight", (keys, hidden)
    yield f"{name}.o_proj.weight", (hidden, queries)


def _mlp(name: str, hidden: int, width: int) -> Tensors:
    yield f"{name}.gate_proj.weight", (width, hidden)
    yield f"{name}.up_proj.weight", (width, hidden)
    yield f"{name}.down_proj.weight", (hidden, width)


TENSORS: dict[str, Callable[[Config], Tensors]] = {"llama4_text": llama4_tensors}
"""model_type → the tensors that follow from a config of that family."""

LLAMA4: Config = {
    "model_type": "llama4_text",
    "num_hidden_layers": 48,
    "hidden_size": 5120,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 202048,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_experts_per_tok": 1,
}

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("llama4-scout", "Llama 4 Scout", {**LLAMA4, "num_local_experts": 16, "interleave_moe_layer_step": 1}),
        Shape(
            "llama4-maverick", "Llama 4 Maverick", {**LLAMA4, "num_local_experts": 128, "interleave_moe_layer_step": 2}
        ),
    )
}
