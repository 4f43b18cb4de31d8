"""The mathematics of one layer's routed experts: forward and backward by hand, in one autograd Function.

    forward    for each group of experts: gather its tokens ─▶ gate_up (+ LoRA) ─▶ gate ─▶ down (+ LoRA) ─▶ add up
    backward   the same groups again; the base is frozen, so only hidden states, routing weights and LoRA get gradients
               (and dense stacks that ask for one)

What is kept between the two decides the memory:

    fast   the pre-activation gate_up of each pair, P x 2I values, and what LoRA has in its middle, P x r
    lean   nothing but the hidden states and the routing; gate_up is computed again

Neither keeps gathered inputs, activations or anything dequantised. The gradient of a routing weight
needs no second output: <dout, down(a)> = <downᵀ(dout), a>, and downᵀ(dout) is computed anyway.

Experts go in groups, so that small ones share the cost of a call. On a CPU a group has about a hundred rows, which stay
in the cache, and each expert's matrix is multiplied (and dequantised) on its own. On CUDA in bfloat16 a group is as
many experts as the workspace holds, and one grouped matmul serves them all.

Dimension legend: T tokens, K experts a token (top-k), P = T·K pairs sorted by expert, E experts, H hidden size,
I expert width, G experts of a group, r LoRA rank, R sum of the ranks of all experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.activations import SiLUActivation

from adapters.lora_products import Each, Grouped, Lora, factors_of
from adapters.products import Group, grouped_linear, linear
from adapters.quantized import QuantizedStack
from adapters.workspace import CPU_GROUP_ROWS

Stack = nn.Parameter | Tensor | QuantizedStack
GateBackward = Callable[[Tensor], Tensor]
Scratch = dict[QuantizedStack, tuple[int, Tensor]]
HALF = (torch.bfloat16, torch.float16)


def _parts(count: int, limit: int) -> list[int]:
    """`count` rows in parts of at most `limit`, 0 for no limit."""
    if not limit or count <= limit:
        return [count] if count else []
    return [limit] * (count // limit) + ([count % limit] if count % limit else [])


@dataclass(frozen=True)
class Projection:
    """gate_up or down of one layer: the stack, its bias if any, and the adapters on it."""

    stack: Stack
    bias: Tensor | None
    transposed: bool
    loras: tuple[Lora, ...]


def matrix(stack: Stack, expert: int, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """(rows, cols) of one expert in `dtype`: a view of a dense stack, or dequantised into its buffer in `scratch`."""
    if not isinstance(stack, QuantizedStack):
        return stack[expert].to(dtype)
    held, buffer = scratch.get(stack) or (None, torch.empty(stack.shape[1:], dtype=dtype, device=stack.device))
    if held != expert:
        stack.dequantize(expert, dtype, out=buffer)
        scratch[stack] = expert, buffer
    return buffer


def matrices(stack: Stack, experts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """(G, rows, cols) of these experts in `dtype`; of a dense stack a view, so they must adjoin."""
    if isinstance(stack, QuantizedStack):
        return stack.dequantize_many(experts, dtype)
    return stack[experts[0] : experts[-1] + 1].to(dtype)


def swiglu(gate_up: Tensor, own: bool = False) -> tuple[Tensor, GateBackward]:
    """silu(gate) · up with gate first, and its backward. gate_up (P, 2I) → (P, I).

    Args:
        own: the backward may write its result over `gate_up`. It always uses up the gradient it is given.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    silu = F.silu(gate)

    def backward(grad: Tensor) -> Tensor:
        d_up = silu.mul_(grad)
        product = grad.mul_(up)
        result = gate_up if own else torch.empty_like(gate_up)
        result.chunk(2, dim=-1)[1].copy_(d_up)
        torch.ops.aten.silu_backward.grad_input(product, gate, grad_input=result.chunk(2, dim=-1)[0])
        return result

    return silu * up, backward


