"""About how many bytes an export takes, from the headers of the base's files alone. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from adapters.checkpoint import DTYPE_BYTES, TensorInfo
from adapters.export import Format, Options

GGUF_BITS = {
    "F32": 32.0,
    "F16": 16.0,
    "BF16": 16.0,
    "Q8_0": 8.5,
    "Q6_K": 6.57,
    "Q5_K_M": 5.7,
    "Q4_K_M": 4.9,
    "Q4_0": 4.6,
    "IQ4_XS": 4.4,
    "Q3_K_M": 4.0,
    "Q2_K": 3.2,
}
"""Bits a weight over a whole model: a type keeps some tensors in a finer one."""

QUANTIZED_BYTES = {"bnb-4bit": 0.5625, "fp8": 1.0}
"""A weight in a matrix; embeddings and the output head stay as they are."""

WHOLE = ("embed", "lm_head", "wte")


def format_bytes(
    form: Format, options: Options, base: Path, adapter: Path | None, index: Mapping[str, TensorInfo]
) -> int:
    """About the bytes of the weights in this format.

    Args:
        index: of the base.
    """
    if form.kind == "adapter":
        return sum(file.stat().st_size for file in adapter.glob("*.safetensors")) if adapter else 0
    if form.name == "gguf":
        return round(GGUF_BITS[options.quant or "F16"] / 8 * sum(info.parameters for info in index.values()))
    return round(sum(_size(name, info, form.name, options) for name, info in index.items()))


def _size(name: str, info: TensorInfo, form: str, options: Options) -> float:
    if form in QUANTIZED_BYTES and len(info.shape) > 1 and not any(word in name for word in WHOLE):
        return QUANTIZED_BYTES[form] * info.parameters
    if options.dtype and form == "safetensors":
        return {"float32": 4, "bfloat16": 2, "float16": 2}[options.dtype] * math.prod(info.shape)
    return DTYPE_BYTES[info.dtype] * math.prod(info.shape)
