"""What a recipe says of the model and of its adapters: base, ranks, placement, routers."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from adapters.placement import PLACEMENTS
from studio.recipe_parts import HUB_ID, InputPath, Settings
from studio.recipe_parts import absolute as _absolute
from studio.recipe_parts import refusal as _refusal
from studio.recipe_text import describe

EMBEDDED_BASE = "embedded"
P_UNSET = {"esft_gate": 0.1, "esft_token": 0.2}
"""0.2 is in ESFT's own scripts (deepseek-ai/ESFT, scripts/generate_expert_config.sh). 0.1 is what others report of the
paper's gate runs and was not checked against it: sums of gate weights and of tokens are not comparable."""

FRACTION_UNSET = 0.25
"""Ours: the quarter of the experts that MoE-Sieve (arXiv 2603.24044, abstract) adapts."""


def _expert_ids(value: Any, allowed: str, empty: bool = False) -> tuple[int, ...]:
    ids = list(value) if isinstance(value, list | tuple) else None
    if ids is None or not (ids or empty) or not all(type(i) is int and 0 <= i <= 65535 for i in ids):
        shown = value if ids is not None and len(ids) <= 8 else describe(value)
        raise _refusal(f"received {shown}; allowed: {allowed}")
    if len(set(ids)) < len(ids):
        twice = sorted({i for i in ids if ids.count(i) > 1})
        raise _refusal(f"expert ids must be unique, received {', '.join(map(str, twice))} more than once")
    return tuple(ids)


Rank = Annotated[int, Field(ge=0, le=1024)]
ExpertId = Annotated[int, Field(ge=0, le=65535)]
LayerNumber = Annotated[int, Field(ge=0, le=65535)]


class ModelSettings(Settings):
    """The base model and the form in which its weights stay in memory."""

    base: str = EMBEDDED_BASE
    """The base: "embedded" (ships with the studio), a directory of safetensors, or a hub id such as "org/name"."""

    quantization: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """How the frozen base weights are held: nf4 or fp4 (4 bits), int8 (8 bits), or none (as `dtype` says)."""

    double_quant: bool = True
    """Quantise the 4-bit scales too: 0.516 instead of 0.563 bytes per parameter. Only read with nf4 and fp4."""

    int8_experts: tuple[ExpertId, ...] = ()
    """Ids of routed experts held in int8, in every MoE layer, while the rest follows `quantization`. []: none."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number type of all that is not quantised. auto: bfloat16 on a GPU, float32 on a CPU."""

    @field_validator("int8_experts", mode="before")
    @classmethod
    def _int8_experts_are_ids(cls, value: Any) -> tuple[int, ...]:
        return _expert_ids(value, "a list of expert ids such as [0, 3, 7]", empty=True)

    @model_validator(mode="after")
    def _int8_is_a_quantization(self) -> Self:
        if self.int8_experts and self.quantization == "none":
            raise _refusal("int8_experts lists experts but quantization is none; choose nf4, fp4 or int8 for the rest")
        return self

    @field_validator("base")
    @classmethod
    def _base_is_known(cls, value: str, info: ValidationInfo) -> str:
        if value == EMBEDDED_BASE:
            return value
        path = _absolute(value, info)
        if path.is_dir() or value.startswith(("/", "./", "../", "~")):
            return str(path)
        if HUB_ID.fullmatch(value):
            return value
        near = f'; did you mean "{EMBEDDED_BASE}"?' if get_close_matches(value, [EMBEDDED_BASE]) else ""
        raise _refusal(
            f'received {describe(value)}; allowed: "embedded", a directory, or a hub id such as "org/name"{near}'
        )


