"""Quantised expert stacks: E matrices of one shape, each in its own format, in the bytes that bitsandbytes writes.

bitsandbytes quantises `nn.Linear` only; a fused (E, ·, ·) expert stack stays in 16 bit there. `QuantizedStack` holds
the stack as E separately quantised matrices, so that one expert can be written or dequantised alone, and experts of one
stack may differ: hot ones in int8, cold ones in nf4.

    format      a value takes      scales
    nf4, fp4    4 bit              one a block of 64; with double quantisation 8-bit themselves (adapters/four_bit.py)
    int8        8 bit              one a row, the row's absmax / 127 (LLM.int8, arXiv 2208.07339, section 2.1)
    none        the dense dtype    none

Each format's tensors are stacked over its own experts, in the order of their ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from adapters import four_bit
from adapters.errors import QuantizationError
from adapters.four_bit import BLOCK

Format = Literal["nf4", "fp4", "int8", "none"]
FORMATS: tuple[Format, ...] = ("nf4", "fp4", "int8", "none")
BITS_MASK = {
    torch.float64: (torch.int64, 0x7FF0000000000000),
    torch.float32: (torch.int32, 0x7F800000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
}
"""The exponent bits of each floating dtype: all of them set means NaN or infinity."""

INT8_PIECE = 1 << 16
"""Values of an int8 matrix that are dequantised at a time on a CPU."""


class Writer(Protocol):
    """Takes one matrix in pieces, in order: `put` pieces of a multiple of `step` values, the last of any size, `close`.

    Attributes:
        step: values.
    """

    step: int

    def put(self, start: int, values: Tensor) -> None: ...

    def close(self) -> None: ...


class Held(nn.Module):
    """G matrices (rows, cols) in one format. The base class of the formats.

    Attributes:
        tensors: what is held, by name; all of it must be written before use.
    """

    def __init__(self, count: int, rows: int, cols: int):
        super().__init__()
        self.count, self.rows, self.cols = count, rows, cols

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def writer(self, slot: int, quantizer: four_bit.Quantizer | None = None) -> Writer:
        """Takes the matrix of `slot`; `quantizer` is scratch to reuse, of this format and this thread."""
        raise NotImplementedError

    def dequantize(self, start: int, out: Tensor) -> None:
        """Dequantises the matrices of slots start … start + G' - 1 into `out` (G', rows, cols)."""
        raise NotImplementedError

    def bad_slots(self) -> list[int]:
        """Slots whose scales hold NaN or infinity."""
        return []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves to devices, never to other dtypes: `model.to(bfloat16)` would round the scales."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        return super()._apply(moved, recurse)

    def _hold(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> None:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if hasattr(self, "_main"):
            self.register_buffer(name, tensor)
        else:  # the first is a parameter: PEFT finds a module's device by one
            self._main = name
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


class FourBit(Held):
    """nf4 or fp4.

    Tensors (n = rows · cols):
        packed: (G, ceil(n / 2)) uint8, two values a byte.
        absmax: (G, ceil(n / 64)) float32, or uint8 with double quantisation.
        absmax_scale: (G, ceil(n / 64 / 256)) float32, double quantisation only.
        absmax_offset: (G,) float32, double quantisation only.
    """

    packed: Tensor
    absmax: Tensor
    absmax_scale: Tensor
    absmax_offset: Tensor

    def __init__(self, kind: str, count: int, rows: int, cols: int, double_quant: bool = True, device: Any = None):
        super().__init__(count, rows, cols)
        self.kind, self.double_quant = kind, double_quant
        blocks = four_bit.block_count(rows * cols)
        self._hold("packed", (count, four_bit.packed_bytes(rows * cols)), torch.uint8, device)
        self._hold("absmax", (count, blocks), torch.uint8 if double_quant else torch.float32, device)
        if double_quant:
            scales = four_bit.block_count(blocks, four_bit.ABSMAX_BLOCK)
            self._hold("absmax_scale", (count, scales), torch.float32, device)
            self._hold("absmax_offset", (count,), torch.float32, device)

    def writer(self, slot: int, quantizer: four_bit.Quantizer | None = None) -> Writer:
        if self.packed.is_cpu:
            return _FourBitWriter(self, slot, quantizer or four_bit.Quantizer(self.kind))
        return _DeviceFourBitWriter(self, slot)

    def store_scales(self, slot: int, absmax: Tensor) -> None:
        """Stores the scales (blocks,) float32 of one matrix.

        Raises:
            QuantizationError: NaN or infinity among them, so in the matrix.
        """
        _require_finite(absmax)
        if not self.double_quant:
            self.absmax[slot] = absmax
            return
        self.absmax[slot], self.absmax_scale[slot], self.absmax_offset[slot] = four_bit.compress(absmax)
        _require_finite(self.absmax_scale[slot])

    def dequantize(self, start: int, out: Tensor) -> None:
        # the kernel takes a run of matrices as one where each begins with a block of its own
        together = not self.packed.is_cpu and self.rows * self.cols % BLOCK == 0
        for slots, part in _runs(start, out, len(out) if together else 1):
            absmax = self._absmax(slots if together else slots.start).view(-1)
            four_bit.dequantize(self.packed[slots], absmax, self.kind, part)

    def _absmax(self, slots: slice | int) -> Tensor:
        if not self.double_quant:
            return self.absmax[slots]
        return four_bit.restore(self.absmax[slots], self.absmax_scale[slots], self.absmax_offset[slots])

    def bad_slots(self) -> list[int]:
        scales = [self.absmax_scale, self.absmax_offset[:, None]] if self.double_quant else [self.absmax]
        good = torch.stack([torch.isfinite(tensor).all(1) for tensor in scales]).all(0)
        return (~good).nonzero().flatten().tolist()


def _runs(start: int, out: Tensor, length: int) -> Iterator[tuple[slice, Tensor]]:
    """The slots from `start` on and their part of `out`, `length` at a time."""
    for done in range(0, len(out), max(length, 1)):
        part = out[done : done + length]
        yield slice(start + done, start + done + len(part)), part


class _FourBitWriter:
    step = BLOCK

    def __init__(self, held: FourBit, slot: int, quantizer: four_bit.Quantizer):
        self._held, self._slot, self._quantizer = held, slot, quantizer
        self._packed = held.packed.data[slot]
        self._absmax = torch.empty(held.absmax.shape[1])

    def put(self, start: int, values: Tensor) -> None:
        stop = start + values.numel()
        packed = self._packed[start // 2 : four_bit.packed_bytes(stop)]
        self._quantizer(values, packed, self._absmax[start // BLOCK : four_bit.block_count(stop)])

    def close(self) -> None:
        self._held.store_scales(self._slot, self._absmax)


class _DeviceFourBitWriter:
    """The whole matrix at once, by bitsandbytes' kernel of the device that the stack is on."""

    def __init__(self, held: FourBit, slot: int):
        self._held, self._slot, self.step = held, slot, held.rows * held.cols

    def put(self, start: int, values: Tensor) -> None:
        values = values.to(self._held.packed.device, values.dtype if values.itemsize < 4 else torch.float32)
        packed, absmax = torch.ops.bitsandbytes.quantize_4bit(values, BLOCK, self._held.kind, torch.uint8)
        self._held.packed.data[self._slot] = packed.view(-1)
        self._held.store_scales(self._slot, absmax)

    def close(self) -> None:
        pass


