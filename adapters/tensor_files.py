"""Exact reads and atomic writes of safetensors files.

Reads go through `pread`, not mmap: mapped pages count as resident memory, and a model streamed through a map peaks at
its full size. Writes are streamed piece by piece beside the target, hashed on the way, fsynced and renamed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from adapters.checkpoint import TensorInfo
from adapters.errors import CheckpointError, OutputExistsError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
REPLACED = "replaced"
"""In `.NAME.old`: the output that is being replaced, and nothing else, so that a folder of the user's is told apart."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_tensor(info: TensorInfo, index: int | None = None) -> Tensor:
    """The tensor, or with `index` its slice [index] along the first dimension, in its own dtype.

    Raises:
        CheckpointError: the file ended early.
    """
    shape = info.shape if index is None else info.shape[1:]
    out = torch.empty(shape, dtype=DTYPES[info.dtype])
    with OpenFiles() as files:
        files.read(info.file, info.start + (index or 0) * out.nbytes, out)
    return out


def read_values(info: TensorInfo, start: int, count: int) -> Tensor:
    """`count` values of the tensor laid out flat, from value `start` on, in its own dtype.

    Raises:
        CheckpointError: the file ended early.
    """
    out = torch.empty(count, dtype=DTYPES[info.dtype])
    with OpenFiles() as files:
        files.read(info.file, info.start + start * out.itemsize, out)
    return out


class OpenFiles:
    """Files opened once each, read at any place by any number of threads at a time; closed at the end of the block."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
            return self._descriptors[file]

    def read(self, file: Path, start: int, out: Tensor) -> None:
        """Fills `out`, contiguous and on the CPU, with the file's bytes from `start` on.

        Raises:
            CheckpointError: the file ended early.
        """
        view = out.view(-1).view(torch.uint8).numpy().data if out.numel() else memoryview(b"")
        descriptor, done = self._descriptor(file), 0
        while done < len(view):
            got = os.preadv(descriptor, [view[done:]], start + done)
            if not got:
                raise CheckpointError(file, [f"ended at byte {start + done}, expected {start + len(view)}"])
            done += got


@contextmanager
def thread_pool() -> Iterator[ThreadPoolExecutor]:
    """A thread for each core, each computing alone; on an error, what has not begun is dropped."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


def write_tensors(
    path: Path,
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    produce: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Writes one safetensors file, asking `produce` for each tensor when its turn comes; returns the file's sha256.

    The header is laid out from `specs` before the first tensor exists. The file appears under its name only when whole.
    """
    return write_pieces(path, specs, (_checked(produce(name), *spec, name) for name, spec in specs.items()), metadata)


def _checked(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], name: str) -> Tensor:
    tensor = tensor.detach().to("cpu", dtype).contiguous()
    assert tuple(tensor.shape) == tuple(shape), (name, tensor.shape, shape)
    return tensor


def write_pieces(
    path: Path,
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    pieces: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Writes one safetensors file from the values of its tensors laid end to end, in pieces of any length.

    Hashed as it is written, by a thread of its own. The file appears under its name only when it is whole and on the
    disk.

    Args:
        pieces: contiguous, on the CPU, each in the dtype of its tensor, in the order of `specs`.

    Returns:
        The sha256 of the file.
    """
    header = safetensors_header(specs, metadata)
    size = len(header) + sum(spec_bytes(*spec) for spec in specs.values())
    temporary, hashed = path.with_name(f".{path.name}.partial"), hashlib.sha256(header)
    with temporary.open("wb") as file, ThreadPoolExecutor(1) as hasher:
        file.write(header)
        before = None
        for piece in pieces:
            view = piece.reshape(-1).view(torch.uint8).numpy().data if piece.numel() else b""
            if before:
                before.result()  # one piece is hashed while the next is written: no more than two exist
            before = hasher.submit(hashed.update, view)
            file.write(view)
        if before:
            before.result()
        assert file.tell() == size, (path, file.tell(), size)
        file.flush()
        os.fsync(file.fileno())
    temporary.chmod(0o644)
    temporary.rename(path)
    return hashed.hexdigest()


def safetensors_header(
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The first bytes of a safetensors file whose tensors lie end to end in this order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, (dtype, shape) in specs.items():
        end = offset + spec_bytes(dtype, shape)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def spec_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * int(torch.Size(shape).numel())


@contextmanager
def new_directory(target: Path, overwrite: bool = False, resume: bool = False) -> Iterator[Path]:
    """A directory written beside `target`, as `.NAME.partial`, that takes its name only when the block ends well.

    With `overwrite` the old directory stays, at last as `.NAME.old/replaced`, until the new one is whole. On an error
    nothing of the new one is left; what a killed process left never looks finished, and the next one clears it away.
    One process writes at a time.

    Args:
        resume: hand over what a killed process left, or one whose disk was full, instead of clearing it away. The block
            decides what of it is good.

    Raises:
        OutputExistsError: `target` exists and `overwrite` is not given, another process is writing it, or `.NAME.old`
            is somebody else's.
    """
    staged, old = (target.with_name(f".{target.name}.{end}") for end in ("partial", "old"))
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_ours(old, target)
    with _locked(staged, target):
        _recover(old, target)
        try:
            if target.exists() and not overwrite:
                raise OutputExistsError(f"{target} exists already; choose another output or pass --overwrite")
            if not resume:
                _empty(staged)
            yield staged
            for file in staged.rglob("*"):
                if file.is_file():
                    _fsync(file)
            _swap(staged, target, old)
        except BaseException as error:
            full_disk = isinstance(error, OSError)  # what is whole is then worth as much as after a kill
            if not (resume and full_disk):
                shutil.rmtree(staged, ignore_errors=True)
            raise


def _check_ours(old: Path, target: Path) -> None:
    """Refuses an `old` that no process of ours left: it would be taken for an output that was being replaced."""
    try:
        ours = not old.is_symlink() and set(os.listdir(old)) <= {REPLACED}
    except FileNotFoundError:
        return
    except NotADirectoryError:
        ours = False
    if not ours:
        raise OutputExistsError(
            f"{old} is in the way: while {target} is replaced, the old one waits under this name; rename yours"
        )


def _recover(old: Path, target: Path) -> None:
    """Ends what a process began that was killed between two renames: an old output comes back, or goes."""
    if (old / REPLACED).exists() and not target.exists():
        (old / REPLACED).rename(target)
    if old.exists():
        shutil.rmtree(old)


@contextmanager
def _locked(staged: Path, target: Path) -> Iterator[None]:
    """Makes `staged` where it is not there, and holds a lock on it: a dead process holds none."""
    while True:
        staged.mkdir(mode=0o755, exist_ok=True)
        try:
            descriptor = os.open(staged, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # another process has just finished with it
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputExistsError(
                    f"another process is writing {target} at this moment; wait until it ends"
                ) from None
            if _same(descriptor, staged):
                yield
                return
        finally:
            os.close(descriptor)


def _same(descriptor: int, path: Path) -> bool:
    """Whether `path` is still the directory that was opened: it may have been renamed before it was locked."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _swap(staged: Path, target: Path, old: Path) -> None:
    if target.exists():
        old.mkdir()
        target.rename(old / REPLACED)
    _fsync(staged)
    try:
        staged.rename(target)
    except BaseException:
        _recover(old, target)
        raise
    _fsync(target.parent)
    _recover(old, target)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
