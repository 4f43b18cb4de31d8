"""The process that checks a combination of adapters, asked by adapters.verify.run.

    python -m adapters.verify.combined QUESTION ANSWER

The combination is read by PEFT's rules, and so are the adapters in it: an exact sum is compared value by value, one of
a lower rank by its distance. TIES and DARE have no second reader: what they keep is not compared.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from adapters.chat_template import own_template
from adapters.checkpoint import read_json_object
from adapters.errors import AdapterFileError, StudioError, listed
from adapters.export import Source
from adapters.verify import Check
from adapters.verify.adapter_files import (
    CLOSE,
    SAME,
    changes_of,
    check_beside,
    check_sum,
    check_used,
    matrices_of,
)
from adapters.verify.peft_reading import PeftReading

READ, FINITE, UNTOUCHED = "adapter: can be read", "adapter: finite", "adapter: no other matrix changed"
RECORD = "combination.json"
ROUNDED = 1e-5
"""How much farther from the sum than recorded a combination of a lower rank may be: its factors are float32."""


def check_combined(
    directory: Path, base: Path, adapters: Sequence[Path], weights: Sequence[float], method: str
) -> list[Check]:
    """Every check of a combination in the standard form."""
    after = PeftReading(directory, base)
    before = [(weight, PeftReading(adapter, base)) for weight, adapter in zip(weights, adapters, strict=True)]
    record = read_json_object(directory / RECORD, AdapterFileError)
    return [
        check_used(after, [reading for _, reading in before]),
        check_finite(after),
        check_untouched(after, before),
        check_values(after, before, method, record),
        check_beside(directory, "peft", Source(base, next(filter(own_template, adapters), None), "")),
    ]


def check_finite(after: PeftReading) -> Check:
    pairs = after.pairs.values()
    wrong = [pair.key for pair in pairs if not all(torch.isfinite(one).all() for one in after.factors(pair))]
    return _judged(
        FINITE, [f"{key} holds NaN or infinity" for key in wrong], f"every value of {len(after.keys)} tensors"
    )


def check_untouched(after: PeftReading, before: Sequence[tuple[float, PeftReading]]) -> Check:
    """What none of the adapters changes, the combination does not change either."""
    problems, seen = [], 0
    for name, expert in matrices_of(after):
        if not any(change.any() for change in changes_of(before, name, expert)):
            seen += 1
            if after.delta(after.pairs[name], expert).any():
                problems.append(f"{name}, expert {expert}: none of the adapters changes it, the combination does")
    return _judged(UNTOUCHED, problems, f"{seen} matrices that no adapter changes are not changed")


def check_values(
    after: PeftReading, before: Sequence[tuple[float, PeftReading]], method: str, record: Mapping[str, Any]
) -> Check:
    """The changes themselves, as far as there is a second way to them."""
    if method != "sum":
        why = f"{method} has no second reader here: which values it keeps was not compared"
        return Check(SAME, "not run", why)
    if record["lost"]["largest"] == 0:
        return check_sum(after, before, CLOSE["float32"])
    return check_distance(after, before, float(record["lost"]["largest"]))


def check_distance(after: PeftReading, before: Sequence[tuple[float, PeftReading]], lost: float) -> Check:
    """No matrix is farther from the exact sum than the combination says of itself, as a part of the sum's norm."""
    worst, where = 0.0, ""
    for name, expert in matrices_of(after):
        found = after.delta(after.pairs[name], expert).double()
        wanted = sum(changes_of(before, name, expert), torch.zeros_like(found))
        size = float(wanted.norm())
        off = float((found - wanted).norm()) / size if size else float(found.norm())
        worst, where = max((worst, where), (off, name if expert is None else f"{name}[{expert}]"))
    detail = f"{worst:.2%} of a matrix's change is left out at most ({where}); {RECORD} says {lost:.2%}"
    measured = {"largest_distance": worst, "limit": lost + ROUNDED, "where": where}
    return Check(SAME, "passed" if worst <= lost + ROUNDED else "failed", detail, measured)


def _judged(name: str, problems: list[str], fine: str) -> Check:
    return Check(name, "failed" if problems else "passed", listed("wrong", problems, 8) if problems else fine)


def check(question: Mapping[str, Any]) -> list[Check]:
    """The checks of the question; files that cannot be read are a failed check that says so."""
    directory, base = Path(question["directory"]), Path(question["base"])
    adapters = [Path(adapter) for adapter in question["adapters"]]
    try:
        return check_combined(directory, base, adapters, question["weights"], question["method"])
    except (StudioError, SafetensorError, OSError, LookupError, ValueError, RuntimeError) as error:
        return [Check(READ, "failed", f"{type(error).__name__}: {error}")]


if __name__ == "__main__":
    found = check(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps([asdict(row) for row in found]), encoding="utf-8")
