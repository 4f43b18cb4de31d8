"""Unusual input to the routed experts: right against the slow obvious loop in float64, or a clear error.

Shapes are odd, square (H = 2I, so gate_up is) or doubled (H = I), so that a swapped axis shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adapters.errors import QuantizationError
from adapters.expert_math import LoraRanks, clamped_swiglu
from adapters.layouts import LAYOUTS
from adapters.lora import ExpertLora, attach
from adapters.placement import Placement, same_experts_everywhere
from adapters.quantized import QuantizedStack
from adapters.routed import RoutedExperts, moe_blocks, set_expert_path, use_routed_experts
from tests.numerics.conftest import EXPERTS, MOE_LAYERS, Tiny, randomise

FAMILIES = ("llama4_text", "qwen3_moe", "gpt_oss")
"""The routing weight on the input, on the output, and biases with a gate of its own."""
HELD = ("plain", "nf4", "fp4", "int8")
SCALE, ALPHA = 1.5, 1.702


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
) -> Layer:
    """`limit` is gpt_oss's clamp: at 0.8 many values reach it."""
    layout, generator = LAYOUTS[family], torch.Generator().manual_seed(11)
    ranks = ranks or tuple((2, 0, 3, 1)[e % 4] for e in range(experts))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3

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
    quantized = QuantizedStack(*dense.shape, held)
    for expert, matrix in enumerate(dense):
        quantized.write(expert, matrix)
    return quantized


