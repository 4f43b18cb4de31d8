"""Quantised expert stacks: bitsandbytes' bytes and values in every format, and an honest check of a loaded base."""

from __future__ import annotations

import math
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from adapters.errors import QuantizationError
from adapters.four_bit import CHUNK
from adapters.loading import check_quantized, load_base
from adapters.quantized import QuantizedStack
from adapters.quantized_linear import quantized_linear
from adapters.routed import RoutedExperts
from studio.weights import four_bit_bytes
from tests.numerics.conftest import Tiny, save

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def filled(double_quant: bool, shape: tuple[int, int, int] = (3, 48, 64)) -> tuple[QuantizedStack, torch.Tensor]:
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    stack = QuantizedStack(*shape, double_quant=double_quant)
    for expert, matrix in enumerate(weights):
        stack.write(expert, matrix)
    return stack, weights


def hostile(kind: str, dtype: torch.dtype) -> torch.Tensor:
    """(90, 64): random blocks, zeros, denormals, huge ones, and values at the decision thresholds and beside them."""
    code = bnb.get_4bit_type(kind, device="cpu").sort().values
    thresholds = (code[1:] + code[:-1]) / 2
    rows = [torch.randn(16, 64, generator=torch.Generator().manual_seed(3)), torch.zeros(2, 64)]
    for absmax in (1.0, 0.37, 3.1e-5, 2.0**-130, 1e-39, 60000.0):
        at = torch.zeros(3, 64)
        for i, side in enumerate((-math.inf, 0.0, math.inf)):
            exact = thresholds * absmax
            at[i, :15] = exact if side == 0 else torch.nextafter(exact, torch.tensor(side))
            at[i, 15:30], at[i, 30:46], at[i, 63] = -at[i, :15], code * absmax, absmax
        rows.append(at)
    rows.append(torch.randn(54, 64, generator=torch.Generator().manual_seed(4)) * torch.logspace(-44, 4, 54)[:, None])
    return torch.cat(rows).to(dtype)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("source", DTYPES)
def test_bytes_and_values_are_those_of_bitsandbytes(kind: str, source: torch.dtype, double_quant: bool) -> None:
    large = torch.randn(300, 512, generator=torch.Generator().manual_seed(5)).to(source)  # more than one piece
    for matrix in (hostile(kind, source), large, large[:9, :30].contiguous()):  # the last is not whole blocks
        stack = QuantizedStack(2, *matrix.shape, kind, double_quant=double_quant)
        stack.write(1, matrix)
        packed, state = bnb.quantize_4bit(matrix, compress_statistics=double_quant, quant_type=kind)
        held = stack.held[kind]
        assert torch.equal(held.packed[1], packed.flatten())
        assert torch.equal(held.absmax[1], state.absmax.flatten())
        if double_quant:
            assert torch.equal(held.absmax_scale[1], state.state2.absmax)
            assert torch.equal(held.absmax_offset[1], state.offset)
        for dtype in DTYPES:
            state.dtype = dtype
            assert torch.equal(stack.dequantize(1, dtype), bnb.dequantize_4bit(packed, state)), dtype


@pytest.mark.parametrize("count", [1, 63, 65, 15 * 7])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_odd_counts_end_in_a_part_of_a_block_as_in_bitsandbytes(kind: str, count: int) -> None:
    random = torch.Generator().manual_seed(count)
    code = bnb.get_4bit_type(kind, device="cpu").sort().values
    unsorted = bnb.get_4bit_type(kind, device="cpu")
    at_thresholds = ((code[1:] + code[:-1]) / 2).repeat(8)[-count:]
    for scale in (*torch.rand(20, generator=random), 1e-39, 0.0):
        matrix = torch.randn(1, count, generator=random)
        matrix[0, -len(at_thresholds) :] = at_thresholds
        matrix[0, -1] = 1.0
        matrix *= scale
        stack = QuantizedStack(1, 1, count, kind, double_quant=False)
        stack.write(0, matrix)
        packed, state = bnb.quantize_4bit(matrix, quant_type=kind)
        assert torch.equal(stack.held[kind].packed[0], packed.flatten())
        assert torch.equal(stack.held[kind].absmax[0], state.absmax)
        index = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()[:count].long()
        expected = unsorted[index] * state.absmax.repeat_interleave(64)[:count]
        assert torch.equal(stack.dequantize(0)[0], expected), scale


