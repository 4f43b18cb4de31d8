"""The Recipe: what is wanted, validated and frozen, from one YAML file.

    recipe.yaml ── load_recipe ──▶ Recipe ── recipe_to_yaml ──▶ the same recipe, complete and with absolute paths

This file is the only place where a default is written. Each field's docstring is the one text that the command line,
the form in the browser, the JSON Schema and the docs show.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.representer import RoundTripRepresenter

from adapters.placement import PLACEMENTS, Method, Placement, dora_problem
from studio.data.formats import COLUMNS
from studio.errors import Problem, RecipeError, RewardError
from studio.methods import METHODS, readers_of
from studio.metrics import METRICS
from studio.preference_losses import preference_problems
from studio.recipe_mixture import DataSource, MixturePhase, Sources, mixture_problems, training_problems
from studio.recipe_parts import HUB_ID, DataPath, InputPath, OutputPath, Settings, refused_keys
from studio.recipe_parts import absolute as _absolute
from studio.recipe_parts import refusal as _refusal
from studio.recipe_problems import problems_of
from studio.recipe_text import describe, read_mapping
from studio.rewards import REWARDS, unknown_option
from studio.trl_options import trl_problem

EMBEDDED_BASE = "embedded"
P_UNSET = {"esft_gate": 0.1, "esft_token": 0.2}
"""0.2 is in ESFT's own scripts (deepseek-ai/ESFT, scripts/generate_expert_config.sh). 0.1 is what others report of the
paper's gate runs and was not checked against it: sums of gate weights and of tokens are not comparable."""

FRACTION_UNSET = 0.25
"""Ours: the quarter of the experts that MoE-Sieve (arXiv 2603.24044, abstract) adapts."""


def _refused_section(name: str, message: str) -> PydanticCustomError:
    return refused_keys({name: message})


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
Rate = Annotated[float, Field(gt=0, le=1)]
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


class DataSettings(Settings):
    """The data: JSON Lines, JSON, CSV, TSV, Parquet, an Arrow directory, a folder of text, or a hub's data set."""

    train: Sources
    """File or folder of training rows, or "hub:org/name:split", or a list of sources {path, weight, name} that are
    mixed. A relative path starts at the recipe file."""

    eval: DataPath | None = None
    """The same of held-out rows, for the comparison before and after. null: no comparison."""

    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "alpaca",
        "prompt_completion",
        "preference",
        "preference_implicit",
        "kto",
        "text",
    ] = "auto"
    """What the rows look like. auto: each row is recognised by its columns; `studio data inspect` says as what."""

    columns: dict[str, str] = Field(default_factory=dict)
    """Columns with other names, as {ours: theirs}, such as {"prompt": "ask", "completion": "reply"}."""

    bad_rows: Literal["refuse", "drop"] = "refuse"
    """Rows that cannot be trained on: refuse the file, or drop them, counted and listed in dropped_rows.jsonl."""

    max_length_tokens: int = Field(default=256, ge=16, le=1_048_576)
    """Examples are cut to this many tokens. Memory for activations grows with it."""

    temperature: float | None = Field(default=None, gt=0, le=1000)
    """Sources without weights share the rows by size^(1/temperature): 1 as they are, larger evens out. null: 1."""

    phases: tuple[MixturePhase, ...] = Field(default=(), strict=False)
    """A curriculum: [{until_steps: 100, weights: {name: 1}}, …, {weights: {…}}]. []: one mixture throughout."""

    eval_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of the training rows that is held out instead of a file `eval`; rows with one prompt stay together."""

    leakage: Literal["warn", "refuse", "off"] = "warn"
    """What happens where held-out rows occur in the training data, as they are or nearly. off: nobody looks."""

    drop_easiest: float = Field(default=0.0, ge=0, lt=1)
    """Share of each source's rows that is left out: those with the least loss of the base. 0: none. Needs
    `studio data score`."""

    drop_hardest: float = Field(default=0.0, ge=0, lt=1)
    """The same of the rows with the largest loss, often broken ones. 0: none."""

    streaming: bool = False
    """Read rows while training, through a shuffle buffer, for data larger than memory. Needs training.max_steps."""

    @model_validator(mode="after")
    def _settings_go_together(self) -> Self:
        if problems := mixture_problems(self):
            raise refused_keys(problems)
        return self

    @property
    def mixed(self) -> bool:
        """Whether `train` lists sources, so that the order of the rows is planned."""
        return not isinstance(self.train, Path)

    @property
    def ordered(self) -> bool:
        """Whether trainers read the rows in an order that is fixed before they start."""
        return self.mixed or self.streaming

    @property
    def sources(self) -> tuple[DataSource, ...]:
        return (DataSource(path=self.train),) if isinstance(self.train, Path) else self.train

    @property
    def held_out(self) -> bool:
        """Whether there are rows to be measured on."""
        return self.eval is not None or self.eval_fraction is not None

    @field_validator("columns")
    @classmethod
    def _columns_are_ours(cls, columns: dict[str, str]) -> dict[str, str]:
        known = {name: f"unknown column; allowed: {', '.join(COLUMNS)}" for name in columns if name not in COLUMNS}
        empty = {name: "received an empty name; allowed: a column of the file" for name in columns if not columns[name]}
        if found := {**empty, **known}:
            listed = "; ".join(f"{name}: {message}" for name, message in found.items())
            raise PydanticCustomError("refused_keys", "{message}", {"message": listed, "keys": found})
        if twice := sorted({theirs for theirs in columns.values() if list(columns.values()).count(theirs) > 1}):
            raise _refusal(f"received {', '.join(twice)} for several columns; allowed: each column of the file once")
        return columns


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
    of this recipe are not read. null: a new adapter."""

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
        for name, rules in _readers().items():
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


