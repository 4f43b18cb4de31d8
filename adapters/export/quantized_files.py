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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.checkpoint import TensorInfo, read_index, read_json_object
from adapters.errors import ExportError
from adapters.export import Options, Progress, Source
from adapters.journal import file_sha256
from adapters.layouts import QUANTIZED_CLASSES
from adapters.merge import INDEX, check_room, copy_rest, own_shards
from adapters.merged import MergedWeights
from adapters.merging import compute, pieces
from adapters.tensor_files import DTYPES, read_tensor, spec_bytes, write_pieces, write_tensors
from adapters.verify import Check, Evidence
from adapters.verify.behaviour import LIMITS
from adapters.verify.model_files import check_config, check_in_transformers, check_whole
from adapters.verify.tokenizer import check_tokenizer
from adapters.verify.weights import Rounding, audit

Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]
CONFIG_KEY = "quantization_config"
NAMED = "weights: names, shapes and dtypes"


class Encoding(ABC):
    """One format for one model.

    Attributes:
        title: for messages.
        rounding: how far a quantised matrix may lie from base + adapter. limits: a name in `LIMITS`.
    """

    title: str
    rounding: Rounding
    limits: str

    def __init__(self, merged: MergedWeights):
        self.merged = merged

    @abstractmethod
    def parts(self, key: str) -> Specs:
        """The tensors that a quantised tensor of the base becomes, in order."""

    @abstractmethod
    def encode(self, key: str) -> Iterator[Tensor]:
        """Their values, in the same order."""

    @abstractmethod
    def decode(self, directory: Path, index: Mapping[str, TensorInfo], key: str, expert: int | None) -> Tensor:
        """One matrix of the base's tensor `key`, float32, from the files."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The quantization_config."""

    def quantizes(self, key: str) -> bool:
        """Whether the tensor is quantised: a matrix of a linear layer or a stack, not the router, not the head."""
        layout, info = self.merged.layout, self.merged.index[key]
        if len(info.shape) < 2 or layout.model_key(key) is None or info.dtype not in ("F32", "F16", "BF16"):
            return False
        return layout.tensor_class(key) in QUANTIZED_CLASSES and layout.takes_lora(key)

    def left(self) -> list[str]:
        """Modules with a matrix that is not quantised, by their names in the files and in the model."""
        names = set()
        for key, info in self.merged.index.items():
            if len(info.shape) == 2 and key.endswith(".weight") and not self.quantizes(key):
                names |= {name.removesuffix(".weight") for name in (key, self.merged.layout.model_key(key) or key)}
        return sorted(names)

    def specs(self, key: str) -> Specs:
        info = self.merged.index[key]
        return self.parts(key) if self.quantizes(key) else {key: (DTYPES[info.dtype], info.shape)}

    def tensors(self, key: str) -> Iterator[Tensor]:
        if self.quantizes(key):
            yield from self.encode(key)
            return
        for piece in pieces(self.merged, [key]):
            yield compute(self.merged, piece, DTYPES[self.merged.index[key].dtype])[0]


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
    copy_rest(merged.base, directory)
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
    whole = check_whole(directory)
    if whole.status == "failed":
        return [whole]
    index, merged = read_index(directory), encoding.merged
    named = _check_names(encoding, index)
    checks = [whole, named, check_config(directory, source.base, allowed=(CONFIG_KEY,))]
    if named.status == "passed":

        def read(key: str, expert: int | None) -> Tensor:
            if encoding.quantizes(key):
                return encoding.decode(directory, index, key, expert)
            return read_tensor(index[key], expert)

        checks += audit(source, read, lambda key: encoding.rounding if encoding.quantizes(key) else None)
    checks += check_tokenizer(directory, source.base)
    limits = LIMITS[encoding.limits]
    if stock or evidence.logits is None or named.status == "failed":
        return [*checks, *check_in_transformers(directory, source, evidence, limits)]
    with tempfile.TemporaryDirectory(prefix="studio-values-") as folder:
        values = Path(folder)
        _write_values(merged, read, values)
        return [*checks, *check_in_transformers(values, source, evidence, limits)]


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


def _write_values(merged: MergedWeights, read: Any, directory: Path) -> None:
    """A plain model of what was read back, in float32."""
    dtypes = {key: DTYPES[info.dtype] for key, info in merged.index.items()}
    floats = {key: torch.float32 if dtype.is_floating_point else dtype for key, dtype in dtypes.items()}
    specs = {key: (floats[key], info.shape) for key, info in merged.index.items()}

    def produce(key: str) -> Tensor:
        info = merged.index[key]
        if len(info.shape) == 3:
            return torch.stack([read(key, expert) for expert in range(info.shape[0])])
        return read(key, None)

    write_tensors(directory / "model.safetensors", specs, produce)
    copy_rest(merged.base, directory)
    shutil.copyfile(merged.base / "config.json", directory / "config.json")
