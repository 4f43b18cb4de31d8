"""One safetensors file from the parts of an adapter, part by part. Forms differ in the `lay` that they give."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from torch import Tensor

from adapters.adapter_files import PREFIX, AdapterFile
from adapters.errors import AdapterFileError, ExportError, listed
from adapters.export import Progress
from adapters.factors import Factors, Part
from adapters.merge import check_room
from adapters.tensor_files import write_tensors

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Laid:
    """One tensor of a file: its key, its shape, and how it is made of its part's factors (A, B) at rank `rank`."""

    key: str
    shape: tuple[int, ...]
    rank: int
    make: Callable[[Tensor, Tensor], Tensor]


def published_base(adapter: AdapterFile, base: Path) -> str:
    """What an exported adapter calls its base: a hub id or "embedded" as they are, a folder by its name alone.

    A path of the machine that it was trained on is of no use elsewhere, and says whose machine that was.
    """
    name = str(adapter.config.get("base_model_name_or_path") or base)
    return name if HUB_ID.fullmatch(name) and not Path(name).is_dir() else Path(name).name


def factor_dtype(name: str | None) -> torch.dtype:
    """The dtype that factors are written in; float32 where none is asked for.

    Raises:
        ExportError: not one of DTYPES.
    """
    if name is not None and name not in DTYPES:
        raise ExportError(f"dtype {name!r}: an adapter is written as {', '.join(DTYPES)}")
    return DTYPES[name] if name else torch.float32


def write_parts(
    path: Path,
    parts: Sequence[Part],
    lay: Callable[[Part], list[Laid]],
    dtype: torch.dtype,
    progress: Progress | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """Writes the tensors of all parts, holding one part's factors at a time.

    Returns:
        {"tensors", "parameters", "bytes"} of the file.

    Raises:
        AdapterFileError: a value is not finite, as it is or in `dtype`.
        ExportError: the disk has no room; nothing is written then.
    """
    laid = {one.key: (part, one) for part in parts for one in lay(part)}
    specs = {key: (dtype, one.shape) for key, (_, one) in laid.items()}
    total = sum(torch.Size(shape).numel() for _, shape in specs.values())
    if not laid:
        raise AdapterFileError("the adapter adapts nothing: there is nothing to write")
    check_room(path.parent, total * dtype.itemsize)
    held: dict[tuple[str, int], Factors] = {}
    done = 0

    def produce(key: str) -> Tensor:
        nonlocal done
        part, one = laid[key]
        if (part.name, one.rank) not in held:
            held.clear()
            held[part.name, one.rank] = part.at_rank(one.rank)
        tensor = one.make(*held[part.name, one.rank]).to(dtype)
        if not torch.isfinite(tensor).all():
            raise AdapterFileError(
                listed(f"the adapter would hold NaN or infinity as {dtype}, and was not written", [key])
            )
        done += tensor.numel()
        if progress:
            progress(done * dtype.itemsize, total * dtype.itemsize)
        return tensor

    write_tensors(path, specs, produce, {"peft_version": peft.__version__, **(metadata or {})})
    return {"tensors": len(laid), "parameters": total, "bytes": path.stat().st_size}


Side = tuple[tuple[int, ...], Callable[[Tensor], Tensor]]
"""The shape that a factor is written in, and how it gets there."""


def pair(module: str, rank: int, a: Side, b: Side) -> list[Laid]:
    """`module`'s lora_A, made of A (E, r, in), and lora_B, made of B (E, out, r)."""
    return [
        Laid(f"{PREFIX}{module}.lora_A.weight", a[0], rank, lambda factor, _: a[1](factor)),
        Laid(f"{PREFIX}{module}.lora_B.weight", b[0], rank, lambda _, factor: b[1](factor)),
    ]


def plain(module: str, part: Part, rank: int) -> list[Laid]:
    """Of one matrix, as every form has it: lora_A (r, in) and lora_B (out, r)."""
    return pair(module, rank, ((rank, part.inputs), lambda a: a[0]), ((part.outputs, rank), lambda b: b[0]))