def _readers() -> dict[str, tuple[str, ...]]:
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


class TrainingSettings(Settings):
    """How the adapter is trained."""

    method: Literal["sft", "dpo", "kto", "orpo", "cpo", "reward", "grpo", "rloo", "rejection"] = "sft"
    """sft: supervised fine-tuning, on conversations or plain text. From preference pairs: dpo, orpo, cpo (also SimPO),
    and reward, which trains a reward model. kto: from completions labelled as wanted or not, or pairs. grpo, rloo:
    learn from `rewards` of completions that the model writes. rejection: sft on the best of them."""

    epochs: float | None = Field(default=3.0, gt=0, le=1000)
    """Passes over the training examples. null where max_steps is set."""

    max_steps: int | None = Field(default=None, ge=1, le=100_000_000)
    """Train for exactly this many optimizer steps. null: as `epochs` says. Only one of the two is set."""

    batch_size: int = Field(default=16, ge=1, le=4096)
    """Examples per forward pass. Memory for activations grows with it."""

    gradient_accumulation_steps: int = Field(default=1, ge=1, le=4096)
    """Forward passes per optimizer step. The effective batch is batch_size times this."""

    learning_rate: Rate | Literal["auto"] = 2e-4
    """Highest learning rate, reached after the warm-up. auto: what `studio suggest` says."""

    lr_scheduler: Literal["linear", "cosine", "constant"] = "cosine"
    """How the learning rate goes on after the warm-up: falls linearly, along a cosine, or stays constant."""

    warmup_fraction: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""

    lora_plus_ratio: float = Field(default=1.0, ge=1, le=1024)
    """Learning rate of the B factors over that of the A factors (LoRA+, whose paper finds 16 good). 1: the same."""

    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """AdamW's weight decay on the adapter."""

    max_grad_norm: float = Field(default=1.0, ge=0, le=1000)
    """Gradients are scaled down to this norm. 0: never."""

    loss_on: Literal["completion", "assistant", "all"] = "completion"
    """What sft learns: the completion, every turn of the assistant, or all tokens. Plain text is learned whole."""

    expert_path: Literal["auto", "fast", "lean"] = "auto"
    """fast keeps the experts' activations, lean computes them again (less memory). auto: fast where it fits."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Seed of the data order and of the adapter's start."""

    logging_steps: int = Field(default=5, ge=1, le=100_000)
    """Optimizer steps between two points of the loss curve."""

    @model_validator(mode="before")
    @classmethod
    def _max_steps_alone_clears_epochs(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("max_steps") is not None and "epochs" not in values:
            return {**values, "epochs": None}
        return values

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.max_steps is None):
            both = "both are" if self.epochs is not None else "neither is"
            raise _refusal(f"{both} set: give either epochs or max_steps, and null for the other")
        return self


