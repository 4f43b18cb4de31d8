"""4-bit expert stacks: one nf4 matrix an expert, the same bytes that bitsandbytes writes for it.

bitsandbytes quantises `nn.Linear` only; a fused (E, ·, ·) expert stack stays in 16 bit there. `QuantizedStack` holds
the stack as E separately quantised matrices, so that one expert can be written or dequantised alone. Only experts that
received tokens are dequantised, in the forward and again in the backward: nothing dequantised is kept between them.

NF4 is from QLoRA (Dettmers et al., 2023, arXiv 2305.14314, section 3): blocks of 64 values share one absmax; with
double quantisation the absmax values are themselves 8-bit in blocks of 256 with a float32 mean.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn

from adapters.errors import QuantizationError

BLOCK = 64
ABSMAX_BLOCK = 256


class QuantizedStack(nn.Module):
    """E matrices of one shape, each nf4.

    Tensors (n = rows · cols of one expert):
        packed: (E, n / 2) uint8, two values a byte.
        absmax: (E, n / 64) float32, or uint8 with double quantisation.
        absmax_scale: (E, n / 64 / 256) float32, double quantisation only.
        absmax_offset: (E,) float32, double quantisation only.
        absmax_code: (256,) float32, double quantisation only.
        written: (E,) bool, which experts have been quantised into the stack.

    Raises:
        QuantizationError: when an expert's values do not fill whole blocks of 64.
    """

    absmax: Tensor
    absmax_scale: Tensor
    absmax_offset: Tensor
    absmax_code: Tensor
    written: Tensor

    def __init__(self, experts: int, rows: int, cols: int, double_quant: bool = True, device: Any = None):
        super().__init__()
        self.experts, self.rows, self.cols, self.double_quant = experts, rows, cols, double_quant
        values = rows * cols
        if values % BLOCK:
            raise QuantizationError(
                f"an expert matrix of {rows} x {cols} does not fill whole nf4 blocks of {BLOCK} values; "
                "set quantization: none for this model"
            )
        blocks = values // BLOCK
        kind = torch.uint8 if double_quant else torch.float32
        packed = torch.zeros((experts, values // 2), dtype=torch.uint8, device=device)
        self.packed = nn.Parameter(packed, requires_grad=False)  # a parameter: PEFT finds a module's device by one
        self._buffer("absmax", (experts, blocks), kind, device)
        self._buffer("written", (experts,), torch.bool, device)
        if double_quant:
            self._buffer("absmax_scale", (experts, -(-blocks // ABSMAX_BLOCK)), torch.float32, device)
            self._buffer("absmax_offset", (experts,), torch.float32, device)
            self.register_buffer("absmax_code", bnb.create_dynamic_map().to(device or "cpu"))

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> None:
        self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the stack before quantisation, (E, rows, cols)."""
        return self.experts, self.rows, self.cols

    def write(self, expert: int, matrix: Tensor) -> None:
        """Quantises `matrix` (rows, cols), floating point, into place `expert`."""
        if tuple(matrix.shape) != (self.rows, self.cols):
            raise QuantizationError(f"expert {expert}: got {tuple(matrix.shape)}, the stack is {self.shape}")
        packed, state = bnb.quantize_4bit(
            matrix.to(self.packed.device).contiguous(),
            blocksize=BLOCK,
            compress_statistics=self.double_quant,
            quant_type="nf4",
        )
        self.packed.data[expert] = packed.view(-1)
        self.absmax[expert] = state.absmax.view(-1)
        if self.double_quant:
            self.absmax_scale[expert] = state.state2.absmax.view(-1)
            self.absmax_offset[expert] = state.offset
        self.written[expert] = True

    def quant_state(self, expert: int, dtype: torch.dtype) -> bnb.QuantState:
        """bitsandbytes' own description of one expert; dequantises to `dtype` (float32, bfloat16 or float16)."""
        common = {"blocksize": BLOCK, "quant_type": "nf4", "shape": torch.Size((self.rows, self.cols)), "dtype": dtype}
        if not self.double_quant:
            return bnb.QuantState(absmax=self.absmax[expert], **common)
        scales = bnb.QuantState(
            absmax=self.absmax_scale[expert], code=self.absmax_code, blocksize=ABSMAX_BLOCK, dtype=torch.float32
        )
        return bnb.QuantState(absmax=self.absmax[expert], offset=self.absmax_offset[expert], state2=scales, **common)

    def dequantize(self, expert: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """One expert's matrix (rows, cols) in `dtype`."""
        kernel_dtype = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
        packed = self.packed[expert].view(-1, 1)
        return bnb.dequantize_4bit(packed, self.quant_state(expert, kernel_dtype)).to(dtype)

    def matmul(self, expert: int, x: Tensor, transposed: bool) -> Tensor:
        """x @ W, or x @ Wᵀ when `transposed`; differentiable in x alone.

        Args:
            x: (P, rows), or (P, cols) when `transposed`.
        """
        product: Tensor = _Matmul.apply(x, self, expert, transposed)
        return product

    def extra_repr(self) -> str:
        return f"{self.experts} x {self.rows} x {self.cols}, nf4, double_quant={self.double_quant}"


class _Matmul(torch.autograd.Function):
    """x @ W with W dequantised in the forward, dropped, and dequantised again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: QuantizedStack, expert: int, transposed: bool) -> Tensor:
        ctx.stack, ctx.expert, ctx.transposed = stack, expert, transposed
        weight = stack.dequantize(expert, x.dtype)
        return x @ (weight.t() if transposed else weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        weight = ctx.stack.dequantize(ctx.expert, grads[0].dtype)
        return grads[0] @ (weight if ctx.transposed else weight.t()), None, None, None
