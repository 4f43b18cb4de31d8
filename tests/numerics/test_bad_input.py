"""Unusual input to the routed experts: right against the slow obvious loop in float64, or a clear error.

Shapes are odd, square (H = 2I, so gate_up is) or doubled (H = I), so that a swapped axis shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adapters.errors import QuantizationError
from adapters.lora import ExpertLora, attach
from adapters.placement import Placement, same_experts_everywhere
from adapters.quantized import QuantizedStack
from adapters.routed import moe_blocks, set_expert_path, use_routed_experts
from tests.numerics.conftest import EXPERTS, MOE_LAYERS, Tiny, randomise
from tests.numerics.slow_experts import FAMILIES, HELD, NEVER, check, compare, make_layer, spread


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
    """float16 has 11 bits of mantissa, bfloat16 8; half a unit of each product, a few of them in a row."""
    for lean in (False, True):
        layer = make_layer(family, 5, 16, 8, held=held, lean=lean, dtype=dtype, limit=NEVER)
        check(layer, spread(9, 2, 3), dtype, tolerance)


@pytest.mark.parametrize("held", ["plain", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chosen", [lambda: spread(9, 2, 3), lambda: spread(0, 2, 5)], ids=["idle experts", "no token"])
def test_autocast_computes_in_bfloat16_and_returns_the_inputs_dtype(chosen: Callable, family: str, held: str) -> None:
    for lean in (False, True):
        layer = make_layer(family, 5, 7, 9, held=held, lean=lean, dtype=torch.float32, limit=NEVER)
        with torch.autocast("cpu", torch.bfloat16):
            check(layer, chosen(), torch.float32, 0.04)


def test_autocast_is_arithmetic_in_its_own_dtype() -> None:
    torch.manual_seed(4)
    layer = make_layer("qwen3_moe", 5, 16, 8, dtype=torch.float32)
    hidden, routing = torch.randn(9, 16), (spread(9, 2, 5), torch.rand(9, 2))
    exact = layer(hidden, *routing)
    for dtype, least, most in ((torch.bfloat16, 2e-3, 2e-2), (torch.float16, 2e-4, 2e-3)):
        with torch.autocast("cpu", dtype):
            error = (layer(hidden, *routing) - exact).norm() / exact.norm()
        assert least < error < most


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


@pytest.mark.parametrize("path", ["fast", "lean"])
def test_a_compiled_block_gives_the_same(square: Tiny, path: str) -> None:
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
    for mine, other in zip(run(torch.compile(block, backend="aot_eager")), plain, strict=True):
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
