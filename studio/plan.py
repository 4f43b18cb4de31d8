"""Recipe → Plan: every tensor class with its bytes, what is trained, and the predicted peak memory.

    make_plan(recipe)                        for the base model in the recipe, which lies on this machine
    make_plan(recipe, shape="llama4-scout")  for a published shape in its place; no weights, no download

Read from config.json, safetensors headers and the data files alone: no weights, no torch, under two seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from adapters.errors import StudioError
from adapters.placement import Placement, same_experts_everywhere
from studio.activations import Pass
from studio.base import EMBEDDED_DIR
from studio.beside import beside, held_as
from studio.data import Preference, Row, recipe_rows
from studio.data.curriculum import Mixed, contributions
from studio.data.leakage import LeakPlan, leak_plan, refuse_leaks
from studio.data.lengths import TokenCounter
from studio.data.of_recipe import RecipeRows, count_of, refused
from studio.data.reading import refuse
from studio.defaults import settled, settled_learning_rate
from studio.evaluation_inputs import check_evaluation
from studio.generations import asked, check_prompts, drawn_together, is_online, online_steps
from studio.measurable import check_measurable
from studio.memory import Held, MemoryPlan, fits, memory_at_hand, predict_memory
from studio.methods import METHODS
from studio.models import check_tokenizer, compute_dtype, has_gpu, resolve_base
from studio.packed_plan import check_packing, packed_rows, packs
from studio.placing import coverage, plan_placement
from studio.plan_warnings import warnings
from studio.recipe import Recipe
from studio.rewards import check_rewards
from studio.shapes import published_shape
from studio.starting import reference_parameters
from studio.weights import BYTES, Base, TensorClass, base_in, expert_grid, start_parameters, tensor_classes

if TYPE_CHECKING:
    from adapters.router_profile import RouterProfile


class PlacementPlan(BaseModel):
    """Which routed experts get adapters.

    Attributes:
        rule: of the recipe.
        layers: decoder layer numbers of the MoE layers.
        ranks: by MoE layer and expert; () for no routed adapters.
        experts_adapted, experts_in_all: over all layers.
        shared_experts: of a layer; they see every token and are no part of the coverage. None without a profile.
        coverage: the share of the routed pairs that adapted experts get, of "all" the data and by data source. None
            without a profile.
        parameters, parameters_saved: of the adapters on routed experts; and what more it would be if every expert had
            the largest rank.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: str
    layers: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]
    experts_adapted: int
    experts_in_all: int
    shared_experts: int | None
    coverage: dict[str, float] | None
    parameters: int
    parameters_saved: int


