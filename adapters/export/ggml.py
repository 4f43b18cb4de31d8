"""ggml's own quantiser, called in this process: float32 rows in, the bytes of a GGUF tensor out. It aborts where
something is wrong in it: exports call it in a child (`adapters.export.gguf_child`).

The functions are C, exported by the shared library inside xllamacpp; they hold no state but tables made once, and
ctypes lets go of the interpreter while they run, so several threads quantise at a time.
"""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from typing import Any

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from adapters.errors import ExportError
from adapters.verify.llama_cpp import llama_cpp_library

LARGEST_HALF = 65504.0
"""The largest float16."""


@cache
def _library() -> Any:
    library = ctypes.CDLL(str(llama_cpp_library()))
    library.ggml_quantize_chunk.restype = c_size_t
    library.ggml_quantize_chunk.argtypes = [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]
    library.ggml_validate_row_data.restype = c_bool
    library.ggml_validate_row_data.argtypes = [c_int, c_void_p, c_size_t]
    library.ggml_row_size.restype = c_size_t
    library.ggml_row_size.argtypes = [c_int, c_int64]
    return library


def prepare(kind: str) -> None:
    """Makes the tables of a type, before threads share them.

    Raises:
        ExportError: xllamacpp is not installed, or knows another size of the type than the package gguf does.
    """
    number = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[number]
    _library().ggml_quantize_init(c_int(number))
    if (found := _library().ggml_row_size(number, block)) != size:
        raise ExportError(f"xllamacpp has {found} bytes in a block of {kind}, the package gguf {size}; reinstall both")


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of one row; `columns` is a multiple of the type's block."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return columns // block * size


def block_of(kind: str) -> int:
    """How many values of a row are quantised together."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]


def quantize(rows: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """The rows' bytes as ggml lays them out.

    Args:
        rows: (n, columns) float32, contiguous, finite.
        kind: a ggml type, e.g. "Q4_K", "F16"; `prepare` was called for it.
        importance: (columns,) float32, how much an error in each column matters; not all types take it.

    Raises:
        ExportError: the quantiser made bytes that ggml itself refuses, or float16 cannot hold a value.
    """
    number, (count, columns) = GGMLQuantizationType[kind], rows.shape
    if kind == "F16" and float(rows.abs().max()) > LARGEST_HALF:
        raise ExportError(f"{float(rows.abs().max()):.6g} is beyond float16 ({LARGEST_HALF:.0f}); choose BF16 or Q8_0")
    out = torch.empty(count * row_bytes(kind, columns), dtype=torch.uint8)
    weights = importance.data_ptr() if importance is not None else None
    _library().ggml_quantize_chunk(number, rows.data_ptr(), out.data_ptr(), 0, count, columns, weights)
    if not _library().ggml_validate_row_data(number, out.data_ptr(), out.numel()):
        raise ExportError(f"the quantised rows ({kind}) hold NaN or infinity")
    return out
