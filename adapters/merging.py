"""The values of a merged model as a stream of small pieces, computed by a thread for each core, in order.

    pieces(merged, keys)            how tensors are cut: a few rows of one matrix, or a run of a tensor that is copied
    computed(merged, pieces, …)     each piece in the dtype it is written in, and what rounding did to the delta

One piece is read, merged in float32, rounded once and checked for NaN and infinity while it is in the core's own cache,
so the memory depends neither on the size of the model nor on that of an expert.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from adapters.errors import CheckpointError
from adapters.merged import MergedWeights
from adapters.tensor_files import DTYPES, read_values

PIECE_VALUES = 1 << 20
ROWS = 64
"""Rows of a matrix are merged in multiples of these, and what is left over with the last: a product of a few rows takes
another kernel, whose last bits differ from those of the whole matrix."""

AHEAD = 4
"""Pieces that are computed before the first of them is written."""

FLOAT16_MOST = 65504.0


@dataclass(frozen=True)
class Piece:
    """A run of one tensor's values.

    Attributes:
        expert: of a stack; else None.
        start, stop: rows of the matrix, or, of a tensor that is copied, values of the tensor laid out flat.
    """

    key: str
    expert: int | None
    start: int
    stop: int
    copied: bool


@dataclass(frozen=True)
class Squares:
    """Sums of squares over a run of values: of the delta, of the base, and of what rounding changed; float64."""

    delta: float = 0.0
    weight: float = 0.0
    rounding: float = 0.0

    def __add__(self, other: Squares) -> Squares:
        return Squares(self.delta + other.delta, self.weight + other.weight, self.rounding + other.rounding)


@dataclass(frozen=True)
class TensorDelta:
    """How much one tensor changed.

    Attributes:
        relative: ‖Δ‖ / ‖W‖ (Frobenius).
        lost: ‖rounding of W + Δ‖ / ‖Δ‖: the share of the delta that the written dtype does not hold; 0 in float32.
    """

    key: str
    relative: float
    lost: float


def tensor_delta(key: str, squares: Squares) -> TensorDelta:
    relative = sqrt(squares.delta / squares.weight) if squares.weight else float("inf")
    return TensorDelta(key, relative, sqrt(squares.rounding / squares.delta) if squares.delta else 0.0)


def pieces(merged: MergedWeights, keys: Iterable[str]) -> Iterator[Piece]:
    """The tensors in the order of `keys`, each from its first value to its last."""
    for key in keys:
        shape, values = merged.index[key].shape, merged.index[key].parameters
        if not merged.computed(key):
            for start in range(0, values, PIECE_VALUES):
                yield Piece(key, None, start, min(start + PIECE_VALUES, values), copied=True)
            continue
        for expert in range(shape[0]) if len(shape) == 3 else (None,):
            for first, last in row_runs(*shape[-2:]):
                yield Piece(key, expert, first, last, copied=False)


def row_runs(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    """A matrix cut into runs of about `PIECE_VALUES` values."""
    step = max(1, PIECE_VALUES // cols // ROWS) * ROWS
    starts = [start for start in range(0, rows, step) if start == 0 or rows - start >= ROWS]
    yield from zip(starts, [*starts[1:], rows], strict=True)


def computed(
    merged: MergedWeights, cut: Iterable[Piece], dtype: torch.dtype | None, pool: ThreadPoolExecutor
) -> Iterator[tuple[Piece, Tensor, Squares]]:
    """(piece, its values as they are written, what rounding did), in the order of `cut`.

    Args:
        dtype: of the floating-point tensors; None keeps each tensor's own.

    Raises:
        CheckpointError: a value would be NaN or infinite.
    """
    waiting: deque[tuple[Piece, Future[tuple[Tensor, Squares]]]] = deque()
    for piece in cut:
        waiting.append((piece, pool.submit(compute, merged, piece, written_dtype(merged, piece.key, dtype))))
        if len(waiting) > AHEAD:
            first, future = waiting.popleft()
            yield first, *future.result()
    for first, future in waiting:
        yield first, *future.result()


def written_dtype(merged: MergedWeights, key: str, dtype: torch.dtype | None) -> torch.dtype:
    """What a tensor is written in: `dtype` where it is a floating-point one, else its own.

    The router's correction of its selection stays as it is: a few values that stock keeps in float32 in a 16-bit model.
    """
    own = DTYPES[merged.index[key].dtype]
    keeps = not own.is_floating_point or key.endswith("e_score_correction_bias")
    return own if dtype is None or keeps else dtype


def compute(merged: MergedWeights, piece: Piece, dtype: torch.dtype) -> tuple[Tensor, Squares]:
    """One piece: contiguous, in `dtype`, finite."""
    if piece.copied:
        values = read_values(merged.index[piece.key], piece.start, piece.stop - piece.start)
        written, squares = values.to(dtype), Squares()
    else:
        written, squares = _merged(merged, piece, dtype)
    _check_finite(merged, piece.key, written)
    return written, squares


def _merged(merged: MergedWeights, piece: Piece, dtype: torch.dtype) -> tuple[Tensor, Squares]:
    rows = piece.start, piece.stop
    weight, delta = merged.weight(piece.key, piece.expert, rows), merged.delta(piece.key, piece.expert, rows)
    if delta is None:
        return weight.to(dtype), Squares()
    exact = weight.float()
    before = _square(exact)
    exact = exact.add_(delta) if exact is not weight else exact.add(delta)
    changed = _square(delta)
    written = exact.to(dtype)
    rounding = 0.0 if dtype == torch.float32 else _square(torch.sub(exact, written, out=delta))
    return written, Squares(changed, before, rounding)


def _square(values: Tensor) -> float:
    flat = values.view(-1) if values.is_contiguous() else values.reshape(-1)
    return float(torch.dot(flat, flat))


def _check_finite(merged: MergedWeights, key: str, written: Tensor) -> None:
    if not written.is_floating_point() or not written.numel():
        return
    least, most = (float(value) for value in torch.aminmax(written))
    if least - least == 0 and most - most == 0:  # neither is NaN or infinite
        return
    hint = f", which holds no more than {FLOAT16_MOST:.0f}: write bfloat16" if written.dtype == torch.float16 else ""
    name = str(written.dtype).removeprefix("torch.")
    raise CheckpointError(merged.index[key].file, [f"{key} would hold NaN or infinity as {name} after merging{hint}"])
