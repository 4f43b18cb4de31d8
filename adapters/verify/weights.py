"""The audit of merged weights, matrix by matrix: base + adapter by PEFT's own formula, against what was written.

It goes through every tensor of the base's files. What the adapter changes is computed by `peft_reading`, which shares
no code with the merge; what it does not change must be the base's, value by value.

Dimension legend: E exported, W base, D delta: one matrix of each, float32, in the axis order of the files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.checkpoint import TensorInfo, read_config, read_index
from adapters.errors import listed
from adapters.export import Source
from adapters.layouts import ExpertLayout, layout_for
from adapters.sidecar import read_sidecar
from adapters.tensor_files import DTYPES, NAMES, OpenFiles, read_tensor
from adapters.verify import Check
from adapters.verify.fresh import tell_parent
from adapters.verify.held_reading import HeldReading
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
TELLING = 0.1
"""The share of D that is carried is judged where quantisation moves it by less than this; of other matrices together.
"""
SHARE, DEVIATIONS, SHRUNK = 0.02, 5, 1 / 2
"""How far that share may be from 1: at least `SHARE`, else so many of its deviations, which are twice those measured;
and a quantiser shrinks what it rounds by about its squared error (0.96 carried, at an error of 0.2, in Q3_K)."""
ON_GRID = 0.5
"""The same of a base held quantised: its values lie on a grid, and one that quantises them again to the same grid takes
small changes back (74 % carried, nf4 into nf4, measured)."""
PART_VALUES = 1 << 19
"""Values that are compared at one time: they stay in a core's cache, and what stands beside a matrix stays small."""
MISSED = 0.1
"""Another order of summation tips a few values the other way: about 1 in 10,000 of those that a delta changes."""


@dataclass(frozen=True)
class Rounding:
    """How far a right matrix may lie from W + D.

    Attributes:
        relative: ‖E − (W + D)‖ / ‖W + D‖, at most.
        ulp: |E − (W + D)| / |W + D| of each value, at most; None for formats whose blocks share a scale.
        exact: tensors that are not targeted must be the base's, rounded to the dtype, bit by bit.
        share: how far the share of D that is carried may be from 1, at least.
        dtype: of a tensor that lies unquantised among quantised ones: it is held to what that dtype allows.
    """

    relative: float
    ulp: float | None
    exact: bool = True
    dtype: torch.dtype | None = None
    share: float = SHARE


ROUNDINGS = {
    torch.float32: Rounding(2e-6, 2e-5),
    torch.float64: Rounding(2e-6, 2e-5),
    torch.float16: Rounding(4e-4, 2**-10),
    torch.bfloat16: Rounding(3e-3, 2**-7),
}
"""Half a unit in the last place is 2^-12 of a float16's value, 2^-9 of a bfloat16's; the mean error is about half."""


@dataclass
class Faint:
    """Changes each too small beside the rounding to be judged alone, summed up: all of them lost is seen.

    Attributes:
        shared: Σ ⟨E − W, D⟩. size: Σ ‖D‖². variance: of `shared`, by rounding.
        rounding: the coarsest one.
    """

    shared: float = 0.0
    size: float = 0.0
    variance: float = 0.0
    rounding: Rounding = Rounding(0.0, None)

    def add(self, other: Faint) -> None:
        self.shared += other.shared
        self.size += other.size
        self.variance += other.variance
        self.rounding = max(self.rounding, other.rounding, key=lambda rounding: rounding.relative)

    def problem(self) -> str:
        """What is wrong with them, "" where nothing is or even their sum cannot tell."""
        telling = self.variance**0.5 / self.size if self.size else 1.0
        carried = self.shared / self.size if self.size else 1.0
        if telling > TELLING or abs(carried - 1) <= _allowed(telling, self.rounding):
            return ""
        return f"of the changes that rounding nearly hides {100 * carried:.0f} % are there, all together"


@dataclass
class Findings:
    """What the audit has seen so far; `problems` by check."""

    problems: dict[str, list[str]] = field(default_factory=lambda: {FINITE: [], TARGETED: [], UNTOUCHED: []})
    targeted: int = 0
    changed: int = 0
    untouched: int = 0
    eaten: int = 0
    worst: float = 0.0
    faint: Faint = field(default_factory=lambda: Faint())

    def note(self, check: str, problem: str) -> None:
        self.problems[check].append(problem)

    def add(self, parts: Findings) -> None:
        """What was seen of one matrix, in parts: it counts once, with its first problem."""
        for check, problems in parts.problems.items():
            self.problems[check] += problems[:1]
        self.targeted += min(1, parts.targeted)
        self.changed += min(1, parts.changed)
        self.untouched += min(1, parts.untouched)
        self.eaten += min(1, parts.eaten) if not parts.changed else 0
        self.worst = max(self.worst, parts.worst)
        self.faint.add(parts.faint)


