"""4-bit blocks in bitsandbytes' own bytes: quantised many times faster on a CPU, dequantised into a given buffer.

A block of 64 values shares one absmax; each value is the nearest of 16 codes times that absmax, two values a byte. NF4
is from QLoRA (Dettmers et al., 2023, arXiv 2305.14314, section 3). With double quantisation the absmax values are 8-bit
themselves, in blocks of 256 with a float32 mean (the same paper).

    Quantizer(kind)(values, packed, absmax)     the bytes and scales of `bitsandbytes.functional.quantize_4bit`
    compress(absmax) / restore(...)             double quantisation of the scales
    dequantize(packed, absmax, kind, out)       the values of `bitsandbytes.functional.dequantize_4bit`

The bytes do not depend on how a matrix is cut into calls, as long as each cut lies between blocks.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import torch
from bitsandbytes import cextension
from torch import Tensor

BLOCK = 64
ABSMAX_BLOCK = 256
CHUNK = 1 << 18
"""Values that the quantiser works on at a time. Threads take turns at the interpreter between two numpy calls: with a
quarter of this, two threads together were hardly faster than one."""

RUN = 1 << 13
"""Values that are compared with one threshold after the other while they stay in a core's first cache."""

_SMALLEST = 1e-38  # bitsandbytes' floor under a block's absmax
_NATIVE_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def packed_bytes(values: int) -> int:
    """Bytes of `values` 4-bit values; an odd count is padded by one."""
    return -(-values // 2)


def block_count(values: int, block: int = BLOCK) -> int:
    """Blocks that `values` values take, the last one perhaps not full."""
    return -(-values // block)


class Quantizer:
    """Quantises on a CPU, in the bytes of bitsandbytes' CPU kernel. Not to be shared between threads: it has scratch.

    bitsandbytes looks each value up by binary search. Here a chunk is compared with all 15 thresholds at once and the
    outcomes are added up, which vectorises: the sum is the same index.

    Args:
        kind: "nf4" or "fp4".
    """

    def __init__(self, kind: str):
        thresholds, order = _thresholds(kind)
        self._thresholds = thresholds.numpy()[:, None]
        self._codes = _code_pairs(order.numpy())
        self._scaled, self._magnitude = torch.empty(CHUNK // BLOCK, BLOCK), torch.empty(CHUNK // BLOCK, BLOCK)
        self._above = np.empty(15 * CHUNK, bool)
        self._index, self._shifted = np.empty(CHUNK, np.uint8), np.empty(CHUNK // 2, np.uint16)

    def __call__(self, values: Tensor, packed: Tensor, absmax: Tensor) -> None:
        """Quantises `values` into `packed` and `absmax`.

        A block with NaN or infinity gets a non-finite absmax: check `absmax` afterwards.

        Args:
            values: (n,) floating point, contiguous, on the CPU; a dtype wider than float32 is rounded to it first.
            packed: (ceil(n / 2),) uint8, written.
            absmax: (ceil(n / 64),) float32, written.
        """
        count = values.numel()  # len() of a tensor takes several times as long
        whole = count - count % BLOCK
        out, scales = packed.numpy(), absmax
        for start in range(0, whole, CHUNK):
            stop = min(start + CHUNK, whole)
            self._blocks(values[start:stop], out[start // 2 : stop // 2], scales[start // BLOCK : stop // BLOCK])
        if whole < count:
            self._part(values[whole:], out[whole // 2 :], scales[whole // BLOCK :])

    def _blocks(self, values: Tensor, packed: np.ndarray, absmax: Tensor) -> None:
        scaled, magnitude = (scratch[: absmax.numel()] for scratch in (self._scaled, self._magnitude))
        scaled.copy_(values.view(-1, BLOCK))
        torch.amax(torch.abs(scaled, out=magnitude), -1, out=absmax)
        scaled.mul_(absmax.clamp(min=_SMALLEST).reciprocal_().unsqueeze(1))
        self._pack(scaled.view(-1).numpy(), packed)

    def _part(self, values: Tensor, packed: np.ndarray, absmax: Tensor) -> None:
        """The last block, not full: bitsandbytes divides here, and floors the scale that it stores."""
        scaled = values.float()
        absmax.copy_(scaled.abs().max().clamp(min=_SMALLEST))
        padded = torch.zeros(2 * len(packed))
        padded[: len(values)] = scaled / absmax
        self._pack(padded.numpy(), packed)

    def _pack(self, scaled: np.ndarray, packed: np.ndarray) -> None:
        count = len(scaled)
        index, shifted = self._index[:count], self._shifted[: count // 2]
        run = RUN if count % RUN == 0 else count
        above = self._above[: 15 * count].reshape(-1, 15, run)
        np.greater(scaled.reshape(-1, 1, run), self._thresholds, out=above)
        np.add.reduce(above.view(np.uint8), axis=1, dtype=np.uint8, out=index.reshape(-1, run))
        pairs = index.view("<u2")  # the first of two values in the low byte; it goes to the high half of the result
        np.left_shift(pairs, 4, out=shifted)
        np.right_shift(pairs, 8, out=pairs)
        np.bitwise_or(shifted, pairs, out=shifted)
        packed[:] = shifted.view("<u2")  # the low byte of each
        if self._codes is not None:
            packed[:] = self._codes[packed]


def _code_pairs(order: np.ndarray) -> np.ndarray | None:
    """The byte of two codes for each byte of two ranks (256,); None where a rank is its code, as with nf4."""
    ranks, pairs = np.arange(16), np.arange(256)
    return None if (order == ranks).all() else (order[pairs >> 4] << 4 | order[pairs & 15]).astype(np.uint8)


@cache
def _thresholds(kind: str) -> tuple[Tensor, Tensor]:
    """Halfway values between neighbouring codes (15,) and the code of each rank (16,), as bitsandbytes has them."""
    code = bnb.get_4bit_type(kind, device="cpu")
    order = torch.argsort(code)
    return (code[order[:-1]] + code[order[1:]]) / 2, order


def compress(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation of one matrix's scales.

    Args:
        absmax: (blocks,) float32.

    Returns:
        (blocks,) uint8, (ceil(blocks / 256),) float32 scales of those, and their mean, () float32.
    """
    offset = absmax.mean()
    small, state = bnb.quantize_blockwise(absmax - offset, code=dynamic_code(absmax.device), blocksize=ABSMAX_BLOCK)
    return small, state.absmax, offset


def restore(small: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """The scales that `compress` stored, of one matrix or of G.

    Args:
        small: (..., blocks) uint8.
        scale: (..., ceil(blocks / 256)) float32.
        offset: (...) float32.

    Returns:
        (..., blocks) float32.
    """
    if small.is_cpu and small.dim() == 1:
        code = dynamic_code(small.device)
        absmax: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(small, scale, code, ABSMAX_BLOCK, torch.float32)
    else:
        each = scale.repeat_interleave(ABSMAX_BLOCK, dim=-1)[..., : small.shape[-1]]
        absmax = dynamic_code(small.device)[small.int()].mul_(each)
    return absmax.add_(offset.unsqueeze(-1))


@cache
def dynamic_code(device: torch.device) -> Tensor:
    """bitsandbytes' 8-bit code (256,) float32, one a device: it is the same for every stack."""
    return bnb.create_dynamic_map().to(device)


def dequantize(packed: Tensor, absmax: Tensor, kind: str, out: Tensor) -> None:
    """Dequantises one run of blocks into `out`.

    Args:
        packed: uint8, contiguous, ceil(n / 2) bytes.
        absmax: (ceil(n / 64),) float32, contiguous.
        out: n values, contiguous, any shape; float32, bfloat16 or float16.
    """
    flat = out.view(-1)
    if not out.is_cpu:
        shape = list(flat.shape)
        torch.ops.bitsandbytes.dequantize_4bit.out(packed.view(-1, 1), absmax, BLOCK, kind, shape, out.dtype, out=flat)
        return
    whole = len(flat) - len(flat) % BLOCK
    if whole:
        _kernel(kind, out.dtype)(packed, absmax, flat, whole)
    if whole < len(flat):
        pairs = packed.view(-1)[whole // 2 :]
        index = torch.stack([pairs >> 4, pairs & 15], 1).view(-1)[: len(flat) - whole].int()
        flat[whole:] = bnb.get_4bit_type(kind, device="cpu")[index] * absmax[-1]


@cache
def _kernel(kind: str, dtype: torch.dtype) -> Any:
    """bitsandbytes' CPU kernel with an output that is given.

    Its registered operator allocates the output anew, and the page faults of a fresh 32 MB cost 20 times the kernel.
    Where this build of bitsandbytes has no such kernel, its operator does it.
    """
    native: Any = None
    if not isinstance(cextension.lib, cextension.ErrorHandlerMockBNBNativeLibrary):
        native = getattr(cextension.lib, f"cdequantize_blockwise_cpu_{kind}_{_NATIVE_DTYPES[dtype]}", None)

    def call(packed: Tensor, absmax: Tensor, out: Tensor, count: int) -> None:
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (packed, absmax, out)]
        native(*pointers, *map(ctypes.c_longlong, (BLOCK, count // BLOCK, BLOCK)))

    def operator(packed: Tensor, absmax: Tensor, out: Tensor, count: int) -> None:
        bytes_used, blocks = packed.reshape(-1, 1)[: count // 2], absmax[: count // BLOCK]
        out[:count] = torch.ops.bitsandbytes.dequantize_4bit(bytes_used, blocks, BLOCK, kind, [count], dtype)

    return operator if native is None else call
