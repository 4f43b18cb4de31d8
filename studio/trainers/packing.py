"""Packed rows in which examples do not see each other, without flash attention.

TRL's own collator joins all rows of a batch into one of batch x length tokens, whose attention mask grows with the
square of that. Here each packed row stays a row. There is no attention mask for padding: `transformers` makes the
mask from `position_ids`, which begin at 0 with each example (masking_utils.find_packed_sequence_indices), and padding
is one more example at the end of its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from studio.encoding import IGNORED


@dataclass(frozen=True)
class PackedRows:
    """Collates rows {"input_ids", "labels", "seq_lengths"} of TRL's packing.

    Returns:
        `input_ids`, `labels`, `position_ids`, (rows, longest) int64, and `real_tokens`, bool, False for padding. The
        first label of each example is ignored: it would be what the example before it predicts.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        return {
            "input_ids": _filled([row["input_ids"] for row in rows], longest, self.pad_token_id),
            "labels": _filled([_labels(row) for row in rows], longest, IGNORED),
            "position_ids": torch.tensor([_positions(row["seq_lengths"], longest) for row in rows]),
            "real_tokens": torch.arange(longest) < torch.tensor([[len(row["input_ids"])] for row in rows]),
        }


def _filled(rows: list[list[int]], longest: int, filling: int) -> Tensor:
    return torch.tensor([row + [filling] * (longest - len(row)) for row in rows])


def _labels(row: dict[str, Any]) -> list[int]:
    labels, start = list(row["labels"]), 0
    for length in row["seq_lengths"]:
        labels[start] = IGNORED
        start += length
    return labels


def _positions(lengths: Sequence[int], longest: int) -> list[int]:
    lengths = [*lengths, longest - sum(lengths)]
    return [place for length in lengths for place in range(length)]