def slow_loop(layer: Layer, factors: list[Tensor], hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Token by token and expert by expert, W + scale · B A materialised, in float64."""
    module, layout = layer.experts, layer.experts.layout

    def linear(expert: int, projection: int, x: Tensor) -> Tensor:
        name = ("gate_up_proj", "down_proj")[projection]
        held = getattr(module, name)
        weight = held.dequantize(expert, torch.float64) if isinstance(held, QuantizedStack) else held[expert].double()
        rows = slice(sum(layer.ranks[:expert]), sum(layer.ranks[: expert + 1]))
        a, b = factors[2 * projection][rows], factors[2 * projection + 1][rows]
        bias = getattr(module, f"{name}_bias")
        y = (weight if layout.stack_order == "out_in" else weight.t()) @ x + SCALE * b.t() @ (a @ x)
        return y if bias is None else y + bias[expert].double()

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
    hidden = (
        torch.randn(len(chosen), layer.factors[0].shape[1], generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
    )
    weights = torch.rand(chosen.shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    direction = torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
    return compare(layer, hidden, chosen, weights, direction, tolerance)


def compare(
    layer: Layer, hidden: Tensor, chosen: Tensor, weights: Tensor, direction: Tensor, tolerance: float
) -> list[Tensor]:
    twins = [t.detach().double().requires_grad_() for t in (hidden, weights, *layer.factors)]
    slow = slow_loop(layer, twins[2:], twins[0], chosen, twins[1])
    wanted = [slow, *torch.autograd.grad(slow, twins, direction, allow_unused=True)]
    output = layer(hidden, chosen, weights)
    assert output.dtype == hidden.dtype and output.shape == hidden.shape
    found = [output, *torch.autograd.grad(output, (hidden, weights, *layer.factors), direction.to(output.dtype))]
    for mine, right in zip(found, wanted, strict=True):
        right = torch.zeros_like(mine, dtype=torch.float64) if right is None else right
        assert (mine.double() - right).norm() <= tolerance * (1 + right.norm())
    return found[3:]


@dataclass(frozen=True)
class Condition:
    experts: int
    hidden: int
    width: int
    chosen: Callable[[], Tensor]


CONDITIONS = {
    "two experts that no token reaches": Condition(5, 8, 4, lambda: spread(9, 2, 3) + 1),
    "all tokens to one expert": Condition(5, 8, 8, lambda: torch.full((9, 1), 3)),
    "the same expert twice for a token": Condition(3, 8, 8, lambda: torch.ones(4, 2, dtype=torch.long)),
    "no token": Condition(4, 8, 4, lambda: spread(0, 2, 4)),
    "one token": Condition(4, 6, 6, lambda: spread(1, 2, 4)),
    "one expert": Condition(1, 8, 4, lambda: spread(7, 1, 1)),
    "every expert for every token": Condition(5, 10, 5, lambda: spread(6, 5, 5)),
    "sizes that no block divides": Condition(3, 7, 5, lambda: spread(9, 2, 3)),
    "sizes of one": Condition(2, 1, 1, lambda: spread(5, 1, 2)),
    "32-bit expert ids": Condition(4, 8, 4, lambda: spread(9, 2, 4).int()),
}


@pytest.mark.parametrize("lean", [False, True], ids=["fast", "lean"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("condition", CONDITIONS.values(), ids=CONDITIONS.keys())
def test_the_result_is_that_of_the_slow_loop(condition: Condition, family: str, lean: bool) -> None:
    sizes = condition.experts, condition.hidden, condition.width
    for held in HELD:
        check(make_layer(family, *sizes, held=held, lean=lean), condition.chosen())
    plain = make_layer(family, *sizes, lean=lean, dtype=torch.float32)
    check(plain, condition.chosen(), torch.float32, 1e-5)


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_shape_and_any_routing_gives_the_slow_loops_result(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 9), "width")
    hidden = data.draw(st.sampled_from([width, 2 * width, data.draw(st.integers(1, 17))]), "hidden")
    experts = data.draw(st.integers(1, 6), "experts")
    top_k = data.draw(st.integers(1, experts), "top_k")
    few = data.draw(st.integers(top_k, experts), "experts in use")
    ranks = tuple(data.draw(st.lists(st.integers(0, 4), min_size=experts, max_size=experts), "ranks"))
    drawn = {name: st.sampled_from(values) for name, values in (("family", FAMILIES), ("held", HELD))}
    layer = make_layer(
        data.draw(drawn["family"]), experts, hidden, width, ranks, data.draw(drawn["held"]), data.draw(st.booleans())
    )
    check(layer, spread(data.draw(st.integers(0, 7), "tokens"), top_k, few))


@pytest.mark.parametrize("lean", [False, True], ids=["fast", "lean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_idle_experts_gradients_are_exactly_zero(family: str, lean: bool) -> None:
    layer = make_layer(family, 4, 8, 4, ranks=(2, 2, 2, 2), lean=lean)
    trained = [layer.experts.gate_up_proj.requires_grad_(), layer.experts.down_proj.requires_grad_()]
    chosen = torch.tensor([[0, 3], [3, 0], [0, 3]])
    layer(torch.randn(3, 8, dtype=torch.float64), chosen, torch.rand(3, 2, dtype=torch.float64)).sum().backward()
    for factor in layer.factors:
        by_expert = factor.grad.view(4, 2, -1)
        assert (by_expert[[1, 2]] == 0).all() and by_expert[[0, 3]].abs().sum((1, 2)).gt(0).all()
    for parameter in trained:
        assert (parameter.grad[[1, 2]] == 0).all() and parameter.grad[[0, 3]].abs().sum((1, 2)).gt(0).all()


def test_a_batch_that_is_masked_away_trains_nothing_and_breaks_nothing() -> None:
    layer = make_layer("qwen3_moe", 4, 8, 4)
    hidden = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(6, dtype=torch.bool)
    output = layer(hidden[mask], spread(6, 2, 4)[mask], torch.rand(6, 2, dtype=torch.float64)[mask])
    assert output.shape == (0, 8)
    output.sum().backward()
    assert all((tensor.grad == 0).all() for tensor in (hidden, *layer.factors))


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every second column": lambda t: torch.stack([t, t], -1).flatten(1)[:, ::2],
    "every second row": lambda t: torch.stack([t, t], 1).flatten(0, 1)[::2],
}


@pytest.mark.parametrize("lean", [False, True], ids=["fast", "lean"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
def test_strided_views_give_what_contiguous_tensors_give(view: Callable, family: str, lean: bool) -> None:
    layer = make_layer(family, 4, 8, 4, lean=lean)
    generator = torch.Generator().manual_seed(5)
    hidden, direction = (view(torch.randn(9, 8, generator=generator, dtype=torch.float64)) for _ in range(2))
    weights = view(torch.rand(9, 2, generator=generator, dtype=torch.float64))
    chosen = view(spread(9, 2, 4))
    assert not any(t.is_contiguous() for t in (hidden, chosen, weights, direction))
    compare(layer, hidden.requires_grad_(), chosen, weights.requires_grad_(), direction, 1e-11)


def test_expanded_weights_and_an_expanded_gradient() -> None:
    layer = make_layer("llama4_text", 4, 8, 4)
    hidden = torch.randn(9, 8, dtype=torch.float64).requires_grad_()
    weights = torch.tensor(0.7, dtype=torch.float64).expand(9, 2).requires_grad_()
    compare(layer, hidden, spread(9, 2, 4), weights, torch.tensor(1.0, dtype=torch.float64).expand(9, 8), 1e-11)


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.005), (torch.bfloat16, 0.04)], ids=str)
def test_16_bit_input_stays_close_to_float64(dtype: torch.dtype, tolerance: float, family: str, held: str) -> None:
    """float16 has 11 bits of mantissa, bfloat16 8; half a unit of each product, a few of them in a row. No value is
    clamped: rounding across the edge of a clamp changes the gradient by all of it."""
    for lean in (False, True):
        layer = make_layer(family, 5, 16, 8, held=held, lean=lean, dtype=dtype, limit=7.0)
        check(layer, spread(9, 2, 3), dtype, tolerance)


@pytest.mark.parametrize("held", ["plain", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chosen", [lambda: spread(9, 2, 3), lambda: spread(0, 2, 5)], ids=["idle experts", "no token"])
def test_autocast_computes_in_bfloat16_and_returns_the_inputs_dtype(chosen: Callable, family: str, held: str) -> None:
    for lean in (False, True):
        layer = make_layer(family, 5, 7, 9, held=held, lean=lean, dtype=torch.float32, limit=7.0)
        with torch.autocast("cpu", torch.bfloat16):
            check(layer, chosen(), torch.float32, 0.04)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("lean", [False, True], ids=["fast", "lean"])
def test_gradient_checkpointing_changes_no_gradient(lean: bool, reentrant: bool) -> None:
    layer = make_layer("qwen3_moe", 5, 8, 4, lean=lean, held="nf4")
    hidden = torch.randn(9, 8, dtype=torch.float64).requires_grad_()
    weights = torch.rand(9, 2, dtype=torch.float64).requires_grad_()
    chosen = spread(9, 2, 3)
    inputs = (hidden, weights, *layer.factors)

    def gradients(output: Tensor) -> list[Tensor]:
        for tensor in inputs:
            tensor.grad = None
        output.square().sum().backward()
        return [tensor.grad for tensor in inputs]

    right = gradients(layer(hidden, chosen, weights))
    found = gradients(checkpoint(layer, hidden, chosen, weights, use_reentrant=reentrant))
    assert all(torch.equal(mine, other) for mine, other in zip(found, right, strict=True))


def test_differentiating_twice_says_that_it_cannot_be_done() -> None:
    layer = make_layer("qwen3_moe", 4, 8, 4)
    hidden = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    output = layer(hidden, spread(6, 2, 4), torch.rand(6, 2, dtype=torch.float64))
    (first,) = torch.autograd.grad(output.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("kind", "double_quant", "name"),
    [
        ("nf4", False, "absmax"),
        ("nf4", True, "absmax_scale"),
        ("nf4", True, "absmax_offset"),
        ("fp4", False, "absmax"),
        ("int8", True, "absmax"),
    ],
)
def test_a_scale_that_is_not_finite_is_named(kind: str, double_quant: bool, name: str, value: float) -> None:
    quantized = QuantizedStack(3, 9, 15, kind, double_quant=double_quant)
    for expert in range(3):
        quantized.write(expert, torch.randn(9, 15))
    assert quantized.problems() == []
    scales = getattr(quantized.held[kind], name)
    scales[1].view(-1)[-1] = value
    assert quantized.problems() == ["the scales of experts [1] hold NaN or infinity"]


def test_a_weight_that_is_not_finite_cannot_be_quantised() -> None:
    weight = torch.randn(9, 15)
    weight[8, 14] = math.nan
    for kind in ("nf4", "fp4", "int8"):
        with pytest.raises(QuantizationError, match=r"expert 2.*NaN"):
            QuantizedStack(3, 9, 15, kind).write(2, weight)


def adapted(tiny: Tiny, path: str = "fast") -> nn.Module:
    """A tiny model with trained-looking adapters on attention and experts."""
    model = use_routed_experts(tiny.build()).requires_grad_(False)
    routed = same_experts_everywhere(3, MOE_LAYERS, EXPERTS)
    model = attach(model, Placement(attention=2, routed=routed, alpha=6)).train()
    randomise(model)
    set_expert_path(model, path)
    return model


def step(model: nn.Module, **inputs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits
    logits.square().mean().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach().flatten(0, 1), **gradients}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == wanted.keys() and any("lora_gate_up_A" in name for name in wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("path", ["fast", "lean"])
def test_packed_rows_give_what_separate_rows_give(square: Tiny, path: str, ids: Tensor) -> None:
    """Packing as TRL does it: one row, position ids that start again, no attention mask."""
    model, rows = adapted(square, path), ids[:2, :8]
    positions = torch.arange(8).repeat(2)[None]
    together = step(model, input_ids=rows.reshape(1, -1), position_ids=positions)
    apart = step(model, input_ids=rows)
    assert_same(together, apart, 1e-5)
    wrong = step(model, input_ids=rows.reshape(1, -1))
    assert (wrong["logits"] - apart["logits"]).abs().max() > 1e-2  # rows that see each other do show


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("path", ["fast", "lean"])
def test_a_checkpointed_model_trains_the_same(square: Tiny, path: str, reentrant: bool, ids: Tensor) -> None:
    model = adapted(square, path)
    plain = step(model, input_ids=ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(step(model, input_ids=ids), plain, 1e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("path", ["fast", "lean"])
def test_a_compiled_block_gives_the_same(square: Tiny, path: str, backend: str) -> None:
    model = adapted(square, path)
    block = next(block for _, block in moe_blocks(model, square.layout))
    trained = [p for p in block.parameters() if p.requires_grad]
    torch.manual_seed(4)
    hidden = torch.randn(1, 9, square.hidden, requires_grad=True)

    def run(block: Callable) -> list[Tensor]:
        output = block(hidden)
        output = output[0] if isinstance(output, tuple) else output
        return [output, *torch.autograd.grad(output.square().sum(), [hidden, *trained])]

    plain = run(block)
    torch._dynamo.reset()
    for mine, other in zip(run(torch.compile(block, backend=backend)), plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["fast", "lean"])
def test_a_disabled_adapter_gives_the_bases_output_and_input_gradient(square: Tiny, path: str) -> None:
    model = adapted(square, path)
    layer = next(m for m in model.modules() if isinstance(m, ExpertLora))
    torch.manual_seed(4)
    hidden = torch.randn(9, square.hidden, requires_grad=True)
    routing = spread(9, square.top_k, EXPERTS), torch.rand(9, square.top_k)

    def run(module: nn.Module) -> tuple[Tensor, Tensor]:
        output = module(hidden, *routing)
        return output, torch.autograd.grad(output.square().sum(), hidden)[0]

    base, with_adapter = run(layer.get_base_layer()), run(layer)
    with model.disable_adapter():
        disabled = run(layer)
    assert all(torch.equal(mine, other) for mine, other in zip(disabled, base, strict=True))
    assert (with_adapter[0] - base[0]).abs().max() > 1e-2
    assert all(torch.equal(mine, other) for mine, other in zip(run(layer), with_adapter, strict=True))
