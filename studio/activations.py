"""What autograd keeps of one decoder layer between forward and backward, in bytes per token, from the layer's shapes.

Read off the saved tensors of stock layers with LoRA on their projections (tests/numerics/test_activations.py holds the
sums against them, family by family):

    norms      the residual stream before and after attention, in float32
    attention  by its kind, which the names of its tensors tell:
               sdpa     q, k, v, out as the fused kernel takes them, one log-sum a head, the padding mask
               eager    q, k, v, out and the probabilities, heads x length (gpt-oss: sinks; MLA on a CPU, where the
                        fused kernel wants values as wide as keys)
               linear   the gated delta rule in chunks of 64, as stock computes it without its kernels
    mlp        gate, its activation and up; with LoRA also their product
    experts    hidden states and routing; on the fast path also gate_up of every (token, expert) pair,
               and its rank-sized products
    LoRA       the input of the projections (once in float32, where they share it), and their rank-sized products;
               with dropout what is left of the input, and its mask, for each projection
    DoRA       what each layer gives and what its LoRA adds
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from adapters.layouts import ExpertLayout, MoeShape, TensorClassName
from studio.weights import Base

DELTA_CHUNK = 64
"""Tokens of a chunk of the gated delta rule in transformers."""

Shapes = Mapping[str, tuple[int, ...]]
AttentionKind = Literal["sdpa", "eager", "linear"]


@dataclass(frozen=True)
class Pass:
    """One forward pass in training.

    Attributes:
        batch_size, length_tokens: rows, and tokens of the longest one.
        dtype_bytes: of the computation.
        on_gpu: fused kernels and autocast are the GPU's.
        attention_rank, shared_expert_rank, dense_mlp_rank, routed_experts_rank: LoRA ranks, 0 for none.
        keep_gate_up: the fast path of the routed experts.
        dropout: the adapters' inputs are dropped in part. dora: the linear layers have magnitudes.
    """

    batch_size: int
    length_tokens: int
    dtype_bytes: int
    on_gpu: bool
    attention_rank: int
    shared_expert_rank: int
    dense_mlp_rank: int
    routed_experts_rank: int
    keep_gate_up: bool
    dropout: bool = False
    dora: bool = False

    @property
    def tokens(self) -> int:
        return self.batch_size * self.length_tokens

    @property
    def padded(self) -> bool:
        """Rows of a batch differ in length, so that attention gets a mask."""
        return self.batch_size > 1

    def lora_input(self, width: int, projections: int) -> int:
        """Bytes of an input of that many adapted projections: shared in float32, in bfloat16 a copy for each."""
        if self.dropout:  # of each projection what is left, and the mask: on a CPU a number for each value
            return projections * width * (self.dtype_bytes + 1 if self.on_gpu else 8)
        if self.dtype_bytes == 4:
            return 4 * width
        return projections * width * (self.dtype_bytes if self.on_gpu else 4)


@dataclass(frozen=True)
class Attention:
    """One layer's attention: its kind, and how many values its parts have per token."""

    kind: AttentionKind
    heads: int
    queries: int
    keys: int
    values: int
    normed: bool
    gated: bool
    latents: tuple[int, ...] = ()


def attention_of(base: Base, layer: Shapes, on_gpu: bool) -> Attention:
    """The attention of a layer, by the names and shapes of its tensors."""
    heads = base.number("num_attention_heads")
    if "linear_attn.out_proj.weight" in layer:
        return _linear_attention(base, layer)
    out = layer["self_attn.o_proj.weight"][1]
    if "self_attn.kv_b_proj.weight" in layer:
        queries = layer.get("self_attn.q_b_proj.weight", layer.get("self_attn.q_proj.weight", (0, 0)))[0]
        latents = tuple(shape[0] for name, shape in layer.items() if name.endswith("_a_layernorm.weight"))
        return Attention("sdpa" if on_gpu else "eager", heads, queries, queries, out, False, False, latents)
    queries, keys = layer["self_attn.q_proj.weight"][0], layer["self_attn.k_proj.weight"][0]
    normed = any("norm" in name for name in layer if name.startswith("self_attn.")) or _l2_normed(base)
    kind: AttentionKind = "eager" if "self_attn.sinks" in layer else "sdpa"
    return Attention(kind, heads, out, keys, out, normed, queries == 2 * out)


def _l2_normed(base: Base) -> bool:
    """Llama 4's norm of queries and keys has no weights."""
    return base.layout.model_type.startswith("llama4") and bool(base.config.get("use_qk_norm", True))


def _linear_attention(base: Base, layer: Shapes) -> Attention:
    heads, values = base.number("linear_num_value_heads"), layer["linear_attn.out_proj.weight"][1]
    keys = base.number("linear_num_key_heads") * base.number("linear_key_head_dim")
    spread = heads * base.number("linear_key_head_dim")  # keys and queries are repeated for every value head
    return Attention("linear", heads, spread, keys, values, True, True)


