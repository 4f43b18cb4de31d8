"""Base + adapter → a plain model directory that needs neither the adapter nor this studio.

Planned first: every adapter tensor must find its base tensor and fit its shape, the base must be the one of the
training, the disk must have room, or nothing is written. Then file by file and piece by piece: read, add scale · B A in
float32, round once to the wanted dtype, hash, write; in the base's own layout. A killed merge goes on where it was.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.adapter_files import CONFIG, WEIGHTS
from adapters.chat_template import copy_template
from adapters.checkpoint import DTYPE_NAMES
from adapters.errors import ExportError, OutputExistsError
from adapters.export import Options, Progress, Source
from adapters.fingerprint import file_sha256
from adapters.journal import Journal
from adapters.merged import MergedWeights
from adapters.merging import Squares, TensorDelta, computed, pieces, tensor_delta, written_dtype
from adapters.tensor_files import new_directory, spec_bytes, thread_pool, write_pieces

INDEX = "model.safetensors.index.json"
COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
"""What goes along from the base directory: config, generation config, tokenizer, chat template."""

SPARE_BYTES = 64 * 2**20
"""Left free on the disk."""

LOST_SHARE = 0.5
"""Of a delta, lost to rounding: from here on the report warns."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        out: the directory.
        tensors, changed, experts_changed: in all; with a delta; and expert matrices that are really adapted.
        bytes, files: of the weights.
        dtype: of the weights.
        resumed: weight files that a killed merge had finished.
        sha256: of every file.
        deltas: ‖Δ‖ / ‖W‖ and the share lost to rounding of every changed tensor.
        warnings: in words.
    """

    out: Path
    tensors: int
    changed: int
    experts_changed: int
    bytes: int
    files: int
    dtype: str
    resumed: int = 0
    sha256: Mapping[str, str] = field(default_factory=dict)
    deltas: tuple[TensorDelta, ...] = ()
    warnings: tuple[str, ...] = ()


def merge_adapter(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    held: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    check: Callable[[Path], None] | None = None,
) -> MergeReport:
    """Writes the merged model to `out`, whole or not at all. Killed, the next call goes on where it was.

    Args:
        dtype: of the merged weights; None keeps each tensor's own.
        held: merge into the base as training held it, quantised; None merges into the base's own weights.
        progress: called with (bytes written, bytes in all).
        check: called with the folder before it appears under its name; what it raises leaves nothing. It may add files.

    Raises:
        AdapterFileError: the adapter does not fit the base; all misfits are listed.
        CheckpointError: the base cannot be read, or a merged tensor would not be finite in `dtype`.
        ExportError: the disk has no room.
        OutputExistsError: `out` exists.
    """
    out = Path(os.path.abspath(out))
    check_output(base, adapter, out, overwrite)
    merged = MergedWeights(base, adapter, held)
    plan = _plan(adapter, held)
    with new_directory(out, overwrite, resume=True) as directory:
        written = _Writing(merged, directory, dtype, plan).write(progress)
        report = written.report(directory)
        if check:
            check(directory)
    return replace(report, out=out)


def write_safetensors(
    source: Source, directory: Path, options: Options, progress: Progress | None = None
) -> dict[str, Any]:
    """The format "safetensors": the merged weights, config and tokenizer, in the base's own layout.

    What a killed process left in `directory` is used where it is whole and of the same source and options.
    """
    dtype = getattr(torch, options.dtype) if options.dtype else None
    plan = _plan(source.adapter, source.held)
    report = _Writing(source.open(), directory, dtype, plan).write(progress).report(directory)
    facts = {
        name: getattr(report, name) for name in ("tensors", "changed", "experts_changed", "bytes", "files", "dtype")
    }
    shown = [{"key": d.key, "relative": d.relative, "lost": d.lost} for d in report.deltas]
    return {**facts, "sha256": dict(report.sha256), "deltas": shown, "warnings": list(report.warnings)}


def _plan(adapter: Path | None, held: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a journal must agree on of the adapter."""
    files = [adapter / name for name in (WEIGHTS, CONFIG)] if adapter else []
    return {"adapter": [file_sha256(file) for file in files], "held": dict(held) if held else None}


