"""Base + adapter → a plain model directory that needs neither the adapter nor this studio.

Planned first: every adapter tensor must find its base tensor and fit its shape, or nothing is written. Then file by
file and tensor by tensor: read, add scale · B A in float32, write in the wanted dtype, in the base's own layout.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.checkpoint import DTYPE_NAMES, TensorInfo
from adapters.errors import CheckpointError, OutputExistsError
from adapters.export import Options, Progress, Source
from adapters.merged import MergedWeights
from adapters.tensor_files import DTYPES, new_directory, write_tensors

INDEX = "model.safetensors.index.json"
COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
"""What goes along from the base directory: config, generation config, tokenizer, chat template."""


@dataclass(frozen=True)
class MergeReport:
    """What a merge did: tensors in all, tensors changed, expert matrices changed, bytes written, weight files."""

    out: Path
    tensors: int
    changed: int
    experts_changed: int
    bytes: int
    files: int
    dtype: str


def merge_adapter(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Writes the merged model to `out`, whole or not at all.

    Args:
        dtype: of the merged weights; None keeps each tensor's own.
        progress: called with (bytes read, bytes in all).

    Raises:
        AdapterFileError: the adapter does not fit the base; all misfits are listed.
        CheckpointError: the base cannot be read, or a merged tensor would not be finite in `dtype`.
        OutputExistsError: `out` exists.
    """
    out = Path(os.path.abspath(out))
    check_output(base, adapter, out, overwrite)
    merged = MergedWeights(base, adapter)
    with new_directory(out, overwrite) as directory:
        written, files = _write(merged, directory, dtype, progress)
    names = {DTYPE_NAMES.get(info.dtype, info.dtype) for info in merged.index.values()}
    shown = str(dtype).removeprefix("torch.") if dtype else "/".join(sorted(names))
    return MergeReport(out, len(merged.index), len(merged.changed), merged.experts_changed, written, files, shown)


def write_safetensors(
    source: Source, directory: Path, options: Options, progress: Progress | None = None
) -> dict[str, Any]:
    """The format "safetensors": the merged weights, config and tokenizer, in the base's own layout."""
    merged = source.open()
    dtype = getattr(torch, options.dtype) if options.dtype else None
    written, files = _write(merged, directory, dtype, progress)
    return {"tensors": len(merged.index), "changed": len(merged.changed), "bytes": written, "files": files}


def _write(
    merged: MergedWeights, directory: Path, dtype: torch.dtype | None, progress: Progress | None
) -> tuple[int, int]:
    """Fills `directory`; returns bytes of the weights and how many files they are in."""
    index = merged.index
    total, done, written = sum(info.size_bytes for info in index.values()), 0, 0

    def produce(key: str) -> Tensor:
        nonlocal done
        tensor = _merged(key, merged, dtype)
        done += index[key].size_bytes
        if progress:
            progress(done, total)
        return tensor

    files = sorted({info.file for info in index.values()})
    for file in files:
        keys = [key for key, info in index.items() if info.file == file]
        specs = {key: (_dtype(index[key], dtype), index[key].shape) for key in keys}
        write_tensors(directory / file.name, specs, produce)
        written += (directory / file.name).stat().st_size
    _copy_rest(merged.base, directory, dtype, written)
    return written, len(files)


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


def _dtype(info: TensorInfo, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or DTYPES[info.dtype]


def _merged(key: str, merged: MergedWeights, dtype: torch.dtype | None) -> Tensor:
    info = merged.index[key]
    wanted = _dtype(info, dtype)
    if merged.matrices(key) > 1 and key in merged.changed:  # one expert in float32 at a time
        tensor = torch.empty(info.shape, dtype=wanted)
        for expert in range(len(tensor)):
            tensor[expert] = merged.read(key, expert)
    else:
        tensor = merged.read(key).to(wanted)
    if not torch.isfinite(tensor).all():
        raise CheckpointError(info.file, [f"{key} would hold NaN or infinity as {wanted} after merging"])
    return tensor


def _copy_rest(base: Path, out: Path, dtype: torch.dtype | None, written: int) -> None:
    """Config, tokenizer and the like as they are: the base's own text, but for a dtype that was asked for."""
    for pattern in COPIED:
        for file in base.glob(pattern):
            if file.name != INDEX:
                shutil.copy2(file, out / file.name)
    if dtype is not None:
        _set_dtype(out / "config.json", str(dtype).removeprefix("torch."))
    if (base / INDEX).exists():
        index = json.loads((base / INDEX).read_text())
        index["metadata"] = {**index.get("metadata", {}), "total_size": written}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _set_dtype(file: Path, name: str) -> None:
    """The dtype of the model and of each part of a multimodal one, wherever config.json states it."""
    config = json.loads(file.read_text())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if part is config or {"dtype", "torch_dtype"} & set(part):
            part.pop("torch_dtype", None)
            part["dtype"] = name
    file.write_text(json.dumps(config, indent=2) + "\n")