@pytest.mark.parametrize("source", DTYPES)
def test_int8_is_that_of_bitsandbytes(source: torch.dtype) -> None:
    torch.manual_seed(6)
    matrix = torch.cat([torch.randn(70, 96), torch.zeros(1, 96), torch.full((1, 96), -2.5), torch.randn(3, 96) * 1e-30])
    matrix[5, 7] = 300.0
    matrix = matrix.to(source)
    stack = QuantizedStack(1, *matrix.shape, "int8")
    stack.write(0, matrix)
    values, absmax, _ = bnb.int8_vectorwise_quant(matrix.clone())
    assert torch.equal(stack.held["int8"].values[0], values)
    assert torch.equal(stack.held["int8"].absmax[0], absmax)
    for dtype in (*DTYPES, torch.float64):
        expected = bnb.int8_vectorwise_dequant(values, absmax).to(dtype)
        assert torch.equal(stack.dequantize(0, dtype), expected)
    tiny = QuantizedStack(1, 1, 4, "int8")  # bitsandbytes converts infinity to int8 here
    tiny.write(0, torch.tensor([[1e-39, 0.0, -1e-40, 3e-38]]).to(source) * 0.01)
    assert torch.equal(tiny.dequantize(0), torch.zeros(1, 4))
    assert (stack.dequantize(0) - matrix.float()).abs().amax(1).le(matrix.float().abs().amax(1) / 253).all()


def test_experts_of_one_stack_differ_in_format() -> None:
    formats = ("nf4", "int8", "nf4", "none", "fp4", "nf4", "int8")
    weights = torch.randn(len(formats), 40, 64, generator=torch.Generator().manual_seed(2))
    stack = QuantizedStack(len(formats), 40, 64, formats, dtype=torch.bfloat16)
    for expert in reversed(range(len(formats))):
        stack.write(expert, weights[expert])
    assert stack.formats == formats
    assert stack.held["nf4"].packed.shape[0] == 3 and stack.held["int8"].values.shape[0] == 2
    assert torch.equal(stack.dequantize(3), weights[3].bfloat16().float())
    for expert, name in enumerate(formats):
        alone = QuantizedStack(1, 40, 64, name, dtype=torch.bfloat16)
        alone.write(0, weights[expert])
        assert torch.equal(stack.dequantize(expert), alone.dequantize(0)), expert


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(40, 64), (5, 6)])
def test_many_at_once_are_the_same_as_one_by_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    formats = ("nf4", "nf4", "int8", "nf4", "fp4", "int8", "int8")
    stack = QuantizedStack(7, *shape, formats)
    for expert in range(7):
        stack.write(expert, torch.randn(shape, generator=torch.Generator().manual_seed(expert)))
    for chosen in ([0, 1, 3], [6, 0, 2, 2, 5], [4], list(range(7)), []):
        given = torch.full((len(chosen), *shape), torch.nan, dtype=dtype)
        many = stack.dequantize_many(chosen, dtype, out=given)
        assert many is given
        assert torch.equal(many, stack.dequantize_many(chosen, dtype))
        for place, expert in enumerate(chosen):
            assert torch.equal(many[place], stack.dequantize(expert, dtype))


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_matrix_that_is_not_finite_is_refused(name: str, value: float) -> None:
    for place in (0, 200, 3 * 70 - 1):
        stack = QuantizedStack(2, 3, 70, name)
        matrix = torch.ones(3, 70)
        matrix.view(-1)[place] = value
        with pytest.raises(QuantizationError, match="expert 1: holds NaN or infinity"):
            stack.write(1, matrix)
        assert not stack.written.any()


