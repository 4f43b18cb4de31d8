"""The audit of merged weights, matrix by matrix: base + adapter by PEFT's own formula, against what was written.

It goes through every tensor of the base's files. What the adapter changes is computed by `peft_reading`, which shares
no code with the merge; what it does not change must be the base's, value by value.

Dimension legend: E exported, W base, D delta: one matrix of each, float32, in the axis order of the files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.checkpoint import TensorInfo, read_config, read_index
from adapters.errors import listed
from adapters.export import Source
from adapters.layouts import ExpertLayout, layout_for
from adapters.tensor_files import DTYPES, NAMES, read_tensor
from adapters.verify import Check
from adapters.verify.peft_reading import Pair, PeftReading

Read = Callable[[str, int | None], Tensor]
"""One matrix of the export by its key in the base's files, and its expert where that tensor is a stack."""
Deltas = Mapping[str, Callable[[int | None], Tensor]]

FINITE, TARGETED, UNTOUCHED, USED = (
    "weights: finite",
    "weights: every targeted tensor changed as trained",
    "weights: no other tensor changed",
    "weights: every adapter tensor used",
)
TELLING = 0.2
"""The share of D that is carried is judged where rounding moves it by less than this."""


@dataclass(frozen=True)
class Rounding:
    """How far a right matrix may lie from W + D.

    Attributes:
        relative: ‖E − (W + D)‖ / ‖W + D‖, at most.
        ulp: |E − (W + D)| / |W + D| of each value, at most; None for formats whose blocks share a scale.
        exact: tensors that are not targeted must be the base's, rounded to the dtype, bit by bit.
    """

    relative: float
    ulp: float | None
    exact: bool = True


ROUNDINGS = {
    torch.float32: Rounding(2e-6, 2e-5),
    torch.float64: Rounding(2e-6, 2e-5),
    torch.float16: Rounding(4e-4, 2**-10),
    torch.bfloat16: Rounding(3e-3, 2**-7),
}
"""Half a unit in the last place is 2^-12 of a float16's value, 2^-9 of a bfloat16's; the mean error is about half."""


@dataclass
class Findings:
    """What the audit has seen so far; `problems` by check."""

    problems: dict[str, list[str]] = field(default_factory=lambda: {FINITE: [], TARGETED: [], UNTOUCHED: []})
    targeted: int = 0
    changed: int = 0
    untouched: int = 0
    eaten: int = 0
    worst: float = 0.0

    def note(self, check: str, problem: str) -> None:
        self.problems[check].append(problem)


def audit(
    source: Source, read: Read, rounding: Callable[[str], Rounding | None] | None = None, dtype: str | None = None
) -> list[Check]:
    """Holds every matrix of an export against base and adapter; one matrix of each is in memory at a time.

    Args:
        read: gives what was written, as float or in the file's own dtype.
        rounding: of the format, by the tensor's key; None for plain tensors: by the dtype of each.
        dtype: of plain tensors, where it is not the base's.
    """
    index = read_index(source.base)
    layout = layout_for(read_config(source.base), index)
    reading = PeftReading(source.adapter, source.base) if source.adapter else None
    deltas = file_deltas(reading, layout) if reading else {}
    base = _base_reader(source, index, deltas)
    found = Findings()
    for key, info in index.items():
        written, allowed = _dtype(key, info, dtype), rounding(key) if rounding else None
        for expert in range(info.shape[0]) if len(info.shape) == 3 else [None]:
            delta = deltas[key](expert) if key in deltas else None
            _audit_matrix(found, _label(key, expert), read(key, expert), base(key, expert), delta, written, allowed)
    checks = [_check(FINITE, found, f"every value of {len(index)} tensors"), _targeted(found), _untouched(found)]
    return [*checks, *([_used(reading, deltas, index)] if reading else [])]


def file_deltas(reading: PeftReading, layout: ExpertLayout) -> Deltas:
    """What is added to each targeted tensor of the base's files, by its key there; an expert's where it is a stack."""
    found: dict[str, Callable[[int | None], Tensor]] = {}
    for pair in reading.pairs.values():
        if len(pair.shape) == 2:
            found[layout.checkpoint_key(pair.parameter)] = _delta_of(reading, pair)
            continue
        for expert in range(pair.shape[0]):
            sources = layout.sources(pair.parameter, expert)
            for number, place in enumerate(sources):
                whole = place.expert is not None
                part = None if whole else (expert, number, len(sources))
                found[place.key] = _delta_of(reading, pair, part)
    return found


def _delta_of(
    reading: PeftReading, pair: Pair, part: tuple[int, int, int] | None = None
) -> Callable[[int | None], Tensor]:
    """The delta of a tensor; `part` (expert, i, n) where it holds the i-th of n equal runs of rows of an expert's."""

    def delta(expert: int | None) -> Tensor:
        if part is None:
            return reading.delta(pair, expert)
        return reading.delta(pair, part[0]).chunk(part[2])[part[1]]

    return delta


def _base_reader(source: Source, index: Mapping[str, TensorInfo], deltas: Deltas) -> Read:
    """W: from the base's files, or as training held it."""
    if source.held is None:
        return lambda key, expert: read_tensor(index[key], expert)
    merged = source.open()

    def held(key: str, expert: int | None) -> Tensor:
        tensor = merged.read(key, expert)
        return tensor - deltas[key](expert) if key in deltas else tensor

    return held


def _dtype(key: str, info: TensorInfo, dtype: str | None) -> torch.dtype:
    """The router's correction of its selection keeps its own, as stock keeps it in float32 in a 16-bit model."""
    own = DTYPES[info.dtype]
    plain = own.is_floating_point and not key.endswith("e_score_correction_bias")
    return getattr(torch, dtype) if dtype and plain else own