class AdapterSettings(Settings):
    """LoRA rank of each class of tensors; 0 means that the class gets no adapter."""

    attention_rank: Rank = 16
    """Rank for the attention projections of every layer. 0: none."""

    shared_expert_rank: Rank = 16
    """Rank for the shared experts, which see every token. 0: none. Not read by placement.rule attention."""

    routed_experts_rank: Rank = 16
    """Rank for the routed experts that `placement` chooses. 0: none. Not read by the rule budget."""

    dense_mlp_rank: Rank = 0
    """Rank for the feed-forward layers without experts, which dense models and some MoE layers have. 0: none."""

    alpha: float = Field(default=32.0, gt=0, le=8192)
    """Strength of the adapter: its output is scaled by alpha / rank."""

    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA), so that a larger rank is not weaker; alpha is then smaller."""

    dora: bool = False
    """DoRA: a trained magnitude of each output. For linear layers alone, where no expert or router is adapted."""

    init: Literal["zero", "pissa", "loftq"] = "zero"
    """Where the adapter begins. zero: it changes nothing. pissa: the weights' principal components. loftq: the largest
    part of what the quantisation lost."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs that are zeroed in training, on linear layers and experts; never on routers."""

    start_from: InputPath | None = None
    """An adapter, or the job that made it, to train further: its ranks, alpha, method and experts are taken, and those
    of this recipe are not read. A relative path starts at the recipe file. null: a new adapter."""

    @model_validator(mode="after")
    def _the_method_is_one(self) -> Self:
        given = [name for name in ("rslora", "dora") if getattr(self, name)] + ["init"] * (self.init != "zero")
        if self.start_from and given:
            raise _refusal(f"{', '.join(given)} is set, but start_from takes the method of the adapter; leave it out")
        return self


class PlacementSettings(Settings):
    """Which routed experts get adapters, and how large: chosen by a rule, most of them from where your data goes."""

    rule: Literal[
        "all_experts", "attention", "shared", "esft_gate", "esft_token", "top_fraction", "budget", "manual"
    ] = "all_experts"
    """attention: no experts. shared: attention and shared experts. esft_gate, esft_token: in each layer the experts
    that make up the share p of the data's routing weight, or of its tokens. top_fraction: the most used ones. budget:
    ranks by use, for a given size. manual: as `experts` lists."""

    p: float | None = Field(default=None, gt=0, le=1)
    """Share that the chosen experts of a layer make up. null: 0.1 for esft_gate, 0.2 for esft_token."""

    fraction: float | None = Field(default=None, gt=0, le=1)
    """Share of the experts that top_fraction chooses. null: 0.25."""

    scope: Literal["layer", "model"] = "layer"
    """Where top_fraction looks for the most used experts: in each layer, or in the whole model."""

    parameters: Annotated[int, Field(ge=1)] | None = None
    """Trainable parameters that budget spreads over the routed experts. Either this or training_bytes."""

    training_bytes: Annotated[int, Field(ge=1)] | None = None
    """The same as bytes of training memory: 16 a parameter, for weight, gradient and AdamW's two moments."""

    min_rank: int = Field(default=4, ge=1, le=1024)
    """Smallest rank that budget gives to an expert that gets any."""

    rank_step: int = Field(default=4, ge=1, le=1024)
    """Ranks that budget gives are multiples of this."""

    max_rank: int = Field(default=64, ge=1, le=1024)
    """Largest rank that budget gives."""

    experts: tuple[ExpertId, ...] | dict[LayerNumber, tuple[ExpertId, ...]] | None = None
    """What manual takes: a list of expert ids for every MoE layer, or {decoder layer: [ids]}, counted from 0."""

    profile_tokens: int = Field(default=131_072, ge=1, le=1_000_000_000)
    """Tokens of the training data that the router profile is made from."""

    @field_validator("experts", mode="before")
    @classmethod
    def _experts_are_ids(cls, value: Any) -> Any:
        allowed = "a list of expert ids such as [0, 3, 7], or {decoder layer: [ids]}"
        if not isinstance(value, dict):
            return None if value is None else _expert_ids(value, allowed)
        if not value or not all(type(layer) is int and layer >= 0 for layer in value):
            raise _refusal(f"received layers {', '.join(map(str, value)) or 'none'}; allowed: {allowed}")
        return {layer: _expert_ids(ids, allowed) for layer, ids in value.items()}

    @model_validator(mode="after")
    def _the_rule_reads_what_is_given(self) -> Self:
        for name, rules in readers().items():
            if getattr(self, name) != type(self).model_fields[name].default and self.rule not in rules:
                raise _refusal(f"{name} is given, but the rule is {self.rule}; {name} is read by {', '.join(rules)}")
        return self

    @model_validator(mode="after")
    def _the_rule_has_what_it_needs(self) -> Self:
        if self.rule == "manual" and self.experts is None:
            raise _refusal("the rule manual needs experts: a list of expert ids, or {decoder layer: [ids]}")
        if self.rule == "budget" and (self.parameters is None) == (self.training_bytes is None):
            raise _refusal("the rule budget needs one of parameters and training_bytes, and only one")
        uneven = [name for name in ("min_rank", "max_rank") if getattr(self, name) % self.rank_step]
        if uneven or self.min_rank > self.max_rank:
            ranks = f"min_rank {self.min_rank}, max_rank {self.max_rank}, rank_step {self.rank_step}"
            raise _refusal(f"received {ranks}; allowed: multiples of rank_step, min_rank at most max_rank")
        return self


