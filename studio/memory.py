"""Predicted peak memory of a training step, part by part, from shapes alone; and the memory that is at hand.

What autograd keeps of a layer is in studio/activations.py. Three moments can be the peak, and the plan takes the
largest: the loss (all layers kept, a tile of logits), the backward of the last layer (all layers kept, its gradients
and workspace), and the last layer reached (no activations, all gradients of the adapters). What the process needs
before any model is there is measured, not derived. benchmarks/memory.py prints predicted against measured.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from adapters.layouts import MoeShape
from adapters.workspace import fused_experts, lean_rows
from studio.activations import Pass, Shapes, attention_of, layer_bytes
from studio.weights import Base

RUNTIME_BYTES = 770_000_000
"""Resident memory of a job's process on a CPU beside the model: libraries (500 MB), tokenised data, the trainer, code
that oneDNN compiles, and freed blocks that the allocator keeps. Fitted to the rows of benchmarks/memory.py."""

LOSS_TILE_TOKENS, LOSS_TILE_VOCABULARY = 256, 8192
"""Logits that exist at one time in the loss on a CPU (studio/trainers/chunked_loss.py)."""

LOSS_TILES = 9
"""Tiles of logits alive at once in the backward of TRL's loss on a CPU, where its arithmetic is not fused."""

LOGITS_DRAWN, LOGITS_SORTED = 5, 10
"""Copies of the logits of one position that sampling has at once: as the head gives them, in float32, by temperature,
probabilities, and what is drawn with; for top_p also sorted, with their places, and summed up."""

GPU_LOSS_TILE_TOKENS, GPU_LOSS_TILE_VOCABULARY = 4096, 32768
"""The same on a GPU, where TRL's kernels work in place: one tile."""

FULL_LOGITS = 4
"""Arrays of the size of all logits, in float32, alive at once in ORPO and CPO: the logits, their gradient, and the
log-softmax of the likelihood's half of the batch with its own."""

EXPERT_SKEW = 4
"""The busiest expert is taken to have this many times the mean number of tokens."""

MARGIN = 0.10
"""The prediction is right within this; a plan fits when it does with the margin added."""


class MemoryPlan(BaseModel):
    """Predicted memory at the peak, in bytes. `peak_bytes` is the sum of the parts.

    Attributes:
        gradients_bytes: those of the adapters that exist at the peak: they grow while activations are let go.
        reward_models_bytes, tasks_bytes: beside the model in training (studio/beside.py).
    """

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
    # absent from the plans of older jobs
    reward_models_bytes: int = 0
    tasks_bytes: int = 0

    @property
    def fixed_bytes(self) -> int:
        """What no smaller batch makes smaller."""
        own = self.runtime_bytes + self.weights_bytes + self.adapters_bytes + self.optimizer_bytes
        return own + self.reward_models_bytes + self.tasks_bytes


@dataclass(frozen=True)
class Held:
    """What is in memory in every step.

    Attributes:
        weights_bytes: the base as held.
        trainable_parameters: of the adapters and of a reward head, float32, with AdamW's two moments.
        start_parameters: float32 and frozen: what the adapters began with.
        quantized: a matrix is dequantised while it is used.
        accumulates: gradients of earlier forward passes are there in the next.
        checkpointing: only layer inputs are kept, one layer at a time is computed again.
        full_logits: the loss holds the logits of every position (ORPO, CPO).
        reward_models_bytes, tasks_bytes: beside the model (studio/beside.py).
    """

    weights_bytes: int
    trainable_parameters: int
    quantized: bool
    accumulates: bool
    checkpointing: bool
    full_logits: bool = False
    start_parameters: int = 0
    reward_models_bytes: int = 0
    tasks_bytes: int = 0


@dataclass(frozen=True)
class Drawn:
    """Completions that are sampled together.

    Attributes:
        rows: of them. length_tokens: of the longest, with its prompt. prompt_tokens: of that.
        sorts: the likely tokens are looked for among all (top_p below 1).
    """

    rows: int
    length_tokens: int
    prompt_tokens: int
    sorts: bool