def audit(
    source: Source, read: Read, rounding: Callable[[str], Rounding | None] | None = None, dtype: str | None = None
) -> list[Check]:
    """Holds every matrix of an export against base and adapter; one matrix of each is in memory at a time.

    In a process that was asked it says how many bytes of the base lie behind it.

    Args:
        read: gives what was written, as float or in the file's own dtype.
        rounding: of the format, by the tensor's key; None for plain tensors: by the dtype of each.
        dtype: of plain tensors, where it is not the base's.
    """
    index = read_index(source.base)
    layout = layout_for(read_config(source.base), index)
    reading = PeftReading(source.adapter, source.base) if source.adapter else None
    sidecar = read_sidecar(source.adapter) if source.adapter else None
    if reading and source.held is not None and sidecar and sidecar.start == "loftq":
        reading.leave_out_start(layout.class_modules("router"))
    deltas = file_deltas(reading, layout) if reading else {}
    pairs = reading.pairs.values() if reading else ()
    doras = {layout.checkpoint_key(pair.parameter): pair for pair in pairs if reading and reading.is_dora(pair)}
    base = _base_reader(source, index)
    found = Findings()
    total, done = sum(info.size_bytes for info in index.values()), 0
    for key, info in index.items():
        tell_parent(done, total)
        done += info.size_bytes
        written, allowed = _dtype(key, info, dtype), rounding(key) if rounding else None
        if allowed and allowed.dtype:
            written, allowed = allowed.dtype, None
        if allowed and source.held:
            allowed = replace(allowed, share=ON_GRID)
        if (
            key not in deltas
            and allowed is None
            and isinstance(read, FileReader)
            and not source.held
            and read.index[key].dtype == info.dtype
        ):
            _audit_bytes(found, key, info, read.index[key])
            continue
        for expert in range(info.shape[0]) if len(info.shape) == 3 else [None]:
            delta, weight = deltas[key](expert) if key in deltas else None, base(key, expert)
            if reading is not None and delta is not None and (pair := doras.get(key)):
                delta = reading.dora(pair, weight, delta)
            _audit_matrix(found, _label(key, expert), read(key, expert), weight, delta, written, allowed)
    if problem := found.faint.problem():
        found.note(TARGETED, problem)
    checks = [_check(FINITE, found, f"every value of {len(index)} tensors"), _untouched(found)]
    return [*checks, _targeted(found), _used(reading, deltas, index)] if reading else checks


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