class _Writing:
    """One merge on its way to the disk."""

    def __init__(
        self,
        merged: MergedWeights,
        directory: Path,
        dtype: torch.dtype | None,
        plan: dict[str, Any],
    ):
        self.merged, self.directory, self.dtype = merged, directory, dtype
        self.specs = {key: (written_dtype(merged, key, dtype), info.shape) for key, info in merged.index.items()}
        self.shards = own_shards(merged)
        self.total = sum(spec_bytes(*spec) for spec in self.specs.values())
        self.squares: dict[str, Squares] = {}
        self.sha256: dict[str, str] = {}
        self.done = self.resumed = 0
        sources = sorted({info.file for info in merged.index.values()})
        seen = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in sources]
        sizes = {name: [str(self.specs[key]) for key in keys] for name, keys in self.shards.items()}
        self.journal = Journal(directory, [1, plan, seen, str(dtype), sizes])

    def write(self, progress: Progress | None) -> _Writing:
        """Weights first, config last: what is not finished has no config.json."""
        kept = {name: self.journal.finished(self.directory / name) for name in self.shards}
        left = sum(spec_bytes(*self.specs[k]) for name, keys in self.shards.items() if not kept[name] for k in keys)
        check_room(self.directory, left)
        with thread_pool() as pool:
            for name, keys in self.shards.items():
                file = self.directory / name
                if (record := kept[name]) is not None:
                    self._keep(name, record, progress)
                    continue
                specs = {key: self.specs[key] for key in keys}
                cut = computed(self.merged, pieces(self.merged, keys), self.dtype, pool)
                self.sha256[name] = write_pieces(file, specs, self._counted(cut, progress))
                squares = {key: vars(self.squares[key]) for key in keys if key in self.squares}
                self.journal.add(file, self.sha256[name], {"sha256": self.sha256[name], "squares": squares})
        self._copy_rest()
        self.journal.close()
        return self

    def _keep(self, name: str, record: dict[str, Any], progress: Progress | None) -> None:
        self.resumed += 1
        self.sha256[name] = record["sha256"]
        self.squares |= {key: Squares(**found) for key, found in record["squares"].items()}
        self._report(sum(spec_bytes(*self.specs[key]) for key in self.shards[name]), progress)

    def _counted(self, stream: Iterator[tuple[Any, Tensor, Squares]], progress: Progress | None) -> Iterator[Tensor]:
        for piece, values, squares in stream:
            if piece.key in self.merged.changed:
                self.squares[piece.key] = self.squares.get(piece.key, Squares()) + squares
            yield values
            self._report(values.nbytes, progress)

    def _report(self, size: int, progress: Progress | None) -> None:
        self.done += size
        if progress:
            progress(self.done, self.total)

    def _copy_rest(self) -> None:
        """Config, tokenizer and the like as they are: the base's own text, but for a dtype that was asked for."""
        base = self.merged.base
        copy_rest(self.merged, self.directory)
        if (base / INDEX).exists() or len(self.shards) > 1:
            weight_map = {key: name for name, keys in self.shards.items() for key in keys}
            found = json.loads((base / INDEX).read_text()).get("metadata", {}) if (base / INDEX).exists() else {}
            index = {"metadata": {**found, "total_size": self.total}, "weight_map": weight_map}
            (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        _copy(base / "config.json", self.directory)
        if self.dtype is not None:
            _set_dtype(self.directory / "config.json", str(self.dtype).removeprefix("torch."))

    def report(self, out: Path) -> MergeReport:
        merged = self.merged
        names = {DTYPE_NAMES.get(info.dtype, info.dtype) for info in merged.index.values()}
        dtype = str(self.dtype).removeprefix("torch.") if self.dtype else "/".join(sorted(names))
        deltas = tuple(tensor_delta(key, self.squares[key]) for key in sorted(self.squares))
        weights = sum((out / name).stat().st_size for name in self.shards)
        rest = (file for file in sorted(out.iterdir()) if file.is_file() and file.name not in self.shards)
        return MergeReport(
            out,
            tensors=len(merged.index),
            changed=len(merged.changed),
            experts_changed=merged.experts_changed,
            bytes=weights,
            files=len(self.shards),
            dtype=dtype,
            resumed=self.resumed,
            sha256=self.sha256 | {file.name: file_sha256(file) for file in rest},
            deltas=deltas,
            warnings=(*merged.warnings, *rounding_warnings(deltas, dtype)),
        )


def rounding_warnings(deltas: tuple[TensorDelta, ...], dtype: str) -> list[str]:
    """One sentence where rounding takes half of a tensor's delta or more."""
    lost = sorted((delta for delta in deltas if delta.lost >= LOST_SHARE), key=lambda delta: -delta.lost)
    if not lost:
        return []
    worst = lost[0]
    return [
        f"rounding to {dtype} changes {len(lost)} of {len(deltas)} tensors by half of their adapter's delta or more; "
        f"most in {worst.key}: ‖Δ‖ is {worst.relative:.2%} of ‖W‖, and {worst.lost:.0%} of it is rounding. "
        "float32 keeps it (--dtype float32), or leave the adapter unmerged"
    ]


def own_shards(merged: MergedWeights) -> dict[str, list[str]]:
    """The base's files, and in each the keys in the order in which they lie there."""
    ordered = sorted(merged.index, key=lambda key: (merged.index[key].file, merged.index[key].start))
    shards: dict[str, list[str]] = {}
    for key in ordered:
        shards.setdefault(merged.index[key].file.name, []).append(key)
    return shards


def copy_rest(merged: MergedWeights, directory: Path) -> None:
    """Tokenizer, generation config and the like, as they are, and the adapter's own chat template; not config.json,
    which comes last."""
    for file in sorted({file for pattern in COPIED for file in merged.base.glob(pattern)}):
        if not file.name.endswith(".index.json") and file.name != "config.json":
            _copy(file, directory)
    copy_template(merged.directory, directory)


def check_room(directory: Path, needed_bytes: int) -> None:
    """Raises ExportError where the disk of `directory` has no room for so many bytes more."""
    free = shutil.disk_usage(directory).free
    if free < needed_bytes + SPARE_BYTES:
        raise ExportError(
            f"{directory.parent} has {free / 1e9:.2f} GB free, and {needed_bytes / 1e9:.2f} GB are to be written; make "
            "room, or choose an output on another disk"
        )


def check_output(base: Path, adapter: Path, out: Path, overwrite: bool) -> None:
    """Refuses an output that exists, and even with `overwrite` one that is no model, or that is being read.

    Raises:
        OutputExistsError
    """
    here = out.resolve()
    if any(here in (path, *path.parents) for path in (base.resolve(), adapter.resolve())):
        raise OutputExistsError(f"{out} holds the base or the adapter that is being read; choose another output")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise OutputExistsError(f"{out} exists already; choose another output or pass --overwrite")
    empty = out.is_dir() and not any(out.iterdir())
    model = (out / "config.json").is_file() and any(out.glob("*.safetensors"))
    if out.is_symlink() or not (empty or model):
        raise OutputExistsError(f"{out} is no model directory (config.json and safetensors); it is never overwritten")


def _copy(file: Path, directory: Path) -> None:
    shutil.copyfile(file, directory / file.name)
    (directory / file.name).chmod(0o644)


def _set_dtype(file: Path, name: str) -> None:
    """The dtype of the model and of each part of a multimodal one, wherever config.json states it."""
    config = json.loads(file.read_text())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if part is config or {"dtype", "torch_dtype"} & set(part):
            part.pop("torch_dtype", None)
            part["dtype"] = name
    file.write_text(json.dumps(config, indent=2) + "\n")
