"""Whether a model can be run here in float32: what decides between "verified" and "behaviour not run". No torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from adapters.checkpoint import TensorInfo

PROGRAM_BYTES = 1_000_000_000
"""Of a process with torch and transformers (about 0.5 GB), and of activations and logits of short prompts."""
LOADING = 1.25
"""Stock transformers holds a layer twice while it turns one tensor an expert into stacks."""


def needed_bytes(index: Mapping[str, TensorInfo]) -> int:
    """Memory to run the model of these files in float32, in stock transformers."""
    return int(LOADING * 4 * sum(info.parameters for info in index.values())) + PROGRAM_BYTES


def available_bytes() -> int:
    """Memory that a new process can have here: what is free, or less where a control group sets a limit."""
    limits = [_meminfo("MemAvailable")]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        values = _number(Path(limit)), _number(Path(used))
        if values[0] is not None and values[1] is not None:
            limits.append(max(0, values[0] - values[1]))
    return min(limits)


def why_not(index: Mapping[str, TensorInfo]) -> str:
    """Why the model cannot be run here, "" where it can."""
    needed, there = needed_bytes(index), available_bytes()
    if needed <= there:
        return ""
    return f"the model needs {needed / 1e9:.1f} GB to run in float32, {there / 1e9:.1f} GB are free on this machine"


def why_no_room(directory: Path, needed_bytes: int) -> str:
    """Why so much cannot be written for a while in `directory`, "" where it can."""
    free = shutil.disk_usage(directory).free
    if needed_bytes + PROGRAM_BYTES // 10 <= free:
        return ""
    return (
        f"{needed_bytes / 1e9:.1f} GB in {directory.parent} are needed for a while to run it, {free / 1e9:.1f} GB are "
        "free there; another folder can be given by TMPDIR"
    )


def _meminfo(name: str) -> int:
    rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return next(1024 * int(row[1]) for row in rows if row[0] == f"{name}:")


def _number(path: Path) -> int | None:
    """None where there is no such file, or it says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
