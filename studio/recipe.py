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
    BaseModel,
    BeforeValidator,
    ConfigDict,
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

from adapters.placement import PLACEMENTS
from studio.errors import Problem, RecipeError, RewardError
from studio.methods import METHODS
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

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def _refusal(message: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{message}", {"message": message})


def _refused_section(name: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("refused_keys", "{message}", {"message": message, "keys": {name: message}})


def _absolute(value: Any, info: ValidationInfo) -> Any:
    """A path text made absolute against the recipe's folder, or the working directory where there is none."""
    if not isinstance(value, str | Path):
        return value
    text = str(value)
    return _path(text, (info.context or {}).get("folder") or Path.cwd())


def _path(text: str, folder: Path) -> Path:
    if not text.strip() or not text.isprintable():
        raise _refusal(f"received {describe(text)}; allowed: a path")
    return Path(os.path.abspath(folder / os.path.expanduser(text)))


def _absolute_from_cwd(value: Any) -> Any:
    return _path(str(value), Path.cwd()) if isinstance(value, str | Path) else value


def _expert_ids(value: Any, allowed: str, empty: bool = False) -> tuple[int, ...]:
    ids = list(value) if isinstance(value, list | tuple) else None
    if ids is None or not (ids or empty) or not all(type(i) is int and 0 <= i <= 65535 for i in ids):
        shown = value if ids is not None and len(ids) <= 8 else describe(value)
        raise _refusal(f"received {shown}; allowed: {allowed}")
    if len(set(ids)) < len(ids):
        twice = sorted({i for i in ids if ids.count(i) > 1})
        raise _refusal(f"expert ids must be unique, received {', '.join(map(str, twice))} more than once")
    return tuple(ids)


InputPath = Annotated[Path, BeforeValidator(_absolute)]
OutputPath = Annotated[Path, BeforeValidator(_absolute_from_cwd)]
Rank = Annotated[int, Field(ge=0, le=1024)]
ExpertId = Annotated[int, Field(ge=0, le=65535)]
LayerNumber = Annotated[int, Field(ge=0, le=65535)]


class Settings(BaseModel):
    """A section of the recipe: frozen, no unknown keys, no silent conversions ("16" is not a number)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


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
    """The examples: JSON Lines, each row {"messages": [...]} or {"prompt": ..., "completion": ...}."""

    train: InputPath
    """JSON Lines file of training examples. A relative path starts at the recipe file."""

    eval: InputPath | None = None
    """JSON Lines file of held-out examples, for the comparison before and after. null: no comparison."""

    max_length_tokens: int = Field(default=256, ge=16, le=1_048_576)
    """Examples are cut to this many tokens. Memory for activations grows with it."""


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

    method: Literal["sft", "grpo", "rloo", "rejection"] = "sft"
    """Training method. sft: supervised fine-tuning on the completions. grpo, rloo: learn from `rewards` of completions
    that the model writes. rejection: sft on the best of them."""

    epochs: float | None = Field(default=3.0, gt=0, le=1000)
    """Passes over the training examples. null where max_steps is set."""

    max_steps: int | None = Field(default=None, ge=1, le=100_000_000)
    """Train for exactly this many optimizer steps. null: as `epochs` says. Only one of the two is set."""

    batch_size: int = Field(default=16, ge=1, le=4096)
    """Examples per forward pass. Memory for activations grows with it."""

    gradient_accumulation_steps: int = Field(default=1, ge=1, le=4096)
    """Forward passes per optimizer step. The effective batch is batch_size times this."""

    learning_rate: float = Field(default=2e-4, gt=0, le=1)
    """Highest learning rate, reached after the warm-up."""

    lr_scheduler: Literal["linear", "cosine", "constant"] = "cosine"
    """How the learning rate goes on after the warm-up: falls linearly, along a cosine, or stays constant."""

    warmup_fraction: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""

    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """AdamW's weight decay on the adapter."""

    max_grad_norm: float = Field(default=1.0, ge=0, le=1000)
    """Gradients are scaled down to this norm. 0: never."""

    loss_on: Literal["completion", "all"] = "completion"
    """Which tokens are learned: those of the completion, or all."""

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
    rewards: tuple[RewardSettings, ...] = ()
    """What completions that the model writes are rewarded for, such as [{"function": "exact_match"}]."""

    sampling: SamplingSettings = SamplingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    trl: dict[str, JsonValue] = Field(default_factory=dict)
    """Any further option of the method's class in TRL, by its TRL name, such as {"neftune_noise_alpha": 5}."""

    output: OutputSettings

    @model_validator(mode="after")
    def _something_is_trained(self) -> Self:
        rule, adapter = PLACEMENTS[self.placement.rule], self.adapter
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
