"""The sides that the expert benchmarks compare: one MoE layer of one family, as stock or as ours, ready to step.

    Shape ─▶ stock_model(shape) ─▶ build(side, stock) ─▶ Bench.step()      one forward and one backward
                                                       ─▶ floor(side, …)   what that step must at least compute and move

Every side of a shape holds the same base weights, gets the same hidden states and sends the same gradient back. The
base is frozen and the input's gradient is wanted, as in the middle of a model.

Dimension legend: T tokens, K top-k, P = T·K pairs, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from machine import synchronize
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Llama4ForCausalLM, Llama4TextConfig, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from adapters.layouts import LAYOUTS, ExpertLayout
from adapters.lora import attach
from adapters.placement import Placement, same_experts_everywhere
from adapters.quantized import QuantizedStack
from adapters.routed import PROJECTIONS, moe_blocks, set_expert_path, use_routed_experts

Kind = Literal["peft", "lora", "frozen"]


@dataclass(frozen=True)
class Shape:
    """One MoE layer: family by its model_type, and sizes."""

    family: str
    experts: int
    top_k: int
    hidden: int = 512
    width: int = 1024
    tokens: int = 1024
    rank: int = 8

    @property
    def pairs(self) -> int:
        return self.tokens * self.top_k

    @property
    def expert_parameters(self) -> int:
        return self.experts * 3 * self.hidden * self.width


@dataclass(frozen=True)
class Side:
    """One way to run the layer.

    Attributes:
        kind: "peft" is the stock block under PEFT `target_parameters`, "lora" ours with LoRA on all experts, "frozen"
            ours without an adapter.
        path: of ours, "fast" or "lean".
        stacks: of ours, "plain" (the compute dtype) or "nf4" with double quantisation.
        part: the whole block, or its experts alone on given routing.
    """

    shape: Shape
    kind: Kind
    path: Literal["fast", "lean"] = "fast"
    stacks: Literal["plain", "nf4"] = "plain"
    part: Literal["block", "experts"] = "block"


@dataclass
class Bench:
    """A side built and ready."""

    side: Side
    model: nn.Module
    block: nn.Module
    arguments: tuple[Tensor, ...]
    direction: Tensor
    pairs_by_expert: Tensor = field(repr=False)

    def step(self) -> float:
        """Forward and backward; the seconds they took. Gradients stay until `reset`."""
        synchronize(self.direction)
        start = time.perf_counter()
        self.output().backward(self.direction)
        synchronize(self.direction)
        return time.perf_counter() - start

    def output(self) -> Tensor:
        output = self.block(*self.arguments)
        return (output[0] if isinstance(output, tuple) else output).view_as(self.direction)

    def train(self) -> None:
        """As after some training: every adapter tensor random. A fresh adapter's B is zero."""
        torch.manual_seed(2)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.02)

    def reset(self) -> None:
        self.arguments[0].grad = None
        self.model.zero_grad(set_to_none=True)

    def timed(self) -> float:
        seconds = self.step()
        self.reset()
        return seconds


