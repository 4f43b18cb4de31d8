"""Merged weights in a quantised safetensors form: what the forms have in common. One matrix is in memory at a time.

    Encoding       which tensors of the base are quantised, what their parts are called, and how they are made
    write_encoded  the base's files, in each the encoded tensors; config.json with its quantization_config; tokenizer
    check_encoded  every value read back by the format's own reader and held against base + adapter

The quantiser gets the merged values in float32: there is no stop in 16 bit on the way.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.checkpoint import TensorInfo, read_index, read_json_object
from adapters.errors import ExportError
from adapters.export import Options, Progress, Source
from adapters.fingerprint import file_sha256
from adapters.layouts import QUANTIZED_CLASSES
from adapters.merge import INDEX, check_room, copy_rest, own_shards
from adapters.merged import MergedWeights
from adapters.merging import compute, pieces
from adapters.tensor_files import DTYPES, spec_bytes, write_pieces, write_tensors
from adapters.verify import Check, Evidence
from adapters.verify.behaviour import LIMITS, behaviour_not_run
from adapters.verify.memory import why_no_room
from adapters.verify.model_files import check_config, check_in_transformers, check_whole
from adapters.verify.tokenizer import check_tokenizer
from adapters.verify.weights import Rounding, audit

Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]
CONFIG_KEY = "quantization_config"
NAMED = "weights: names, shapes and dtypes"


@dataclass(frozen=True)
class Matrix:
    """One matrix (out, in) as it is written.

    Attributes:
        name: of its module in the files.
        key: of the base's tensor that it comes from. expert: in a stack.
        half, halves: its place among the equal runs of rows that the expert's matrix is written as.
    """

    name: str
    key: str
    shape: tuple[int, int]
    expert: int | None = None
    half: int = 0
    halves: int = 1


class Encoding(ABC):
    """One format for one model.

    Attributes:
        title: for messages.
        rounding: how far a quantised matrix may lie from base + adapter. limits: a name in `LIMITS`.
        split: families whose stacks are written as one matrix for each part of each expert, `experts.{e}.gate_proj`.
    """

    title: str
    rounding: Rounding
    limits: str
    split: tuple[str, ...] = ()

    def __init__(self, merged: MergedWeights):
        self.merged = merged

    @abstractmethod
    def parts(self, matrix: Matrix) -> Specs:
        """The tensors that a matrix becomes, in order."""

    @abstractmethod
    def encode(self, matrix: Matrix, values: Tensor) -> Iterator[Tensor]:
        """Theirs, in the same order, of `values` (out, in) float32."""

    @abstractmethod
    def read_back(self, index: Mapping[str, TensorInfo], key: str, expert: int | None) -> Tensor:
        """One matrix of the base's tensor `key` from the files, in the base's axis order, as the consumer reads it.

        Raises:
            ExportError: the consumer does not find it.
        """

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The quantization_config."""

    def quantizes(self, key: str) -> bool:
        """Whether the tensor is quantised: a matrix of a linear layer or a stack, not the router, not the head."""
        layout, info = self.merged.layout, self.merged.index[key]
        if layout.model_key(key) is None or info.dtype not in ("F32", "F16", "BF16"):
            return False
        if len(info.shape) == 3 and layout.model_type not in self.split:
            return False
        return len(info.shape) > 1 and layout.tensor_class(key) in QUANTIZED_CLASSES and layout.takes_lora(key)

    def matrices(self, key: str) -> list[Matrix]:
        """What a quantised tensor of the base is written as."""
        shape = self.merged.index[key].shape
        if len(shape) == 2:
            return [Matrix(key.removesuffix(".weight"), key, (shape[0], shape[1]))]
        inputs, outputs = shape[1:] if self.merged.layout.stack_order == "in_out" else (shape[2], shape[1])
        prefix, _, projection = key.rpartition(".")
        gate, up, down = self.merged.layout.parts
        names = (gate, up) if projection == "gate_up_proj" else (down,)
        size = outputs // len(names), inputs
        return [
            Matrix(f"{prefix}.{expert}.{name}", key, size, expert, half, len(names))
            for expert in range(shape[0])
            for half, name in enumerate(names)
        ]

    def left(self) -> list[str]:
        """Modules with a matrix that is not quantised, by their names in the files and in the model."""
        plain = {key: info for key, info in self.merged.index.items() if not self.quantizes(key)}
        names = {
            key.removesuffix(".weight") for key, i in plain.items() if len(i.shape) == 2 and key.endswith(".weight")
        }
        for key in filter(self.quantizes, self.merged.index):
            names |= {matrix.name for matrix in self.matrices(key) if len(self.parts(matrix)) == 1}
        in_model = {self.merged.layout.model_key(f"{name}.weight") or name for name in names}
        return sorted(names | {name.removesuffix(".weight") for name in in_model})

    def specs(self, key: str) -> Specs:
        """The tensors in the files that the base's tensor `key` becomes."""
        info = self.merged.index[key]
        if not self.quantizes(key):
            return {key: (DTYPES[info.dtype], info.shape)}
        return {name: spec for matrix in self.matrices(key) for name, spec in self.parts(matrix).items()}

    def tensors(self, key: str) -> Iterator[Tensor]:
        """Theirs, in the same order, in pieces."""
        if not self.quantizes(key):
            for piece in pieces(self.merged, [key]):
                yield compute(self.merged, piece, DTYPES[self.merged.index[key].dtype])[0]
            return
        values = torch.empty(0)
        for matrix in self.matrices(key):
            if matrix.half == 0:
                values = self.merged.read(key, matrix.expert).float()
                if matrix.expert is not None and self.merged.layout.stack_order == "in_out":
                    values = values.t()
            yield from self.encode(matrix, values.chunk(matrix.halves)[matrix.half].contiguous())

    def declared(self, directory: Path, index: Mapping[str, TensorInfo]) -> list[Check]:
        """Whether config.json says of the files what is so; nothing where the consumer itself is run on them."""
        return []


