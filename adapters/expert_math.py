"""The mathematics of one layer's routed experts: forward and backward by hand, in one autograd Function.

    forward    for each group of experts: gather its tokens ─▶ gate_up (+ LoRA) ─▶ gate ─▶ down (+ LoRA) ─▶ add up
    backward   the same groups again; the base is frozen, so only hidden states, routing weights and LoRA get gradients
               (and dense stacks that ask for one)

What is kept between the two decides the memory:

    fast   the pre-activation gate_up of each pair, P x 2I values
    lean   nothing but the hidden states and the routing; gate_up is computed again

Neither keeps gathered inputs, activations, LoRA intermediates or anything dequantised. The gradient of a routing weight
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
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.activations import SiLUActivation

from adapters.quantized import QuantizedStack
from adapters.workspace import CPU_GROUP_ROWS

Stack = nn.Parameter | Tensor | QuantizedStack
GateBackward = Callable[[Tensor], Tensor]
Scratch = dict[QuantizedStack, tuple[int, Tensor]]
HALF = (torch.bfloat16, torch.float16)
ROW_BYTES = 16
"""What torch's grouped matmul wants the rows of its operands to be a multiple of."""


@dataclass(frozen=True)
class Group:
    """Experts computed together: their ids, how many pairs each has, and their slice of the sorted pairs."""

    experts: tuple[int, ...]
    counts: tuple[int, ...]
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    def with_expert(self, expert: int, rows: int, adjoining: bool) -> Group:
        """This group and the next `rows` pairs, of `expert`; `adjoining`: with the idle experts between, too."""
        idle = tuple(range(self.experts[-1] + 1, expert)) if adjoining else ()
        counts = (*self.counts, *(0 for _ in idle), rows)
        return Group((*self.experts, *idle, expert), counts, self.start, self.stop + rows)


