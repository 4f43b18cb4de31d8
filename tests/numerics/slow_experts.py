"""The routed experts of one layer beside the slow obvious loop over tokens and experts, in float64 on the CPU.

make_layer(family, …) ─▶ Layer, called like `RoutedExperts`
check(layer, chosen)     its output and gradients equal the loop's
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from adapters.expert_math import clamped_swiglu
from adapters.layouts import LAYOUTS
from adapters.lora_products import LoraRanks
from adapters.quantized import QuantizedStack
from adapters.routed import RoutedExperts

FAMILIES = ("llama4_text", "qwen3_moe", "gpt_oss")
"""The routing weight on the input, on the output, and biases with a gate of its own."""
HELD = ("plain", "nf4", "fp4", "int8")
SCALE, ALPHA = 1.5, 1.702
NEVER = 1e4
"""A clamp that no value reaches. In 16 bit a value rounded across a clamp's edge changes the gradient by all of it."""


@dataclass
class Layer:
    """`RoutedExperts` with LoRA factors: gate_up A (R, H), B (R, 2I), down A (R, I), B (R, H)."""

    experts: RoutedExperts
    ranks: tuple[int, ...]
    factors: list[Tensor]
    limit: float

    def __call__(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return self.experts(hidden, chosen, weights, [(LoraRanks(self.ranks, SCALE), self.factors)])


def make_layer(
    family: str,
    experts: int,
    hidden: int,
    width: int,
    ranks: tuple[int, ...] | None = None,
    held: str = "plain",
    lean: bool = False,
    dtype: torch.dtype = torch.float64,
    limit: float = 0.8,
    device: str = "cpu",
) -> Layer:
    """Random values, the same on every device.

    Args:
        ranks: LoRA rank of each expert; None for a mixture with zeros.
        held: how the stacks are held, one of `HELD`.
        dtype: of plain stacks and biases; LoRA factors are in float32, or in float64 with it.
        limit: gpt_oss's clamp; at 0.8 many values reach it.
    """
    layout, generator = LAYOUTS[family], torch.Generator().manual_seed(11)
    ranks = ranks or tuple((2, 0, 3, 1)[e % 4] for e in range(experts))

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3).to(device)

    shapes = layout.stack_shapes(experts, hidden, width)
    stacks = [stack(normal(*shapes[name]).to(dtype), held) for name in ("gate_up_proj", "down_proj")]
    biases: list[nn.Parameter] = []
    if layout.bias:
        biases = [nn.Parameter(normal(experts, n).to(dtype), requires_grad=False) for n in (2 * width, hidden)]
    gate = partial(clamped_swiglu, alpha=ALPHA, limit=limit) if layout.interleaved else None
    module = RoutedExperts(layout, *stacks, nn.SiLU(), *(biases or (None, None)), gate)
    module.lean = lean
    sizes = (hidden, 2 * width, width, hidden)
    wide = dtype if dtype == torch.float64 else torch.float32
    return Layer(module, ranks, [normal(sum(ranks), size).to(wide).requires_grad_() for size in sizes], limit)


def stack(dense: Tensor, held: str) -> nn.Parameter | QuantizedStack:
    if held == "plain":
        return nn.Parameter(dense, requires_grad=False)
    quantized = QuantizedStack(*dense.shape, held, device=dense.device)
    for expert, matrix in enumerate(dense):
        quantized.write(expert, matrix)
    return quantized


def slow_loop(layer: Layer, factors: list[Tensor], hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Token by token and expert by expert, W + scale · B A materialised, in float64."""
    module, layout = layer.experts, layer.experts.layout

    def linear(expert: int, projection: int, x: Tensor) -> Tensor:
        name = ("gate_up_proj", "down_proj")[projection]
        held = getattr(module, name)
        weight = held.dequantize(expert, torch.float64) if isinstance(held, QuantizedStack) else held[expert]
        weight = weight.cpu().double()
        rows = slice(sum(layer.ranks[:expert]), sum(layer.ranks[: expert + 1]))
        a, b = factors[2 * projection][rows], factors[2 * projection + 1][rows]
        bias = getattr(module, f"{name}_bias")
        y = (weight if layout.stack_order == "out_in" else weight.t()) @ x + SCALE * b.t() @ (a @ x)
        return y if bias is None else y + bias[expert].cpu().double()

    def gated(y: Tensor) -> Tensor:
        if layout.interleaved:
            gate, up = y[0::2].clamp(max=layer.limit), y[1::2].clamp(-layer.limit, layer.limit)
            return (up + 1) * gate / (1 + torch.exp(-ALPHA * gate))
        gate, up = y[: len(y) // 2], y[len(y) // 2 :]
        return gate / (1 + torch.exp(-gate)) * up

    output = hidden * 0
    for t, row in enumerate(chosen.tolist()):
        for k, expert in enumerate(row):
            weight, on_input = weights[t, k], layout.weight_on == "input"
            y = linear(expert, 1, gated(linear(expert, 0, hidden[t] * weight if on_input else hidden[t])))
            output = output.index_add(0, torch.tensor([t]), (y if on_input else y * weight)[None])
    return output


def spread(tokens: int, top_k: int, experts: int, seed: int = 0) -> Tensor:
    """(T, K) different experts for each token."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)]
    return torch.stack(chosen) if chosen else torch.empty(0, top_k, dtype=torch.long)


def check(layer: Layer, chosen: Tensor, dtype: torch.dtype = torch.float64, tolerance: float = 1e-11) -> list[Tensor]:
    """Output and gradients of hidden states, routing weights and factors against the slow loop; returns the last."""
    generator = torch.Generator().manual_seed(5)
    like, size = layer.factors[0], (len(chosen), layer.factors[0].shape[1])
    hidden, direction = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.rand(chosen.shape, generator=generator, dtype=torch.float64)
    leaves = [tensor.to(like.device, dtype).requires_grad_() for tensor in (hidden, weights)]
    return compare(layer, leaves[0], chosen.to(like.device), leaves[1], direction, tolerance)


def compare(
    layer: Layer, hidden: Tensor, chosen: Tensor, weights: Tensor, direction: Tensor, tolerance: float
) -> list[Tensor]:
    """The same on given tensors. direction: (T, H) float64 on the CPU, the gradient that comes back.

    An error counts by its norm: at most `tolerance` of the right value's.
    """
    twins = [t.detach().cpu().double().requires_grad_() for t in (hidden, weights, *layer.factors)]
    slow = slow_loop(layer, twins[2:], twins[0], chosen, twins[1])
    wanted = [slow, *torch.autograd.grad(slow, twins, direction, allow_unused=True)]
    output = layer(hidden, chosen, weights)
    assert output.dtype == hidden.dtype and output.shape == hidden.shape
    found = [output, *torch.autograd.grad(output, (hidden, weights, *layer.factors), direction.to(output))]
    for mine, right in zip(found, wanted, strict=True):
        right = torch.zeros(mine.shape, dtype=torch.float64) if right is None else right
        assert (mine.cpu().double() - right).norm() <= tolerance * right.norm() + 1e-12
    return found[3:]
