"""How each model family names, orders and feeds its experts, as data: one `ExpertLayout` a family.

Everything that depends on the family is read from here. Axis order in particular is declared, never inferred from
sizes: square stacks would be silently wrong. No torch at import.

A tensor has two names, and both belong to the layout: its *name* in stock transformers' model, where the experts of a
layer are fused stacks, and its *key* in the published files, where they may be one tensor an expert, under another
block, behind a prefix.

    LAYOUTS ─ layout_for(config, keys) ─▶ ExpertLayout ─▶ tensor_class(key)      the class a tensor belongs to
                                                       ─▶ class_modules(class)   module suffixes that a LoRA targets
                                                       ─▶ model_key(key)         file ─▶ model
                                                       ─▶ checkpoint_key(name)   model ─▶ file
                                                       ─▶ sources(stack, expert) model ─▶ file, one expert of a stack
    moe_shapes(layout, index, config)     ─▶ experts, hidden size and width of every MoE layer
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Literal

from adapters.checkpoint import TensorInfo, text_config
from adapters.errors import CheckpointError, LayoutError

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

PROJECTIONS = ("gate_up_proj", "down_proj")
"""The stacks of a layer's routed experts in the stock model."""

SMALL = r"(norm|layernorm)\.(weight|bias)|\.(shared_expert_gate\.weight|conv1d\.weight|sinks|A_log|dt_bias)"
"""Counted with the norms: what stands between the matrices and is neither quantised nor adapted."""

