"""Dropout of an adapter's inputs on routed experts: a mask that the backward makes again instead of keeping it.

Whether a value is dropped is a function of a seed, of its (token, expert) pair and of its column, by a 32-bit hash. So
it does not depend on the groups in which pairs are computed, on the path (fast or lean), or on the device, and a whole
layer's masks cost no memory. The seed is drawn from torch's generator at each forward, which gradient checkpointing
sets back before it computes a layer again.

Dimension legend: P pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST, SECOND = 0x7FEB352D, 0x846CA68B - 2**32
"""Multipliers of `lowbias32` (C. Wellons, hash-prospector: bias 0.17 of 1,000), as signed numbers of 32 bits."""

GOLDEN = 0x9E3779B9
WORD = 0xFFFFFFFF


def draw_seed() -> int:
    """A seed from torch's own generator of the CPU."""
    return int(torch.randint(2**31, ()))


def keep_mask(seed: int, pairs_P: Tensor, columns: int, share: float, dtype: torch.dtype) -> Tensor:
    """(P, columns): 0 where a value is dropped, with probability `share`, else 1 / (1 - share).

    Args:
        pairs_P: the number of each pair in the call, token · K + k; integers.
    """
    rows = _words(pairs_P.to(torch.int64), seed)
    wide = torch.arange(columns, device=pairs_P.device, dtype=torch.int64)
    mixed = rows[:, None] ^ _words(wide, seed ^ GOLDEN)[None, :]
    _mix(mixed)
    threshold = round(share * 2**32) - 2**31
    return (mixed >= threshold).to(dtype).mul_(1 / (1 - share))


def _words(numbers: Tensor, seed: int) -> Tensor:
    """A random word of 32 bits, as int32, for each number."""
    words = (numbers * GOLDEN + seed * 2_654_435_761) & WORD
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    _mix(words)
    words ^= (words >> 16) & 0xFFFF
    return words


def _mix(words: Tensor) -> None:
    """Spreads every bit over the higher ones, in place; int32 products wrap around."""
    words ^= (words >> 16) & 0xFFFF
    words *= FIRST
    words ^= (words >> 15) & 0x1FFFF
    words *= SECOND