def _label(key: str, expert: int | None) -> str:
    return key if expert is None else f"{key} (expert {expert})"


def _audit_matrix(
    found: Findings,
    label: str,
    written: Tensor,
    base: Tensor,
    delta: Tensor | None,
    dtype: torch.dtype,
    rounding: Rounding | None,
) -> None:
    if written.shape != base.shape:
        found.note(
            TARGETED if delta is not None else UNTOUCHED, f"{label} is {tuple(written.shape)}, not {tuple(base.shape)}"
        )
    elif not torch.isfinite(written).all():
        found.note(FINITE, f"{label} holds NaN or infinity")
    elif delta is None:
        _audit_untouched(found, label, written, base, dtype, rounding)
    else:
        plain = dtype if rounding is None else None
        _audit_targeted(found, label, written.float(), base.float(), delta, rounding or ROUNDINGS[dtype], plain)


def _audit_untouched(
    found: Findings, label: str, written: Tensor, base: Tensor, dtype: torch.dtype, rounding: Rounding | None
) -> None:
    found.untouched += 1
    if rounding is None or rounding.exact:
        if not torch.equal(written, base.to(dtype)):
            found.note(UNTOUCHED, f"{label} is not the base's, and the adapter does not target it")
        return
    error = _relative(written.float() - base.float(), base.float())
    if error > rounding.relative:
        found.note(UNTOUCHED, f"{label} lies {error:.1e} of its size from the base's (limit {rounding.relative:.0e})")


def _audit_targeted(
    found: Findings,
    label: str,
    written: Tensor,
    base: Tensor,
    delta: Tensor,
    rounding: Rounding,
    plain: torch.dtype | None,
) -> None:
    exact = base + delta
    error = written - exact
    relative = _relative(error, exact)
    found.targeted += 1
    found.worst = max(found.worst, relative)
    moved = bool(delta.any())
    if relative > rounding.relative:
        share = f", {100 * _carried(written - base, delta):.0f} % of the trained change is there" if moved else ""
        found.note(
            TARGETED,
            f"{label} lies {relative:.1e} of its size from base + adapter (limit {rounding.relative:.0e}){share}",
        )
        return
    if rounding.ulp is not None and (error.abs() > rounding.ulp * exact.abs() + 1e-5 * exact.abs().max()).any():
        found.note(TARGETED, f"{label} has values off by more than rounding")
        return
    if moved:
        whole = 1.0 if plain is None else _carried(exact.to(plain).float() - base, delta)
        _audit_carried(found, label, written - base, delta, base, rounding, whole)


def _audit_carried(
    found: Findings, label: str, change: Tensor, delta: Tensor, base: Tensor, rounding: Rounding, whole: float
) -> None:
    """A delta as small as the rounding is still seen as a whole: rounding errors cancel along it, a lost one is 0.

    They do not where the base's values lie on the grid that is rounded to: there most of a tiny delta goes, and `whole`
    is the share that right rounding leaves.
    """
    telling = rounding.relative * float(base.norm()) / (float(delta.norm()) * delta.numel() ** 0.5)
    if telling > TELLING or whole < 5 * TELLING / 2:
        found.eaten += 1
        return
    found.changed += 1
    if abs(_carried(change, delta) - whole) > 5 * TELLING / 2:
        found.note(TARGETED, f"{label}: {100 * _carried(change, delta):.0f} % of the trained change is there")


def _carried(change: Tensor, delta: Tensor) -> float:
    """How much of `delta` is in `change`: 1 for all of it."""
    return float((change.double() * delta.double()).sum() / delta.double().square().sum())


def _relative(error: Tensor, exact: Tensor) -> float:
    size = float(exact.norm())
    return float(error.norm()) / size if size else float(error.norm())


def _check(name: str, found: Findings, fine: str, measured: Mapping[str, Any] | None = None) -> Check:
    problems = found.problems[name]
    detail = listed(f"{len(problems)} of them wrong", problems, 8) if problems else fine
    return Check(name, "failed" if problems else "passed", detail, dict(measured or {}))


def _targeted(found: Findings) -> Check:
    """Zero deltas, of experts without an adapter, are held against the base like all others."""
    eaten = f"; {found.eaten} deltas are so small that rounding hides them" if found.eaten else ""
    fine = (
        f"{found.changed} of {found.targeted} targeted matrices changed, each as PEFT's formula has it, the others "
        f"have no delta (worst distance {found.worst:.1e}){eaten}"
    )
    counts = {"targeted": found.targeted, "changed": found.changed, "eaten": found.eaten, "worst": found.worst}
    return _check(TARGETED, found, fine, counts)


def _untouched(found: Findings) -> Check:
    return _check(UNTOUCHED, found, f"{found.untouched} matrices are the base's", {"untouched": found.untouched})


def _used(reading: PeftReading, deltas: Deltas, index: Mapping[str, TensorInfo]) -> Check:
    problems = [f"{key} is no factor of any tensor" for key in reading.unused()]
    problems += [f"{key} is targeted, but not in the base" for key in deltas if key not in index]
    fine = f"{len(reading.keys)} adapter tensors belong to {len(deltas)} tensors of the export"
    detail = listed("not all are used", problems, 8) if problems else fine
    return Check(USED, "failed" if problems else "passed", detail, {"adapter_tensors": len(reading.keys)})


def file_reader(directory: Path) -> Read:
    """Reads an export that is plain safetensors in the base's layout."""
    index = read_index(directory)
    return lambda key, expert: read_tensor(index[key], expert)


def dtype_names(key: str, info: TensorInfo, dtype: str | None) -> set[str]:
    """The safetensors dtypes that an exported tensor may have."""
    return {NAMES[_dtype(key, info, dtype)]}