def clamped_swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """gpt-oss's gate: gate and up interleaved, both clamped, (up + 1) · gate · sigmoid(alpha · gate)."""
    gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def gated(
    gate_up: Tensor, gate: Callable[[Tensor], Tensor] | None, act_fn: nn.Module, own: bool = False
) -> tuple[Tensor, GateBackward]:
    """The gate's output (P, I) and its backward; by autograd where it is not the common silu(gate) · up."""
    if gate is None and type(act_fn) in (nn.SiLU, SiLUActivation):
        return swiglu(gate_up, own)
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
    """One layer's experts as one call sees them. Built alike for the forward and for the backward.

    Attributes:
        fused_experts: CUDA: how many experts one grouped matmul serves. 0: a matmul for each expert.
        row_limit: most rows of a group, 0 for no limit. It bounds the workspace whatever the routing is.
        scratch: a buffer for each quantised stack, which its experts are dequantised into one after the other, and the
            expert that it holds: a fresh block for each would cost more page faults than the dequantisation.
    """

    gate_up: Projection
    down: Projection
    gate: Callable[[Tensor], Tensor] | None
    act_fn: nn.Module
    weight_on: str
    fused_experts: int
    row_limit: int
    dtype: torch.dtype
    scratch: Scratch = field(default_factory=dict)

    @property
    def experts(self) -> int:
        return int(self.gate_up.stack.shape[0])

    def groups(self, counts: list[int]) -> list[Group]:
        """Experts with pairs, in order, as groups of whole experts; with a `row_limit` of parts of experts too."""
        groups: list[Group] = []
        start = 0
        for expert, count in enumerate(counts):
            for rows in _parts(count, self.row_limit):
                if groups and self._has_room(groups[-1], rows):
                    groups[-1] = groups[-1].with_expert(expert, rows, adjoining=self._fused_dense)
                else:
                    groups.append(Group((expert,), (rows,), start, start + rows))
                start += rows
        return groups

    @property
    def _fused_dense(self) -> bool:
        """The experts of a group must be a view of the stack, the idle ones between included."""
        return bool(self.fused_experts) and not isinstance(self.gate_up.stack, QuantizedStack)

    def _has_room(self, group: Group, rows: int) -> bool:
        held = group.stop - group.start
        if self.row_limit and held + rows > self.row_limit:
            return False
        if self.fused_experts:
            return len(group.experts) < self.fused_experts
        return held < CPU_GROUP_ROWS

    def base(self, part: Projection, group: Group, x: Tensor, transposed: bool) -> Tensor:
        """x (P, ·) through the frozen experts of a group: x @ Wᵀ when `transposed`, else x @ W."""
        if self.fused_experts:
            return grouped_linear(x, matrices(part.stack, group.experts, self.dtype), group.counts, transposed)
        products = []
        for expert, rows in zip(group.experts, x.split(list(group.counts)), strict=True):
            weight = matrix(part.stack, expert, self.dtype, self.scratch)
            products.append(linear(rows, weight if transposed else weight.t()))
        return products[0] if len(products) == 1 else torch.cat(products)

    def forward(
        self, part: Projection, group: Group, x: Tensor, pairs_P: Tensor, kept: list[Tensor] | None = None
    ) -> Tensor:
        """x (P, in) → (P, out), bias and adapters included. What `backward` can use again is added to `kept`."""
        y = self.base(part, group, x, part.transposed)
        if part.bias is not None:
            y += _by_pair(part.bias, group, self.dtype)
        for lora in part.loras:
            if factors := factors_of(lora, group, x.dtype, bool(self.fused_experts)):
                keep = lora.keep(x, pairs_P)
                hidden = factors.narrow(x if keep is None else x * keep, factors.a)
                factors.add_wide(y, hidden, factors.b, lora.spec.scale)
                if kept is not None:
                    kept.append(hidden)
        return y

    def backward(
        self,
        part: Projection,
        group: Group,
        x: Tensor,
        pairs_P: Tensor,
        grad: Tensor,
        weight: Tensor | None,
        grads: Gradients,
        kept: list[Tensor],
        through: bool = True,
    ) -> Tensor | None:
        """The gradient (P, in) of a projection's input, and of its parameters into `grads`.

        Args:
            x: (P, in), grad: (P, out). The loss' gradient of the projection is weight · grad, weight (P, 1) or None for
                1; the result is that of `grad` alone.
            kept: of the forward, its last one first to be used; it is taken out. Empty: computed again.
            through: whether the input's gradient is wanted; None is returned else.
        """
        d_x = None
        if through:
            d_x = self.base(part, group, grad, not part.transposed)
        for lora in reversed(part.loras):
            if factors := factors_of(lora, group, x.dtype, bool(self.fused_experts)):
                keep = lora.keep(x, pairs_P)
                seen = x if keep is None else x * keep
                hidden = kept.pop() if kept else factors.narrow(seen, factors.a)
                _lora_backward(lora, factors, hidden, seen, keep, grad, weight, grads, d_x)
        _base_backward(part, group, x, grad, weight, grads)
        return d_x