def layer_bytes(base: Base, layer: Shapes, moe: MoeShape | None, run: Pass) -> float:
    """Bytes per token that are kept of one layer."""
    hidden = base.number("hidden_size")
    norms = 2 * 4 * (hidden + 1)
    attention = attention_bytes(attention_of(base, layer, run.on_gpu), hidden, run)
    kept = norms + attention + feed_forward_bytes(base.layout, layer, moe, base.top_k, hidden, run)
    return kept + (_dora_bytes(base.layout, layer, run) if run.dora else 0)


def _dora_bytes(layout: ExpertLayout, layer: Shapes, run: Pass) -> int:
    """What each DoRA layer gives, and what its LoRA adds: the gradient of the magnitude wants both."""
    ranks: dict[TensorClassName, int] = {
        "attention": run.attention_rank,
        "shared_expert": run.shared_expert_rank,
        "dense_mlp": run.dense_mlp_rank,
    }
    adapted = [f"{module}.weight" for name, rank in ranks.items() if rank for module in layout.class_modules(name)]
    return 2 * run.dtype_bytes * sum(shape[0] for name, shape in layer.items() if name in adapted)


def attention_bytes(shape: Attention, hidden: int, run: Pass) -> float:
    """Bytes per token that are kept of the attention."""
    size, kept = run.dtype_bytes, 0.0
    if run.attention_rank:
        kept += run.lora_input(hidden, 3) + 4 * 4 * run.attention_rank + sum(map(_latent(run), shape.latents))
        shared = size == 4 and shape.kind == "sdpa" and not shape.gated and not run.dropout
        kept += 0 if shared else run.lora_input(shape.values, 1)
    kept += sum(4 * (width + 1) for width in shape.latents)
    if shape.kind == "linear":
        return kept + _linear_bytes(shape, run)
    if shape.normed:
        kept += 4 * (shape.queries + shape.keys + 2 * shape.heads)
    if shape.gated:
        kept += 3 * size * shape.values  # the gate beside q, its sigmoid, the ungated output
    kept += size * (shape.queries + shape.values)  # q and out
    grouped = shape.kind == "sdpa" and not run.padded
    kept += size * (2 * shape.keys if grouped else shape.queries + shape.values)  # k and v, repeated for a mask
    if shape.kind == "sdpa":
        return kept + 4 * shape.heads + (size * run.length_tokens if run.padded else 0)
    return kept + size * shape.heads * run.length_tokens


def _latent(run: Pass) -> Callable[[int], int]:
    return lambda width: run.lora_input(width, 1) + 4 * run.attention_rank


def _linear_bytes(shape: Attention, run: Pass) -> float:
    """The gated delta rule: its chunks in float32, five chunk-by-chunk matrices a head among them."""
    padded = -(-run.length_tokens // DELTA_CHUNK) * DELTA_CHUNK / run.length_tokens
    convolved = 2 * shape.keys + shape.values
    chunked = shape.heads * (6 * DELTA_CHUNK + 8) + 6 * shape.queries + 4 * shape.values
    return run.dtype_bytes * 2 * convolved + 4 * (padded * chunked + 2 * shape.queries + 4 * shape.values)


def feed_forward_bytes(
    layout: ExpertLayout, layer: Shapes, moe: MoeShape | None, top_k: int, hidden: int, run: Pass
) -> float:
    """Bytes per token that are kept of the MLP or MoE block."""
    size = run.dtype_bytes
    if moe is None:
        rank = run.dense_mlp_rank
        shared_input = run.lora_input(hidden, 2) if rank else 0
        return shared_input + _mlp_bytes(layer[f"{layout.block}.{layout.mlp[1]}.weight"][0], rank, run)
    kept = float(size * hidden + 4 * 3 * moe.experts + 16 * top_k)
    if run.keep_gate_up:
        kept += size * top_k * 2 * (moe.width + run.routed_experts_rank)
    if shared := layer.get(
        f"{layout.block}.{layout.shared_expert}.{layout.mlp[1]}.weight"
    ):  # none where its count is 0
        kept += _mlp_bytes(shared[0], run.shared_expert_rank, run)
        kept += run.lora_input(hidden, 2) if (size != 4 or run.dropout) and run.shared_expert_rank else 0
    if f"{layout.block}.shared_expert_gate.weight" in layer:
        kept += size * hidden
    return kept


def _mlp_bytes(width: int, rank: int, run: Pass) -> float:
    """Gate, its activation and up; with LoRA also their product, and what is in the middle of three adapters."""
    return 3 * run.dtype_bytes * width + (run.lora_input(width, 1) + 3 * 4 * rank if rank else 0)