def predict_memory(base: Base, held: Held, run: Pass, drawn: Drawn | None = None) -> MemoryPlan:
    """Predicts the peak of training, and of the sampling in it where there is any."""
    gradients = 4 * held.trainable_parameters
    moments = [_loss(base, held, run), _backward(base, held, run)]
    early = max(moments, key=lambda parts: sum(parts.values()))
    early["gradients_bytes"] = gradients if held.accumulates else early["gradients_bytes"]
    late = [{**_none(), "gradients_bytes": gradients}, *([_sampling(base, held, run, drawn)] if drawn else [])]
    peak = max(early, *late, key=lambda parts: sum(parts.values()))
    parts = {
        "runtime_bytes": 0 if run.on_gpu else RUNTIME_BYTES,
        "weights_bytes": held.weights_bytes,
        "adapters_bytes": 4 * (held.trainable_parameters + held.start_parameters),
        "optimizer_bytes": 8 * held.trainable_parameters,
        "reward_models_bytes": held.reward_models_bytes,
        "tasks_bytes": 0 if run.on_gpu else held.tasks_bytes,
        **peak,
    }
    return MemoryPlan(**parts, peak_bytes=sum(parts.values()))


def _none() -> dict[str, int]:
    return {"gradients_bytes": 0, "activations_bytes": 0, "workspace_bytes": 0, "logits_bytes": 0}


def _loss(base: Base, held: Held, run: Pass) -> dict[str, int]:
    """At the loss: everything kept, the logits' tile, the gradient of the hidden states."""
    hidden = run.tokens * base.number("hidden_size")
    vocabulary = base.number("vocab_size")
    if run.on_gpu:
        tile = min(run.tokens, GPU_LOSS_TILE_TOKENS) * GPU_LOSS_TILE_VOCABULARY * run.dtype_bytes
    else:
        tile = LOSS_TILES * 4 * min(run.tokens, LOSS_TILE_TOKENS) * min(vocabulary, LOSS_TILE_VOCABULARY)
    if held.full_logits:
        tile = FULL_LOGITS * 4 * run.tokens * vocabulary
    kept = _kept(base, held, run) + hidden * (8 + 3 * run.dtype_bytes)
    return {**_none(), "activations_bytes": int(kept), "logits_bytes": tile}


def _backward(base: Base, held: Held, run: Pass) -> dict[str, int]:
    """In the backward of the last layer: everything kept, its gradients on the way, one expert's workspace."""
    layers = _per_layer(base, run)
    kept = _kept(base, held, run) + (layers[-1] * run.tokens if held.checkpointing else 0)
    flowing, workspace = _flowing(base, base.layers[-1], run), _workspace(base, held, run)
    return {**_none(), "activations_bytes": int(kept + flowing), "workspace_bytes": int(workspace)}


def _sampling(base: Base, held: Held, run: Pass, drawn: Drawn) -> dict[str, int]:
    """At the last token of the completions: keys and values of all, one layer's once more (the cache grows by copying,
    and attention takes a copy in its own layout), and the logits of one position; or at their start, where the prompts
    go through one layer."""
    layers = [attention_of(base, layer, run.on_gpu) for layer in base.layers]
    cached = sum(shape.keys + (shape.values if shape.kind == "eager" else shape.keys) for shape in layers)
    copied = max(shape.keys + shape.queries + shape.values for shape in layers)
    whole = drawn.rows * drawn.length_tokens * run.dtype_bytes * (cached + copied)
    copies = LOGITS_SORTED if drawn.sorts else LOGITS_DRAWN
    logits = 4 * copies * drawn.rows * base.number("vocab_size")
    start = replace(run, batch_size=drawn.rows, length_tokens=drawn.prompt_tokens, keep_gate_up=False)
    prompts = drawn.rows * drawn.prompt_tokens * run.dtype_bytes * cached + _flowing(base, base.layers[-1], start)
    first = {**_none(), "activations_bytes": int(prompts), "workspace_bytes": int(_workspace(base, held, start))}
    last = {**_none(), "activations_bytes": int(whole), "logits_bytes": int(logits)}
    return max(first, last, key=lambda parts: sum(parts.values()))


