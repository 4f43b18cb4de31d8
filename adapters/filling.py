"""Fills prepared tensors from a checkpoint: read in small pieces, quantised in parallel, placed as they come.

    Target      one matrix or tensor: where its values lie in the files, and the writer that takes them
    fill        all targets, on a pool of threads; every thread holds one small piece of one target at a time

A piece is read into the same scratch every time and quantised while it is in the core's own cache. So the memory beside
the tensors that are filled does not depend on the size of an expert (on a GPU it is one expert for each thread).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from adapters.checkpoint import TensorInfo
from adapters.errors import CheckpointError, QuantizationError
from adapters.four_bit import CHUNK, Quantizer
from adapters.quantized import Writer
from adapters.tensor_files import DTYPES, OpenFiles, thread_pool

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Span:
    """A run of values in a file: a whole tensor of the checkpoint, or the slice of one expert."""

    info: TensorInfo
    expert: int | None = None

    @property
    def values(self) -> int:
        return self.info.parameters if self.expert is None else self.info.parameters // self.info.shape[0]

    @property
    def start(self) -> int:
        """Offset in the file, bytes."""
        return self.info.start + (self.expert or 0) * self.values * self.value_bytes

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.info.dtype]

    @property
    def value_bytes(self) -> int:
        return self.dtype.itemsize


@dataclass(frozen=True)
class Target:
    """What is filled from the spans, one after the other.

    Attributes:
        label: what messages call it.
        writer: given a quantiser by kind, the writer that takes the values.
    """

    label: str
    spans: tuple[Span, ...]
    writer: Callable[[Callable[[str], Quantizer]], Writer]

    @property
    def size_bytes(self) -> int:
        return sum(span.values * span.value_bytes for span in self.spans)


@dataclass
class _Scratch(threading.local):
    """What a thread reuses from piece to piece."""

    quantizers: dict[str, Quantizer] = field(default_factory=dict)
    piece: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    def quantizer(self, kind: str) -> Quantizer:
        if kind not in self.quantizers:
            self.quantizers[kind] = Quantizer(kind)
        return self.quantizers[kind]

    def values(self, count: int, dtype: torch.dtype) -> Tensor:
        if self.piece.numel() < count * dtype.itemsize:
            self.piece = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        return self.piece[: count * dtype.itemsize].view(dtype)


def fill(targets: Sequence[Target], progress: Progress | None = None) -> list[str]:
    """Fills all targets, in the order in which they lie in the files.

    Args:
        progress: called from this thread with (bytes read, bytes in all).

    Returns:
        Every problem found, one line each; their targets are not to be used.
    """
    ordered = sorted(targets, key=lambda target: (str(target.spans[0].info.file), target.spans[0].start))
    total, done, problems = sum(target.size_bytes for target in targets), 0, []
    with OpenFiles() as files, thread_pool() as pool:
        scratch = _Scratch()
        futures = {pool.submit(_fill, target, files, scratch): target for target in ordered}
        for future in as_completed(futures):
            problems += future.result()
            done += futures[future].size_bytes
            if progress:
                progress(done, total)
    return sorted(problems)


def _fill(target: Target, files: OpenFiles, scratch: _Scratch) -> list[str]:
    try:
        writer = target.writer(scratch.quantizer)
        length = max(writer.step, CHUNK // writer.step * writer.step)
        for start, values in _pieces(target.spans, length, files, scratch):
            writer.put(start, values)
        writer.close()
    except QuantizationError as error:
        return [f"{target.label} {error}"]
    except CheckpointError as error:
        return error.problems
    return []


def _pieces(spans: Sequence[Span], length: int, files: OpenFiles, scratch: _Scratch) -> Iterator[tuple[int, Tensor]]:
    """(start, values) of the spans laid end to end, `length` values at a time. The values change with the next one.

    Spans of different dtypes are given in the smallest that holds the values of all: float32 for float16 and bfloat16.
    """
    dtype = reduce(torch.promote_types, [span.dtype for span in spans])
    total = sum(span.values for span in spans)
    for start in range(0, total, length):
        count = min(length, total - start)
        values = scratch.values(count, dtype)
        offset = 0  # of the span, in the values laid end to end
        for span in spans:
            first, last = max(start, offset), min(start + count, offset + span.values)
            if first < last:
                place = span.start + (first - offset) * span.value_bytes
                part = values[first - start : last - start]
                read = part if span.dtype == dtype else torch.empty_like(part, dtype=span.dtype)
                files.read(span.info.file, place, read)
                if read is not part:
                    part.copy_(read)
            offset += span.values
        yield start, values
