"""The form "gguf-lora": one GGUF file that llama.cpp lays over a GGUF of the base (`llama-server -m BASE --lora LORA`).

llama.cpp (`src/llama-adapter.cpp`, `src/llama-graph.cpp`: build_lora_mm, build_lora_mm_id) takes of each weight
`NAME.lora_a`, (r, in) or (E, r, in), and `NAME.lora_b`, (out, r) or (E, out, r), and multiplies by alpha / r, or by
nothing where alpha is 0. The scale is in lora_b here and alpha is 0, so ranks may differ from weight to weight.

Rows lie as in the base's GGUF: gate and up apart, Llama's queries and keys with the halves of each head interleaved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
from gguf import GGUFWriter
from gguf.constants import Keys, LlamaFileType
from torch import Tensor

from adapters.adapter_files import PREFIX
from adapters.checkpoint import text_config
from adapters.errors import AdapterFileError, ExportError, listed
from adapters.export import Options, Progress, Source, file_stem
from adapters.export.gguf_tensors import STACKS, Architecture, architecture_of
from adapters.factors import Factors, Part, expert_count, halves, opened, parts_of
from adapters.fingerprint import fingerprint
from adapters.layouts import LAYER, ExpertLayout
from adapters.merge import check_room
from adapters.merged import MergedWeights
from adapters.sidecar import Sidecar, read_sidecar, write_sidecar

DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16)}

LEFT_OUT = {
    "deepseek2": (
        "self_attn.q_proj",
        "self_attn.q_a_proj",
        "self_attn.q_b_proj",
        "self_attn.kv_a_proj_with_mqa",
        "self_attn.kv_b_proj",
    ),
}
"""Matrices that llama.cpp multiplies without looking for a LoRA (`src/models/deepseek2.cpp`): it would load the file
and leave them out, saying nothing."""


@dataclass(frozen=True)
class Tensors:
    """Both factors of one weight of the GGUF file: made of a part's (A, B)."""

    weight: str
    part: Part
    rows: int
    take: Callable[[Tensor], Tensor]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        lead = (len(self.part.ranks),) if self.part.stacked else ()
        return {
            f"{self.weight}.lora_a": (*lead, self.part.rank, self.part.inputs),
            f"{self.weight}.lora_b": (*lead, self.rows, self.part.rank),
        }

    def made(self, factors: Factors) -> tuple[Tensor, Tensor]:
        a, b = factors[0], self.take(factors[1])
        return (a, b) if self.part.stacked else (a[0], b[0])


def write_gguf_lora(
    source: Source, directory: Path, options: Options, progress: Progress | None = None
) -> dict[str, Any]:
    """The format "gguf-lora": NAME-lora.gguf and the sidecar.

    Args:
        options: `dtype` float32 (the default) or float16.

    Returns:
        {"file", "tensors", "parameters", "bytes", "rank", "architecture"}.

    Raises:
        ExportError: llama.cpp does not run the family, or would leave out a part of the adapter.
        AdapterFileError: there is no adapter, or a value of it is not finite.
    """
    dtype = DTYPES.get(options.dtype or "float32")
    if dtype is None:
        raise ExportError(f"dtype {options.dtype!r}: a GGUF LoRA is written as {', '.join(DTYPES)}")
    merged = source.open()
    adapter = opened(merged)
    architecture = architecture_of(text_config(merged.config), merged.layout.model_type)
    tensors = planned(parts_of(adapter), merged, architecture)
    name = source.public_base
    file = directory / f"{file_stem(source.name)}-lora.gguf"
    parameters = sum(int(np.prod(shape)) for one in tensors for shape in one.shapes().values())
    check_room(directory, parameters * dtype.itemsize)
    writer = GGUFWriter(file, architecture.name)
    _add_metadata(writer, source.name, name, dtype)
    _write(writer, tensors, dtype, progress)
    write_sidecar(directory, _sidecar(source, merged, name))
    return {
        "file": file.name,
        "tensors": 2 * len(tensors),
        "parameters": parameters,
        "bytes": file.stat().st_size,
        "rank": max(one.part.rank for one in tensors),
        "architecture": architecture.name,
    }