LAYER = re.compile(r"\.layers\.(\d+)\.")

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""What configs call the number of routed experts; any of them says that a model is an MoE."""


@dataclass(frozen=True)
class Source:
    """One tensor of a checkpoint that an expert is read from: all of it, or its slice [expert] of a stacked tensor."""

    key: str
    expert: int | None = None


@dataclass(frozen=True)
class MoeShape:
    """The routed experts of decoder layer `layer`: how many, the model's hidden size, an expert's width."""

    layer: int
    experts: int
    hidden: int
    width: int


@dataclass(frozen=True)
class ExpertLayout:
    """One family.

    Shapes below use E experts, H hidden size, I expert width. The defaults are what most families have in common.

    Attributes:
        model_type: `config.json`'s model_type; of the language model where it is a part of a multimodal one.
        router: the router inside the MoE block; its weight is (E, H). Empty for a dense family.
        router_logits: place of the logits (T, E) in what the router returns, where that is a tuple.
        block: the MoE block inside a decoder layer; the same name holds the dense MLP elsewhere.
        shared_expert: the always-on expert inside the block, or None.
        stack_order: "in_out" when `gate_up_proj` is (E, H, 2I) and `down_proj` (E, I, H); "out_in" when they are
            (E, 2I, H) and (E, H, I).
        scoring: what the router makes of its logits: "softmax" over all experts, or each expert's own "sigmoid". The
            softmax of the chosen logits alone (gpt_oss, granitemoe) is the former, renormalised.
        weight_on: whether the routing weight multiplies the expert's "input" or its "output".
        interleaved: gate and up alternate along the 2I axis, instead of all of gate before all of up.
        bias: the experts have `gate_up_proj_bias` (E, 2I) and `down_proj_bias` (E, H).
        peft_swaps: stock PEFT puts lora_A on the *output* side of the stacks. It takes a 3-D parameter for (E, out, in)
            unless the stock class says `is_transposed`; Llama 4 is (E, in, out) and does not say so.
        peft_fuses: stock PEFT takes a target module that ends in gate_proj, up_proj or down_proj for a routed expert of
            transformers 4 and targets the fused stacks instead, even where the shared expert was meant.
        checkpoint: "stacked" when the files hold the fused stacks, "per_expert" when they hold
            `experts.{e}.{part}.weight` with the `parts` gate (I, H), up (I, H) and down (H, I).
        expert_width, top_k: config.json's keys for I and for the experts of a token.
        attention: module suffixes of the attention matrices, linear attention included.
        renames: (in the model, in the files) for each part of a name that differs; one without a leading dot is a
            prefix. Applied in this order from model to files.
        ignored: patterns of keys that are no part of the language model, as stock ignores them.
        layers: decoder layers; in a checkpoint, later ones are for multi-token prediction and not loaded. None: not
            known.
    """

    model_type: str
    router: str = "gate"
    router_logits: int = 0
    block: str = "mlp"
    shared_expert: str | None = None
    stack_order: Literal["in_out", "out_in"] = "out_in"
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    weight_on: Literal["input", "output"] = "output"
    interleaved: bool = False
    bias: bool = False
    peft_swaps: bool = False
    peft_fuses: bool = False
    checkpoint: Literal["stacked", "per_expert"] = "per_expert"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    expert_width: str = "moe_intermediate_size"
    top_k: str = "num_experts_per_tok"
    attention: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    experts: str = "experts"
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    layers: int | None = None

    @property
    def has_experts(self) -> bool:
        return bool(self.router)

    def tensor_class(self, key: str) -> TensorClassName:
        """The class of the tensor called `key` in a checkpoint or a state dict.

        Raises:
            LayoutError: when the family has no place for it.
        """
        name = self.model_key(key) or ""
        for pattern, found in self._classes:
            if pattern.search(name):
                return found
        raise LayoutError(
            f"tensor {key!r} fits no class of the {self.model_type} family; "
            f"the layout is in adapters/layouts.py (LAYOUTS[{self.model_type!r}])"
        )

    @cached_property
    def _classes(self) -> list[tuple[re.Pattern[str], TensorClassName]]:
        block, mlp, router = re.escape(self.block), "|".join(self.mlp), self.router.partition(".")[0]
        patterns: list[tuple[str, TensorClassName]] = [
            (rf"({SMALL})$", "norms"),
            (rf"\.{block}\.({mlp})\.(weight|bias)$", "dense_mlp"),
            (rf"\.({'|'.join(map(re.escape, self.attention))})\.(weight|bias)$", "attention"),
            (r"(^|\.)embed_tokens\.weight$", "embeddings"),
            (r"(^|\.)lm_head\.(weight|bias)$", "lm_head"),
        ]
        if self.has_experts:
            patterns.insert(0, (rf"\.{block}\.{self.experts}\.", "routed_experts"))
            patterns.append((rf"\.{block}\.({router}\.|e_score_correction_bias$)", "router"))
        if self.shared_expert:
            patterns.append((rf"\.{block}\.{self.shared_expert}\.", "shared_expert"))
        return [(re.compile(pattern), name) for pattern, name in patterns]

    def class_modules(self, name: TensorClassName) -> tuple[str, ...]:
        """Suffixes of the modules that a LoRA of class `name` targets, e.g. `self_attn.q_proj`; () if none."""
        if name == "attention":
            return self.attention
        if name == "dense_mlp":
            return tuple(f"{self.block}.{part}" for part in self.mlp)
        if name == "shared_expert" and self.shared_expert:
            return tuple(f"{self.block}.{self.shared_expert}.{part}" for part in self.mlp)
        if name == "routed_experts" and self.has_experts:
            return (f"{self.block}.{self.experts}",)
        if name == "router" and self.has_experts:
            return (f"{self.block}.{self.router}",)
        return ()

    def takes_lora(self, key: str) -> bool:
        """Whether a LoRA of the tensor's class lands on this tensor, as it does not on biases and corrections."""
        name, found = self.model_key(key) or "", self.tensor_class(key)
        if found == "routed_experts":
            return name.endswith(("gate_up_proj", "down_proj"))
        return any(name.endswith(f".{module}.weight") for module in self.class_modules(found))

    def experts_per_token(self, config: Mapping[str, Any]) -> int:
        """Top-k by the language model's config, the largest where it differs by layer; 0 for a dense family."""
        found = config.get(self.top_k, 0) if self.has_experts else 0
        return max(found) if isinstance(found, list) else int(found)

    def stack_shapes(self, experts: int, hidden: int, width: int) -> dict[str, tuple[int, int, int]]:
        """Shapes of the fused stacks of one layer, by parameter name."""
        gate_up, down = (experts, hidden, 2 * width), (experts, width, hidden)
        if self.stack_order == "out_in":
            gate_up, down = (experts, 2 * width, hidden), (experts, hidden, width)
        return {"gate_up_proj": gate_up, "down_proj": down}

    def checkpoint_key(self, name: str) -> str:
        """What the files call the tensor that is `name` in the stock model; for per-expert files, not for stacks."""
        for model, file in self.renames:
            name = _renamed(name, model, file)
        return name

    def model_key(self, key: str) -> str | None:
        """The name in the stock model of the checkpoint's tensor `key`; of one expert, its fused stack's.

        None for what is no part of the language model: a vision tower, layers for multi-token prediction, the head of a
        merged reward model. Names of the stock model are returned as they are.
        """
        if self._ignored.search(key):
            return None
        for model, file in reversed(self.renames):
            key = _renamed(key, file, model)
        layer = LAYER.search(key)
        if layer and self.layers is not None and int(layer[1]) >= self.layers:
            return None
        return self._fused(key)

    @cached_property
    def _ignored(self) -> re.Pattern[str]:
        return re.compile("|".join((*self.ignored, r"\.rotary_emb\.inv_freq$", r"^score\.weight$")))

    @cached_property
    def _expert(self) -> re.Pattern[str]:
        return re.compile(rf"(.*\.{self.block}\.{self.experts})\.\d+\.({'|'.join(self.parts)})\.weight")

    def _fused(self, name: str) -> str:
        down, one = self.parts[2], self._expert.fullmatch(name)
        if not one:
            return name
        return f"{one[1]}.{'down_proj' if one[2] == down else 'gate_up_proj'}"

    def sources(self, stack_name: str, expert: int) -> tuple[Source, ...]:
        """The checkpoint tensors that make expert `expert` of the fused stack `stack_name` (a state dict name).

        They are to be concatenated in this order along the stack's *out* axis.
        """
        prefix, _, projection = stack_name.rpartition(".")
        if self.checkpoint == "stacked":
            return (Source(self.checkpoint_key(stack_name), expert),)
        gate, up, down = self.parts
        parts = {"gate_up_proj": (gate, up), "down_proj": (down,)}[projection]
        return tuple(Source(self.checkpoint_key(f"{prefix}.{expert}.{part}.weight")) for part in parts)


