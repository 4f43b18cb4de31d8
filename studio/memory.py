"""Predicted peak memory of a training step, part by part, from shapes alone.

The activation terms count what autograd keeps of one decoder layer, per token, in multiples of the model's own widths:
read off the graph of a Llama 4 / Qwen3-MoE layer with LoRA on every projection. What the process needs before any
model is there (Python, torch, transformers, TRL) is measured, not derived. benchmarks/memory.py prints predicted
against measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from adapters.layouts import ExpertLayout

RUNTIME_BYTES = 690_000_000
"""Resident memory of a job's process on a CPU beside the model: libraries (500 MB), tokenised data, the trainer, and
freed blocks that the allocator keeps. Fitted to the rows of benchmarks/memory.py."""

LOGITS_CHUNK_TOKENS = 256
"""Positions whose logits exist at one time, in TRL's loss and in ours."""


class MemoryPlan(BaseModel):
    """Predicted peak, in bytes. `peak_bytes` is the sum of the rest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime_bytes: int
    weights_bytes: int
    adapters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    workspace_bytes: int
    logits_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class TrainingShape:
    """What decides the memory of one training step.

    Attributes:
        batch_size: examples in one forward pass.
        length_tokens: tokens of the longest example.
        weights_bytes: the base as held.
        trainable_parameters: of the adapters, float32, with AdamW's two moments.
        dtype_bytes: of activations.
        checkpointing: only layer inputs are kept, one layer at a time is recomputed.
        quantized: an expert and a linear are dequantised while they are used.
        on_gpu: memory is the GPU's, where the process itself takes next to none.
    """

    batch_size: int
    length_tokens: int
    weights_bytes: int
    trainable_parameters: int
    dtype_bytes: int
    checkpointing: bool
    quantized: bool
    on_gpu: bool


def predict_memory(config: Mapping[str, Any], layout: ExpertLayout, shape: TrainingShape) -> MemoryPlan:
    """Predicts the peak of training `config` with this shape."""
    tokens = shape.batch_size * shape.length_tokens
    # what is kept of each layer; in the backward, the gradients of one layer's worth stand beside it
    layer = tokens * shape.dtype_bytes * _kept_per_token(config, layout)
    layers = config["num_hidden_layers"]
    kept_inputs = layers * tokens * config["hidden_size"] * shape.dtype_bytes
    parts = {
        "runtime_bytes": 0 if shape.on_gpu else RUNTIME_BYTES,
        "weights_bytes": shape.weights_bytes,
        "adapters_bytes": 4 * shape.trainable_parameters,
        "gradients_bytes": 4 * shape.trainable_parameters,
        "optimizer_bytes": 8 * shape.trainable_parameters,
        "activations_bytes": kept_inputs + 2 * layer if shape.checkpointing else (layers + 1) * layer,
        "workspace_bytes": _largest_matrix(config, layout) * shape.dtype_bytes if shape.quantized else 0,
        "logits_bytes": 3 * 4 * min(tokens, LOGITS_CHUNK_TOKENS) * config["vocab_size"],
    }
    return MemoryPlan(**parts, peak_bytes=sum(parts.values()))


def _kept_per_token(config: Mapping[str, Any], layout: ExpertLayout) -> int:
    """Values that autograd keeps of one layer, per token."""
    hidden = config["hidden_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries = config["num_attention_heads"] * head
    keys = (config.get("num_key_value_heads") or config["num_attention_heads"]) * head
    width, top_k = config.get(layout.expert_width, 0), config.get("num_experts_per_tok", 0)
    shared = width if layout.shared_expert else 0
    norms = 6 * hidden
    attention = 4 * queries + 3 * keys
    routed = top_k * (2 * hidden + 5 * width)
    return int(norms + attention + routed + 5 * shared)


def _largest_matrix(config: Mapping[str, Any], layout: ExpertLayout) -> int:
    widths = [config.get(layout.expert_width, 0) * 2, config.get("intermediate_size_mlp", 0)]
    return int(config["hidden_size"]) * max(*widths, int(config["hidden_size"]))
