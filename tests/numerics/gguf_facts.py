"""What is compared of two GGUF files: metadata, and of each tensor its type, shape and the hash of its bytes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter
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


@dataclass(frozen=True)
class Deep:
    """A model by what decides about its types."""

    layers: int
    experts: int
    heads_per_key: int
    tied: bool = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        exps, stack = ("_exps", (self.experts, 8, 256)) if self.experts else ("", (8, 256))
        found: dict[str, tuple[int, ...]] = {"token_embd.weight": (8, 256), "output_norm.weight": (256,)}
        if not self.tied:
            found["output.weight"] = (8, 256)
        for layer in range(self.layers):
            found |= {f"blk.{layer}.{name}.weight": (8, 256) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
            found |= {f"blk.{layer}.ffn_{name}{exps}.weight": stack for name in ("gate", "up", "down")}
            found[f"blk.{layer}.attn_norm.weight"] = (256,)
        return found


DEEP = {
    "33 dense layers, 8 heads a key": Deep(33, 0, 8),
    "28 dense layers, tied": Deep(28, 0, 2, tied=True),
    "80 dense layers, 8 heads a key": Deep(80, 0, 8),
    "32 layers of 8 experts": Deep(32, 8, 4),
    "48 layers of 4 experts": Deep(48, 4, 5),
}


def write_deep(file: Path, deep: Deep) -> None:
    """An architecture llama of these tensors, all zeros."""
    writer = GGUFWriter(file, "llama")
    for method, value in (
        ("block_count", deep.layers),
        ("context_length", 64),
        ("embedding_length", 2560),
        ("feed_forward_length", 256),
        ("head_count", 40),
        ("head_count_kv", 40 // deep.heads_per_key),
        ("layer_norm_rms_eps", 1e-5),
        ("rope_dimension_count", 64),
        *((("expert_count", deep.experts), ("expert_used_count", 2)) if deep.experts else ()),
    ):
        getattr(writer, f"add_{method}")(value)
    for name, shape in deep.shapes().items():
        writer.add_tensor(name, np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def counted(types_by_name: str) -> list[Any]:
    """How often each type comes, and a hash of them all in the order of the names."""
    found = types_by_name.split(" ")
    return [{kind: found.count(kind) for kind in sorted(set(found))}, _hash(types_by_name.encode())]


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
