"""How each model family names, orders and feeds its experts, as data: one `ExpertLayout` a family.

Everything that depends on the family is read from here. Axis order in particular is declared, never inferred from
sizes: square stacks would be silently wrong. No torch at import.

    LAYOUTS ─ model_type ─▶ ExpertLayout ─▶ tensor_class(key)       which class a checkpoint tensor belongs to
                                         ─▶ class_modules(class)    module suffixes a LoRA of that class targets
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from adapters.errors import LayoutError

TensorClassName = Literal[
    "embeddings", "attention", "shared_expert", "routed_experts", "dense_mlp", "router", "norms", "lm_head"
]
TENSOR_CLASSES: tuple[TensorClassName, ...] = (
    "embeddings",
    "attention",
    "shared_expert",
    "routed_experts",
    "dense_mlp",
    "router",
    "norms",
    "lm_head",
)
QUANTIZED_CLASSES: tuple[TensorClassName, ...] = ("attention", "shared_expert", "routed_experts", "dense_mlp")
"""Classes held in 4 bit by a 4-bit recipe. Embeddings, head, router and norms stay as they are: small or sensitive."""


@dataclass(frozen=True)
class ExpertLayout:
    """One family's experts.

    Shapes below use E experts, H hidden size, I expert width.

    Attributes:
        model_type: `config.json`'s model_type.
        block: the MoE block inside a decoder layer, e.g. "feed_forward"; the same name holds the dense MLP elsewhere.
        router: the router inside the block. Its weight is (E, H).
        shared_expert: the always-on expert inside the block, or None.
        stack_order: "in_out" when `gate_up_proj` is (E, H, 2I) and `down_proj` (E, I, H); "out_in" when they are
            (E, 2I, H) and (E, H, I).
        weight_on: whether the routing weight multiplies the expert's "input" or its "output".
        peft_swaps: stock PEFT puts lora_A on the *output* side of the stacks. It takes a 3-D parameter for (E, out, in)
            unless the stock class says `is_transposed`; Llama 4 is (E, in, out) and does not say so.
        checkpoint: "stacked" when the file holds the fused stacks, "per_expert" when it holds
            `experts.{e}.gate_proj.weight` (I, H), `up_proj` (I, H) and `down_proj` (H, I).
        expert_width: config.json's key for I.
    """

    model_type: str
    block: str
    router: str
    shared_expert: str | None
    stack_order: Literal["in_out", "out_in"]
    weight_on: Literal["input", "output"]
    peft_swaps: bool
    checkpoint: Literal["stacked", "per_expert"]
    expert_width: str
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    experts: str = field(default="experts")
    interleaved: bool = False

    def tensor_class(self, key: str) -> TensorClassName:
        """The class of the tensor called `key` in a checkpoint or a state dict.

        Raises:
            LayoutError: when the family has no place for it.
        """
        for pattern, name in self._patterns():
            if re.search(pattern, key):
                return name
        raise LayoutError(
            f"tensor {key!r} fits no class of the {self.model_type} family; "
            f"the layout is in adapters/layouts.py (LAYOUTS[{self.model_type!r}])"
        )

    def _patterns(self) -> list[tuple[str, TensorClassName]]:
        block, mlp = re.escape(self.block), "|".join(self.mlp)
        patterns: list[tuple[str, TensorClassName]] = [
            (rf"\.{block}\.{self.experts}\.", "routed_experts"),
            (rf"\.{block}\.{self.router}\.", "router"),
            (rf"\.{block}\.({mlp})\.", "dense_mlp"),
            (rf"\.self_attn\.({'|'.join(self.attention)})\.", "attention"),
            (r"(norm|layernorm)\.weight$", "norms"),
            (r"(^|\.)embed_tokens\.weight$", "embeddings"),
            (r"(^|\.)lm_head\.weight$", "lm_head"),
        ]
        if self.shared_expert:
            patterns.insert(0, (rf"\.{block}\.{self.shared_expert}\.", "shared_expert"))
        return patterns

    def class_modules(self, name: TensorClassName) -> tuple[str, ...]:
        """Suffixes of the modules that a LoRA of class `name` targets, e.g. `self_attn.q_proj`; () if none."""
        if name == "attention":
            return tuple(f"self_attn.{part}" for part in self.attention)
        if name == "shared_expert" and self.shared_expert:
            return tuple(f"{self.block}.{self.shared_expert}.{part}" for part in self.mlp)
        if name == "routed_experts":
            return (f"{self.block}.{self.experts}",)
        if name == "router":
            return (f"{self.block}.{self.router}",)
        return ()

    def stack_shapes(self, experts: int, hidden: int, width: int) -> dict[str, tuple[int, int, int]]:
        """Shapes of the fused stacks of one layer, by parameter name."""
        gate_up, down = (experts, hidden, 2 * width), (experts, width, hidden)
        if self.stack_order == "out_in":
            gate_up, down = (experts, 2 * width, hidden), (experts, hidden, width)
        return {"gate_up_proj": gate_up, "down_proj": down}


LAYOUTS: dict[str, ExpertLayout] = {
    layout.model_type: layout
    for layout in (
        ExpertLayout(
            model_type="llama4_text",
            block="feed_forward",
            router="router",
            shared_expert="shared_expert",
            stack_order="in_out",
            weight_on="input",
            peft_swaps=True,
            checkpoint="stacked",
            expert_width="intermediate_size",
        ),
        ExpertLayout(
            model_type="qwen3_moe",
            block="mlp",
            router="gate",
            shared_expert=None,
            stack_order="out_in",
            weight_on="output",
            peft_swaps=False,
            checkpoint="per_expert",
            expert_width="moe_intermediate_size",
        ),
    )
}


def layout_for(model_type: str) -> ExpertLayout:
    """The layout of a family.

    Raises:
        LayoutError: the family is not in the table.
    """
    if model_type == "llama4":
        raise LayoutError(
            "model_type 'llama4' is the multimodal Llama 4; its language model inside is not loaded yet. Supported are "
            f"text checkpoints of {', '.join(sorted(LAYOUTS))}"
        )
    if model_type not in LAYOUTS:
        raise LayoutError(
            f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(LAYOUTS))}. "
            "A new family is one ExpertLayout entry in adapters/layouts.py."
        )
    return LAYOUTS[model_type]