class PreferenceSettings(Settings):
    """What the preference methods share; everything else of a method is in `trl`."""

    beta: float = Field(default=0.1, gt=0, le=1000)
    """How strongly the policy is held to the reference (dpo, kto), or the weight of the odds ratio (orpo)."""

    loss_type: tuple[str, ...] = ()
    """Losses of the method, such as [sigmoid] or [sigmoid, sft] for dpo; only dpo takes several. []: its usual one."""

    loss_weights: tuple[float, ...] = ()
    """Weights of several losses of dpo, one for each. []: 1 for each."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the pairs that are taken to be the wrong way round. Not every loss reads it."""

    @field_validator("loss_type", "loss_weights", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return (value,)
        return tuple(value) if isinstance(value, list) else value


class GateRule(Settings):
    """A limit on how much worse a metric may get from base to tuned; past it the job fails, with its adapter kept."""

    metric: str
    """Its name: loss, perplexity, exact_match, json_valid, schema_valid, or TASK/METRIC of a task."""

    max_drop: float | None = Field(default=None, ge=0)
    """Most that the metric may fall. Either this or max_rise."""

    max_rise: float | None = Field(default=None, ge=0)
    """Most that the metric may rise."""

    relative: bool = False
    """Whether the limit is a share of the base's value."""

    certain: bool = False
    """Whether the whole 95 % interval of the change must lie past the limit for the job to fail."""

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if (self.max_drop is None) == (self.max_rise is None):
            raise _refusal("a rule of the gate has one of max_drop and max_rise, and only one")
        return self


def _task(value: Any, info: ValidationInfo) -> Any:
    """A task of lm-eval: its name, or its file, whose path starts at the recipe."""
    return str(_absolute(value, info)) if isinstance(value, str) and value.endswith((".yaml", ".yml")) else value


TaskName = Annotated[str, BeforeValidator(_task), Field(min_length=1)]


class RewardSettings(Settings):
    """One reward: a function, its weight, and the options that this function reads."""

    function: Literal[
        "exact_match", "json_fields", "json_schema", "regex", "code", "length", "thinking", "reward_model"
    ]
    """exact_match, json_fields: against the reference. json_schema, regex: the answer's form. code: the answer's
    program runs, or passes the row's tests. length: not too long. thinking: first thinks, then answers. reward_model:
    a trained one."""

    weight: float = Field(default=1.0, ge=-1000, le=1000)
    """The total reward is the sum of the rewards times their weights. Negative: a penalty."""

    normalise: Literal["ends", "lenient", "json"] = "ends"
    """What exact_match passes over: white space at the ends; also case, spacing and punctuation; or compare as JSON."""

    json_schema: InputPath | dict[str, JsonValue] | None = None
    """A JSON Schema, or the path of its file. A relative path starts at the recipe file."""

    pattern: str | None = None
    """Python regular expression that regex looks for."""

    part: Literal["answer", "completion"] = "answer"
    """Where regex looks: in what comes after the thinking, or in all of the completion."""

    timeout_seconds: float = Field(default=2.0, gt=0, le=600)
    """Longest that code may run, for each test."""

    memory_bytes: int = Field(default=2**29, ge=2**26, le=2**40)
    """Most address space that code may use."""

    longest_characters: int | None = Field(default=None, ge=1)
    """Answers up to here get the full reward of length."""

    job: InputPath | None = None
    """Job directory of a trained reward model. A relative path starts at the recipe file."""

    @model_validator(mode="after")
    def _the_function_reads_what_is_given(self) -> Self:
        if not self.weight:
            raise _refusal("weight is 0: the reward would count for nothing; leave it out")
        if problem := unknown_option(self):
            raise _refusal(problem)
        try:
            if self.function != "reward_model" and not isinstance(self.json_schema, Path):
                REWARDS[self.function].build(self)
        except re.error as error:
            raise _refusal(f"pattern is no regular expression: {error}") from None
        except RewardError as error:
            raise _refusal(f"{self.function}: {error}") from None
        return self


class SamplingSettings(Settings):
    """How completions are drawn from the model, to be rewarded."""

    completions: int = Field(default=8, ge=2, le=1024)
    """Completions of each prompt. They are compared with each other."""

    temperature: float = Field(default=1.0, gt=0, le=10)
    """Of the sampling: below 1 the likely tokens become likelier."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the most likely tokens that make up this probability alone."""

    max_new_tokens: int = Field(default=128, ge=1, le=1_048_576)
    """Longest completion to draw, in tokens."""

    threshold: float = 1.0
    """rejection keeps completions whose total reward is at least this."""

    keep: int = Field(default=1, ge=1, le=1024)
    """Most different completions of a prompt that rejection keeps, the best first."""

    rounds: int = Field(default=1, ge=1, le=100)
    """How often rejection samples anew, from the model as trained so far, and trains on what it kept."""


class EvaluationSettings(Settings):
    """The comparison of base and tuned model on held-out examples."""

    examples: int | None = Field(default=200, ge=1)
    """Held-out examples for loss and exact match. null: all of them."""

    generations: int = Field(default=5, ge=0, le=1000)
    """Held-out examples whose answers are shown side by side, base and tuned."""

    max_new_tokens: int = Field(default=96, ge=1, le=65536)
    """Longest answer to generate, in tokens."""

    json_schema: InputPath | None = None
    """JSON Schema file that answers should fit. null: where all references are JSON, answers need only be JSON."""

    every_steps: int | None = Field(default=None, ge=1, le=100_000_000)
    """Optimizer steps between two held-out losses while training. null: none."""

    tasks: tuple[TaskName, ...] = ()
    """Tasks of lm-eval to run on base and tuned: names of tasks whose data are here, or YAML files of your own."""

    task_examples: int | None = Field(default=None, ge=1)
    """First examples of each task. null: all of them."""

    task_chat_template: bool = False
    """Whether the tasks' prompts are put into the model's chat template."""

    gate: tuple[GateRule, ...] = ()
    """Limits such as {metric: loss, max_rise: 0.05}: a job that is past one of them fails, with its adapter kept."""

    @field_validator("tasks", "gate", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _the_gate_asks_for_what_is_measured(self) -> Self:
        tasks = {Path(task).stem for task in self.tasks}
        for rule in self.gate:
            task, slash, _ = rule.metric.partition("/")
            if not slash and rule.metric not in METRICS:
                near = get_close_matches(rule.metric, METRICS, n=1)
                hint = f'; did you mean "{near[0]}"?' if near else ""
                raise _refusal(
                    f'gate: received the metric "{rule.metric}"; allowed: {", ".join(METRICS)}, or TASK/METRIC{hint}'
                )
            if slash and not tasks:
                raise _refusal(f'gate: "{rule.metric}" is a metric of the task {task}, but tasks lists none')
            if rule.metric == "schema_valid" and self.json_schema is None:
                raise _refusal("gate: schema_valid is measured with json_schema alone; set it")
        return self


class OutputSettings(Settings):
    """Where the job and its adapter go."""

    dir: OutputPath
    """The job directory, made when the job is submitted. A relative path starts at the working directory."""


class Recipe(Settings):
    """A fine-tuning job as it is wanted."""

    model: ModelSettings = ModelSettings()
    data: DataSettings
    adapter: AdapterSettings = AdapterSettings()
    placement: PlacementSettings = PlacementSettings()
    router: RouterSettings = RouterSettings()
    training: TrainingSettings = TrainingSettings()
    preference: PreferenceSettings = PreferenceSettings()
    rewards: tuple[RewardSettings, ...] = ()
    """What completions that the model writes are rewarded for, such as [{"function": "exact_match"}]."""

    sampling: SamplingSettings = SamplingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    trl: dict[str, JsonValue] = Field(default_factory=dict)
    """Any further option of the method's class in TRL, by its TRL name, such as {"neftune_noise_alpha": 5}."""

    output: OutputSettings

    @model_validator(mode="after")
    def _held_out_metrics_have_examples(self) -> Self:
        evaluation = self.evaluation
        asked = [f"gate ({rule.metric})" for rule in evaluation.gate if "/" not in rule.metric]
        asked += [name for name in ("json_schema", "every_steps") if getattr(evaluation, name) is not None]
        if asked and self.data.eval is None and self.data.eval_fraction is None:
            needed = "needs held-out examples; set data.eval or data.eval_fraction"
            raise _refused_section("evaluation", f"{', '.join(asked)} {needed}")
        if evaluation.every_steps and METHODS[self.training.method].scores:
            raise _refused_section("evaluation", "every_steps measures a loss of text, and a reward model writes none")
        return self

    @model_validator(mode="after")
    def _something_is_trained(self) -> Self:
        rule, adapter = PLACEMENTS[self.placement.rule], self.adapter
        if adapter.start_from:  # the ranks are those of that adapter
            return self
        if adapter.dense_mlp_rank and "dense_mlp" not in rule.joins:
            problem = f"dense_mlp_rank is not 0, but placement.rule {self.placement.rule} adapts no dense MLP"
            raise _refused_section("adapter", problem)
        ranks = [getattr(adapter, f"{name}_rank") for name in rule.joins]
        routed = adapter.routed_experts_rank if "rank" in rule.settings else "parameters" in rule.settings
        if not any((*ranks, routed)) and self.router.mode == "frozen":
            raise _refused_section(
                "adapter",
                "every rank that placement.rule reads is 0, nothing would be trained; set at least one rank above 0",
            )
        if "rank" in rule.settings and not routed and self.placement.rule != "all_experts":
            raise _refused_section(
                "adapter",
                f"routed_experts_rank is 0, but placement.rule {self.placement.rule} chooses experts; "
                "set it above 0, or the rule to shared",
            )
        return self

    @model_validator(mode="after")
    def _the_method_reads_what_is_given(self) -> Self:
        if problems := preference_problems(self.training.method, self.preference):
            raise PydanticCustomError(
                "refused_keys",
                "{message}",
                {"message": "; ".join(problems.values()), "keys": {f"preference.{k}": v for k, v in problems.items()}},
            )
        training = self.training
        if training.method != "sft" and training.loss_on != "completion":
            raise _refused_section("training", f"loss_on is read by sft alone, and the method is {training.method}")
        if training.method == "kto" and training.batch_size == 1:
            raise _refused_section(
                "training", "batch_size is 1, but kto estimates the KL from other rows of the batch: 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _data_go_with_the_training(self) -> Self:
        if problems := training_problems(self):
            raise refused_keys({f"data.{name}": message for name, message in problems.items()})
        return self

    @model_validator(mode="after")
    def _the_method_fits(self) -> Self:
        adapter = self.adapter
        if adapter.init == "loftq" and self.model.quantization == "none":
            lost = "init is loftq, but model.quantization is none: nothing was lost; set init to zero or pissa"
            raise _refused_section("adapter", lost)
        if adapter.dora and (problem := dora_problem(self._wanted())):
            raise _refused_section("adapter", problem)
        return self

    def _wanted(self) -> Placement:
        """The classes and the method that are asked for, as far as they are known without a model."""
        rule, adapter = PLACEMENTS[self.placement.rule], self.adapter
        routed = adapter.routed_experts_rank if "rank" in rule.settings else int("parameters" in rule.settings)
        return Placement(
            **{name: getattr(adapter, f"{name}_rank") for name in rule.joins},
            routed=((routed,),) if routed else (),
            router=int(self.router.mode != "frozen"),
            method=Method(rslora=adapter.rslora, dora=adapter.dora, start=adapter.init, dropout=adapter.dropout),
        )

    @field_validator("rewards", mode="before")
    @classmethod
    def _rewards_are_a_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _rewards_and_the_method_fit(self) -> Self:
        method, samples = self.training.method, METHODS[self.training.method].samples
        if samples and not self.rewards:
            raise _refused_section(
                "rewards", f"training.method {method} needs a reward, such as [{{function: exact_match}}]"
            )
        if self.rewards and not samples:
            readers = ", ".join(name for name, entry in METHODS.items() if entry.samples)
            raise _refused_section("rewards", f"given, but training.method is {method}; rewards are read by {readers}")
        if method in ("grpo", "rloo"):
            batch = self.training.batch_size * self.training.gradient_accumulation_steps
            if batch % self.sampling.completions:
                raise _refused_section(
                    "training",
                    f"batch_size times gradient_accumulation_steps is {batch} completions a step; allowed: a multiple "
                    f"of sampling.completions, {self.sampling.completions}, so that each prompt has all of its own",
                )
        return self

    @field_validator("trl")
    @classmethod
    def _options_exist_in_trl(cls, options: dict[str, JsonValue], info: ValidationInfo) -> dict[str, JsonValue]:
        method = info.data["training"].method if "training" in info.data else "sft"  # absent where it has problems
        found = {name: message for name, value in options.items() if (message := trl_problem(name, value, method))}
        if found:
            listed = "; ".join(f"{name}: {message}" for name, message in found.items())
            raise PydanticCustomError("refused_keys", "{message}", {"message": listed, "keys": found})
        return options


def load_recipe(path: Path | str) -> Recipe:
    """The recipe in the YAML file at `path`.

    Raises:
        RecipeError: the file cannot be read, or anything in it is not allowed; all problems together.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise RecipeError([Problem("", None, f"cannot be read: {reason}", str(path))]) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise RecipeError([Problem("", line, "is not UTF-8 text", str(path))]) from None
    return parse_recipe(text, path)


def parse_recipe(text: str, source: Path | None = None) -> Recipe:
    """The recipe that the YAML `text` says; relative data paths start at the folder of `source`.

    Raises:
        RecipeError: anything in it is not allowed; all problems together, each with its line.
    """
    file = str(source) if source else None
    values, marked = read_mapping(text, file)
    folder = Path(os.path.abspath(source)).parent if source else Path.cwd()
    try:
        return Recipe.model_validate(values, context={"folder": folder})
    except ValidationError as error:
        raise RecipeError(problems_of(error, marked, recipe_schema(), file)) from None


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe, for editors and for the form in the browser.

    A field that another one switches on says so as "x-read-when": {"placement.rule": ["budget"]}.
    """
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
    for section, name, switch, values in _switched():
        schema["$defs"][section]["properties"][name]["x-read-when"] = {switch: list(values)}
    return schema


def _switched() -> Iterator[tuple[str, str, str, Sequence[Any]]]:
    """(section class, field, the field that switches it on, its values that do)."""
    for name, rules in _readers().items():
        yield "PlacementSettings", name, "placement.rule", rules
    for name in ("attention", "shared_expert", "dense_mlp"):
        joined = [rule for rule, entry in PLACEMENTS.items() if name in entry.joins]
        yield "AdapterSettings", f"{name}_rank", "placement.rule", joined
    ranked = [rule for rule, entry in PLACEMENTS.items() if "rank" in entry.settings]
    yield "AdapterSettings", "routed_experts_rank", "placement.rule", ranked
    yield "RouterSettings", "rank", "router.mode", ("lora",)
    for name in PreferenceSettings.model_fields:
        yield "PreferenceSettings", name, "training.method", readers_of(name)
    yield "TrainingSettings", "loss_on", "training.method", ("sft",)
    for name in RouterSettings.model_fields:
        if name.endswith("_coef"):
            yield "RouterSettings", name, "router.mode", ("lora", "full")
        if name.startswith(("probe_", "warn_", "stop_")):
            yield "RouterSettings", name, "router.watch", (True,)
    sampling = tuple(name for name, entry in METHODS.items() if entry.samples)
    for name in SamplingSettings.model_fields:
        alone = name in ("threshold", "keep", "rounds")
        yield "SamplingSettings", name, "training.method", ("rejection",) if alone else sampling


def recipe_to_yaml(recipe: Recipe) -> str:
    """YAML text with every field of `recipe`, which `parse_recipe` reads back to an equal recipe."""
    stream = StringIO()
    yaml = YAML()
    yaml.Representer = _ExplicitNull
    yaml.width = 10_000  # one line per value
    values = recipe.model_dump(mode="json")
    if isinstance(experts := recipe.placement.experts, dict):
        values["placement"]["experts"] = {layer: list(ids) for layer, ids in experts.items()}  # JSON's keys are text
    yaml.dump(values, stream)
    return stream.getvalue()


class _ExplicitNull(RoundTripRepresenter):
    """Writes null as `null`, where ruamel writes nothing."""


_ExplicitNull.add_representer(type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null"))
