"""The compact form of an adapter, and its way to the standard PEFT form and back, both without loss.

The standard file has one rank for a whole stack of experts and fills smaller ranks, and experts without an adapter,
with zeros. The compact file holds of each expert its own rows and no others:

    adapter/ (standard PEFT) ── to_compact ──▶ compact_adapter.safetensors + the other files ── to_standard ──▶ adapter/

In it, a stack's `lora_A` is (R, ·) and its `lora_B` (R, ·), R the sum of the ranks, experts one after the other; which
side is in and which is out is as in the standard file. All other tensors are the same in both. The ranks stand in the
file's metadata, so no base model is needed on either way.

Dimension legend: E experts, r the rank of the stack in the standard file, R sum of the experts' own ranks.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adapters.adapter_files import COMPACT_WEIGHTS, CONFIG, PREFIX, WEIGHTS, rank_and_scale, stack_key
from adapters.checkpoint import read_json_object
from adapters.errors import AdapterFileError, OutputExistsError
from adapters.layouts import PROJECTIONS
from adapters.sidecar import in_form, read_sidecar, write_sidecar
from adapters.tensor_files import new_directory

FACTS = "compact_adapter"
VERSION = 1
Tensors = dict[str, Tensor]
Facts = dict[str, str]
CheckFolder = Callable[[Path], None]


def to_compact(
    adapter: Path, out: Path, *, overwrite: bool = False, check: CheckFolder | None = None
) -> dict[str, int]:
    """Writes the standard PEFT directory `adapter` in the compact form to `out`, whole or not at all.

    An expert's rank is the last of its rows that is not zero in both factors, so an adapter made by stock PEFT will do.

    Args:
        check: called with the folder before it appears under its name; what it raises leaves nothing.

    Returns:
        {"bytes_before", "bytes", "experts"}: of the weights in either form, and how many expert matrices have a rank.

    Raises:
        AdapterFileError: files missing, unreadable, or not a LoRA whose ranks fit its tensors.
        OutputExistsError: `out` exists, and not as an adapter directory that may be overwritten.
    """
    return _convert(adapter, out, (WEIGHTS, COMPACT_WEIGHTS), _compacted, overwrite, check)


def to_standard(
    adapter: Path, out: Path, *, overwrite: bool = False, check: CheckFolder | None = None
) -> dict[str, int]:
    """Writes the compact directory `adapter` in the standard PEFT form to `out`; otherwise as `to_compact`."""
    return _convert(adapter, out, (COMPACT_WEIGHTS, WEIGHTS), _filled, overwrite, check)


def compact_in_place(directory: Path) -> dict[str, int]:
    """Puts the compact file of a standard PEFT directory that is being written in the place of the standard one.

    Returns, raises: as `to_compact`, but for an output that exists.
    """
    before = (directory / WEIGHTS).stat().st_size
    tensors, facts, experts = _compacted(directory / WEIGHTS, read_json_object(directory / CONFIG, AdapterFileError))
    save_file(tensors, directory / COMPACT_WEIGHTS, metadata=facts)
    (directory / WEIGHTS).unlink()
    return {"bytes_before": before, "bytes": (directory / COMPACT_WEIGHTS).stat().st_size, "experts": experts}


def _convert(
    adapter: Path,
    out: Path,
    names: tuple[str, str],
    change: Callable[[Path, dict[str, Any]], tuple[Tensors, Facts, int]],
    overwrite: bool,
    check: CheckFolder | None,
) -> dict[str, int]:
    out = Path(os.path.abspath(out))
    source, target = adapter / names[0], out / names[1]
    _check_output(adapter, out, overwrite)
    for file in (adapter / CONFIG, source):
        if not file.is_file():
            raise AdapterFileError(f"{adapter} has no {file.name}: expected {_form(names[0])} to convert")
    tensors, facts, experts = change(source, read_json_object(adapter / CONFIG, AdapterFileError))
    with new_directory(out, overwrite) as directory:
        shutil.copytree(adapter, directory, ignore=shutil.ignore_patterns(*names), dirs_exist_ok=True)
        save_file(tensors, directory / target.name, metadata=facts)
        if sidecar := read_sidecar(adapter):
            write_sidecar(directory, in_form(sidecar, "peft" if target.name == WEIGHTS else "compact"))
        if check:
            check(directory)
    return {"bytes_before": source.stat().st_size, "bytes": target.stat().st_size, "experts": experts}


def _form(name: str) -> str:
    return "a standard PEFT adapter" if name == WEIGHTS else "an adapter in the compact form"


def _check_output(adapter: Path, out: Path, overwrite: bool) -> None:
    inside, source = out.resolve(), adapter.resolve()
    if inside in (source, *source.parents):
        raise OutputExistsError(f"{out} holds the adapter that is being read; choose another output")
    if source in inside.parents:
        raise OutputExistsError(f"{out} is inside the adapter that is being read; choose another output")
    if overwrite and os.path.lexists(out) and (out.is_symlink() or not (out / CONFIG).is_file()):
        raise OutputExistsError(f"{out} is no adapter directory ({CONFIG}); it is never overwritten")


# -------------------------------------------------------------------- standard → compact


def _compacted(file: Path, config: dict[str, Any]) -> tuple[Tensors, Facts, int]:
    if config.get("peft_type") != "LORA":
        raise AdapterFileError(f"{file.parent}: peft_type is {config.get('peft_type')!r}; only LORA can be converted")
    tensors, facts = _read(file)
    modules = tuple(
        name.removesuffix(f".{projection}")
        for name in config.get("target_parameters") or ()
        for projection in PROJECTIONS
        if name.endswith(f".{projection}")
    )
    ranks: dict[str, Any] = {}
    for module in [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]:
        if modules and module.removesuffix(".base_layer").endswith(modules):
            rank = rank_and_scale(config, stack_key(module.removeprefix(PREFIX), config))[0]
            first, second = _by_expert(module, tensors, rank)
            own = own_ranks(first, second)
            keep = torch.arange(rank) < own[:, None]
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = first[keep], second[keep]
            ranks[module] = {"rank": rank, "ranks": own.tolist()}
    if not ranks:
        raise AdapterFileError(f"{file} adapts no routed experts: its compact form would be the same file")
    facts[FACTS] = json.dumps({"version": VERSION, "stacks": ranks})
    return tensors, facts, _adapted(ranks)


def _by_expert(module: str, tensors: Tensors, rank: int) -> tuple[Tensor, Tensor]:
    """(E, r, ·) and (E, r, ·) of a stack's lora_A (E·r, ·), expert-major, and lora_B (·, r·E), rank-major."""
    names = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
    if names[1] not in tensors:
        raise AdapterFileError(f"{names[0]} has no {names[1]}")
    first, second = (tensors[name] for name in names)
    if first.shape[0] % rank or second.shape[1] != first.shape[0]:
        raise AdapterFileError(f"{names[0]} is {tuple(first.shape)} and {tuple(second.shape)}: not of rank {rank}")
    return first.reshape(-1, rank, first.shape[1]), second.reshape(len(second), rank, -1).permute(2, 1, 0).contiguous()