def readers() -> dict[str, tuple[str, ...]]:
    """Settings of rules, by name, and the rules that read them."""
    names = ("p", "fraction", "scope", "parameters", "min_rank", "rank_step", "max_rank", "experts")
    readers = {name: tuple(rule for rule, entry in PLACEMENTS.items() if name in entry.settings) for name in names}
    return {**readers, "training_bytes": readers["parameters"]}


class RouterSettings(Settings):
    """Whether the routers are trained, and how they are watched while the adapters are."""

    mode: Literal["frozen", "lora", "full"] = "frozen"
    """frozen is the safe choice. lora: adapters of `rank`. full: the whole router."""

    rank: int = Field(default=8, ge=1, le=1024)
    """LoRA rank of the routers with mode lora."""

    distill_coef: float = Field(default=0.0, ge=0, le=1000)
    """Weight of a loss that holds a trained router to the base's routing (KL divergence). 0: off."""

    load_balance_coef: float = Field(default=0.0, ge=0, le=1000)
    """Weight of the load-balance loss, for a trained router. 0: off."""

    z_loss_coef: float = Field(default=0.0, ge=0, le=1000)
    """Weight of the router z-loss, which keeps the router's logits small. 0: off."""

    watch: bool = True
    """Whether load and drift of the routing are measured while training."""

    probe_examples: int = Field(default=16, ge=1, le=100_000)
    """First held-out examples (else training ones) whose routing is compared with the base's; 2,048 tokens at most."""

    warn_kl: float | None = Field(default=None, ge=0)
    """Warn where a layer's routing is further than this from the base's (KL divergence in nats). null: never."""

    stop_kl: float | None = Field(default=None, ge=0)
    """Stop the training there. null: never."""

    warn_entropy: float | None = Field(default=None, ge=0, le=1)
    """Warn where a layer's load entropy falls below this; 1 is even use, 0 one expert for all. null: never."""

    stop_entropy: float | None = Field(default=None, ge=0, le=1)
    """Stop the training there. null: never."""

    warn_busiest: float | None = Field(default=None, ge=0, le=1)
    """Warn where one expert of a layer gets more than this share of its tokens. null: never."""

    stop_busiest: float | None = Field(default=None, ge=0, le=1)
    """Stop the training there. null: never."""

    @model_validator(mode="after")
    def _losses_reach_a_router(self) -> Self:
        losses = [name for name in ("distill_coef", "load_balance_coef", "z_loss_coef") if getattr(self, name)]
        if self.mode == "frozen" and losses:
            raise _refusal(
                f"{', '.join(losses)} is set but the router is frozen: the loss would push on the other adapters "
                "instead; set router.mode to lora or full, or the coefficient to 0"
            )
        if self.mode != "lora" and self.rank != type(self).model_fields["rank"].default:
            raise _refusal(f"rank is given, but the mode is {self.mode}; rank is read by lora")
        return self

    @model_validator(mode="after")
    def _rules_have_something_to_watch(self) -> Self:
        rules = [name for name in type(self).model_fields if name.startswith(("warn_", "stop_"))]
        given = [name for name in rules if getattr(self, name) is not None]
        if given and not self.watch:
            raise _refusal(f"{', '.join(given)} is set but watch is false; set watch to true")
        return self
