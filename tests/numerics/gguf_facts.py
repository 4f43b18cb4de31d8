"""What is compared of two GGUF files: metadata, and of each tensor its type, shape and the hash of its bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.constants import LlamaFileType

from tests.numerics.gguf_models import DEEPSEEK, GPT4O, LLAMA3, MODELS, QWEN2, drawn

REFERENCE = Path(__file__).with_name("gguf_reference.json")
QUANTS = {
    "F32": LlamaFileType.ALL_F32,
    **{name: LlamaFileType[f"MOSTLY_{name}"] for name in ("F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")},
    **{name: LlamaFileType[f"MOSTLY_{name}"] for name in ("IQ4_XS", "Q3_K_M", "Q2_K")},
}
WITH_IMPORTANCE = ("Q4_K_M", "IQ4_XS", "Q4_0", "Q2_K")
QUANTIZED = tuple(name for name in QUANTS if name not in ("F32", "F16", "BF16"))
NAMES = {
    LLAMA3: "smaug-bpe",
    QWEN2: "qwen2",
    GPT4O: "gpt-4o",
    DEEPSEEK: "deepseek-v3",
    "gpt2": "gpt-2",
    None: "default",
}
PRE_TOKENIZERS = {name: NAMES[model.pattern] for name, model in MODELS.items()}


def metadata(file: Path) -> dict[str, Any]:
    """Every key and value; long arrays as a hash."""
    fields = GGUFReader(file).fields
    return {key: _short(field.contents()) for key, field in fields.items() if not key.startswith("GGUF.")}


def tensors(file: Path) -> dict[str, list[Any]]:
    """{name: [shape, the row first, and the start of its bytes' sha256]}."""
    return {
        tensor.name: [[int(n) for n in tensor.shape], _hash(tensor.data.tobytes())]
        for tensor in GGUFReader(file).tensors
    }


def types(file: Path) -> list[str]:
    """The types of the tensors in the order of their names, and one hash of all their bytes."""
    found = sorted(GGUFReader(file).tensors, key=lambda tensor: tensor.name)
    hashes = "".join(_hash(tensor.data.tobytes()) for tensor in found)
    return [" ".join(tensor.tensor_type.name for tensor in found), _hash(hashes.encode())]


def _short(value: Any) -> Any:
    if isinstance(value, list) and len(value) > 20:
        return f"{len(value)} values, {_hash(repr(value).encode())}"
    return value


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def importance_of(file: Path) -> dict[str, torch.Tensor]:
    """A made-up importance matrix for every matrix of a file: (matrices, columns), exact in float32."""
    shapes = {tensor.name: [int(n) for n in tensor.shape] for tensor in GGUFReader(file).tensors}
    return {
        name: drawn(f"importance of {name}", (shape[2] if len(shape) == 3 else 1, shape[0])).abs() + 2.0**-13
        for name, shape in shapes.items()
        if len(shape) > 1 and name.endswith(".weight") and name != "token_embd.weight"
    }