def test_scales_too_large_to_quantise_are_refused() -> None:
    stack = QuantizedStack(1, 64, 64)
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        stack.write(0, torch.full((64, 64), 3e38))  # their mean is not finite


def test_wrong_shapes_dtypes_and_formats_are_refused() -> None:
    stack = QuantizedStack(2, 3, 5)
    with pytest.raises(QuantizationError, match=r"got \(5, 3\)"):
        stack.write(0, torch.zeros(5, 3))
    with pytest.raises(QuantizationError, match=r"got torch.int32; allowed: torch.float64"):
        stack.write(0, torch.zeros(3, 5, dtype=torch.int32))
    with pytest.raises(QuantizationError, match="unknown format nf5; known: nf4"):
        QuantizedStack(2, 3, 5, "nf5")
    with pytest.raises(QuantizationError, match="got 1 formats for 2 experts"):
        QuantizedStack(2, 3, 5, ["nf4"])


def test_a_transposed_matrix_is_quantised_as_it_reads() -> None:
    matrix = torch.randn(64, 48, generator=torch.Generator().manual_seed(8))
    stack = QuantizedStack(2, 48, 64)
    stack.write(0, matrix.t())
    stack.write(1, matrix.t().contiguous())
    assert torch.equal(stack.dequantize(0), stack.dequantize(1))


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_another_dtype_for_the_model_leaves_the_scales_alone(name: str) -> None:
    stack = QuantizedStack(1, 48, 64, name, double_quant=False)
    stack.write(0, torch.randn(48, 64, generator=torch.Generator().manual_seed(9)))
    before = stack.dequantize(0)
    assert torch.equal(stack.to(torch.bfloat16).dequantize(0), before)


@pytest.mark.parametrize("double_quant", [False, True])
def test_bytes_held_are_bytes_planned(double_quant: bool) -> None:
    stack, _ = filled(double_quant)
    assert stack.nbytes == 3 * four_bit_bytes(48 * 64, double_quant)


def test_double_quantisation_takes_at_most_0_52_bytes_a_value() -> None:
    stack = QuantizedStack(2, 512, 1024)
    assert stack.nbytes / (2 * 512 * 1024) <= 0.52
    assert QuantizedStack(2, 512, 1024, "int8").nbytes / (2 * 512 * 1024) < 1.01


def test_int8_linears_compute_and_differentiate_with_the_dequantised_weight() -> None:
    stock = nn.Linear(40, 24, dtype=torch.float64)
    linear, held = quantized_linear(stock, "int8", double_quant=True, dtype=torch.float64, device="cpu")
    writer = held.writer(0)
    writer.put(0, stock.weight.detach().view(-1))
    writer.close()
    linear.bias = stock.bias
    dense = bnb.int8_vectorwise_dequant(*bnb.int8_vectorwise_quant(stock.weight.detach().float())[:2]).double()
    x = torch.randn(7, 40, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    y, expected = linear(x), nn.functional.linear(twin, dense, stock.bias)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    (y * y).sum().backward()
    (expected * expected).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=0, atol=1e-11)


