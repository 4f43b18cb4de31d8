"""The form "compact": each expert with its own rank and nothing else (`adapters.compact`), for the studio itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapters.compact import compact_in_place
from adapters.export import Options, Progress, Source
from adapters.export.peft import write_peft
from adapters.sidecar import in_form, read_sidecar, write_sidecar


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
    write_sidecar(directory, in_form(sidecar, "compact"))
    return {**facts, **compact_in_place(directory)}
