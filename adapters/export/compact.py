"""The form "compact": each expert with its own rank and nothing else (`adapters.compact`), for the studio itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.compact import compact_in_place
from adapters.export import Options, Progress, Source
from adapters.export.peft import write_peft
from adapters.sidecar import read_sidecar, write_sidecar


def write_compact(
    source: Source, directory: Path, options: Options, progress: Progress | None = None
) -> dict[str, Any]:
    """The format "compact".

    Returns:
        {"tensors", "parameters", "bytes", "rank", "bytes_before", "experts"}: `experts` matrices have a rank.
    """
    facts = write_peft(source, directory, options, progress)
    sidecar = read_sidecar(directory)
    assert sidecar is not None
    packing = "rows of every expert's own rank one after the other, ranks in the file's metadata; gate and up fused"
    experts = {**sidecar.experts, "packing": packing}
    write_sidecar(
        directory, replace(sidecar, format="compact", experts=experts, made_for=("moe-studio",), ignored_by=())
    )
    return {**facts, **compact_in_place(directory)}