class LargestFloat32(TorchDispatchMode):
    """The most values of any float32 tensor that an operation gives."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.values = max(self.values, out.numel())
        return out


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(128, 96), (96, 160), (64, 32), (48, 40), (64, 128)])
def test_4_bit_linears_compute_and_differentiate_with_the_value_of_every_code(
    kind: str, double_quant: bool, rows: int, cols: int
) -> None:
    """Rows that end inside a block of 64 too, where bitsandbytes' CPU kernel gives other weights."""
    torch.manual_seed(0)
    stock = nn.Linear(cols, rows)
    linear, held = quantized_linear(stock, kind, double_quant=double_quant, dtype=torch.float32, device="cpu")
    writer = held.writer(0)
    writer.put(0, stock.weight.detach().view(-1))
    writer.close()
    linear.bias = stock.bias
    dense = torch.empty(1, rows, cols)
    held.dequantize(0, dense)
    assert (dense[0] - stock.weight).norm() / stock.weight.norm() < 0.13
    x = torch.randn(5, cols, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    y, expected = linear(x), nn.functional.linear(twin, dense[0], stock.bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-4)


def test_int8_linears_make_no_float32_matrix_on_the_way_to_16_bit() -> None:
    torch.manual_seed(10)
    stock = nn.Linear(512, 301, bias=False)
    linear, held = quantized_linear(stock, "int8", double_quant=True, dtype=torch.bfloat16, device="cpu")
    writer = held.writer(0)
    writer.put(0, stock.weight.detach().view(-1))
    writer.close()
    x = torch.randn(3, 512).bfloat16().requires_grad_()
    with LargestFloat32() as largest:
        y = linear(x)
        y.sum().backward()
    assert 0 < largest.values <= CHUNK
    dense = bnb.int8_vectorwise_dequant(held.values[0], held.absmax[0]).bfloat16()
    assert torch.equal(y, x @ dense.t())


def test_every_routed_expert_weight_is_4_bit_after_loading(square: Tiny, tmp_path: Path) -> None:
    model = load_base(save(square, tmp_path))
    experts = [m for m in model.modules() if isinstance(m, RoutedExperts)]
    assert len(experts) == 2
    for module in experts:
        assert not any(p.is_floating_point() for p in module.parameters())
        assert all(stack.written.all() for stack in (module.gate_up_proj, module.down_proj))


def test_one_expert_left_unquantised_is_an_error(square: Tiny, tmp_path: Path) -> None:
    model = load_base(save(square, tmp_path))
    stack = next(m for m in model.modules() if isinstance(m, RoutedExperts)).down_proj
    stack.written[4] = False
    with pytest.raises(QuantizationError, match=r"down_proj: experts \[4\] were never quantised"):
        check_quantized(model)


def test_a_stack_left_in_32_bit_is_an_error(square: Tiny, tmp_path: Path) -> None:
    model = load_base(save(square, tmp_path))
    experts = next(m for m in model.modules() if isinstance(m, RoutedExperts))
    shape = experts.gate_up_proj.shape
    del experts.gate_up_proj
    experts.gate_up_proj = nn.Parameter(torch.zeros(shape), requires_grad=False)
    with pytest.raises(QuantizationError, match=r"gate_up_proj is torch.float32"):
        check_quantized(model)


def test_a_linear_left_in_32_bit_is_an_error(square: Tiny, tmp_path: Path) -> None:
    model = load_base(save(square, tmp_path))
    attention = model.get_submodule("model.layers.1.self_attn")
    attention.k_proj = nn.Linear(attention.k_proj.in_features, attention.k_proj.out_features, bias=False)
    with pytest.raises(QuantizationError, match=r"layers.1.self_attn.k_proj.weight is torch.float32"):
        check_quantized(model)


@pytest.mark.parametrize("place", ["expert", "linear"])
@pytest.mark.parametrize(("name", "double_quant"), [("nf4", True), ("fp4", False), ("int8", True)])
def test_a_scale_that_is_not_finite_is_an_error(tmp_path: Path, name: str, double_quant: bool, place: str) -> None:
    model = load_base(save(Tiny("qwen3_moe", 64, 32, 2), tmp_path), quantize=name, double_quant=double_quant)
    if place == "expert":
        held = next(m for m in model.modules() if isinstance(m, RoutedExperts)).down_proj.held[name]
        scales, message = held.absmax_scale if double_quant and name != "int8" else held.absmax, r"experts \[3\]"
        scales[3, 1 if name == "int8" else 0] = math.nan
    else:
        linear, message = model.get_submodule("model.layers.2.self_attn.v_proj"), r"layers.2.self_attn.v_proj.weight"
        state = getattr(linear.weight, "quant_state", None)
        scales = linear.absmax if state is None else state.state2.absmax if double_quant else state.absmax
        scales[0] = math.inf
    with pytest.raises(QuantizationError, match=f"{message}.*NaN or infinity"):
        check_quantized(model)
