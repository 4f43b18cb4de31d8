"""4-bit expert stacks: bitsandbytes' bytes, an honest check, gradients through dequantised weights."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import nn

from adapters.errors import QuantizationError
from adapters.loading import check_quantized, load_base
from adapters.quantized import QuantizedStack
from adapters.routed import RoutedExperts
from studio.weights import four_bit_bytes
from tests.numerics.conftest import Tiny, save


def filled(double_quant: bool, shape: tuple[int, int, int] = (3, 48, 64)) -> tuple[QuantizedStack, torch.Tensor]:
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    stack = QuantizedStack(*shape, double_quant=double_quant)
    for expert, matrix in enumerate(weights):
        stack.write(expert, matrix)
    return stack, weights


@pytest.mark.parametrize("double_quant", [False, True])
def test_bytes_are_those_of_bitsandbytes(double_quant: bool) -> None:
    stack, weights = filled(double_quant)
    for expert, matrix in enumerate(weights):
        packed, state = bnb.quantize_4bit(matrix, compress_statistics=double_quant, quant_type="nf4")
        assert torch.equal(stack.packed[expert], packed.flatten())
        assert torch.equal(stack.absmax[expert], state.absmax.flatten())
        assert torch.equal(stack.dequantize(expert), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("double_quant", [False, True])
def test_bytes_held_are_bytes_planned(double_quant: bool) -> None:
    stack, _ = filled(double_quant)
    held = [stack.packed, stack.absmax, *([stack.absmax_scale, stack.absmax_offset] if double_quant else [])]
    assert sum(t.numel() * t.element_size() for t in held) == 3 * four_bit_bytes(48 * 64, double_quant)


@pytest.mark.parametrize("transposed", [False, True])
def test_matmul_and_its_gradient_are_those_of_the_dequantised_matrix(transposed: bool) -> None:
    stack, _ = filled(True)
    dense = stack.dequantize(1, torch.float64)
    dense = dense.t() if transposed else dense
    x = torch.randn(7, dense.shape[0], dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    direction = torch.randn(7, dense.shape[1], dtype=torch.float64)
    (stack.matmul(1, x, transposed) * direction).sum().backward()
    (twin @ dense * direction).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=0, atol=1e-12)


def test_partial_blocks_are_refused() -> None:
    with pytest.raises(QuantizationError, match="whole nf4 blocks of 64"):
        QuantizedStack(2, 3, 5)


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
