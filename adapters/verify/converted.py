"""The process that checks an adapter in its other form, compact or standard. Asked by adapters.verify.run.

    python -m adapters.verify.converted QUESTION ANSWER

The compact file is read here a second time, expert by expert: the two forms hold the same bits.

Dimension legend: E experts, r the rank of a stack in the standard file, R sum of the experts' own ranks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapters.adapter_files import COMPACT_WEIGHTS, CONFIG, WEIGHTS
from adapters.errors import StudioError, listed
from adapters.sidecar import SIDECAR, read_sidecar
from adapters.verify import Check

READ, USED, FINITE, BITS, SETTINGS, BESIDE = (
    "adapter: can be read",
    "adapter: every tensor in both forms",
    "adapter: finite",
    "adapter: the same bits",
    "adapter: its config",
    "adapter: the sidecar",
)


def check_converted(directory: Path, adapter: Path) -> list[Check]:
    """Every check of an adapter in its other form; one of the two directories is compact."""
    to_standard = (directory / WEIGHTS).is_file()
    standard, compact = (directory, adapter) if to_standard else (adapter, directory)
    return [
        *check_bits(standard / WEIGHTS, compact / COMPACT_WEIGHTS),
        _judged(SETTINGS, _other_config(directory, adapter), f"{CONFIG} is the adapter's, byte by byte"),
        check_form(directory, adapter, "peft" if to_standard else "compact"),
    ]


def check_bits(standard: Path, compact: Path) -> list[Check]:
    """Every expert's factors in both files, and every other tensor; nothing but zeros beside them."""
    problems, experts, broken = [], 0, []
    with safe_open(standard, "pt") as first, safe_open(compact, "pt") as second:
        stacks = json.loads(second.metadata()["compact_adapter"])["stacks"]
        names, others = set(first.keys()), set(second.keys())
        for key in sorted(names & others):
            module, _, side = key.removesuffix(".weight").rpartition(".")
            one, other = first.get_tensor(key), second.get_tensor(key)
            broken += [key] * (not (torch.isfinite(one).all() and torch.isfinite(other).all()))
            if module in stacks:
                ranks = stacks[module]["ranks"]
                problems += [f"{key}: {what}" for what in _stack(one, other, side, ranks, stacks[module]["rank"])]
                experts += sum(rank > 0 for rank in ranks) * (side == "lora_A")
            elif not _same(one, other):
                problems.append(f"{key} differs")
    lost = [f"{key} is in one file alone" for key in sorted(names ^ others)]
    return [
        _judged(USED, lost, f"{len(names)} tensors are in both"),
        _judged(FINITE, [f"{key} holds NaN or infinity" for key in broken], f"every value of {len(names)} tensors"),
        _judged(BITS, problems, f"{experts} expert matrices and every other tensor are the same, bit by bit"),
    ]


def _stack(standard: Tensor, compact: Tensor, side: str, ranks: Sequence[int], rank: int) -> list[str]:
    """What differs in one factor of a stack.

    Args:
        standard: lora_A (E·r, ·), expert-major, or lora_B (·, r·E), rank-major. compact: (R, ·) of either.
    """
    count = len(ranks)
    long = standard.shape[0 if side == "lora_A" else 1]
    if long != count * rank or len(compact) != sum(ranks):
        return [f"{long} and {len(compact)} rows do not fit {count} experts of rank {rank}, {sum(ranks)} rows in all"]
    wrong, start = [], 0
    for expert, own in enumerate(ranks):
        rows = standard[expert * rank : (expert + 1) * rank] if side == "lora_A" else standard[:, expert::count].t()
        if not _same(rows[:own], compact[start : start + own]):
            wrong.append(f"expert {expert} differs")
        elif rows[own:].any():
            wrong.append(f"expert {expert} has values above its rank {own}")
        start += own
    return wrong


def _same(one: Tensor, other: Tensor) -> bool:
    """Bit by bit, negative zeros too."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    pair = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other))
    return torch.equal(*pair)


def _other_config(directory: Path, adapter: Path) -> list[str]:
    same = (directory / CONFIG).read_bytes() == (adapter / CONFIG).read_bytes()
    return [] if same else [f"{CONFIG} is not the adapter's"]


def check_form(directory: Path, adapter: Path, form: str) -> Check:
    """The sidecar names the new form and says nothing else anew."""
    before, after = read_sidecar(adapter), read_sidecar(directory)
    if before is None and after is None:
        return Check(BESIDE, "not run", f"the adapter has no {SIDECAR}")
    kept = ("base_name", "base", "held", "peft_version", "model_type")
    problems = [f"{name} has changed" for name in kept if getattr(before, name, None) != getattr(after, name, None)]
    if after is None or after.format != form:
        problems.append(f"format is {after.format if after else None!r}, expected {form!r}")
    return _judged(BESIDE, problems, f"form {form}, else the adapter's")


def _judged(name: str, problems: list[str], fine: str) -> Check:
    return Check(name, "failed" if problems else "passed", listed("wrong", problems, 8) if problems else fine)


def check(question: Mapping[str, Any]) -> list[Check]:
    """The checks of the question; files that cannot be read are a failed check that says so."""
    try:
        return check_converted(Path(question["directory"]), Path(question["adapter"]))
    except (StudioError, SafetensorError, OSError, LookupError, ValueError, RuntimeError) as error:
        return [Check(READ, "failed", f"{type(error).__name__}: {error}")]


if __name__ == "__main__":
    found = check(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps([asdict(row) for row in found]), encoding="utf-8")