def _parts(count: int, limit: int) -> list[int]:
    """`count` rows in parts of at most `limit`, 0 for no limit."""
    if not limit or count <= limit:
        return [count] if count else []
    return [limit] * (count // limit) + ([count % limit] if count % limit else [])


@dataclass(frozen=True)
class LoraRanks:
    """One adapter's ranks, by expert, and the scale of its products."""

    ranks: tuple[int, ...]
    scale: float

    def rows(self, expert: int) -> slice:
        """The rows of the flat (R, ·) factors that belong to `expert`."""
        start = self.starts[expert]
        return slice(start, start + self.ranks[expert])

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first row of each expert in the flat factors, and after the last their number."""
        return (0, *accumulate(self.ranks))


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
    switch is `torch.backends.mkldnn.enabled`. It compiles code for every row count that it meets and keeps it (2 ms and
    half a megabyte or more each), so rows are padded to one of a few counts.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu" or not _onednn():
        return x @ weight.t()
    rows = x.shape[0]
    missing = padded_rows(rows) - rows
    padded = F.pad(x, (0, 0, 0, missing)) if missing else x
    product: Tensor = torch.ops.mkldnn._linear_pointwise(padded, weight, None, "none", [], "")
    return product[:rows]


def padded_rows(rows: int) -> int:
    """The next of the counts 8, 16, …, 64, 80, …, 256, and from there eight an octave: 288, 320, …, 512, 576, …"""
    step = 8 if rows <= 64 else max(16, 1 << ((rows - 1).bit_length() - 4))
    return -(-rows // step) * step


def _onednn() -> bool:
    return bool(torch.backends.mkldnn.enabled) and torch.backends.mkldnn.is_available()


def grouped_linear(x: Tensor, weights: Tensor, counts: Sequence[int], transposed: bool) -> Tensor:
    """x (P, ·) times each group's matrix: x @ W[g]ᵀ when `transposed`, else x @ W[g]. weights (G, ·, ·)."""
    if len(counts) == 1:
        return x @ (weights[0].t() if transposed else weights[0])
    if not _serves(x, weights):
        parts = zip(x.split(list(counts)), weights, strict=True)
        return torch.cat([rows @ (weight.t() if transposed else weight) for rows, weight in parts])
    return F.grouped_mm(x, weights.transpose(1, 2) if transposed else weights, offs=_offsets(counts, x.device))


def grouped_outer(left: Tensor, right: Tensor, counts: Sequence[int]) -> Tensor:
    """left (P, m), right (P, n) → (G, m, n): leftᵀ right of each group's rows."""
    if len(counts) == 1:
        return (left.t() @ right)[None]
    if not _serves(left, right):
        parts = zip(left.split(list(counts)), right.split(list(counts)), strict=True)
        return torch.stack([a.t() @ b for a, b in parts])
    return F.grouped_mm(left.t(), right, offs=_offsets(counts, left.device))


def _serves(*operands: Tensor) -> bool:
    """Whether torch has a grouped matmul for these: the dtype, and rows of whole 16 bytes."""
    dtype, device = operands[0].dtype, operands[0].device.type
    aligned = all(stride * t.itemsize % ROW_BYTES == 0 for t in operands for stride in sorted(t.stride())[1:])
    return aligned and (dtype == torch.bfloat16 or (dtype == torch.float32 and device == "cpu"))


def _offsets(counts: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=device)


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
        return len(group.experts) < self.fused_experts if self.fused_experts else held < CPU_GROUP_ROWS

    def base(self, part: Projection, group: Group, x: Tensor, transposed: bool) -> Tensor:
        """x (P, ·) through the frozen experts of a group: x @ Wᵀ when `transposed`, else x @ W."""
        if self.fused_experts:
            return grouped_linear(x, matrices(part.stack, group.experts, self.dtype), group.counts, transposed)
        products = []
        for expert, rows in zip(group.experts, x.split(list(group.counts)), strict=True):
            weight = matrix(part.stack, expert, self.dtype, self.scratch)
            products.append(linear(rows, weight if transposed else weight.t()))
        return products[0] if len(products) == 1 else torch.cat(products)

    def forward(self, part: Projection, group: Group, x: Tensor) -> Tensor:
        """x (P, in) → (P, out), bias and adapters included."""
        y = self.base(part, group, x, part.transposed)
        if part.bias is not None:
            y += _by_pair(part.bias, group, self.dtype)
        for lora in part.loras:
            if factors := lora_factors(lora, group, x.dtype):
                _add_product(y, grouped_linear(x, factors[0], group.counts, True), factors[1], group, lora.spec.scale)
        return y

    def backward(
        self,
        part: Projection,
        group: Group,
        x: Tensor,
        grad: Tensor,
        weight: Tensor | None,
        grads: Gradients,
        through: bool = True,
    ) -> Tensor | None:
        """The gradient (P, in) of a projection's input, and of its parameters into `grads`.

        Args:
            x: (P, in), grad: (P, out). The loss' gradient of the projection is weight · grad, weight (P, 1) or None for
                1; the result is that of `grad` alone.
            through: whether the input's gradient is wanted; None is returned else.
        """
        d_x = None
        if through:
            d_x = self.base(part, group, grad, not part.transposed)
        for lora in part.loras:
            _lora_backward(lora, group, x, grad, weight, grads, d_x)
        _base_backward(part, group, x, grad, weight, grads)
        return d_x


def _by_pair(bias: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    """The bias (E, out) of each pair's expert: (1, out) or (P, out)."""
    rows = bias[list(group.experts)].to(dtype)
    if len(group.experts) == 1:
        return rows
    return rows.repeat_interleave(torch.tensor(group.counts, device=rows.device), dim=0)


def _add_product(y: Tensor, x: Tensor, weights: Tensor, group: Group, scale: float) -> None:
    """y += scale · x @ W[g], in place."""
    if len(group.counts) == 1:
        y.addmm_(x, weights[0], alpha=scale)
    else:
        y.add_(grouped_linear(x, weights, group.counts, False), alpha=scale)


def lora_factors(lora: Lora, group: Group, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """A (G, r, in) and B (G, r, out) of a group in `dtype`, smaller ranks zero-filled; None when none has a rank."""
    ranks = [lora.spec.ranks[expert] for expert in group.experts]
    rank = max(ranks)
    if not rank:
        return None
    run = slice(lora.spec.rows(group.experts[0]).start, lora.spec.rows(group.experts[-1]).stop)
    step = ROW_BYTES // dtype.itemsize
    whole = len(ranks) == 1 or dtype == torch.float64 or rank % step == 0
    if whole and min(ranks) == rank and run.stop - run.start == rank * len(ranks):
        a, b = (factor[run].to(dtype).reshape(len(ranks), rank, -1) for factor in (lora.a, lora.b))
        return a, b
    rank = rank if whole else rank + step - rank % step
    return _padded(lora.a, lora.spec, group, rank, dtype), _padded(lora.b, lora.spec, group, rank, dtype)


def _padded(factor: Tensor, spec: LoraRanks, group: Group, rank: int, dtype: torch.dtype) -> Tensor:
    result = factor.new_zeros(len(group.experts), rank, factor.shape[1], dtype=dtype)
    for place, expert in enumerate(group.experts):
        result[place, : spec.ranks[expert]] = factor[spec.rows(expert)]
    return result


def _lora_backward(
    lora: Lora, group: Group, x: Tensor, grad: Tensor, weight: Tensor | None, grads: Gradients, d_x: Tensor | None
) -> None:
    """Adds the adapter's part to `d_x`, and to the gradients of the group's rows of A and B.

    The routing weight multiplies the rank-sized products, the smaller ones.
    """
    factors = lora_factors(lora, group, x.dtype)
    if factors is None:
        return
    a, b = factors
    d_hidden = grouped_linear(grad, b, group.counts, True)
    if d_x is not None:
        _add_product(d_x, d_hidden, a, group, lora.spec.scale)
    into_a, into_b = grads.of(lora.a), grads.of(lora.b)
    factor = lora.spec.scale if weight is None else lora.spec.scale * weight
    if into_a is not None:
        _add_rows(into_a, grouped_outer(d_hidden * factor, x, group.counts), lora.spec, group)
    if into_b is not None:
        hidden = grouped_linear(x, a, group.counts, True)
        _add_rows(into_b, grouped_outer(hidden * factor, grad, group.counts), lora.spec, group)


def _add_rows(target: Tensor, product: Tensor, spec: LoraRanks, group: Group) -> None:
    """Adds product (G, r, ·) to the rows (R, ·) of the group's experts."""
    ranks = {spec.ranks[expert] for expert in group.experts}
    run = slice(spec.rows(group.experts[0]).start, spec.rows(group.experts[-1]).stop)
    if ranks == {product.shape[1]} and run.stop - run.start == product.shape[0] * product.shape[1]:
        target[run] += product.view(-1, product.shape[2])
        return
    for place, expert in enumerate(group.experts):
        target[spec.rows(expert)] += product[place, : spec.ranks[expert]]


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
        kept = []
        for group in layer.groups(counts):
            gate_up = layer.forward(layer.gate_up, group, pairs.inputs(layer, group, hidden_TH))
            if keep:
                kept.append(gate_up)
            y = layer.forward(layer.down, group, gated(gate_up, layer.gate, layer.act_fn)[0]).to(output.dtype)
            if layer.weight_on == "output":
                y *= pairs.weight_P1[group.rows]
            output.index_add_(0, pairs.token_P[group.rows], y)
        ctx.build, ctx.counts, ctx.kept = build, counts, len(kept)
        ctx.save_for_backward(hidden_TH, weights_TK, pairs.order_P, *tensors, *kept)
        return output.to(hidden_TH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, weights_TK, order_P, *rest = ctx.saved_tensors
        tensors, kept = rest[: len(rest) - ctx.kept], rest[len(rest) - ctx.kept :]
        layer = ctx.build(tensors)
        wanted = ctx.needs_input_grad
        grads = Gradients(hidden_TH, weights_TK, tensors, [*wanted[2:4], *wanted[5:]])
        pairs = Pairs(order_P, weights_TK)
        for place, group in enumerate(layer.groups(ctx.counts)):
            _backward_group(layer, group, pairs, grads, grad_TH, hidden_TH, kept[place] if kept else None)
        d_hidden = None if grads.hidden is None else grads.hidden.to(hidden_TH.dtype)
        return None, None, d_hidden, grads.weights, None, *grads.tensors


def _backward_group(
    layer: Layer,
    group: Group,
    pairs: Pairs,
    grads: Gradients,
    grad_TH: Tensor,
    hidden_TH: Tensor,
    gate_up: Tensor | None,
) -> None:
    token, order = pairs.token_P[group.rows], pairs.order_P[group.rows]
    weight = pairs.weight_P1[group.rows].to(layer.dtype)
    on_output = layer.weight_on == "output"
    x = pairs.inputs(layer, group, hidden_TH)
    lean = gate_up is None
    if gate_up is None:
        gate_up = layer.forward(layer.gate_up, group, x)
    a, gate_backward = gated(gate_up, layer.gate, layer.act_fn, own=lean)
    grad = grad_TH[token].to(layer.dtype)
    d_a = layer.backward(layer.down, group, a, grad, weight if on_output else None, grads)
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
    d_x = layer.backward(layer.gate_up, group, x, d_gate_up, None, grads, through)
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