def _renamed(name: str, old: str, new: str) -> str:
    if old.startswith("."):
        return name.replace(old, new, 1)
    return new + name.removeprefix(old) if name.startswith(old) else name


MLA = tuple(
    f"self_attn.{part}" for part in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
)
"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1); small models have q_proj alone."""

SELF_ATTENTION = ExpertLayout.attention
MIXTRAL_PARTS = ("w1", "w3", "w2")
MIXTRAL_BLOCK = (".mlp.", ".block_sparse_moe.")

LLAMA4 = ExpertLayout(
    model_type="llama4_text",
    block="feed_forward",
    router="router",
    router_logits=1,
    shared_expert="shared_expert",
    stack_order="in_out",
    scoring="sigmoid",
    weight_on="input",
    peft_swaps=True,
    checkpoint="stacked",
    expert_width="intermediate_size",
)
QWEN3_5 = ExpertLayout(
    model_type="qwen3_5_moe_text",
    shared_expert="shared_expert",
    attention=(
        *SELF_ATTENTION,
        *(f"linear_attn.{part}" for part in ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")),
    ),
    ignored=(r"^mtp\.", r"^model\.visual\."),
)

LAYOUTS: dict[str, ExpertLayout] = {
    "llama4": replace(
        LLAMA4,
        renames=(("model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")),
        ignored=(r"^vision_model\.", r"^multi_modal_projector\."),
    ),
    "qwen3_5_moe": replace(QWEN3_5, renames=(("model.", "model.language_model."),), checkpoint="stacked"),
} | {
    layout.model_type: layout
    for layout in (
        LLAMA4,
        QWEN3_5,
        ExpertLayout("mixtral", parts=MIXTRAL_PARTS, renames=(MIXTRAL_BLOCK,), expert_width="intermediate_size"),
        ExpertLayout("qwen2_moe", shared_expert="shared_expert"),
        ExpertLayout("qwen3_moe", peft_fuses=True),
        ExpertLayout(
            "qwen3_next",
            peft_fuses=True,
            shared_expert="shared_expert",
            attention=(
                *SELF_ATTENTION,
                *(f"linear_attn.{part}" for part in ("in_proj_qkvz", "in_proj_ba", "out_proj")),
            ),
            ignored=(r"^mtp\.",),
        ),
        ExpertLayout(
            "gpt_oss",
            router="router",
            stack_order="in_out",
            interleaved=True,
            bias=True,
            checkpoint="stacked",
            expert_width="intermediate_size",
        ),
        ExpertLayout("deepseek_v2", shared_expert="shared_experts", attention=MLA, peft_fuses=True),
        ExpertLayout("deepseek_v3", shared_expert="shared_experts", attention=MLA, peft_fuses=True, scoring="sigmoid"),
        ExpertLayout("olmoe", expert_width="intermediate_size", peft_fuses=True),
        ExpertLayout(
            "granitemoe",
            block="block_sparse_moe",
            router="router",
            checkpoint="stacked",
            renames=(
                (".experts.gate_up_proj", ".input_linear.weight"),
                (".experts.down_proj", ".output_linear.weight"),
                (".router.weight", ".router.layer.weight"),
            ),
            expert_width="intermediate_size",
        ),
        ExpertLayout(
            "phimoe",
            router="router",
            parts=MIXTRAL_PARTS,
            renames=((".mlp.router.", ".mlp.gate."), MIXTRAL_BLOCK),
            expert_width="intermediate_size",
        ),
        ExpertLayout("glm4_moe", shared_expert="shared_experts", peft_fuses=True, scoring="sigmoid"),
        ExpertLayout(
            "ernie4_5_moe",
            peft_fuses=True,
            shared_expert="shared_experts",
            renames=((".mlp.gate.moe_statics.", ".mlp.moe_statics."),),
            top_k="moe_k",
            ignored=(r"(^|\.)mtp_",),
        ),
        ExpertLayout(
            "minimax_m2",
            parts=MIXTRAL_PARTS,
            renames=(MIXTRAL_BLOCK,),
            expert_width="intermediate_size",
            scoring="sigmoid",
        ),
        ExpertLayout(
            "hunyuan_v1_moe",
            peft_fuses=True,
            router="gate.wg",
            shared_expert="shared_mlp",
            expert_width="intermediate_size",
            top_k="moe_topk",
        ),
        *(ExpertLayout(name, router="") for name in ("llama", "mistral", "qwen2", "qwen3")),
    )
}


def layout_for(model: str | Mapping[str, Any], keys: Iterable[str] = ()) -> ExpertLayout:
    """The layout of a family, or of one checkpoint.

    Args:
        model: a model_type; or a checkpoint's config.json, for a layout that knows the number of its layers.
        keys: the checkpoint's tensor names. Where the files of a family come in both forms, they say whether this one
            holds stacks or one tensor an expert.

    Raises:
        LayoutError: the family is not in the table.
    """
    config = {"model_type": model} if isinstance(model, str) else model
    model_type, keys = config["model_type"], list(keys)
    if model_type not in LAYOUTS:
        raise LayoutError(_unknown(config, keys))
    layout = replace(_prefixed(LAYOUTS[model_type], keys), layers=text_config(config).get("num_hidden_layers"))

    def found(pattern: str) -> bool:
        return any(re.search(pattern, key) and layout.model_key(key) for key in keys)

    if found(rf"\.{layout.block}\.{layout.experts}\.gate_up_proj$"):  # the model's own name: so has the whole block
        return replace(layout, checkpoint="stacked", renames=_prefixes(layout))
    return replace(layout, checkpoint="per_expert") if found(rf"\.{layout.experts}\.\d+\.") else layout


def _prefixes(layout: ExpertLayout) -> tuple[tuple[str, str], ...]:
    return tuple(pair for pair in layout.renames if not pair[0].startswith("."))


def _prefixed(layout: ExpertLayout, keys: Collection[str]) -> ExpertLayout:
    """The entry of the same language model whose prefix the keys have; stock reads a text model in either form."""
    for other in LAYOUTS.values():
        prefixes = tuple(file for _, file in _prefixes(other))
        if other.model_type == layout.model_type and prefixes and any(key.startswith(prefixes) for key in keys):
            return other
    return layout


def _unknown(config: Mapping[str, Any], keys: Collection[str]) -> str:
    """Says what is known about a family that is not in the table, and what an entry would have to say."""
    model_type = config["model_type"]
    near = get_close_matches(str(model_type), LAYOUTS, n=1)
    lines = [
        f"model_type {model_type!r} is not supported" + (f"; the nearest name is {near[0]!r}" if near else ""),
        f"supported: {', '.join(sorted(LAYOUTS))}",
    ]
    inner = text_config(config)
    counts = [f"{name}: {inner[name]}" for name in EXPERT_COUNTS if name in inner]
    if counts or any(".experts." in key for key in keys):
        example = next((key for key in keys if ".experts." in key), None)
        lines.append(
            f"it is an MoE ({', '.join(counts) or 'tensors of experts'}), and no layout says what its router, shared "
            "expert and stacks gate_up_proj and down_proj are called and in which order their axes lie"
            + (f"; its files have {example!r}" if example else "")
        )
    lines.append(
        "a new family is one ExpertLayout entry in adapters/layouts.py (LAYOUTS) and a tiny model in "
        "tests/numerics/conftest.py that proves it against stock transformers"
    )
    return ". ".join(lines)


def moe_shapes(
    layout: ExpertLayout, index: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> tuple[MoeShape, ...]:
    """The shape of every MoE layer, from headers alone; () for a dense model.

    Args:
        layout: of this checkpoint, by `layout_for(config, index)`.
        index: `adapters.checkpoint.read_index` of it.
        config: its config.json.

    Raises:
        CheckpointError: a layer has a router, but no expert 0.
    """
    if not layout.has_experts:
        return ()
    shapes = []
    for layer in range(text_config(config)["num_hidden_layers"]):
        block = f"model.layers.{layer}.{layout.block}"
        router = index.get(layout.checkpoint_key(f"{block}.{layout.router}.weight"))
        if router is not None:
            experts, hidden = router.shape
            width = _width(layout, index, f"{block}.{layout.experts}.down_proj")
            shapes.append(MoeShape(layer, experts, hidden, width))
    return tuple(shapes)


def _width(layout: ExpertLayout, index: Mapping[str, TensorInfo], down_proj: str) -> int:
    source = layout.sources(down_proj, 0)[0]
    if source.key not in index:
        raise CheckpointError("the base weights", [f"{source.key} is missing"])
    *_, rows, cols = index[source.key].shape
    return rows if layout.stack_order == "in_out" else cols
