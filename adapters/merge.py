"""Base + adapter → a plain model directory that needs neither the adapter nor this studio.

Planned first: every adapter tensor must find its base tensor and fit its shape, or nothing is written. Then file by
file and tensor by tensor: read, add scale · B A in float32, write in the wanted dtype, in the base's own layout.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from adapters.checkpoint import DTYPE_NAMES, TensorInfo, read_config, read_index
from adapters.errors import AdapterFileError, CheckpointError, OutputExistsError, listed
from adapters.layouts import ExpertLayout, layout_for
from adapters.peft_files import AdapterFile, ExpertFactors, read_adapter
from adapters.tensor_files import DTYPES, new_directory, read_tensor, write_tensors

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Delta:
    """What is added to one base tensor, matrix by matrix so that one float32 matrix exists at a time.

    Attributes:
        matrices: one for a matrix, one an expert for a stack; each gives (rows, cols) float32 in the base's axis order.
        experts: how many of them are experts that are really adapted.
    """

    matrices: tuple[Callable[[], Tensor], ...]
    experts: int = 0


Found = list[tuple[str, tuple[int, ...], Delta]]
"""(checkpoint key, shape that it must have, what is added to it)."""

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
    index = read_index(base)
    layout = layout_for(read_config(base), index)
    deltas = plan_deltas(read_adapter(adapter, layout), layout, index)
    total, done, written = sum(info.size_bytes for info in index.values()), 0, 0

    def produce(key: str) -> Tensor:
        nonlocal done
        tensor = _merged(key, index[key], deltas.get(key), dtype)
        done += index[key].size_bytes
        if progress:
            progress(done, total)
        return tensor

    files = sorted({info.file for info in index.values()})
    with new_directory(out, overwrite) as directory:
        for file in files:
            keys = [key for key, info in index.items() if info.file == file]
            specs = {key: (_dtype(index[key], dtype), index[key].shape) for key in keys}
            write_tensors(directory / file.name, specs, produce)
            written += (directory / file.name).stat().st_size
        _copy_rest(base, directory, dtype, written)
    experts = sum(delta.experts for delta in deltas.values())
    names = {DTYPE_NAMES.get(info.dtype, info.dtype) for info in index.values()}
    shown = str(dtype).removeprefix("torch.") if dtype else "/".join(sorted(names))
    return MergeReport(out, len(index), len(deltas), experts, written, len(files), shown)


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


def _merged(key: str, info: TensorInfo, delta: Delta | None, dtype: torch.dtype | None) -> Tensor:
    tensor = read_tensor(info)
    merged = tensor.to(_dtype(info, dtype))
    if delta is not None:
        stacked = tensor if tensor.ndim == 3 else tensor[None]
        target = merged if tensor.ndim == 3 else merged[None]
        for number, matrix in enumerate(delta.matrices):
            target[number] = stacked[number].float().add_(matrix())
    tensor = merged
    if not torch.isfinite(tensor).all():
        raise CheckpointError(info.file, [f"{key} would hold NaN or infinity as {_dtype(info, dtype)} after merging"])
    return tensor


def plan_deltas(adapter: AdapterFile, layout: ExpertLayout, index: dict[str, TensorInfo]) -> dict[str, Delta]:
    """What to add to which base tensor, shapes checked.

    Raises:
        AdapterFileError: listing every adapter tensor without a base tensor, or of another shape.
    """
    problems: list[str] = []
    deltas: dict[str, Delta] = {}
    found: Found = [
        (layout.checkpoint_key(name), (linear.B.shape[0], linear.A.shape[1]), Delta((linear.delta,)))
        for name, linear in adapter.linear.items()
    ]
    for name, factors in adapter.experts.items():
        found += (
            _stacked_delta(name, factors, layout)
            if layout.checkpoint == "stacked"
            else (_per_expert_deltas(name, factors, layout))
        )
    for key, shape, delta in found:
        if key not in index:
            problems.append(f"{key} is adapted, but the base has no such tensor")
        elif index[key].shape != shape:
            problems.append(f"{key} is {index[key].shape} in the base, the adapter is for {shape}")
        else:
            deltas[key] = delta
    if problems:
        raise AdapterFileError(listed("the adapter does not fit this base", problems))
    return deltas


def _stacked_delta(name: str, factors: ExpertFactors, layout: ExpertLayout) -> Found:
    """(key, shape, delta) of a stack that lies in the files as one tensor."""
    experts, outputs, inputs = factors.B.shape[0], factors.B.shape[1], factors.A.shape[2]
    transposed = layout.stack_order == "in_out"
    shape = (experts, inputs, outputs) if transposed else (experts, outputs, inputs)
    matrices = tuple(partial(_expert_delta, factors, expert, transposed) for expert in range(experts))
    return [(layout.checkpoint_key(name), shape, Delta(matrices, sum(map(factors.adapts, range(experts)))))]


def _per_expert_deltas(name: str, factors: ExpertFactors, layout: ExpertLayout) -> Found:
    """(key, shape, delta) of each tensor that an expert of the stack lies in: its own rows of the expert's delta."""
    experts, outputs, inputs = factors.B.shape[0], factors.B.shape[1], factors.A.shape[2]
    found: Found = []
    for expert in range(experts):
        sources, adapts = layout.sources(name, expert), int(factors.adapts(expert))
        rows = outputs // len(sources)
        for number, source in enumerate(sources):
            delta = Delta((partial(_rows, factors, expert, number * rows, rows),), adapts)
            found.append((source.key, (rows, inputs), delta))
    return found


def _rows(factors: ExpertFactors, expert: int, start: int, rows: int) -> Tensor:
    return factors.delta(expert)[start : start + rows]


def _expert_delta(factors: ExpertFactors, expert: int, transposed: bool) -> Tensor:
    delta = factors.delta(expert)
    return delta.t() if transposed else delta


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