def stock_model(shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PreTrainedModel:
    """A stock causal LM of one layer with random weights; the layer's MoE block is what gets measured."""
    common: dict[str, Any] = {
        "vocab_size": 8,
        "hidden_size": shape.hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts_per_tok": shape.top_k,
        "pad_token_id": 0,
    }
    with torch.device("meta"):
        if shape.family == "llama4_text":
            sizes = {"intermediate_size": shape.width, "intermediate_size_mlp": shape.width}
            config: Any = Llama4TextConfig(
                **common, **sizes, num_local_experts=shape.experts, interleave_moe_layer_step=1
            )
            model: PreTrainedModel = Llama4ForCausalLM(config)
        else:
            sizes = {"moe_intermediate_size": shape.width, "intermediate_size": shape.width}
            config = Qwen3MoeConfig(**common, **sizes, num_experts=shape.experts, norm_topk_prob=True)
            model = Qwen3MoeForCausalLM(config)
            model.set_experts_implementation("grouped_mm")
    model = model.to(dtype).to_empty(device=device).requires_grad_(False)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.normal_(std=shape.hidden**-0.5)
    return model


def build(side: Side, stock: PreTrainedModel) -> Bench:
    """`side` on the weights of `stock`, which it shares and leaves as they are."""
    model = copy.deepcopy(stock, memo={id(p): p for p in stock.parameters()})
    layout = LAYOUTS[side.shape.family]
    adapted = with_peft(model, side.shape, layout) if side.kind == "peft" else with_ours(model, side, layout)
    block = next(block for _, block in moe_blocks(adapted, layout))
    hidden, direction = inputs(side.shape, stock)
    chosen, weights = routing(block, layout, hidden.detach())
    counts = torch.bincount(chosen.flatten(), minlength=side.shape.experts)
    if side.part == "experts":
        arguments = (hidden.detach().view(-1, side.shape.hidden).requires_grad_(), chosen, weights)
        return Bench(side, adapted, getattr(block, layout.experts), arguments, direction.flatten(0, 1), counts)
    return Bench(side, adapted, block, (hidden,), direction, counts)


def with_peft(model: PreTrainedModel, shape: Shape, layout: ExpertLayout) -> nn.Module:
    names = [f"{layout.experts}.{projection}" for projection in PROJECTIONS]
    config = LoraConfig(
        r=shape.rank, lora_alpha=2 * shape.rank, target_modules=[], target_parameters=names, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def with_ours(model: PreTrainedModel, side: Side, layout: ExpertLayout) -> nn.Module:
    use_routed_experts(model)
    if side.stacks == "nf4":
        for _, block in moe_blocks(model, layout):
            quantize(getattr(block, layout.experts))
    adapted: nn.Module = model.requires_grad_(False)
    if side.kind == "lora":
        ranks = same_experts_everywhere(side.shape.rank, 1, side.shape.experts)
        adapted = attach(model, Placement(routed=ranks, alpha=2.0 * side.shape.rank))
    set_expert_path(adapted, side.path)
    return adapted


def quantize(experts: nn.Module) -> None:
    for name in PROJECTIONS:
        dense = getattr(experts, name)
        stack = QuantizedStack(*dense.shape, double_quant=True, device=dense.device)
        for expert, matrix in enumerate(dense):
            stack.write(expert, matrix)
        delattr(experts, name)
        setattr(experts, name, stack)


def inputs(shape: Shape, stock: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Hidden states (1, T, H) and the gradient that comes back. Tokens share a direction, so some experts get more of
    them than others: softmax(random logits) with a preference."""
    generator = torch.Generator().manual_seed(3)
    noise, shared, direction = (
        torch.randn(size, generator=generator)
        for size in ((1, shape.tokens, shape.hidden), (1, 1, shape.hidden), (1, shape.tokens, shape.hidden))
    )
    like = next(stock.parameters())
    return (noise + 0.5 * shared).to(like).requires_grad_(), direction.to(like)


def routing(block: nn.Module, layout: ExpertLayout, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The block's own choice: expert ids (T, K) and weights (T, K)."""
    with torch.no_grad():
        result = getattr(block, layout.router)(hidden.view(-1, hidden.shape[-1]))
    if layout.model_type == "llama4_text":
        scores, logits = result
        chosen = logits.topk(block.top_k, dim=1).indices
        return chosen, scores.gather(1, chosen)
    return result[2], result[1]


def expert_bytes(bench: Bench) -> int:
    """Bytes in which the routed experts' base weights are held."""
    layer = next(module for module in bench.model.modules() if all(hasattr(module, name) for name in PROJECTIONS))
    return sum(int(getattr(layer, name).nbytes) for name in PROJECTIONS)


def floor(bench: Bench) -> tuple[float, float]:
    """(flops, bytes) that one step of one of our sides cannot avoid.

    Flops: forward and input gradient of every matmul, and of the LoRA its weight gradients too; on the lean path the
    recomputed gate and up. Bytes: the weights of the experts that got tokens twice (forward, backward), the adapters
    twice and their gradients once, hidden states and their gradients in and out, and on the fast path what it saves
    (gate and up) written and read. Router and shared expert are counted in a block.
    """
    side, shape = bench.side, bench.side.shape
    size = bench.direction.element_size()
    hit = int((bench.pairs_by_expert > 0).sum())
    matmul = 2 * shape.pairs * 3 * shape.hidden * shape.width
    flops = 2 * matmul + (matmul * 2 / 3 if side.path == "lean" else 0)
    moved = 2 * expert_bytes(bench) * hit / shape.experts + 4 * shape.tokens * shape.hidden * size
    if side.path == "fast":
        moved += 2 * shape.pairs * 2 * shape.width * size
    if side.kind == "lora":
        ends = 2 * shape.hidden + 3 * shape.width
        flops += 3 * 2 * shape.pairs * shape.rank * ends
        moved += 3 * shape.experts * shape.rank * ends * 4
    if side.part == "block":
        rest = shape.experts * shape.hidden
        rest += 3 * shape.hidden * shape.width if LAYOUTS[shape.family].shared_expert else 0
        flops += 2 * 2 * shape.tokens * rest
        moved += 2 * rest * size
    return flops, moved
