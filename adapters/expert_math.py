"""The mathematics of one layer's routed experts: forward and backward by hand, in one autograd Function.

    forward    for each group of experts: gather its tokens ─▶ gate_up (+ LoRA) ─▶ gate ─▶ down (+ LoRA) ─▶ add up
    backward   the same groups again; the base is frozen, so only hidden states, routing weights and LoRA get gradients
               (and dense stacks that ask for one)

What is kept between the two decides the memory:

    fast   the pre-activation gate_up of each pair, P x 2I values
    lean   nothing but the hidden states and the routing; gate_up is computed again

Neither keeps gathered inputs, activations, LoRA intermediates or anything dequantised. The gradient of a routing weight
needs no second output: <dout, down(a)> = <downᵀ(dout), a>, and downᵀ(dout) is computed anyway.

On a CPU a group is one expert, whose rows stay in the cache. On CUDA in bfloat16 a group is as many experts as the
workspace holds, and one grouped matmul serves them all.

Dimension legend: T tokens, K experts a token (top-k), P = T·K pairs sorted by expert, E experts, H hidden size,
I expert width, G experts of a group, r LoRA rank, R sum of the ranks of all experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.activations import SiLUActivation

from adapters.quantized import QuantizedStack

Stack = nn.Parameter | Tensor | QuantizedStack
GateBackward = Callable[[Tensor], Tensor]
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Group:
    """Experts computed together: their ids, and the slice of the sorted pairs that each of them owns."""

    experts: tuple[int, ...]
    counts: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class LoraRanks:
    """One adapter's ranks, by expert, and the scale of its products."""

    ranks: tuple[int, ...]
    scale: float

    def rows(self, expert: int) -> slice:
        """The rows of the flat (R, ·) factors that belong to `expert`."""
        start = self.starts[expert]
        return slice(start, start + self.ranks[expert])

    @property
    def starts(self) -> tuple[int, ...]:
        return _starts(self.ranks)


def _starts(ranks: tuple[int, ...]) -> tuple[int, ...]:
    if ranks not in _STARTS:
        _STARTS[ranks] = (0, *accumulate(ranks))
    return _STARTS[ranks]


_STARTS: dict[tuple[int, ...], tuple[int, ...]] = {}


@dataclass(frozen=True)
class Lora:
    """One adapter's factors on one projection: adds scale · (x Aᵀ) B, expert by expert. A (R, in), B (R, out)."""

    spec: LoraRanks
    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Projection:
    """gate_up or down of one layer: the stack, its bias if any, and the adapters on it."""

    stack: Stack
    bias: Tensor | None
    transposed: bool
    loras: tuple[Lora, ...]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (P, in) @ weightᵀ, weight (out, in) with any strides.

    In float32 on a CPU through oneDNN, which took half the time of the default BLAS on AMD (docs/performance.md). Its
    switch is `torch.backends.mkldnn.enabled`.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and _onednn():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return product
    return x @ weight.t()


def _onednn() -> bool:
    return bool(torch.backends.mkldnn.enabled) and torch.backends.mkldnn.is_available()


def grouped_linear(x: Tensor, weights: Tensor, counts: Sequence[int], transposed: bool) -> Tensor:
    """x (P, ·) times each expert's matrix: x @ W[g]ᵀ when `transposed`, else x @ W[g]. weights (G, ·, ·)."""
    if len(counts) == 1:
        return linear(x, weights[0] if transposed else weights[0].t())
    return F.grouped_mm(x, weights.transpose(1, 2) if transposed else weights, offs=_offsets(counts, x.device))


def _offsets(counts: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=device)


def grouped_outer(left: Tensor, right: Tensor, counts: Sequence[int]) -> Tensor:
    """left (P, m), right (P, n) → (G, m, n): leftᵀ right of each expert's rows."""
    if len(counts) == 1:
        return (left.t() @ right)[None]
    return F.grouped_mm(left.t(), right, offs=_offsets(counts, left.device))


