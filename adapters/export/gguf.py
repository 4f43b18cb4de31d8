"""Base + adapter → one GGUF file that llama.cpp, Ollama and LM Studio run.

Everything is known before the first byte: names, shapes and types, and with them each tensor's place in the file. Then
the base is read piece by piece, merged in float32, and its rows go straight into ggml's quantiser and to their place.
What stands in memory is one matrix (one expert of a stack, one band of the embeddings), whatever the model's size.
"""

from __future__ import annotations

import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import LlamaFileType
from torch import Tensor

from adapters.errors import CheckpointError, ExportError
from adapters.export import Options, Progress, Source, file_stem
from adapters.export.ggml import prepare, quantize, row_bytes
from adapters.export.gguf_metadata import add_metadata, full_config
from adapters.export.gguf_tensors import Part, Piece, Plan, plan_tensors
from adapters.export.gguf_tokenizer import read_vocabulary
from adapters.export.gguf_types import Mixture, tensor_types
from adapters.export.importance import importance_for

DEFAULT_QUANT = "Q4_K_M"
CHUNK_VALUES = 2**20
"""Values that one call of the quantiser gets: 4 MB of float32."""
THREADS = min(2, os.cpu_count() or 1)


def make_gguf(source: Source, directory: Path, options: Options, progress: Progress | None = None) -> dict[str, Any]:
    """Writes `NAME-QUANT.gguf` into the empty `directory`, in this process, which an abort of ggml's would end.

    Exports go through `adapters.export.gguf_child`.

    Args:
        options: `quant` (a name in `gguf_types.QUANTS`) and `importance` (an importance matrix, or examples).
        progress: called with bytes of the base.

    Returns:
        {"file", "quant", "bytes", "architecture", "tensors", "types" {type: tensors of it}, "importance"}.

    Raises:
        ExportError: llama.cpp cannot run this model or tokenizer, a tool is missing, or the disk is too small.
        CheckpointError: a merged value is not finite.
    """
    weights, quant = source.open(), options.quant or DEFAULT_QUANT
    plan, config = plan_tensors(weights), full_config(source.base)
    vocabulary = read_vocabulary(source.base, config, source.adapter)
    types = tensor_types(plan.tensors, mixture_of(config, plan, quant, options.importance is not None))
    for kind in set(types.values()):
        prepare(kind)
    importance = importance_for(options.importance, source, plan.tensors) if options.importance else {}
    file = directory / f"{file_stem(source.name)}-{quant}.gguf"
    writer = _listing(file, plan, types)
    add_metadata(writer, source.base, config, weights.layout, source.name)
    writer.add_file_type(LlamaFileType["ALL_F32" if quant == "F32" else f"MOSTLY_{quant}"])
    vocabulary.write(writer)
    places = _write_header(writer, file)
    _Filler(file, plan, types, places, importance).run(progress)
    return {
        "file": file.name,
        "quant": quant,
        "bytes": file.stat().st_size,
        "architecture": plan.architecture.name,
        "tensors": len(types),
        "types": {kind: list(types.values()).count(kind) for kind in sorted(set(types.values()))},
        "importance": bool(importance),
    }


def _listing(file: Path, plan: Plan, types: dict[str, str]) -> GGUFWriter:
    """A writer that knows every tensor's shape, type and size, and has none of their values."""
    writer = GGUFWriter(file, plan.architecture.name)
    for name, shape in plan.tensors.items():
        size = math.prod(shape[:-1]) * row_bytes(types[name], shape[-1])
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=GGMLQuantizationType[types[name]])
    return writer


def mixture_of(config: dict[str, Any], plan: Plan, quant: str, importance: bool) -> Mixture:
    """What decides about the types of this model's tensors."""
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    shared = heads // (1 if "kv_lora_rank" in config else config.get("num_key_value_heads") or heads)
    stacks = [shape[0] for name, shape in plan.tensors.items() if "ffn_gate_exps.weight" in name]
    return Mixture(
        quant=quant,
        experts=max(stacks, default=0),
        heads_per_key=shared,
        layers=layers,
        tied="output.weight" not in plan.tensors,
        importance=importance,
        seventy_billion=plan.architecture.name == "llama" and layers == 80 and shared > 1,
    )