def own_ranks(first: Tensor, second: Tensor) -> Tensor:
    """(E,): of each expert, the last row that holds any bit, and so also a negative zero, in one of the factors."""
    held = [factor.contiguous().view(torch.uint8).ne(0).any(-1) for factor in (first, second)]
    return ((held[0] | held[1]) * torch.arange(1, first.shape[1] + 1)).amax(1)


def _adapted(stacks: dict[str, Any]) -> int:
    return sum(rank > 0 for stack in stacks.values() for rank in stack["ranks"])


# -------------------------------------------------------------------- compact → standard


def _filled(file: Path, config: dict[str, Any]) -> tuple[Tensors, Facts, int]:
    tensors, facts = _read(file)
    try:
        record = json.loads(facts.pop(FACTS))
        version, stacks = record["version"], record["stacks"]
        if version != VERSION:
            raise AdapterFileError(f"{file} is of version {version!r}; this studio reads version {VERSION}")
        for module, stack in stacks.items():
            keep = torch.arange(stack["rank"]) < torch.tensor(stack["ranks"], dtype=torch.int64)[:, None]
            first, second = (
                _spread(tensors[f"{module}.{factor}.weight"], keep, stack["ranks"]) for factor in ("lora_A", "lora_B")
            )
            tensors[f"{module}.lora_A.weight"] = first.flatten(0, 1)
            tensors[f"{module}.lora_B.weight"] = second.permute(2, 1, 0).flatten(1).contiguous()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise AdapterFileError(f"{file} is no whole adapter in the compact form: {error}") from None
    return tensors, facts, _adapted(stacks)


def _spread(flat: Tensor, keep: Tensor, ranks: list[int]) -> Tensor:
    """(E, r, ·), zero where `keep` (E, r) is not, from the rows (R, ·) of the experts."""
    if sum(ranks) != keep.sum() or len(flat) != keep.sum():
        raise ValueError(f"{len(flat)} rows do not fit ranks {ranks} of at most {keep.shape[1]}")
    filled = flat.new_zeros(*keep.shape, flat.shape[1])
    filled[keep] = flat
    return filled


def _read(file: Path) -> tuple[Tensors, Facts]:
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no mapping
            return tensors, dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{file} cannot be read: {error}") from None
