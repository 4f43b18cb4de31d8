"""The files of a job directory: durable writes, tolerant reads, and the lock that says who is alive.

The lock is a flock on JOB/lock, taken before the directory appears under its name and handed to the worker and to
all its children as standard input: descriptors 0, 1 and 2 are the ones that every launcher passes on. Held = alive,
whatever was killed; no process id is stored, so none can be stale. Linux only (flock, /proc).
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TAIL_BYTES = 65_536


def write_atomic(path: Path, text: str) -> None:
    """`text` at `path`, whole or not at all: written beside, fsynced, renamed, and the directory fsynced."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Makes the names in directory `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text of plain values; a number that is not finite becomes null, which JSON can hold."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False, default=str)


def read_json(path: Path) -> Any:
    """The JSON value in the file at `path`. Raises OSError or ValueError."""
    return json.loads(path.read_text(encoding="utf-8"))


def append_line(path: Path, line: str) -> None:
    """One line more in `path`, in a single write; a torn line that a killed writer left is closed first."""
    with path.open("a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
        file.write((b"\n" if torn else b"") + line.encode("utf-8") + b"\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole JSON object line of `path`; torn lines are passed over, a missing file is empty."""
    try:
        *lines, _torn = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [row for line in lines if isinstance(row := _parsed(line), dict)]


def tail(path: Path, count: int) -> list[str]:
    """The last `count` lines of the text file `path`, progress bars reduced to their last state."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n")]
    return [line for line in lines if line.strip()][-count:]


def open_lock(path: Path) -> int:
    """A descriptor that holds the lock file `path` exclusively.

    Raises:
        BlockingIOError: a living process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    return descriptor


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock file `path`. Asks for a shared lock: two that ask do not meet."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def holds_as_input(path: Path) -> bool:
    """Whether this process has the lock file `path` as its standard input."""
    return path.exists() and _has_as_input(os.getpid(), path.stat())


def lock_holders(path: Path) -> list[int]:
    """Ids of the processes that have the lock file `path` as their standard input: a job's worker and its children."""
    try:
        lock = path.stat()
    except FileNotFoundError:
        return []
    return [pid for pid in _process_ids() if pid != os.getpid() and _has_as_input(pid, lock)]


@contextmanager
def mutex(path: Path) -> Iterator[None]:
    """Waits for the lock file `path` and holds it for the length of the block."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _process_ids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _has_as_input(pid: int, lock: os.stat_result) -> bool:
    try:
        other = os.stat(f"/proc/{pid}/fd/0")
    except OSError:  # gone meanwhile, or another user's
        return False
    return (other.st_dev, other.st_ino) == (lock.st_dev, lock.st_ino)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