class Plan(BaseModel):
    """What a recipe will do.

    Attributes:
        experts, top_k: of a layer, and of a token; 0 for a dense model.
        parameters, active_parameters: of the base, and those that one token meets.
        trainable_fraction: of the base's parameters.
        expert_path: what the routed experts keep for the backward pass: the recipe's choice, or the plan's for "auto".
        memory_at_hand_bytes: free for the job when it was planned: of the GPU, or of this machine's memory. None: not
            known.
        longest_tokens: of the longest training example, before it is cut to `data.max_length_tokens`.
        truncated_examples: training examples longer than that.
        warnings: what to know before the job is started.
        dropped_rows: bad rows of both files that are left out under `data.bad_rows: drop`.
        placement: which routed experts get adapters; None for a dense model.
        mixture: what each source of the data gives; None where there is one file.
        leaks: held-out rows that occur in the training data; None where nobody looked.
        left_out_examples: rows that the selection by loss leaves out.
        sampled: the data is streamed: `train_examples` and the lengths are of the first rows alone.
        learning_rate: what the recipe's "auto" stands for; None where it has a number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    model_type: str
    layers: int
    moe_layers: int
    experts: int
    top_k: int
    classes: tuple[TensorClass, ...]
    parameters: int
    bytes: int
    trainable_parameters: int
    trainable_fraction: float
    memory: MemoryPlan
    train_examples: int
    eval_examples: int
    longest_tokens: int
    truncated_examples: int
    total_steps: int
    # absent from the plans of older jobs
    active_parameters: int = 0
    expert_path: Literal["fast", "lean"] = "fast"
    memory_at_hand_bytes: int | None = None
    warnings: tuple[str, ...] = ()
    dropped_rows: int = 0
    placement: PlacementPlan | None = None
    mixture: Mixed | None = None
    leaks: LeakPlan | None = None
    left_out_examples: int = 0
    sampled: bool = False
    learning_rate: float | None = None


def make_plan(
    recipe: Recipe, shape: str | None = None, profile: RouterProfile | None = None, thorough: bool = False
) -> Plan:
    """Plans a recipe.

    Args:
        shape: a name in `studio.shapes.SHAPES`: plan for this published model instead of the recipe's base.
        profile: where the router sends the data; None looks for the one that `studio profile` keeps.
        thorough: look for held-out rows in all of the training data, however large.

    Raises:
        StudioError: anything that would make the job fail later and can be known now: base model missing or pickled,
            unsupported family, data files with bad rows, an adapter on a class or expert that the model does not have.
    """
    base = published_shape(shape).base() if shape else recipe_base(recipe)
    check_packing(recipe, base)
    check_evaluation(recipe.evaluation)
    found, lengths = _fitting_rows(recipe, base)
    train, held_out, dropped = found.train, found.held_out, found.dropped
    _check_rewards(recipe, train, held_out)
    check_measurable(recipe, held_out)
    leaks = _leaks(recipe, found, thorough)
    mixed = contributions(recipe, train)
    if profile is None and shape is None and base.moe:  # also for a rule that needs none: it says what the rule covers
        from studio.profile import find_profile

        profile = find_profile(recipe)
    placement = plan_placement(recipe, base, profile)
    classes = tensor_classes(base, held_as(recipe.model), placement)
    if METHODS[recipe.training.method].samples:
        prompts = TokenCounter(_tokenizer_of(recipe, base)).lengths(asked(recipe, train))
        lengths = [length + recipe.sampling.max_new_tokens for length in prompts]
    trainable = sum(entry.trainable_parameters for entry in classes)
    parameters = sum(entry.parameters for entry in classes)
    weights_bytes = sum(entry.bytes for entry in classes)
    path, memory, at_hand = _choose_path(recipe, base, placement, max(lengths), weights_bytes, trainable)
    return Plan(
        model=base.name,
        model_type=base.layout.model_type,
        layers=len(base.layers),
        moe_layers=len(base.moe),
        experts=base.experts,
        top_k=base.top_k,
        classes=classes,
        parameters=parameters,
        active_parameters=base.parameter_counts()["active"],
        bytes=weights_bytes,
        trainable_parameters=trainable,
        trainable_fraction=trainable / parameters,
        expert_path=path,
        memory=memory,
        memory_at_hand_bytes=at_hand,
        train_examples=len(train),
        eval_examples=min(len(held_out), recipe.evaluation.examples or len(held_out)),
        longest_tokens=max(lengths),
        dropped_rows=count_of(dropped),
        truncated_examples=0 if is_online(recipe) else sum(n > recipe.data.max_length_tokens for n in lengths),
        total_steps=total_steps(recipe, batch_rows(recipe, train, lengths)),
        warnings=warnings(recipe, base, placement, train, dropped, mixed, leaks, memory, at_hand),
        mixture=mixed,
        leaks=leaks,
        left_out_examples=len(found.left_out),
        sampled=recipe.data.streaming,
        placement=_placement_plan(recipe, base, placement, profile) if base.moe else None,
        learning_rate=_settled_rate(recipe, base, train),
    )


def _settled_rate(recipe: Recipe, base: Base, rows: list[Row]) -> float | None:
    if recipe.training.learning_rate != "auto":
        return None
    return settled_learning_rate(settled(recipe, base, rows))


def _check_rewards(recipe: Recipe, train: list[Row], held_out: list[Row]) -> None:
    check_rewards(recipe, train)
    check_rewards(recipe, held_out)
    check_prompts(recipe, train, held_out)


def _leaks(recipe: Recipe, rows: RecipeRows, thorough: bool) -> LeakPlan | None:
    if recipe.data.leakage == "off" or not rows.held_out:
        return None
    found = leak_plan(rows.train, rows.held_out, *((None,) if thorough else ()))
    if recipe.data.leakage == "refuse":
        refuse_leaks(found)
    return found


def _placement_plan(recipe: Recipe, base: Base, placement: Placement, profile: RouterProfile | None) -> PlacementPlan:
    grid = expert_grid(base)
    parameters = grid.parameters(placement.routed)
    everywhere = grid.parameters(same_experts_everywhere(placement.routed_rank, len(grid.layers), grid.experts))
    return PlacementPlan(
        rule="start_from" if recipe.adapter.start_from else recipe.placement.rule,
        layers=grid.layers,
        ranks=placement.routed,
        experts_adapted=placement.adapted_experts,
        experts_in_all=len(grid.layers) * grid.experts,
        shared_experts=profile.shared_experts if profile else None,
        coverage=coverage(placement, profile) if profile else None,
        parameters=parameters,
        parameters_saved=everywhere - parameters,
    )


def recipe_base(recipe: Recipe) -> Base:
    """The recipe's base model, from its files' headers.

    Raises:
        StudioError: it is not here, or its files cannot be trained on.
    """
    directory = resolve_base(recipe.model.base)
    base = base_in(directory, recipe.model.base)
    check_tokenizer(directory)
    return base


def batch_rows(recipe: Recipe, rows: Sequence[Row], lengths_tokens: Sequence[int]) -> int:
    """Rows that batches are made of: packed ones with `trl: {packing: true}`; of a pair, kto trains the sides apart.

    Packed rows are counted from the plan's lengths, which do not know the chat template: so about right.
    """
    if packs(recipe):
        return packed_rows(lengths_tokens, recipe.data.max_length_tokens)
    pairs = sum(isinstance(row, Preference) for row in rows) if recipe.training.method == "kto" else 0
    return len(rows) + pairs


def total_steps(recipe: Recipe, examples: int) -> int:
    """Optimizer steps of the whole training on that many rows of batches; in rejection sampling an upper bound."""
    training = recipe.training
    rounds = recipe.sampling.rounds if training.method == "rejection" else 1
    if training.max_steps is not None:
        return rounds * training.max_steps
    if is_online(recipe):
        return online_steps(recipe, examples)
    if training.method == "rejection":
        examples *= min(recipe.sampling.keep, recipe.sampling.completions)
    batches = math.ceil(examples / training.batch_size)
    per_epoch = max(1, math.ceil(batches / training.gradient_accumulation_steps))
    return rounds * math.ceil((training.epochs or 1.0) * per_epoch)


# -------------------------------------------------------------------- memory


def _choose_path(
    recipe: Recipe, base: Base, placement: Placement, longest_tokens: int, weights_bytes: int, trainable: int
) -> tuple[Literal["fast", "lean"], MemoryPlan, int | None]:
    """The path of the routed experts, its memory, and what is at hand: fast where it fits, unless the recipe says."""
    training, on_gpu = recipe.training, has_gpu()
    more, head = beside(recipe), base.number("hidden_size") if METHODS[training.method].scores else 0
    held = Held(
        weights_bytes=weights_bytes,
        trainable_parameters=trainable + head,
        quantized=recipe.model.quantization != "none",
        accumulates=training.gradient_accumulation_steps > 1,
        checkpointing=training.gradient_checkpointing,
        full_logits=METHODS[training.method].full_logits,
        start_parameters=start_parameters(base, placement) + reference_parameters(recipe, trainable),
        reward_models_bytes=more.reward_models_bytes,
        tasks_bytes=more.tasks_bytes,
    )
    limit = longest_tokens if is_online(recipe) else recipe.data.max_length_tokens
    drawn = drawn_together(recipe, longest_tokens)
    run = Pass(
        batch_size=training.batch_size * (2 if METHODS[training.method].paired else 1),
        length_tokens=limit if packs(recipe) else min(limit, longest_tokens),
        dtype_bytes=BYTES[compute_dtype(recipe.model.dtype)],
        on_gpu=on_gpu,
        attention_rank=placement.attention,
        shared_expert_rank=placement.shared_expert,
        dense_mlp_rank=placement.dense_mlp,
        routed_experts_rank=placement.routed_rank * (2 if placement.method.start == "pissa" else 1),
        keep_gate_up=training.expert_path != "lean",
        dropout=bool(placement.method.dropout),
        dora=placement.method.dora,
    )
    at_hand, memory = memory_at_hand(on_gpu), predict_memory(base, held, run, drawn)
    if training.expert_path != "auto" or fits(memory.peak_bytes, at_hand):
        return "fast" if run.keep_gate_up else "lean", memory, at_hand
    return "lean", predict_memory(base, held, replace(run, keep_gate_up=False), drawn), at_hand


# -------------------------------------------------------------------- rows and their lengths


def _fitting_rows(recipe: Recipe, base: Base) -> tuple[RecipeRows, list[int]]:
    """The recipe's rows whose prompts leave room for an answer, and the tokens of those to train on.

    Raises:
        DataError: as `recipe_rows`; and rows whose prompt alone fills `data.max_length_tokens`.
    """
    found = recipe_rows(recipe)
    counter, limit = TokenCounter(_tokenizer_of(recipe, base)), recipe.data.max_length_tokens
    lengths = counter.lengths(found.train)
    held_out = found.held_out[: recipe.evaluation.examples]
    long = dict(counter.long_prompts(found.train, lengths, limit))
    long_held_out = dict(counter.long_prompts(held_out, counter.lengths(held_out), limit))
    kept = [number for number in range(len(lengths)) if number not in long]
    train = [found.train[number] for number in kept]
    held_out = [row for number, row in enumerate(held_out) if number not in long_held_out]
    problems = [list(long.values()), list(long_held_out.values())]
    refuse([refused(recipe, rows, bad) for rows, bad in zip((train, held_out), problems, strict=True)])
    dropped = (*found.dropped, *problems[0], *problems[1])
    return replace(found, train=train, held_out=held_out, dropped=dropped), [lengths[number] for number in kept]


def _tokenizer_of(recipe: Recipe, base: Base) -> Path:
    """The folder whose tokenizer counts the tokens: for a shape the recipe's own base, or the embedded one."""
    if base.directory is not None:
        return base.directory
    try:
        return resolve_base(recipe.model.base)
    except StudioError:
        return EMBEDDED_DIR


def row_tokens(recipe: Recipe, rows: Sequence[Row]) -> list[int]:
    """Tokens of each row as the plan counts them, cut to `data.max_length_tokens`: phases that end by tokens go by it.

    Raises:
        StudioError: the base is not here, or has no tokenizer.
    """
    return row_counter(recipe)(rows)


def row_counter(recipe: Recipe) -> Callable[[Sequence[Row]], list[int]]:
    """`row_tokens` for rows that come one after the other: the tokenizer is loaded once.

    Raises:
        StudioError: the base is not here, or has no tokenizer.
    """
    counter, limit = TokenCounter(resolve_base(recipe.model.base)), recipe.data.max_length_tokens
    return lambda rows: [min(length, limit) for length in counter.lengths(rows)]