def planned(parts: Sequence[Part], merged: MergedWeights, architecture: Architecture) -> list[Tensors]:
    """What each part becomes.

    Raises:
        ExportError: llama.cpp has no name for a tensor, or leaves its LoRA out; all of them are listed.
    """
    config = text_config(merged.config)
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    found: list[Tensors] = []
    problems: list[str] = []
    for part in sorted(parts, key=lambda part: part.name):
        if part.stacked:
            found += _experts(part, merged.layout)
            continue
        weight = names.get_name(part.name, try_suffixes=(".weight",))
        if weight is None or part.name.removesuffix(".weight").endswith(LEFT_OUT.get(architecture.name, ())):
            problems.append(part.name)
            continue
        found.append(Tensors(weight, part, part.outputs, _order(part.name, config, architecture)))
    if problems:
        title = f"llama.cpp takes no LoRA of these matrices of {architecture.name}, and would leave them out unsaid"
        raise ExportError(listed(f"{title}; export the merged model instead (format gguf)", problems, most=5))
    return found


def _experts(part: Part, layout: ExpertLayout) -> list[Tensors]:
    layer, kinds = LAYER.findall(part.name)[-1], STACKS[part.name.rpartition(".")[2]]
    if len(kinds) == 1:
        return [Tensors(f"blk.{layer}.{kinds[0]}.weight", part, part.outputs, lambda b: b)]
    return [
        Tensors(f"blk.{layer}.{kind}.weight", part, part.outputs // 2, partial(_half, number=number, layout=layout))
        for number, kind in enumerate(kinds)
    ]


def _half(b: Tensor, number: int, layout: ExpertLayout) -> Tensor:
    return halves(b, layout)[number]


def _order(name: str, config: Mapping[str, Any], architecture: Architecture) -> Callable[[Tensor], Tensor]:
    """What happens to the rows of B (1, out, r): as to the rows of the base's matrix."""
    heads = config["num_attention_heads"]
    if architecture.permuted and name.endswith(".k_proj.weight"):
        heads = config.get("num_key_value_heads") or heads
    elif not (architecture.permuted and name.endswith(".q_proj.weight")):
        return lambda b: b
    return lambda b: b.view(heads, 2, b.shape[1] // heads // 2, -1).transpose(1, 2).reshape(b.shape)


def _add_metadata(writer: GGUFWriter, name: str, base_name: str, dtype: np.dtype[Any]) -> None:
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, 0.0)
    writer.add_name(name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base_name)
    writer.add_file_type(LlamaFileType.ALL_F32 if dtype == np.float32 else LlamaFileType.MOSTLY_F16)


def _write(writer: GGUFWriter, tensors: Sequence[Tensors], dtype: np.dtype[Any], progress: Progress | None) -> None:
    """The header, then factor by factor: one part's are in memory at a time."""
    shapes = {name: shape for one in tensors for name, shape in one.shapes().items()}
    for name, shape in shapes.items():
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
    total, done = sum(int(np.prod(shape)) for shape in shapes.values()) * dtype.itemsize, 0
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    held: dict[str, Factors] = {}
    for one in tensors:
        if one.part.name not in held:
            held = {one.part.name: one.part.at_rank(one.part.rank)}
        for tensor in one.made(held[one.part.name]):
            values = tensor.contiguous().numpy().astype(dtype)
            if not np.isfinite(values).all():
                raise AdapterFileError(f"{PREFIX}{one.part.name} would hold NaN or infinity as {dtype}")
            writer.write_tensor_data(values)
            done += values.nbytes
            if progress:
                progress(done, total)
    writer.close()


def _sidecar(source: Source, merged: MergedWeights, base_name: str) -> Sidecar:
    before = read_sidecar(source.adapter) if source.adapter else None
    return Sidecar(
        format="gguf-lora",
        base_name=base_name,
        base=fingerprint(source.base),
        held=before.held_elsewhere if before else None,
        peft_version=peft.__version__,
        model_type=merged.layout.model_type,
        experts={
            "count": expert_count(merged),
            "orientation": "lora_a (r, in), lora_b (out, r) of each expert",
            "packing": "lora_a (E, r, in), lora_b (E, out, r); gate and up apart; the scale in lora_b, alpha 0",
        },
        made_for=("llama.cpp",),
    )
