"""Recipe → Plan: every tensor class with its bytes, what is trained, and the predicted peak memory.

    make_plan(recipe)                        for the base model in the recipe, which lies on this machine
    make_plan(recipe, shape="llama4-scout")  for a published shape in its place; no weights, no download

Read from config.json, safetensors headers and the data files alone: no weights, no torch, under two seconds.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from adapters.errors import CheckpointError, StudioError
from adapters.placement import Placement, same_experts_everywhere
from studio.activations import Pass
from studio.base import EMBEDDED_DIR
from studio.data import Example, Row, Sequence, both_rows, sequences
from studio.generations import asked, drawn_together, is_online, online_steps
from studio.memory import Held, MemoryPlan, fits, memory_at_hand, predict_memory
from studio.methods import METHODS
from studio.models import check_tokenizer, compute_dtype, has_gpu, resolve_base
from studio.placing import coverage, plan_placement
from studio.quantities import as_bytes
from studio.recipe import Recipe
from studio.rewards import check_rewards
from studio.rewards.programs import missing_protections
from studio.shapes import published_shape
from studio.weights import BYTES, Base, HeldAs, TensorClass, base_in, expert_grid, tensor_classes

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
        placement: which routed experts get adapters; None for a dense model.
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
    placement: PlacementPlan | None = None


def make_plan(recipe: Recipe, shape: str | None = None, profile: RouterProfile | None = None) -> Plan:
    """Plans a recipe.

    Args:
        shape: a name in `studio.shapes.SHAPES`: plan for this published model instead of the recipe's base.
        profile: where the router sends the data; None looks for the one that `studio profile` keeps.

    Raises:
        StudioError: anything that would make the job fail later and can be known now: base model missing or pickled,
            unsupported family, data files with bad rows, an adapter on a class or expert that the model does not have.
    """
    base = published_shape(shape).base() if shape else recipe_base(recipe)
    train, held_out = both_rows(recipe)
    for rows, file in ((train, recipe.data.train), (held_out, recipe.data.eval)):
        check_rewards(recipe, rows, str(file))
    if profile is None and shape is None and base.moe:  # also for a rule that needs none: it says what the rule covers
        from studio.profile import find_profile

        profile = find_profile(recipe)
    placement = plan_placement(recipe, base, profile)
    classes = tensor_classes(base, _held_as(recipe), placement)
    lengths = _lengths_tokens(_tokenizer_of(recipe, base), asked(recipe, train))
    if METHODS[recipe.training.method].samples:
        lengths = [length + recipe.sampling.max_new_tokens for length in lengths]
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
        truncated_examples=0 if is_online(recipe) else sum(n > recipe.data.max_length_tokens for n in lengths),
        total_steps=total_steps(recipe, len(train)),
        warnings=_warnings(recipe, base, memory, at_hand),
        placement=_placement_plan(recipe.placement.rule, base, placement, profile) if base.moe else None,
    )


def _placement_plan(rule: str, base: Base, placement: Placement, profile: RouterProfile | None) -> PlacementPlan:
    grid = expert_grid(base)
    parameters = grid.parameters(placement.routed)
    everywhere = grid.parameters(same_experts_everywhere(placement.routed_rank, len(grid.layers), grid.experts))
    return PlacementPlan(
        rule=rule,
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


def total_steps(recipe: Recipe, examples: int) -> int:
    """Optimizer steps of the whole training; with `trl: {packing: true}` and in rejection sampling an upper bound."""
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


def _held_as(recipe: Recipe) -> HeldAs:
    model = recipe.model
    return HeldAs(model.quantization, model.double_quant, model.int8_experts, compute_dtype(model.dtype))


# -------------------------------------------------------------------- memory


def _choose_path(
    recipe: Recipe, base: Base, placement: Placement, longest_tokens: int, weights_bytes: int, trainable: int
) -> tuple[Literal["fast", "lean"], MemoryPlan, int | None]:
    """The path of the routed experts, its memory, and what is at hand: fast where it fits, unless the recipe says."""
    training, on_gpu = recipe.training, has_gpu()
    held = Held(
        weights_bytes=weights_bytes,
        trainable_parameters=trainable,
        quantized=recipe.model.quantization != "none",
        accumulates=training.gradient_accumulation_steps > 1,
        checkpointing=training.gradient_checkpointing,
    )
    limit = longest_tokens if is_online(recipe) else recipe.data.max_length_tokens
    drawn = drawn_together(recipe, longest_tokens)
    run = Pass(
        batch_size=training.batch_size,
        length_tokens=limit if recipe.trl.get("packing") else min(limit, longest_tokens),
        dtype_bytes=BYTES[compute_dtype(recipe.model.dtype)],
        on_gpu=on_gpu,
        attention_rank=placement.attention,
        shared_expert_rank=placement.shared_expert,
        dense_mlp_rank=placement.dense_mlp,
        routed_experts_rank=placement.routed_rank,
        keep_gate_up=training.expert_path != "lean",
    )
    at_hand, memory = memory_at_hand(on_gpu), predict_memory(base, held, run, drawn)
    if training.expert_path != "auto" or fits(memory.peak_bytes, at_hand):
        return "fast" if run.keep_gate_up else "lean", memory, at_hand
    return "lean", predict_memory(base, held, replace(run, keep_gate_up=False), drawn), at_hand


def _warnings(recipe: Recipe, base: Base, memory: MemoryPlan, at_hand: int | None) -> tuple[str, ...]:
    found = []
    if at_hand is not None and not fits(memory.peak_bytes, at_hand):
        options = "; ".join(_options(recipe, base, memory, at_hand))
        peak = f"the predicted peak of {as_bytes(memory.peak_bytes)} plus 10 %"
        found.append(f"{peak} does not fit into the {as_bytes(at_hand)} at hand. What would help: {options}")
    if any(reward.function == "code" for reward in recipe.rewards) and (missing := missing_protections()):
        found.append(missing)
    if base.directory is None:
        found.append(f"{base.name} is a published shape: its weights and its tokenizer were not looked for")
    return tuple(found)


def _options(recipe: Recipe, base: Base, memory: MemoryPlan, at_hand: int) -> list[str]:
    """What would make the peak smaller, the cheapest first."""
    training = recipe.training
    options = []
    if fits(memory.fixed_bytes, at_hand):
        if base.moe and training.expert_path == "fast":
            options.append("training.expert_path: lean")
        if training.batch_size % 2 == 0:
            steps = training.gradient_accumulation_steps * 2
            options.append(f"training.batch_size: {training.batch_size // 2} with gradient_accumulation_steps: {steps}")
        if not training.gradient_checkpointing:
            options.append("training.gradient_checkpointing: true")
        options.append("a shorter data.max_length_tokens")
    if recipe.model.quantization in ("none", "int8"):
        options.append("model.quantization: nf4")
    if base.moe and recipe.placement.rule == "all_experts" and recipe.adapter.routed_experts_rank:
        options.append("a placement.rule that adapts fewer experts, or a lower rank")
    return [*options, "a machine with more memory"]


# -------------------------------------------------------------------- lengths


def _tokenizer_of(recipe: Recipe, base: Base) -> Path:
    """The folder whose tokenizer counts the tokens: for a shape the recipe's own base, or the embedded one."""
    if base.directory is not None:
        return base.directory
    try:
        return resolve_base(recipe.model.base)
    except StudioError:
        return EMBEDDED_DIR


def _lengths_tokens(directory: Path, rows: list[Row]) -> list[int]:
    """Tokens of each row (of a pair the longer side) by the model's own tokenizer, and 8 a turn for the template."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # what the Rust library raises has no narrower class
        raise CheckpointError(directory / "tokenizer.json", [f"cannot be read: {error}"]) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    sides = [sequences([row]) for row in rows]
    texts = [_texts(side) for of_row in sides for side in of_row]
    encoded = tokenizer.encode_batch(["\n".join(turns) for turns in texts])
    lengths = iter([len(ids.ids) + 8 * len(turns) for ids, turns in zip(encoded, texts, strict=True)])
    return [max(next(lengths) for _ in of_row) for of_row in sides]


def _texts(sequence: Sequence) -> list[str]:
    if isinstance(sequence, Example):
        return [turn.thinking + turn.content + "".join(map(str, turn.tool_calls)) for turn in sequence.turns]
    return [sequence.text]
