"""Which tensor of a GGUF file gets which type: llama.cpp's own mixing rules as a table.

A file type such as Q4_K_M names a mixture: most matrices get its main type, those that matter more (attention's values,
some down projections, the output) a better one, and rows that no block fits a simpler one. The rules are those of
llama.cpp's `llama_tensor_get_type_impl` and `tensor_type_fallback` (src/llama-quant.cpp); the tests hold them against
what its quantiser really wrote. No torch at import.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from adapters.errors import ExportError

MAIN = {
    "F32": "F32",
    "F16": "F16",
    "BF16": "BF16",
    "Q8_0": "Q8_0",
    "Q6_K": "Q6_K",
    "Q5_K_M": "Q5_K",
    "Q4_K_M": "Q4_K",
    "Q4_0": "Q4_0",
    "IQ4_XS": "IQ4_XS",
    "Q3_K_M": "Q3_K",
    "Q2_K": "Q2_K",
}
"""The file types offered, and the type of most of their matrices."""

QUANTS = tuple(MAIN)
PLAIN = ("F32", "F16", "BF16")

NARROW = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
"""What takes the place of a type with blocks of 256 where rows are not a multiple of that: a type with blocks of 32."""

ATTENTION_VALUES = ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")


@dataclass(frozen=True)
class Mixture:
    """What the rules look at.

    Attributes:
        quant: the file type.
        experts: routed experts a layer, 0 for a dense model. heads_per_key: query heads that share a key head.
        layers: decoder layers.
        tied: the file has no output matrix, the embeddings are used for it.
        importance: an importance matrix is at hand.
        seventy_billion: Llama 2's or 3's 70B by its shape: 80 layers with shared key heads.
    """

    quant: str
    experts: int
    heads_per_key: int
    layers: int
    tied: bool
    importance: bool
    seventy_billion: bool = False


def tensor_types(shapes: Mapping[str, tuple[int, ...]], mixture: Mixture) -> dict[str, str]:
    """The ggml type of every tensor.

    Args:
        shapes: by GGUF name, the last dimension being the row.

    Raises:
        ExportError: an unknown file type.
    """
    if mixture.quant not in MAIN:
        raise ExportError(f"{mixture.quant!r} is no GGUF type that is written here; choose from {', '.join(QUANTS)}")
    values = [name for name in sorted(shapes, key=_order) if name.endswith(ATTENTION_VALUES)]
    downs = [name for name in sorted(shapes, key=_order) if _is_quantized(name, shapes[name]) and "ffn_down" in name]
    return {name: _type(name, shape, mixture, values, downs) for name, shape in shapes.items()}


def _order(name: str) -> tuple[int, str]:
    """llama.cpp walks through the tensors by layer, then by name; those outside the layers first."""
    return _layer(name), name


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Matrices but for routers and norms; a matrix of one row counts as a vector."""
    matrix = len(shape) > 1 and any(size > 1 for size in shape[:-1])
    return matrix and name.endswith("weight") and not name.endswith(("_norm.weight", "ffn_gate_inp.weight"))


def _type(name: str, shape: tuple[int, ...], mixture: Mixture, values: list[str], downs: list[str]) -> str:
    if not _is_quantized(name, shape):
        return "F32"
    if mixture.quant in PLAIN:
        return mixture.quant
    if name == "output.weight" or (name == "token_embd.weight" and mixture.tied):
        return _fitting(_output_type(shape[-1], mixture), shape[-1])
    kind = MAIN[mixture.quant]
    if name.endswith(ATTENTION_VALUES):
        kind = _values_type(values.index(name), len(values), kind, mixture)
    elif name.endswith("attn_k.weight") and mixture.experts == 8:
        kind = "Q8_0"
    elif "ffn_down" in name:
        kind = _down_type(_layer(name) if mixture.experts > 1 else downs.index(name), kind, mixture)
    elif name.endswith("attn_output.weight"):
        kind = _attention_output_type(kind, mixture)
    return _fitting(kind, shape[-1])


def _output_type(columns: int, mixture: Mixture) -> str:
    """The output matrix, and the embeddings that are used for it."""
    if MAIN[mixture.quant] == "Q8_0" or columns % _block(MAIN[mixture.quant]):
        return "Q8_0"
    return "Q6_K"


def _values_type(number: int, count: int, kind: str, mixture: Mixture) -> str:
    """Attention's values, the `number`-th of `count`: small and sensitive."""
    shared = mixture.heads_per_key >= 4
    if mixture.quant == "Q2_K":
        kind = "Q4_K" if shared else "Q3_K"
    elif mixture.quant == "Q3_K_M":
        kind = "Q5_K" if number < 2 else "Q4_K"
    elif mixture.quant == "IQ4_XS" and shared:
        kind = "Q5_K"
    elif mixture.quant in ("Q4_K_M", "Q5_K_M") and _gets_more_bits(number, count):
        kind = "Q6_K"
    if mixture.seventy_billion and kind in ("Q3_K", "Q4_K"):
        kind = "Q5_K"
    return "Q8_0" if mixture.experts == 8 else kind


def _down_type(layer: int, kind: str, mixture: Mixture) -> str:
    early = layer < mixture.layers // 8
    if mixture.quant == "Q2_K":
        return "Q3_K"
    if mixture.quant == "Q3_K_M":
        return "Q5_K" if layer < mixture.layers // 16 else "Q4_K"
    if mixture.quant in ("Q4_K_M", "Q5_K_M") and _gets_more_bits(layer, mixture.layers):
        return "Q6_K"
    if mixture.quant == "IQ4_XS" and early and not mixture.importance:
        return "Q5_K"
    if mixture.quant == "Q4_0" and early and mixture.importance:
        return "Q4_1"
    return kind


def _attention_output_type(kind: str, mixture: Mixture) -> str:
    if mixture.experts == 8:
        return "Q5_K" if mixture.quant in ("Q2_K", "Q3_K_M", "Q4_K_M", "IQ4_XS") else kind
    return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K"}.get(mixture.quant, kind)


def _gets_more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth, and every third layer between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _fitting(kind: str, columns: int) -> str:
    """The type, or the one that takes its place where a row is no multiple of its block."""
    if columns % _block(kind):
        kind = NARROW.get(kind, kind)
    return "F16" if columns % _block(kind) else kind


def _block(kind: str) -> int:
    return 256 if kind in NARROW else 1 if kind in PLAIN else 32