class Int8(Held):
    """Row-wise absmax int8, values -127 … 127.

    Tensors:
        values: (G, rows, cols) int8.
        absmax: (G, rows) float32. A row whose absmax is under 4e-37 is stored as zeros, as by bitsandbytes.
    """

    values: Tensor
    absmax: Tensor

    def __init__(self, count: int, rows: int, cols: int, device: Any = None):
        super().__init__(count, rows, cols)
        self._hold("values", (count, rows, cols), torch.int8, device)
        self._hold("absmax", (count, rows), torch.float32, device)

    def writer(self, slot: int, quantizer: four_bit.Quantizer | None = None) -> Writer:
        return _Int8Writer(self, slot)

    def dequantize(self, start: int, out: Tensor) -> None:
        values = self.values[start : start + len(out)].view(-1, self.cols)
        absmax = self.absmax[start : start + len(out)].view(-1)
        dequantize_rows(values, absmax, out.view(-1, self.cols))

    def bad_slots(self) -> list[int]:
        return (~torch.isfinite(self.absmax).all(1)).nonzero().flatten().tolist()


def dequantize_rows(values: Tensor, absmax: Tensor, out: Tensor) -> None:
    """Row-wise int8 `values` (N, cols) with `absmax` (N,) float32 into `out` (N, cols), floating point."""
    # a piece at a time, so that the product in float32 is not another matrix in memory; on a GPU all at once
    count, cols = out.shape
    rows = max(1, INT8_PIECE // cols) if out.is_cpu else max(1, count)
    scratch = None if out.dtype == torch.float32 else torch.empty((min(rows, count), cols), device=out.device)
    for row in range(0, count, rows):
        part = out[row : row + rows]
        product = part if scratch is None else scratch[: len(part)]
        # in bitsandbytes' order (int8_vectorwise_dequant), rounded to the dtype of `out` once, at the end
        product.copy_(values[row : row + rows]).mul_(absmax[row : row + rows, None]).mul_(7.874015718698502e-3)
        if scratch is not None:
            part.copy_(product)


class _Int8Writer:
    def __init__(self, held: Int8, slot: int):
        self._values, self._absmax, self._cols = held.values.data[slot], held.absmax[slot], held.cols
        self.step = held.cols if held.values.is_cpu else held.rows * held.cols

    def put(self, start: int, values: Tensor) -> None:
        rows = slice(start // self._cols, (start + len(values)) // self._cols)
        matrix = values.view(-1, self._cols).to(self._values.device, torch.float32)
        absmax = matrix.abs().amax(1)
        _require_finite(absmax)
        factor = (127.0 / absmax).unsqueeze(1)
        self._values[rows] = (matrix * factor).nan_to_num_(0, 0, 0).round_().to(torch.int8)
        self._absmax[rows] = absmax

    def close(self) -> None:
        pass


class Dense(Held):
    """Not quantised.

    Tensors:
        values: (G, rows, cols) in `dtype`.
    """

    values: Tensor

    def __init__(self, count: int, rows: int, cols: int, dtype: torch.dtype, device: Any = None):
        super().__init__(count, rows, cols)
        self._hold("values", (count, rows, cols), dtype, device)

    def writer(self, slot: int, quantizer: four_bit.Quantizer | None = None) -> Writer:
        return DenseWriter(self.values.data[slot])

    def dequantize(self, start: int, out: Tensor) -> None:
        out.copy_(self.values[start : start + len(out)])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return nn.Module._apply(self, fn, recurse)


class DenseWriter:
    """Copies into `target`, of any shape, in its dtype."""

    def __init__(self, target: Tensor):
        self._flat = target.view(-1)
        self.step = 1 if target.is_cpu else 1 << 22  # fewer, larger copies to a device

    def put(self, start: int, values: Tensor) -> None:
        require_finite_values(values)
        self._flat[start : start + len(values)].copy_(values)

    def close(self) -> None:
        pass


class QuantizedStack(nn.Module):
    """E matrices (rows, cols), each in the format given for it.

    Args:
        formats: one of `FORMATS` for all experts, or one for each.
        double_quant: whether the scales of nf4 and fp4 are quantised too.
        dtype: of the experts in format "none".

    Attributes:
        formats: by expert.
        held: the tensors of each format, by its name.
        written: (E,) bool, which experts have been written.

    Raises:
        QuantizationError: an unknown format, or not one for each expert.
    """

    written: Tensor

    def __init__(
        self,
        experts: int,
        rows: int,
        cols: int,
        formats: str | Sequence[str] = "nf4",
        *,
        double_quant: bool = True,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
    ):
        super().__init__()
        self.experts, self.rows, self.cols, self.double_quant = experts, rows, cols, double_quant
        self.formats = (formats,) * experts if isinstance(formats, str) else tuple(formats)
        _check_formats(self.formats, experts)
        self.held = nn.ModuleDict()
        for name in sorted(set(self.formats)):
            count = self.formats.count(name)
            self.held[name] = hold(name, count, rows, cols, double_quant=double_quant, dtype=dtype, device=device)
        self._slots = [self.formats[:expert].count(name) for expert, name in enumerate(self.formats)]
        self.register_buffer("written", torch.zeros(experts, dtype=torch.bool))

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the stack before quantisation, (E, rows, cols)."""
        return self.experts, self.rows, self.cols

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def nbytes(self) -> int:
        """Bytes of all values and scales."""
        return sum(tensor.nbytes for held in self._all_held() for tensor in held.tensors.values())

    def _all_held(self) -> Iterator[Held]:
        return cast(Iterator[Held], iter(self.held.values()))

    def place(self, expert: int) -> tuple[Held, int]:
        """Where an expert lies: its format's tensors, and its slot in them."""
        return cast(Held, self.held[self.formats[expert]]), self._slots[expert]

    def writer(self, expert: int, quantizer: four_bit.Quantizer | None = None) -> Writer:
        """Takes one expert in pieces; marks it as written when closed."""
        held, slot = self.place(expert)
        return _Marking(held.writer(slot, quantizer), self.written, expert)

    def write(self, expert: int, matrix: Tensor) -> None:
        """Quantises `matrix` (rows, cols), floating point, any strides, into place `expert`.

        Raises:
            QuantizationError: another shape, no floating dtype, NaN or infinity.
        """
        if tuple(matrix.shape) != (self.rows, self.cols):
            raise QuantizationError(f"expert {expert}: got {tuple(matrix.shape)}, the stack is {self.shape}")
        if matrix.dtype not in BITS_MASK:
            raise QuantizationError(f"expert {expert}: got {matrix.dtype}; allowed: {', '.join(map(str, BITS_MASK))}")
        matrix = matrix.detach().to(self.device)
        self.written[expert] = False
        writer = self.writer(expert)
        try:
            writer.put(0, matrix.contiguous().view(-1))
            writer.close()
        except QuantizationError as error:
            raise QuantizationError(f"expert {expert}: {error}") from None

    def dequantize(self, expert: int, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """One expert's matrix (rows, cols) in `dtype`; into `out` where that is given."""
        return self.dequantize_many([expert], dtype, None if out is None else out.unsqueeze(0))[0]

    def dequantize_many(
        self, experts: Sequence[int], dtype: torch.dtype = torch.float32, out: Tensor | None = None
    ) -> Tensor:
        """The matrices of `experts`, in that order.

        Args:
            out: (G, rows, cols) in `dtype`, contiguous, written and returned. Reusing one avoids the page faults of a
                fresh one, which on a CPU can cost more than the dequantisation.

        Returns:
            (G, rows, cols) in `dtype`. What bitsandbytes dequantises to float32, bfloat16 or float16 is bit for bit the
            same here; other dtypes go through float32.
        """
        if out is None:
            out = torch.empty((len(experts), self.rows, self.cols), dtype=dtype, device=self.device)
        kernel_dtype = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
        target = out if out.dtype == kernel_dtype else torch.empty_like(out, dtype=kernel_dtype)
        for first, last in self._contiguous(experts):
            held, slot = self.place(experts[first])
            held.dequantize(slot, target[first:last])
        return out if target is out else out.copy_(target)

    def _contiguous(self, experts: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Runs [first, last) of `experts` that lie one after the other in the tensors of one format."""
        first = 0
        for i in range(1, len(experts) + 1):
            if i == len(experts) or self.place(experts[i]) != self._next(experts[i - 1]):
                yield first, i
                first = i

    def _next(self, expert: int) -> tuple[Held, int]:
        held, slot = self.place(expert)
        return held, slot + 1

    def problems(self) -> list[str]:
        """What makes the stack unfit for use: experts never written, scales that are not finite."""
        found = []
        if unwritten := (~self.written).nonzero().flatten().tolist():
            found.append(f"experts {unwritten} were never quantised")
        bad = {name: set(cast(Held, held).bad_slots()) for name, held in self.held.items()}
        if broken := [e for e, name in enumerate(self.formats) if self._slots[e] in bad[name]]:
            found.append(f"the scales of experts {broken} hold NaN or infinity")
        return found

    def extra_repr(self) -> str:
        kinds = ", ".join(f"{self.formats.count(name)} {name}" for name in self.held)
        return f"{self.experts} x {self.rows} x {self.cols}: {kinds}; double_quant={self.double_quant}"


class _Marking:
    """A writer that marks its expert as written."""

    def __init__(self, writer: Writer, written: Tensor, expert: int):
        self._writer, self._written, self._expert = writer, written, expert
        self.step = writer.step
        self.put = writer.put

    def close(self) -> None:
        self._writer.close()
        self._written[self._expert] = True


def hold(name: str, count: int, rows: int, cols: int, *, double_quant: bool, dtype: torch.dtype, device: Any) -> Held:
    """Tensors for `count` matrices in format `name`."""
    if name == "int8":
        return Int8(count, rows, cols, device)
    if name == "none":
        return Dense(count, rows, cols, dtype, device)
    return FourBit(name, count, rows, cols, double_quant, device)


def require_finite_values(values: Tensor) -> None:
    """Raises `QuantizationError` for NaN or infinity in `values`, floating point, any shape."""
    kind, mask = BITS_MASK[values.dtype]
    bits = values.view(kind) & mask
    if (bits == mask).any():
        raise QuantizationError("holds NaN or infinity")


def _require_finite(scales: Tensor) -> None:
    if not torch.isfinite(scales).all():
        raise QuantizationError("holds NaN or infinity")


def _check_formats(formats: tuple[str, ...], experts: int) -> None:
    if len(formats) != experts:
        raise QuantizationError(f"got {len(formats)} formats for {experts} experts; give one for each, or one for all")
    if unknown := sorted(set(formats) - set(FORMATS)):
        raise QuantizationError(f"unknown format {', '.join(unknown)}; known: {', '.join(FORMATS)}")