def matrices(stack: Stack, experts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """(G, rows, cols) of these experts in `dtype`; a view where the stack is dense and the experts adjoin."""
    if isinstance(stack, QuantizedStack):
        return torch.stack([stack.dequantize(expert, dtype) for expert in experts])
    return stack[experts[0] : experts[-1] + 1].to(dtype)


def swiglu(gate_up: Tensor) -> tuple[Tensor, GateBackward]:
    """silu(gate) · up with gate first, and its backward. gate_up (P, 2I) → (P, I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    silu = F.silu(gate)

    def backward(grad: Tensor) -> Tensor:
        result = torch.empty_like(gate_up)
        d_gate, d_up = result.chunk(2, dim=-1)
        d_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        torch.mul(grad, silu, out=d_up)
        return result

    return silu * up, backward


def clamped_swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """gpt-oss's gate: gate and up interleaved, both clamped, (up + 1) · gate · sigmoid(alpha · gate)."""
    gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def gated(gate_up: Tensor, gate: Callable[[Tensor], Tensor] | None, act_fn: nn.Module) -> tuple[Tensor, GateBackward]:
    """The gate's output (P, I) and its backward; by autograd where it is not the common silu(gate) · up."""
    if gate is None and type(act_fn) in (nn.SiLU, SiLUActivation):
        return swiglu(gate_up)
    with torch.enable_grad():
        leaf = gate_up.detach().requires_grad_()
        if gate is None:
            first, up = leaf.chunk(2, dim=-1)
            output = act_fn(first) * up
        else:
            output = gate(leaf)
    return output.detach(), lambda grad: torch.autograd.grad(output, leaf, grad)[0]


@dataclass(frozen=True)
class Layer:
    """One layer's experts as one call sees them. Built alike for the forward and for the backward."""

    gate_up: Projection
    down: Projection
    gate: Callable[[Tensor], Tensor] | None
    act_fn: nn.Module
    weight_on: str
    group_experts: int
    dtype: torch.dtype

    def groups(self, counts: list[int]) -> Iterator[Group]:
        """Experts with tokens, in runs of at most `group_experts`. Dense runs include the idle ones between, which
        cost nothing and keep the run a view of the stack."""
        dense = not isinstance(self.gate_up.stack, QuantizedStack)
        starts = [0, *accumulate(counts)]
        active = [expert for expert, count in enumerate(counts) if count]
        for first in range(0, len(active), self.group_experts):
            run = active[first : first + self.group_experts]
            experts = tuple(range(run[0], run[-1] + 1)) if dense else tuple(run)
            yield Group(experts, tuple(counts[e] for e in experts), starts[run[0]], starts[run[-1] + 1])

    def forward(self, part: Projection, group: Group, x: Tensor) -> Tensor:
        """x (P, in) → (P, out), bias and adapters included."""
        weights = matrices(part.stack, group.experts, self.dtype)
        y = grouped_linear(x, weights, group.counts, part.transposed)
        if part.bias is not None:
            y += _by_pair(part.bias, group, self.dtype)
        for lora in part.loras:
            add_lora(y, x, lora, group)
        return y

    def backward(self, part: Projection, group: Group, grad: Tensor) -> Tensor:
        """grad (P, out) → (P, in), through the base and the adapters."""
        weights = matrices(part.stack, group.experts, self.dtype)
        result = grouped_linear(grad, weights, group.counts, not part.transposed)
        for lora in part.loras:
            add_lora(result, grad, Lora(lora.spec, lora.b, lora.a), group)
        return result


def _by_pair(bias: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    """The bias (E, out) of each pair's expert: (1, out) or (P, out)."""
    rows = bias[list(group.experts)].to(dtype)
    if len(group.experts) == 1:
        return rows
    return rows.repeat_interleave(torch.tensor(group.counts, device=rows.device), dim=0)


def add_lora(y: Tensor, x: Tensor, lora: Lora, group: Group) -> None:
    """y += scale · (x Aᵀ) B in place, each pair by its own expert's factors."""
    factors = lora_factors(lora, group, x.dtype)
    if factors is None:
        return
    a, b = factors
    if len(group.experts) == 1:
        y.addmm_(x @ a[0].t(), b[0], alpha=lora.spec.scale)
    else:
        y.add_(grouped_linear(grouped_linear(x, a, group.counts, True), b, group.counts, False), alpha=lora.spec.scale)


def lora_factors(lora: Lora, group: Group, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """A (G, r, in) and B (G, r, out) of a group in `dtype`, smaller ranks zero-filled; None when none has a rank."""
    ranks = [lora.spec.ranks[expert] for expert in group.experts]
    rank = max(ranks)
    if not rank:
        return None
    run = slice(lora.spec.rows(group.experts[0]).start, lora.spec.rows(group.experts[-1]).stop)
    if min(ranks) == rank and run.stop - run.start == rank * len(ranks):
        a, b = (factor[run].to(dtype).reshape(len(ranks), rank, -1) for factor in (lora.a, lora.b))
        return a, b
    if rank % 8 and dtype in HALF:
        rank += 8 - rank % 8  # grouped matmuls want rows of whole 16 bytes
    return _padded(lora.a, lora.spec, group, rank, dtype), _padded(lora.b, lora.spec, group, rank, dtype)


def _padded(factor: Tensor, spec: LoraRanks, group: Group, rank: int, dtype: torch.dtype) -> Tensor:
    result = factor.new_zeros(len(group.experts), rank, factor.shape[1], dtype=dtype)
    for place, expert in enumerate(group.experts):
        result[place, : spec.ranks[expert]] = factor[spec.rows(expert)]
    return result


def lora_gradients(
    lora: Lora, group: Group, x: Tensor, grad: Tensor, weight: Tensor | None, into: tuple[Tensor, Tensor]
) -> None:
    """Writes the gradients of this group's rows of A and B.

    Args:
        x: (P, in), grad: (P, out); the loss' gradient with respect to the product is weight · grad.
        weight: (P, 1) or None for 1; applied to the rank-sized products, the smaller ones.
        into: gradients of the flat A (R, in) and B (R, out).
    """
    factors = lora_factors(lora, group, x.dtype)
    if factors is None:
        return
    a, b = factors
    hidden = grouped_linear(x, a, group.counts, True) if len(group.counts) > 1 else x @ a[0].t()
    d_hidden = grouped_linear(grad, b, group.counts, True) if len(group.counts) > 1 else grad @ b[0].t()
    factor = lora.spec.scale if weight is None else lora.spec.scale * weight
    products = grouped_outer(d_hidden * factor, x, group.counts), grouped_outer(hidden * factor, grad, group.counts)
    for place, expert in enumerate(group.experts):
        if lora.spec.ranks[expert] and group.counts[place]:
            for target, product in zip(into, products, strict=True):
                target[lora.spec.rows(expert)] = product[place, : lora.spec.ranks[expert]]


class RoutedFunction(torch.autograd.Function):
    """(hidden, weights, tensors of the layer) → the sum over each token's experts. See the module's docstring.

    Differentiable once, in hidden states, routing weights, LoRA factors, and in dense stacks and biases.
    """

    @staticmethod
    def forward(
        ctx: Any,
        build: Callable[[Sequence[Tensor | None]], Layer],
        keep: bool,
        hidden_TH: Tensor,
        weights_TK: Tensor,
        experts_TK: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        """`build(tensors)` makes the `Layer`; `keep` saves gate_up (fast), else the backward computes it again."""
        layer = build(tensors)
        order_P, counts = sort_by_expert(experts_TK, _experts_of(layer))
        output = torch.zeros_like(hidden_TH, dtype=_sum_dtype(hidden_TH.dtype), memory_format=torch.contiguous_format)
        kept = []
        for group in layer.groups(counts):
            token, weight = _pairs(order_P, weights_TK, group)
            x = _gather(layer, hidden_TH, token, weight)
            gate_up = layer.forward(layer.gate_up, group, x)
            if keep:
                kept.append(gate_up)
            y = layer.forward(layer.down, group, gated(gate_up, layer.gate, layer.act_fn)[0])
            y = y.to(output.dtype)
            output.index_add_(0, token, y * weight if layer.weight_on == "output" else y)
        ctx.build, ctx.counts, ctx.kept = build, counts, len(kept)
        ctx.save_for_backward(hidden_TH, weights_TK, order_P, *tensors, *kept)
        return output.to(hidden_TH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        kept = [saved.pop() for _ in range(ctx.kept)]  # the last first: popped again from the end below
        hidden_TH, weights_TK, order_P, *tensors = saved
        del saved
        layer = ctx.build(tensors)
        wanted = ctx.needs_input_grad
        grads = _Gradients(hidden_TH, weights_TK, tensors, wanted[2], wanted[3], wanted[5:])
        for group in layer.groups(ctx.counts):
            _backward_group(layer, group, grads, grad_TH, hidden_TH, weights_TK, order_P, kept.pop() if kept else None)
        return None, None, grads.hidden_in(hidden_TH.dtype), grads.weights, None, *grads.tensors


class _Gradients:
    """Where the gradients gather: None for those nobody asked for."""

    def __init__(
        self,
        hidden_TH: Tensor,
        weights_TK: Tensor,
        tensors: Sequence[Tensor | None],
        hidden: bool,
        weights: bool,
        wanted: Sequence[bool],
    ):
        dtype = _sum_dtype(hidden_TH.dtype)
        contiguous = torch.contiguous_format
        self.hidden = torch.zeros_like(hidden_TH, dtype=dtype, memory_format=contiguous) if hidden else None
        self.weights = torch.zeros_like(weights_TK, memory_format=contiguous) if weights else None
        self.tensors = [
            torch.zeros_like(tensor) if want and tensor is not None else None
            for tensor, want in zip(tensors, wanted, strict=True)
        ]
        self.by_tensor = {id(t): g for t, g in zip(tensors, self.tensors, strict=True) if g is not None}

    def hidden_in(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.hidden is None else self.hidden.to(dtype)

    def of(self, tensor: object) -> Tensor | None:
        """The gradient to fill for one of the layer's tensors."""
        return self.by_tensor.get(id(tensor))


def _backward_group(
    layer: Layer,
    group: Group,
    grads: _Gradients,
    grad_TH: Tensor,
    hidden_TH: Tensor,
    weights_TK: Tensor,
    order_P: Tensor,
    gate_up: Tensor | None,
) -> None:
    token, weight = _pairs(order_P, weights_TK, group)
    on_output = layer.weight_on == "output"
    x = _gather(layer, hidden_TH, token, weight)
    if gate_up is None:
        gate_up = layer.forward(layer.gate_up, group, x)
    a, gate_backward = gated(gate_up, layer.gate, layer.act_fn)
    grad = grad_TH[token].to(layer.dtype)
    d_a = layer.backward(layer.down, group, grad)
    pair_weight = weight.to(layer.dtype) if on_output else None
    _parameter_gradients(layer.down, group, grads, a, grad, pair_weight)
    if on_output and grads.weights is not None:
        d_weight = (d_a * a).sum(-1, dtype=_wider(a, weight))
        if layer.down.bias is not None:
            d_weight += (grad * _by_pair(layer.down.bias, group, grad.dtype)).sum(-1, dtype=d_weight.dtype)
        grads.weights.view(-1)[order_P[group.start : group.stop]] = d_weight.to(weight.dtype)
    d_gate_up = gate_backward(d_a if pair_weight is None else d_a * pair_weight)
    del a, d_a, gate_up, gate_backward
    _parameter_gradients(layer.gate_up, group, grads, x, d_gate_up, None)
    if grads.hidden is None and (on_output or grads.weights is None):
        return
    d_x = layer.backward(layer.gate_up, group, d_gate_up)
    if not on_output:
        if grads.weights is not None:
            product = hidden_TH[token].to(layer.dtype) * d_x
            grads.weights.view(-1)[order_P[group.start : group.stop]] = product.sum(-1, dtype=_wider(product, weight))
        d_x = d_x * weight.to(layer.dtype)
    if grads.hidden is not None:
        grads.hidden.index_add_(0, token, d_x.to(grads.hidden.dtype))


def _parameter_gradients(
    part: Projection, group: Group, grads: _Gradients, x: Tensor, grad: Tensor, weight: Tensor | None
) -> None:
    """Gradients of a projection's adapters, and of its stack and bias where they are trained."""
    for lora in part.loras:
        d_a, d_b = grads.of(lora.a), grads.of(lora.b)
        if d_a is not None and d_b is not None:
            lora_gradients(lora, group, x, grad, weight, (d_a, d_b))
    d_stack, d_bias = grads.of(part.stack), grads.of(part.bias)
    if d_stack is None and d_bias is None:
        return
    full = grad if weight is None else grad * weight
    ids = list(group.experts)
    if d_stack is not None:
        d_stack[ids] = grouped_outer(*((full, x) if part.transposed else (x, full)), group.counts).to(d_stack.dtype)
    if d_bias is not None:
        d_bias[ids] = torch.stack([rows.sum(0) for rows in full.split(list(group.counts))]).to(d_bias.dtype)


def sort_by_expert(experts_TK: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """The pairs (flat indices into T·K) sorted by expert, stably, and how many each expert has."""
    flat = experts_TK.reshape(-1)
    return flat.argsort(stable=True), torch.bincount(flat, minlength=experts).tolist()


def _experts_of(layer: Layer) -> int:
    return int(layer.gate_up.stack.shape[0])


def _pairs(order_P: Tensor, weights_TK: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Token (P,) and routing weight (P, 1) of a group's pairs."""
    pairs = order_P[group.start : group.stop]
    token = pairs.div(weights_TK.shape[1], rounding_mode="floor")
    return token, weights_TK.reshape(-1)[pairs].unsqueeze(-1)


def _gather(layer: Layer, hidden_TH: Tensor, token: Tensor, weight: Tensor) -> Tensor:
    x = hidden_TH[token].to(layer.dtype)
    return x * weight.to(layer.dtype) if layer.weight_on == "input" else x


def _wider(values: Tensor, weight: Tensor) -> torch.dtype:
    """Gradients of routing weights are summed in the wider of the two dtypes; a router may compute in float32."""
    return torch.promote_types(values.dtype, weight.dtype)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums over a token's experts are kept in float32 for 16-bit values."""
    return torch.float32 if dtype in HALF else dtype