def _base_reader(source: Source, index: Mapping[str, TensorInfo]) -> Read:
    """W: from the base's files, or as training held it; no adapter is read, so none can be taken for the base's."""
    if source.held is None:
        return lambda key, expert: read_tensor(index[key], expert)
    return HeldReading(source.base, source.held)


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
        problem = f"{label} is {tuple(written.shape)}, not {tuple(base.shape)}"
        found.note(UNTOUCHED if delta is None else TARGETED, problem)
        return
    parts, rows = Findings(), max(1, PART_VALUES // max(1, written[:1].numel())) if written.ndim else 1
    for start in range(0, len(written) if written.ndim else 1, rows):
        part = slice(start, start + rows) if written.ndim else ...
        if not torch.isfinite(written[part]).all():
            parts.note(FINITE, f"{label} holds NaN or infinity")
        elif delta is None:
            _audit_untouched(parts, label, written[part], base[part], dtype, rounding)
        else:
            _audit_targeted(parts, label, written[part].float(), base[part].float(), delta[part], dtype, rounding)
    found.add(parts)


def _audit_bytes(found: Findings, key: str, base: TensorInfo, written: TensorInfo) -> None:
    """A tensor that is to be the base's to the last bit, compared in pieces: the largest are not targeted."""
    found.untouched += base.shape[0] if len(base.shape) == 3 else 1
    dtype, done = DTYPES[base.dtype], 0
    with OpenFiles() as files:
        while done < base.size_bytes:
            count = min(PART_VALUES, (base.size_bytes - done) // dtype.itemsize)
            pair = [torch.empty(count, dtype=dtype) for _ in range(2)]
            for info, piece in zip((base, written), pair, strict=True):
                files.read(info.file, info.start + done, piece)
            if not torch.isfinite(pair[1]).all():
                found.note(FINITE, f"{key} holds NaN or infinity")
                return
            if not torch.equal(*pair):
                found.note(UNTOUCHED, f"{key} is not the base's, and the adapter does not target it")
                return
            done += count * dtype.itemsize


def _audit_untouched(
    found: Findings, label: str, written: Tensor, base: Tensor, dtype: torch.dtype, rounding: Rounding | None
) -> None:
    found.untouched += 1
    if rounding is None or rounding.exact:
        if not torch.equal(written, base.to(dtype).to(written.dtype)):
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
    dtype: torch.dtype,
    rounding: Rounding | None,
) -> None:
    exact, limit = base + delta, rounding or ROUNDINGS[dtype]
    relative = _relative(written - exact, exact)
    found.targeted += 1
    found.worst = max(found.worst, relative)
    if relative > limit.relative:
        share = f", {100 * _carried(written - base, delta):.0f} % of the trained change is there" if delta.any() else ""
        size = f"{relative:.1e} of its size from base + adapter (limit {limit.relative:.0e})"
        found.note(TARGETED, f"{label} lies {size}{share}")
    elif rounding is None:
        _audit_rounded(found, label, written, base, exact.to(dtype).float(), limit, bool(delta.any()))
    elif delta.any():
        _audit_carried(found, label, written - base, delta, base, rounding)


def _audit_rounded(
    found: Findings, label: str, written: Tensor, base: Tensor, rounded: Tensor, limit: Rounding, trained: bool
) -> None:
    """Value by value: of a delta as small as the rounding, those that it tips to their neighbours are still seen."""
    error = (written - rounded).abs()
    if (error > (limit.ulp or 0.0) * rounded.abs() + 1e-5 * rounded.abs().max()).any():
        found.note(TARGETED, f"{label} has values off by more than rounding")
        return
    tipped = rounded != base
    count = int(tipped.sum())
    if not count:
        found.eaten += trained
        return
    found.changed += 1
    missed = int(tipped.logical_and_(error > (rounded - base).abs_().mul_(0.5)).sum())
    if missed > max(1, MISSED * count):
        found.note(TARGETED, f"{label}: {missed:,} of the {count:,} values that training changed are still the base's")


def _audit_carried(
    found: Findings, label: str, change: Tensor, delta: Tensor, base: Tensor, rounding: Rounding
) -> None:
    """Where blocks share a scale no value tells, but errors cancel along the delta: a lost one is 0, a right one 1."""
    size = float(delta.norm())
    telling = rounding.relative * float(base.norm()) / (size * delta.numel() ** 0.5)
    carried = _carried(change, delta)
    if telling > TELLING:
        found.eaten += 1
        found.faint.add(Faint(carried * size**2, size**2, (telling * size**2) ** 2, rounding))
        return
    found.changed += 1
    if abs(carried - 1) > _allowed(telling, rounding):
        found.note(TARGETED, f"{label}: {100 * carried:.0f} % of the trained change is there")


def _allowed(telling: float, rounding: Rounding) -> float:
    """How far the carried share may be from 1, where rounding moves it by `telling`."""
    return max(rounding.share, DEVIATIONS * telling) + SHRUNK * rounding.relative**2


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
    none = found.targeted - found.changed - found.eaten
    fine = (
        f"{found.changed} of {found.targeted} targeted matrices changed, each as PEFT's formula has it (worst distance "
        f"{found.worst:.1e})"
    )
    fine += f"; {none} have no delta, as experts that no token reached" if none else ""
    fine += f"; the delta of {found.eaten} is smaller than the rounding and hidden by it" if found.eaten else ""
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


class FileReader:
    """Reads an export that is plain safetensors in the base's layout."""

    def __init__(self, directory: Path):
        self.index = read_index(directory)

    def __call__(self, key: str, expert: int | None) -> Tensor:
        return read_tensor(self.index[key], expert)


def dtype_names(key: str, info: TensorInfo, dtype: str | None) -> set[str]:
    """The safetensors dtypes that an exported tensor may have."""
    return {NAMES[_dtype(key, info, dtype)]}
