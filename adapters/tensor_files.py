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
    size = info.size_bytes if index is None else info.size_bytes // info.shape[0]
    start = info.start + (index or 0) * size
    data = bytearray(size)
    descriptor = os.open(info.file, os.O_RDONLY)
    try:
        done = 0
        while done < size:
            got = os.preadv(descriptor, [memoryview(data)[done:]], start + done)
            if not got:
                raise CheckpointError(info.file, [f"ended at byte {start + done}, expected {start + size}"])
            done += got
    finally:
        os.close(descriptor)
    if not size:
        return torch.empty(shape, dtype=DTYPES[info.dtype])
    return torch.frombuffer(data, dtype=DTYPES[info.dtype]).reshape(shape)


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
