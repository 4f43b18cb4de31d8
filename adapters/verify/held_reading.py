"""A base as training held it, a second time: what an audit compares a merge into quantised weights with.

Quantised by bitsandbytes itself; dequantised here in the simplest way, by looking codes up: no code is shared with
`adapters.held`, `adapters.quantized` and `adapters.four_bit`, which the merge goes through.

    4 bit   value i of the matrix laid out flat = code[nibble i] · scale[i // 64]      (arXiv 2305.14314, section 3)
            double quantisation: scale j = dynamic code[byte j] · scale of scales[j // 256] + their mean
    int8    value = integer · the row's largest / 127                                  (arXiv 2208.07339, section 2.1)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from adapters.checkpoint import read_config, read_index
from adapters.layouts import PROJECTIONS, QUANTIZED_CLASSES, layout_for, moe_shapes
from adapters.layouts import Source as Place
from adapters.tensor_files import read_tensor

BLOCK, SCALES_BLOCK = 64, 256
OF_127 = 7.874015718698502e-3
"""1 / 127 as bitsandbytes has it (int8_vectorwise_dequant)."""


class HeldReading:
    """Values of a base as they were held.

    Args:
        held: {"quantization", "int8_experts", "double_quant", "dtype"}.
    """

    def __init__(self, base: Path, held: Mapping[str, Any]):
        self.index, config = read_index(base), read_config(base)
        self.layout = layout_for(config, self.index)
        self.kind, self.int8 = str(held["quantization"]), frozenset(held.get("int8_experts") or ())
        self.double = bool(held.get("double_quant", True))
        self.dtype = getattr(torch, held.get("dtype") or "float32")
        self.experts: dict[str, tuple[int, tuple[Place, ...]]] = {}
        self.last: dict[str, Tensor] = {}
        for shape in moe_shapes(self.layout, self.index, config):
            for projection in PROJECTIONS:
                stack = f"model.layers.{shape.layer}.{self.layout.block}.{self.layout.experts}.{projection}"
                for expert in range(shape.experts):
                    sources = self.layout.sources(stack, expert)
                    self.experts |= {one.key: (expert, sources) for one in sources if one.expert is None}

    def __call__(self, key: str, expert: int | None) -> Tensor:
        """One matrix of the base's files, float32 where it was held quantised."""
        if key not in self.experts:
            values = read_tensor(self.index[key], expert)
            return self._held(values, self._kind(key, expert)) if self._quantized(key) else values
        if not self._quantized(key):
            return read_tensor(self.index[key])
        if key not in self.last:
            self.last = self._expert(key)
        return self.last[key]

    def _expert(self, key: str) -> dict[str, Tensor]:
        """The tensors that are one matrix in the model with this one: gate and up of an expert."""
        number, sources = self.experts[key]
        parts = [read_tensor(self.index[one.key]) for one in sources]
        whole = self._held(torch.cat(parts), self._kind(key, number))
        return {one.key: part for one, part in zip(sources, whole.split([len(part) for part in parts]), strict=True)}

    def _quantized(self, key: str) -> bool:
        named = self.layout.model_key(key) is not None and self.layout.takes_lora(key)
        some = self.kind != "none" or bool(self.int8 and self.layout.tensor_class(key) == "routed_experts")
        return named and some and self.layout.tensor_class(key) in QUANTIZED_CLASSES

    def _kind(self, key: str, expert: int | None) -> str:
        return "int8" if expert is not None and expert in self.int8 else self.kind

    def _held(self, values: Tensor, kind: str) -> Tensor:
        if kind == "none":
            return values.float()
        found = by_rows(values.float()) if kind == "int8" else by_blocks(values.float(), kind, self.double)
        return found.to(self.dtype).float()


def by_blocks(matrix: Tensor, kind: str, double: bool) -> Tensor:
    """(rows, cols) float32 as nf4 or fp4 hold it."""
    packed, state = bnb.quantize_4bit(matrix.contiguous(), compress_statistics=double, quant_type=kind, blocksize=BLOCK)
    nibbles = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()[: matrix.numel()]
    scales = _scales(state) if double else state.absmax
    of_each = scales.repeat_interleave(BLOCK)[: matrix.numel()]
    return (state.code[nibbles.long()] * of_each).view(matrix.shape)


def _scales(state: Any) -> Tensor:
    """(blocks,) float32 from the scales' own bytes."""
    of_each = state.state2.absmax.repeat_interleave(SCALES_BLOCK)[: state.absmax.numel()]
    scales: Tensor = state.state2.code[state.absmax.flatten().long()] * of_each + state.offset
    return scales


def by_rows(matrix: Tensor) -> Tensor:
    """(rows, cols) float32 as int8 holds it; a row too small for a factor is zero."""
    largest = matrix.abs().amax(1, keepdim=True)
    factor = 127.0 / largest
    integers = torch.where(torch.isfinite(factor), (matrix * factor).round(), 0.0)
    return integers * largest * OF_127