def _write_header(writer: GGUFWriter, file: Path) -> dict[str, int]:
    """Writes all but the tensors' bytes, and makes the file as long as it will be; where each tensor starts."""
    places, end = {}, 0
    for name, info in writer.tensors[0].items():
        places[name] = end
        end += GGUFWriter.ggml_pad(info.nbytes, writer.data_alignment)
    if (free := shutil.disk_usage(file.parent).free) < end:
        raise ExportError(f"{file.name} takes {end:,} bytes, the disk has {free:,} left; free some or choose another")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = GGUFWriter.ggml_pad(file.stat().st_size, writer.data_alignment)
    with file.open("r+b") as opened:
        opened.truncate(start + end)
    return {name: start + place for name, place in places.items()}


class _Filler:
    """Fills the tensors of a file whose header is written."""

    def __init__(
        self, file: Path, plan: Plan, types: dict[str, str], places: dict[str, int], importance: dict[str, Tensor]
    ):
        self.file, self.plan, self.types, self.places, self.importance = file, plan, types, places, importance

    def run(self, progress: Progress | None) -> None:
        total, done = sum(piece.size_bytes for piece in self.plan.pieces), 0
        self.descriptor = os.open(self.file, os.O_WRONLY)
        try:
            with ThreadPoolExecutor(THREADS) as self.pool:
                for piece in self.plan.pieces:
                    self._fill(piece)
                    done += piece.size_bytes
                    if progress:
                        progress(done, total)
            os.fsync(self.descriptor)
        finally:
            os.close(self.descriptor)

    def _fill(self, piece: Piece) -> None:
        values = piece.read()
        if not all(map(math.isfinite, map(float, torch.aminmax(values)))):
            raise CheckpointError(self.file.name, [f"{piece.parts[0].tensor} would hold NaN or infinity"])
        for part in piece.parts:
            rows = part.take(values)
            step = max(1, CHUNK_VALUES // rows.shape[1])
            firsts = range(0, rows.shape[0], step)
            list(
                self.pool.map(lambda first, p=part, r=rows, s=step: self._write(p, first, r[first : first + s]), firsts)
            )

    def _write(self, part: Part, first: int, rows: Tensor) -> None:
        """Rows `first` and after of the part. An importance matrix has one row for each matrix of a stack."""
        shape, kind = self.plan.tensors[part.tensor], self.types[part.tensor]
        place = self.places[part.tensor] + (part.first + first) * row_bytes(kind, shape[-1])
        values = rows.float().contiguous()
        for start, stop, matrix in _by_matrix(part.first + first, len(values), shape):
            given = self.importance.get(part.tensor)
            made = quantize(values[start:stop], kind, None if given is None else given[matrix])
            _pwrite(self.descriptor, made, place + start * row_bytes(kind, shape[-1]))


def _by_matrix(first: int, count: int, shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(start, stop, number of the matrix) of the runs of `count` rows from `first` on that lie in one matrix each."""
    per_matrix = shape[-2] if len(shape) > 1 else 1
    edges = [0, *range(per_matrix - first % per_matrix, count, per_matrix), count]
    return [(a, b, (first + a) // per_matrix) for a, b in pairwise(edges)]


def _pwrite(descriptor: int, data: Tensor, place: int) -> None:
    view = data.numpy().data
    while len(view):
        written = os.pwrite(descriptor, view, place)
        view, place = view[written:], place + written


def gguf_file(directory: Path) -> Path:
    """The one GGUF file of an export.

    Raises:
        ExportError: there is none, or more than one.
    """
    found = sorted(directory.glob("*.gguf"))
    if len(found) != 1:
        raise ExportError(f"{directory} should hold one GGUF file, it holds {len(found)}")
    return found[0]
