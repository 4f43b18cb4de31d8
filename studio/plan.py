"""Recipe → Plan: every tensor class with its bytes, what is trained, and the predicted peak memory.

Read from config.json, safetensors headers and the data files alone: no weights, no torch, a second or less.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from adapters.checkpoint import TensorInfo, read_config, read_index, text_config
from adapters.errors import CheckpointError, TargetError
from adapters.layouts import QUANTIZED_CLASSES, TENSOR_CLASSES, ExpertLayout, TensorClassName, layout_for
from adapters.placement import Placement, same_experts_everywhere
from studio.data import Example, read_examples
from studio.memory import MemoryPlan, TrainingShape, predict_memory
from studio.models import check_tokenizer, compute_dtype, has_gpu, resolve_base
from studio.recipe import Recipe

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorClass(Frozen):
    """One class of base tensors.

    Attributes:
        name: see `adapters.layouts.TENSOR_CLASSES`.
        tensors, parameters: how many in the checkpoint.
        dtype: as held while training: nf4, or the computation's.
        bytes: held in memory, scales of 4-bit blocks included.
        rank: LoRA rank, 0 for no adapter.
        trainable_parameters: of the adapters on this class.
    """

    name: TensorClassName
    tensors: int
    parameters: int
    dtype: str
    bytes: int
    rank: int
    trainable_parameters: int


class Plan(Frozen):
    """What a recipe will do.

    Attributes:
        trainable_fraction: of the base's parameters.
        longest_tokens: of the longest training example, before it is cut to `data.max_length_tokens`.
        truncated_examples: training examples longer than that.
    """

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


def make_plan(recipe: Recipe) -> Plan:
    """Plans a recipe.

    Raises:
        StudioError: anything that would make the job fail later and can be known now: base model missing or pickled,
            unsupported family, data files with bad rows, an adapter on a class or expert that the model does not have.
    """
    directory = resolve_base(recipe.model.base)
    whole = read_config(directory)
    layout, index = language_model(directory, whole)
    config = text_config(whole)
    check_tokenizer(directory)
    placement = plan_placement(recipe, layout, index)
    classes = _classes(recipe, layout, index, placement)
    train = read_examples(recipe.data.train)
    held_out = read_examples(recipe.data.eval) if recipe.data.eval else []
    lengths = _lengths_tokens(directory, train)
    limit = recipe.data.max_length_tokens
    trainable = sum(entry.trainable_parameters for entry in classes)
    parameters = sum(entry.parameters for entry in classes)
    shape = TrainingShape(
        batch_size=recipe.training.batch_size,
        length_tokens=min(limit, max(lengths)),
        weights_bytes=sum(entry.bytes for entry in classes),
        trainable_parameters=trainable,
        dtype_bytes=BYTES[compute_dtype(recipe.model.dtype)],
        checkpointing=recipe.training.gradient_checkpointing,
        quantized=recipe.model.quantization == "nf4",
        on_gpu=has_gpu(),
    )
    return Plan(
        model=recipe.model.base,
        model_type=layout.model_type,
        layers=config["num_hidden_layers"],
        moe_layers=len(routers(layout, index)),
        experts=count_experts(layout, index),
        top_k=config.get(layout.top_k, 0),
        classes=classes,
        parameters=parameters,
        bytes=shape.weights_bytes,
        trainable_parameters=trainable,
        trainable_fraction=trainable / parameters,
        memory=predict_memory(config, layout, shape),
        train_examples=len(train),
        eval_examples=min(len(held_out), recipe.evaluation.examples or len(held_out)),
        longest_tokens=max(lengths),
        truncated_examples=sum(length > limit for length in lengths),
        total_steps=total_steps(recipe, len(train)),
    )


def language_model(directory: Path, config: Mapping[str, Any]) -> tuple[ExpertLayout, dict[str, TensorInfo]]:
    """The layout of a checkpoint, and its index without what is no part of the language model."""
    index = read_index(directory)
    layout = layout_for(config, index)
    return layout, {key: info for key, info in index.items() if layout.model_key(key)}


def plan_placement(recipe: Recipe, layout: ExpertLayout, index: Mapping[str, TensorInfo]) -> Placement:
    """The recipe's adapter section as a placement on this model.

    Raises:
        TargetError: a class with a rank that no tensor of the model belongs to, or an expert that does not exist.
    """
    wanted = recipe.adapter
    chosen = None if wanted.routed_experts == "all" else wanted.routed_experts
    moe_layers, experts = len(routers(layout, index)), count_experts(layout, index)
    routed = same_experts_everywhere(wanted.routed_experts_rank, moe_layers, experts, chosen)
    placement = Placement(
        attention=wanted.attention_rank,
        shared_expert=wanted.shared_expert_rank,
        router=wanted.router_rank,
        routed=routed,
        alpha=wanted.alpha,
    )
    present = {layout.tensor_class(key) for key in index}
    missing = [name for name, rank in placement.class_ranks().items() if rank and name not in present]
    if missing:
        raise TargetError(
            f"this {layout.model_type} model has no tensor of class {', '.join(missing)}; "
            f"set {', '.join(f'adapter.{name}_rank' for name in missing)} to 0"
        )
    return placement


def routers(layout: ExpertLayout, index: Mapping[str, TensorInfo]) -> list[TensorInfo]:
    """The router weights, (E, H) each: one for every layer with routed experts."""
    weight = f".{layout.block}.{layout.router}.weight"
    return [
        info for key, info in index.items() if layout.has_experts and (layout.model_key(key) or "").endswith(weight)
    ]


def count_experts(layout: ExpertLayout, index: Mapping[str, TensorInfo]) -> int:
    """Routed experts of a layer, 0 for a dense model. Read off a router: configs name the number differently."""
    return next((router.shape[0] for router in routers(layout, index)), 0)


def total_steps(recipe: Recipe, examples: int) -> int:
    """Optimizer steps of the whole training; with `trl: {packing: true}` an upper bound."""
    training = recipe.training
    if training.max_steps is not None:
        return training.max_steps
    batches = math.ceil(examples / training.batch_size)
    per_epoch = max(1, math.ceil(batches / training.gradient_accumulation_steps))
    return math.ceil((training.epochs or 1.0) * per_epoch)


def _classes(
    recipe: Recipe, layout: ExpertLayout, index: Mapping[str, TensorInfo], placement: Placement
) -> tuple[TensorClass, ...]:
    groups: dict[TensorClassName, dict[str, TensorInfo]] = defaultdict(dict)
    for key, info in index.items():
        groups[layout.tensor_class(key)][key] = info
    dtype = compute_dtype(recipe.model.dtype)
    ranks = placement.class_ranks()
    adapted = {expert for layer in placement.routed for expert, rank in enumerate(layer) if rank}
    entries = []
    for name in TENSOR_CLASSES:
        if name not in groups:
            continue
        quantized = recipe.model.quantization == "nf4" and name in QUANTIZED_CLASSES
        infos, rank = groups[name], ranks.get(name, 0)
        entries.append(
            TensorClass(
                name=name,
                tensors=len(infos),
                parameters=sum(info.parameters for info in infos.values()),
                dtype="nf4" if quantized else dtype,
                bytes=sum(_held_bytes(i, quantized, recipe.model.double_quant, BYTES[dtype]) for i in infos.values()),
                rank=rank,
                trainable_parameters=sum(_lora(k, i, rank, len(adapted), layout) for k, i in infos.items()),
            )
        )
    return tuple(entries)


def _held_bytes(info: TensorInfo, quantized: bool, double_quant: bool, dtype_bytes: int) -> int:
    if not quantized or len(info.shape) < 2:
        return info.parameters * dtype_bytes
    matrices = info.shape[0] if len(info.shape) == 3 else 1
    return matrices * nf4_bytes(info.parameters // matrices, double_quant)


def nf4_bytes(values: int, double_quant: bool) -> int:
    """Bytes of one matrix of `values` in nf4: half a byte each, and one scale for every 64 (QLoRA, section 3)."""
    blocks = math.ceil(values / 64)
    scales = blocks + 4 * math.ceil(blocks / 256) + 4 if double_quant else 4 * blocks
    return math.ceil(values / 2) + scales


def _lora(key: str, info: TensorInfo, rank: int, adapted_experts: int, layout: ExpertLayout) -> int:
    """Parameters of the LoRA on one tensor of the checkpoint."""
    if not rank or not layout.takes_lora(key):
        return 0
    if layout.tensor_class(key) != "routed_experts":
        return rank * sum(info.shape)
    if len(info.shape) != (3 if layout.checkpoint == "stacked" else 2):
        raise CheckpointError(info.file, [f"{key} has shape {info.shape}: not an expert tensor of {layout.model_type}"])
    if layout.checkpoint == "stacked":
        return adapted_experts * rank * (info.shape[1] + info.shape[2])
    return _lora_of_expert_part(key, info, rank, adapted_experts, layout)


def _lora_of_expert_part(key: str, info: TensorInfo, rank: int, adapted_experts: int, layout: ExpertLayout) -> int:
    """Per-expert files: counted at expert 0, times the adapted ones. Gate and up share one A: up adds its B alone."""
    if f".{layout.experts}.0." not in key:
        return 0
    sides = info.shape[0] if f".{layout.parts[1]}." in key else sum(info.shape)
    return adapted_experts * rank * sides


def _lengths_tokens(directory: Path, examples: list[Example]) -> list[int]:
    """Tokens of each example by the model's own tokenizer, and 8 a turn for the chat template."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # what the Rust library raises has no narrower class
        raise CheckpointError(directory / "tokenizer.json", [f"cannot be read: {error}"]) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    turns = [[message.content for message in (*example.prompt, *example.completion)] for example in examples]
    encoded = tokenizer.encode_batch(["\n".join(texts) for texts in turns])
    return [len(row.ids) + 8 * len(texts) for row, texts in zip(encoded, turns, strict=True)]