def _per_layer(base: Base, run: Pass) -> list[float]:
    moe = {shape.layer: shape for shape in base.moe}
    return [layer_bytes(base, layer, moe.get(number), run) for number, layer in enumerate(base.layers)]


def _kept(base: Base, held: Held, run: Pass) -> float:
    """Bytes kept of all layers and the last norm."""
    hidden = base.number("hidden_size")
    if held.checkpointing:
        return run.tokens * hidden * (len(base.layers) * run.dtype_bytes + 4)
    return run.tokens * (sum(_per_layer(base, run)) + 4 * hidden)


def _flowing(base: Base, layer: Shapes, run: Pass) -> float:
    """Gradients of activations inside one layer."""
    hidden, attention = base.number("hidden_size"), attention_of(base, layer, run.on_gpu)
    scores = 0 if attention.kind == "sdpa" else 2 * attention.heads * run.length_tokens
    return run.tokens * run.dtype_bytes * (3 * hidden + 3 * attention.queries + 3 * attention.values + scores)


def _workspace(base: Base, held: Held, run: Pass) -> float:
    """The rows of the experts that are computed together, and what is dequantised for them."""
    widest = max(base.moe, key=lambda shape: shape.width, default=None)
    rows, together = _group(widest, base.top_k, held, run) if widest else (0.0, 1)
    values = rows * (3 * widest.hidden + 8 * widest.width) if widest else 0
    if widest and run.dropout and run.routed_experts_rank:  # a mask, its words, and what is left of the input
        values += 3 * rows * max(widest.hidden, widest.width)
    matrices = [
        tensor.shape[0] * tensor.shape[1]
        for tensor in base.tensors
        if tensor.class_name in ("attention", "shared_expert", "dense_mlp") and len(tensor.shape) == 2
    ]
    summed = 4 * (2 if held.quantized else 1) * max(matrices, default=0) if run.dora else 0  # W, and W + BA
    matrices += [together * 2 * shape.hidden * shape.width for shape in base.moe]
    return run.dtype_bytes * (values + (max(matrices, default=0) if held.quantized else 0)) + summed


def _group(shape: MoeShape, top_k: int, held: Held, run: Pass) -> tuple[float, int]:
    """Rows of the largest group of experts that are computed together, and how many experts that is."""
    pairs, fused = run.tokens * top_k, run.on_gpu and run.dtype_bytes == 2
    together = fused_experts(shape.experts, 2 * shape.hidden * shape.width, held.quantized) if fused else 1
    busiest = min(run.tokens, EXPERT_SKEW * pairs / shape.experts)
    rows = min(pairs, max(busiest, EXPERT_SKEW * pairs * together / shape.experts))
    return (rows if run.keep_gate_up else min(rows, lean_rows(fused=run.on_gpu))), together


# -------------------------------------------------------------------- memory at hand


def memory_at_hand(on_gpu: bool) -> int | None:
    """Bytes free for a job on this machine: of the GPU, or of the memory that the process may use. None: not known."""
    return _free_on_gpu() if on_gpu else _available_to_process()


def _free_on_gpu() -> int | None:
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "-i", first]
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        return int(subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout) * 2**20
    return None


def _available_to_process(root: Path = Path("/")) -> int | None:
    """MemAvailable, or what the control group leaves where that is less."""
    found = [*_mem_available(root / "proc/meminfo"), *_left_in_group(root / "sys/fs/cgroup")]
    return min(found, default=None)


def _mem_available(meminfo: Path) -> Sequence[int]:
    with suppress(OSError, ValueError):
        lines = (line.split() for line in meminfo.read_text().splitlines())
        return [1024 * int(words[1]) for words in lines if words[0] == "MemAvailable:"]
    return []


def _left_in_group(group: Path) -> Sequence[int]:
    with suppress(OSError, ValueError):  # "max" is no number: no limit
        return [int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())]
    return []


def fits(peak_bytes: int, at_hand_bytes: int | None) -> bool:
    """Whether a predicted peak fits, with the margin; not where nothing is known of the machine."""
    return at_hand_bytes is not None and peak_bytes * (1 + MARGIN) <= at_hand_bytes
