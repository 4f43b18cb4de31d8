"""Linear layers of a quantised base: bitsandbytes' `Linear4bit` for nf4 and fp4, weight-only int8 for int8.

    quantized_linear(stock, "nf4") ─▶ (layer, its tensors)      to be filled through `tensors.writer(0)`

The layer looks at the very tensors that are filled, so nothing is copied between filling and use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import Tensor, nn

from adapters.four_bit import ABSMAX_BLOCK, BLOCK, dequantize, dynamic_code, restore
from adapters.quantized import FourBit, Held, Int8, dequantize_rows, hold


def quantized_linear(
    stock: nn.Linear, name: str, *, double_quant: bool, dtype: torch.dtype, device: Any
) -> tuple[nn.Linear, Held]:
    """A layer in format `name` of the shape of `stock`, and the tensors that its weight is to be written to.

    A bias is left on meta, to be filled like any other tensor.
    """
    held = hold(name, 1, *stock.weight.shape, double_quant=double_quant, dtype=dtype, device=device)
    if isinstance(held, Int8):
        return Int8Linear(stock, held), held
    return _linear_4bit(stock, cast(FourBit, held), dtype), held


def linear_problems(module: nn.Linear) -> list[str]:
    """What makes a linear layer of a quantised base unfit for use."""
    state = getattr(module.weight, "quant_state", None)
    if isinstance(module, Int8Linear):
        scales = [module.absmax]
    elif module.weight.dtype != torch.uint8 or state is None:
        return [f"is {module.weight.dtype}"]
    else:
        scales = [state.state2.absmax, state.offset] if state.nested else [state.absmax]
    return [] if all(torch.isfinite(s).all() for s in scales) else ["has scales that hold NaN or infinity"]


def _linear_4bit(stock: nn.Linear, held: FourBit, dtype: torch.dtype) -> Linear4bit:
    kind = Linear4bit if stock.in_features % BLOCK == 0 or not held.packed.is_cpu else UnevenLinear4bit
    linear = kind(
        stock.in_features,
        stock.out_features,
        bias=stock.bias is not None,
        compute_dtype=dtype,
        compress_statistics=held.double_quant,
        quant_type=held.kind,
        device="meta",
    )
    linear.quant_state = quant_state(held, dtype)
    linear.weight = Params4bit(
        held.packed[0].view(-1, 1),
        quant_state=linear.quant_state,
        blocksize=BLOCK,
        compress_statistics=held.double_quant,
        quant_type=held.kind,
        module=linear,
        bnb_quantized=True,
    )
    # On CPUs with AVX512-BF16 bitsandbytes repacks weights at the first evaluation into a form that computes in
    # bfloat16 and has no backward: training after an evaluation would silently lose gradients.
    linear.support_avx512bf16_for_cpu = False
    return linear.requires_grad_(False)


def quant_state(held: FourBit, dtype: torch.dtype) -> bnb.QuantState:
    """bitsandbytes' own description of a matrix that is dequantised to `dtype`, over the same tensors."""
    state: dict[str, Any] = {
        "absmax": held.absmax[0],
        "shape": torch.Size((held.rows, held.cols)),
        "code": bnb.get_4bit_type(held.kind, device=held.packed.device),
        "blocksize": BLOCK,
        "quant_type": held.kind,
        "dtype": dtype,
    }
    if held.double_quant:
        code = dynamic_code(held.packed.device)
        state["offset"] = held.absmax_offset[0]
        state["state2"] = bnb.QuantState(
            absmax=held.absmax_scale[0], code=code, blocksize=ABSMAX_BLOCK, dtype=torch.float32
        )
    return bnb.QuantState(**state)


class UnevenLinear4bit(Linear4bit):
    """A `Linear4bit` on a CPU whose rows end inside a block of 64 values.

    bitsandbytes 0.50.2 quantises over row ends and its CPU kernel begins a block with each row: without an error, the
    weights come back as others (relative error 0.24 instead of 0.09).
    """

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x.to(self.compute_dtype), partial(dense_4bit, self))
        return (product if self.bias is None else product + self.bias.to(product.dtype)).to(x.dtype)


class Int8Linear(nn.Linear):
    """y = x Wᵀ + b with W held row-wise in int8 and dequantised for each product; differentiable in x and b.

    bitsandbytes' `Linear8bitLt` quantises the activations as well, which training does not need.

    Parameters:
        weight: (out, in) int8. absmax: (out,) float32. bias: (out,) or None.
    """

    absmax: Tensor

    def __init__(self, stock: nn.Linear, held: Int8):
        super().__init__(stock.in_features, stock.out_features, bias=stock.bias is not None, device="meta")
        self.weight = nn.Parameter(held.values[0], requires_grad=False)
        self.register_buffer("absmax", held.absmax[0])
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        product: Tensor = _Product.apply(x, partial(_dense, self.weight, self.absmax))
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        scales = self.absmax
        super()._apply(fn, recurse)
        self.absmax = scales.to(self.absmax.device)  # never to another dtype
        return self


class _Product(torch.autograd.Function):
    """x Wᵀ with W dequantised in the forward, dropped, and dequantised again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dense: Callable[[torch.dtype], Tensor]) -> Tensor:
        ctx.dense = dense
        return x @ dense(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.dense(grads[0].dtype), None


def _dense(weight: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    dequantize_rows(weight, absmax, out)
    return out


def dense_4bit(linear: Linear4bit, dtype: torch.dtype) -> Tensor:
    """The weight of a 4-bit layer, (out, in) in `dtype`: by flat blocks, as it was quantised."""
    weight: Any = linear.weight
    state = weight.quant_state
    absmax = restore(state.absmax, state.state2.absmax, state.offset) if state.nested else state.absmax
    out = torch.empty(state.shape, dtype=dtype, device=weight.device)
    dequantize(weight.data, absmax, state.quant_type, out)
    return out


def dense_weight(linear: nn.Module) -> Tensor:
    """The weight of a linear layer as it is held, quantised or not: (out, in) float32; not to be written to."""
    if isinstance(linear, Int8Linear):
        return _dense(linear.weight, linear.absmax, torch.float32)
    weight = cast(Tensor, linear.weight)
    return weight.detach().float() if weight.dtype.is_floating_point else dense_4bit(cast(Any, linear), torch.float32)