def _by_pair(bias: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    """The bias (E, out) of each pair's expert: (1, out) or (P, out)."""
    rows = bias[list(group.experts)].to(dtype)
    if len(group.experts) == 1:
        return rows
    return rows.repeat_interleave(torch.tensor(group.counts, device=rows.device), dim=0)


def _lora_backward(
    lora: Lora,
    factors: Each | Grouped,
    hidden: Tensor,
    x: Tensor,
    keep: Tensor | None,
    grad: Tensor,
    weight: Tensor | None,
    grads: Gradients,
    d_x: Tensor | None,
) -> None:
    """Adds the adapter's part to `d_x`, and to the gradients of the group's rows of A and B. `x` is what A was given.

    The routing weight multiplies the rank-sized products, the smaller ones.
    """
    d_hidden = factors.narrow(grad, factors.b)
    if d_x is not None:
        through = d_x if keep is None else torch.zeros_like(d_x)
        factors.add_wide(through, d_hidden, factors.a, lora.spec.scale)
        if keep is not None:
            d_x.addcmul_(through, keep)
    into_a, into_b = grads.of(lora.a), grads.of(lora.b)
    factor = lora.spec.scale if weight is None else lora.spec.scale * weight
    if into_a is not None:
        factors.add_outer(into_a, d_hidden.mul_(factor), x)
    if into_b is not None:
        factors.add_outer(into_b, hidden * factor, grad)


def _base_backward(
    part: Projection, group: Group, x: Tensor, grad: Tensor, weight: Tensor | None, grads: Gradients
) -> None:
    """Gradients of a dense stack and of biases, where they are trained."""
    d_stack, d_bias = grads.of(part.stack), grads.of(part.bias)
    if d_stack is None and d_bias is None:
        return
    full = grad if weight is None else grad * weight
    counts = list(group.counts)
    for expert, rows_x, rows_grad in zip(group.experts, x.split(counts), full.split(counts), strict=True):
        if d_stack is not None:
            d_stack[expert] += rows_grad.t() @ rows_x if part.transposed else rows_x.t() @ rows_grad
        if d_bias is not None:
            d_bias[expert] += rows_grad.sum(0)


class Pairs:
    """The routed pairs sorted by expert: where they come from, and their routing weights."""

    def __init__(self, order_P: Tensor, weights_TK: Tensor):
        self.order_P = order_P
        self.token_P = order_P.div(weights_TK.shape[1], rounding_mode="floor")
        self.weight_P1 = weights_TK.reshape(-1)[order_P].unsqueeze(-1)

    def inputs(self, layer: Layer, group: Group, hidden_TH: Tensor) -> Tensor:
        """(P_g, H): the group's inputs, times the routing weight where the family puts it there."""
        x = hidden_TH[self.token_P[group.rows]].to(layer.dtype)
        return x * self.weight_P1[group.rows].to(layer.dtype) if layer.weight_on == "input" else x


class Gradients:
    """Where the gradients gather: None for those that nobody asked for."""

    def __init__(self, hidden_TH: Tensor, weights_TK: Tensor, tensors: Sequence[Tensor | None], wanted: Sequence[bool]):
        """wanted: for hidden states, routing weights, and each of the tensors."""
        flat = torch.contiguous_format
        dtype = _sum_dtype(hidden_TH.dtype)
        self.hidden = torch.zeros_like(hidden_TH, dtype=dtype, memory_format=flat) if wanted[0] else None
        self.weights = torch.zeros_like(weights_TK, memory_format=flat) if wanted[1] else None
        self.tensors = [
            torch.zeros_like(tensor) if want and tensor is not None else None
            for tensor, want in zip(tensors, wanted[2:], strict=True)
        ]
        self._by_id = {id(t): g for t, g in zip(tensors, self.tensors, strict=True) if g is not None}

    def of(self, tensor: object) -> Tensor | None:
        """The gradient to fill for one of the layer's tensors."""
        return self._by_id.get(id(tensor))

    def add_weights(self, pairs_P: Tensor, products: Tensor) -> None:
        """The routing weights' gradients of these pairs: the row sums of `products`."""
        if self.weights is not None:
            dtype = torch.promote_types(products.dtype, self.weights.dtype)  # a router may compute in float32
            self.weights.view(-1)[pairs_P] += products.sum(-1, dtype=dtype).to(self.weights.dtype)


class RoutedFunction(torch.autograd.Function):
    """(hidden states, routing, tensors of the layer) → the sum over each token's experts. See the module's docstring.

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
        flat = experts_TK.reshape(-1)
        pairs = Pairs(flat.argsort(stable=True), weights_TK)
        counts = torch.bincount(flat, minlength=layer.experts).tolist()
        output = torch.zeros_like(hidden_TH, dtype=_sum_dtype(hidden_TH.dtype), memory_format=torch.contiguous_format)
        kept: list[list[Tensor]] = []
        for group in layer.groups(counts):
            of_group: list[Tensor] | None = [] if keep else None
            order = pairs.order_P[group.rows]
            gate_up = layer.forward(layer.gate_up, group, pairs.inputs(layer, group, hidden_TH), order, of_group)
            a = gated(gate_up, layer.gate, layer.act_fn)[0]
            y = layer.forward(layer.down, group, a, order, of_group).to(output.dtype)
            if of_group is not None:
                kept.append([gate_up, *of_group])
            del gate_up, a
            if layer.weight_on == "output":
                y *= pairs.weight_P1[group.rows]
            output.index_add_(0, pairs.token_P[group.rows], y)
        ctx.build, ctx.counts, ctx.kept = build, counts, [len(of_group) for of_group in kept]
        ctx.save_for_backward(hidden_TH, weights_TK, pairs.order_P, *tensors, *chain.from_iterable(kept))
        return output.to(hidden_TH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, weights_TK, order_P, *rest = ctx.saved_tensors
        first = len(rest) - sum(ctx.kept)
        tensors, kept = rest[:first], iter(rest[first:])
        layer = ctx.build(tensors)
        wanted = ctx.needs_input_grad
        grads = Gradients(hidden_TH, weights_TK, tensors, [*wanted[2:4], *wanted[5:]])
        pairs = Pairs(order_P, weights_TK)
        for place, group in enumerate(layer.groups(ctx.counts)):
            of_group = list(islice(kept, ctx.kept[place])) if ctx.kept else []
            _backward_group(layer, group, pairs, grads, grad_TH, hidden_TH, of_group)
        d_hidden = None if grads.hidden is None else grads.hidden.to(hidden_TH.dtype)
        return None, None, d_hidden, grads.weights, None, *grads.tensors


def _backward_group(
    layer: Layer,
    group: Group,
    pairs: Pairs,
    grads: Gradients,
    grad_TH: Tensor,
    hidden_TH: Tensor,
    kept: list[Tensor],
) -> None:
    token, order = pairs.token_P[group.rows], pairs.order_P[group.rows]
    weight = pairs.weight_P1[group.rows].to(layer.dtype)
    on_output = layer.weight_on == "output"
    x = pairs.inputs(layer, group, hidden_TH)
    lean = not kept
    gate_up = layer.forward(layer.gate_up, group, x, order) if lean else kept.pop(0)
    a, gate_backward = gated(gate_up, layer.gate, layer.act_fn, own=lean)
    grad = grad_TH[token].to(layer.dtype)
    d_a = layer.backward(layer.down, group, a, order, grad, weight if on_output else None, grads, kept)
    assert d_a is not None
    if on_output:
        # <grad, down(a)> without computing down(a) again; a is not needed any more
        grads.add_weights(order, a.mul_(d_a))
        if layer.down.bias is not None:
            grads.add_weights(order, grad * _by_pair(layer.down.bias, group, grad.dtype))
        d_a *= weight
    del a, grad, gate_up
    d_gate_up = gate_backward(d_a)
    del d_a, gate_backward
    through = grads.hidden is not None or (not on_output and grads.weights is not None)
    d_x = layer.backward(layer.gate_up, group, x, order, d_gate_up, None, grads, kept, through)
    if d_x is None:
        return
    if not on_output:
        grads.add_weights(order, hidden_TH[token].to(layer.dtype) * d_x)
        d_x *= weight
    if grads.hidden is not None:
        grads.hidden.index_add_(0, token, d_x.to(grads.hidden.dtype))


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums over a token's experts are kept in float32 for 16-bit values."""
    return torch.float32 if dtype in HALF else dtype
