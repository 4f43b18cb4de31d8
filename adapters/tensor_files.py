"""Exact reads and atomic writes of safetensors files.

Reads go through `pread`, not mmap: mapped pages count as resident memory, and a model streamed through a map peaks at
its full size. Writes are streamed tensor by tensor beside the target, fsynced and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from adapters.checkpoint import DTYPE_BYTES, TensorInfo
from adapters.errors import CheckpointError, OutputExistsError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
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


def write_tensors(
    path: Path,
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    produce: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one safetensors file, asking `produce` for each tensor when its turn comes.

    The header is laid out from `specs` before the first tensor exists. The file appears under its name only when whole.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, (dtype, shape) in specs.items():
        size = DTYPE_BYTES[NAMES[dtype]] * int(torch.Size(shape).numel())
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, (dtype, shape) in specs.items():
            tensor = produce(name).detach().to("cpu", dtype).contiguous()
            assert tuple(tensor.shape) == tuple(shape), (name, tensor.shape, shape)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


@contextmanager
def new_directory(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A directory written beside `target` that takes its name only when the block ends well.

    With `overwrite` the old directory stays until the new one is whole. On failure nothing of the new one is left.

    Raises:
        OutputExistsError: `target` exists and `overwrite` is not given.
    """
    if target.exists() and not overwrite:
        raise OutputExistsError(f"{target} exists already; choose another output or pass --overwrite")
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    staged.chmod(0o755)
    try:
        yield staged
        for file in staged.rglob("*"):
            if file.is_file():
                _fsync(file)
        _swap(staged, target)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def _swap(staged: Path, target: Path) -> None:
    old = None
    if target.exists():
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        target.rename(old)
    _fsync(staged)
    try:
        staged.rename(target)
    except BaseException:
        if old is not None:
            old.rename(target)
        raise
    _fsync(target.parent)
    if old is not None:
        shutil.rmtree(old)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