def write_encoded(encoding: Encoding, directory: Path, progress: Progress | None) -> dict[str, Any]:
    """Fills `directory`; returns facts for the certificate.

    Raises:
        ExportError: nothing in the model can be quantised, or the disk has no room.
    """
    merged, shards = encoding.merged, own_shards(encoding.merged)
    quantized = [key for key in merged.index if encoding.quantizes(key)]
    if not quantized:
        raise ExportError(f"{merged.base} has no matrix that {encoding.title} holds; export it as safetensors")
    specs = {name: _all_specs(encoding, keys) for name, keys in shards.items()}
    total = sum(spec_bytes(*spec) for shard in specs.values() for spec in shard.values())
    check_room(directory, total)
    done, sha256 = 0, {}

    def counted(keys: list[str]) -> Iterator[Tensor]:
        nonlocal done
        for key in keys:
            for tensor in encoding.tensors(key):
                yield tensor
                done += tensor.nbytes
                if progress:
                    progress(done, total)

    for name, keys in shards.items():
        sha256[name] = write_pieces(directory / name, specs[name], counted(keys))
    _write_index(directory, specs, total)
    copy_rest(merged, directory)
    config = read_json_object(merged.base / "config.json") | {CONFIG_KEY: encoding.config()}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    sha256 |= {file.name: file_sha256(file) for file in directory.iterdir() if file.name not in sha256}
    counts = {"tensors": len(merged.index), "changed": len(merged.changed), "quantized": len(quantized)}
    return {**counts, "bytes": total, "files": len(shards), "sha256": sha256, "not_quantized": encoding.left()}


def _all_specs(encoding: Encoding, keys: Iterable[str]) -> Specs:
    return {part: spec for key in keys for part, spec in encoding.specs(key).items()}


def _write_index(directory: Path, specs: Mapping[str, Specs], total: int) -> None:
    if len(specs) > 1 or "model.safetensors" not in specs:
        weight_map = {part: name for name, shard in specs.items() for part in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def check_encoded(
    encoding: Encoding, directory: Path, source: Source, evidence: Evidence, options: Options, stock: bool
) -> list[Check]:
    """The checks of a quantised form.

    Args:
        stock: stock transformers of this machine reads the form; else it is given the values read back.
    """
    checks = check_values(encoding, directory, source)
    if any(check.status == "failed" for check in checks):
        return checks
    checks += [check_config(directory, source.base, allowed=(CONFIG_KEY,)), *check_tokenizer(directory, source)]
    limits = LIMITS[encoding.limits]
    if stock or evidence.logits is None:
        return [*checks, *check_in_transformers(directory, source, evidence, limits)]
    with tempfile.TemporaryDirectory(prefix="studio-values-") as folder:
        parameters = sum(info.parameters for info in encoding.merged.index.values())
        if why := why_no_room(Path(folder), 4 * parameters):
            return [*checks, *behaviour_not_run(why)]
        _write_values(encoding, directory, Path(folder))
        return [*checks, *check_in_transformers(Path(folder), source, evidence, limits)]


def check_values(encoding: Encoding, directory: Path, source: Source) -> list[Check]:
    """The files whole, the names those of the form, and every value against base + adapter."""
    whole = check_whole(directory)
    if whole.status == "failed":
        return [whole]
    index = read_index(directory)
    named = _check_names(encoding, index)
    if named.status == "failed":
        return [whole, named]
    try:
        found = audit(
            source,
            lambda key, expert: encoding.read_back(index, key, expert),
            lambda key: encoding.rounding if encoding.quantizes(key) else None,
        )
    except ExportError as error:
        return [whole, replace(named, status="failed", detail=str(error))]
    return [whole, named, *encoding.declared(directory, index), *found]


def _check_names(encoding: Encoding, index: Mapping[str, TensorInfo]) -> Check:
    wanted = _all_specs(encoding, encoding.merged.index)
    problems = sorted(f"{name} is missing" for name in wanted.keys() - index.keys())
    problems += sorted(f"{name} is not of this form" for name in index.keys() - wanted.keys())
    problems += [
        f"{name} is {index[name].dtype} {index[name].shape}, expected {spec}"
        for name, spec in wanted.items()
        if name in index and (DTYPES[index[name].dtype], index[name].shape) != spec
    ]
    detail = "; ".join(problems[:8]) if problems else f"{len(wanted)} tensors as {encoding.title} has them"
    return Check(NAMED, "failed" if problems else "passed", detail, {"tensors": len(index)})


def _write_values(encoding: Encoding, source: Path, directory: Path) -> None:
    """A plain model of what is read back, in float32."""
    merged, index = encoding.merged, read_index(source)
    dtypes = {key: DTYPES[info.dtype] for key, info in merged.index.items()}
    floats = {key: torch.float32 if dtype.is_floating_point else dtype for key, dtype in dtypes.items()}
    specs = {key: (floats[key], info.shape) for key, info in merged.index.items()}

    def produce(key: str) -> Tensor:
        info = merged.index[key]
        if len(info.shape) == 3:
            return torch.stack([encoding.read_back(index, key, expert) for expert in range(info.shape[0])])
        return encoding.read_back(index, key, None)

    write_tensors(directory / "model.safetensors", specs, produce)
    copy_rest(merged, directory)
    shutil.copyfile(merged.base / "config.json", directory / "config.json")
