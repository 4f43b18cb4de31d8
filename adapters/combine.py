"""Several adapters of one base as one: weighted sums, TIES and DARE, matrix by matrix and expert by expert.

Dimension legend: N adapters, i one of them, r_i its rank, R the rank of the result. Every adapter i adds
w_i · B_i A_i, its weight w_i of any sign: a negative one takes a task away (task arithmetic, Ilharco et al., 2023,
arXiv 2212.04089).

    sum     exact: A is the A_i one below the other, B the w_i · B_i side by side; R is the sum of the r_i
            with a rank: the nearest matrix of that rank (Eckart, Young), by QR of the factors, no delta formed
    ties    trim each delta to its largest values, elect a sign for every value, take the mean of those that agree
            (Yadav et al., 2023, arXiv 2306.01708); signs are elected after weighting
    dare    drop values of each delta at random, rescale the rest by 1 / density, add up (Yu et al., 2024,
            arXiv 2311.03099); seeded by the adapter's place, tensor and expert: the order matters, the machine does not

What ties and dare give has no low rank; the result is its nearest matrix of rank R, and `lost` says how far off.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.adapter_files import CONFIG, WEIGHTS
from adapters.chat_template import TEMPLATE, copy_template, own_template
from adapters.errors import AdapterFileError, OutputExistsError
from adapters.export import Progress
from adapters.export.peft import write_standard
from adapters.factors import Factors, Part, expert_count, opened, parts_of
from adapters.merged import MergedWeights
from adapters.peft_files import peft_sidecar
from adapters.sidecar import check_base, read_sidecar, write_sidecar
from adapters.tensor_files import new_directory

RECORD = "combination.json"
LARGE = 256
"""From this side on a dense delta is factored by the randomised algorithm: exact would take minutes a matrix."""

Matrices = list[tuple[Tensor, Tensor]]
"""Of each adapter A (r_i, in) and w_i · B_i (out, r_i) for one matrix."""


@dataclass(frozen=True)
class Settings:
    """How adapters are combined.

    Attributes:
        method: a name in METHODS.
        weights: one of each adapter.
        rank: of the result; None: for sum exact, else the sum of the adapters' ranks.
        density: the fraction of values that ties and dare keep.
        seed: of dare.
    """

    method: str
    weights: tuple[float, ...]
    rank: int | None = None
    density: float = 0.2
    seed: int = 0


@dataclass
class Lost:
    """The share of the combined delta's Frobenius norm that its rank could not hold, by matrix."""

    fractions: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, float]:
        found = self.fractions or [0.0]
        return {"largest": max(found), "mean": sum(found) / len(found)}


# -------------------------------------------------------------------- one matrix


def concatenated(matrices: Matrices) -> tuple[Tensor, Tensor]:
    """A (R, in) and B (out, R) of the exact sum."""
    return torch.cat([a for a, _ in matrices]), torch.cat([b for _, b in matrices], dim=1)


def compressed(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The factors of rank `rank` nearest to B A, and the fraction of its norm that is lost.

    B A = Q_B (R_B R_Aᵀ) Q_Aᵀ, so the singular values are those of an R × R matrix.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().t())
    u, s, v = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    found = (q_a @ v[:rank].t()).t(), q_b @ (u[:, :rank] * s[:rank])
    return found[0].float(), found[1].float(), _lost(s[:rank], s.square().sum())


def factored(delta: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, float]:
    """As `compressed`, of a dense matrix (out, in)."""
    rank = min(rank, *delta.shape)
    if min(delta.shape) < LARGE:
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            u, s, right = torch.svd_lowrank(delta, q=min(rank + 16, *delta.shape), niter=4)
        v = right.t()
    return v[:rank], u[:, :rank] * s[:rank], _lost(s[:rank], delta.double().square().sum())


def _lost(kept: Tensor, whole: Tensor) -> float:
    return math.sqrt(max(0.0, 1 - float(kept.double().square().sum() / whole))) if whole > 0 else 0.0


def ties(deltas: Tensor, density: float) -> Tensor:
    """(out, in) from the weighted deltas (N, out, in)."""
    keep = max(1, int(density * deltas[0].numel()))
    flat = deltas.flatten(1)
    chosen = flat.abs().topk(keep, dim=1).indices
    trimmed = torch.zeros_like(flat).scatter_(1, chosen, flat.gather(1, chosen)).view_as(deltas)
    agree = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    return (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)


def dare(deltas: Tensor, density: float, seeds: Sequence[int]) -> Tensor:
    """(out, in) from the weighted deltas (N, out, in); `seeds` one of each."""
    total = torch.zeros_like(deltas[0])
    for delta, seed in zip(deltas, seeds, strict=True):
        kept = torch.rand(delta.shape, generator=torch.Generator().manual_seed(seed)) < density
        total += delta * kept / density
    return total


def seed_of(seed: int, *where: object) -> int:
    """A seed of its own for each place, the same in every run."""
    return int.from_bytes(hashlib.sha256(repr((seed, *where)).encode()).digest()[:8], "little") >> 1


def _sum(matrices: Matrices, rank: int, settings: Settings, where: tuple[str, int]) -> tuple[Tensor, Tensor, float]:
    a, b = concatenated(matrices)
    return (a, b, 0.0) if len(a) <= rank else compressed(a, b, rank)


def _ties(matrices: Matrices, rank: int, settings: Settings, where: tuple[str, int]) -> tuple[Tensor, Tensor, float]:
    dense = ties(torch.stack([b @ a for a, b in matrices]), settings.density)
    return factored(dense, rank, seed_of(settings.seed, *where))


def _dare(matrices: Matrices, rank: int, settings: Settings, where: tuple[str, int]) -> tuple[Tensor, Tensor, float]:
    seeds = [seed_of(settings.seed, number, *where) for number in range(len(matrices))]
    dense = dare(torch.stack([b @ a for a, b in matrices]), settings.density, seeds)
    return factored(dense, rank, seed_of(settings.seed, *where))


METHODS: dict[str, Callable[[Matrices, int, Settings, tuple[str, int]], tuple[Tensor, Tensor, float]]] = {
    "sum": _sum,
    "ties": _ties,
    "dare": _dare,
}


# -------------------------------------------------------------------- whole adapters


def combined_parts(adapters: Sequence[Sequence[Part]], settings: Settings, lost: Lost) -> list[Part]:
    """The parts of the combination, by name; each is computed when it is loaded, expert by expert.

    Raises:
        AdapterFileError: the adapters give one tensor different shapes.
    """
    by_name = [{part.name: part for part in parts} for parts in adapters]
    names = sorted({name for parts in by_name for name in parts})
    return [_combined([parts.get(name) for parts in by_name], settings, lost) for name in names]


def _combined(parts: Sequence[Part | None], settings: Settings, lost: Lost) -> Part:
    like = next(part for part in parts if part is not None)
    shapes = {(len(part.ranks), part.outputs, part.inputs) for part in parts if part is not None}
    if len(shapes) > 1:
        raise AdapterFileError(f"{like.name} has shapes {sorted(shapes)} in the adapters: they are of different models")
    sums = [sum(part.ranks[expert] for part in parts if part is not None) for expert in range(len(like.ranks))]
    ranks = tuple(_rank(total, min(like.outputs, like.inputs), settings) for total in sums)
    return replace(like, ranks=ranks, load=partial(_load, parts, ranks, settings, lost, like))


def _rank(total: int, room: int, settings: Settings) -> int:
    """The rank of one expert's result: `total` are its adapters' ranks together, `room` is the smaller side."""
    if total == 0:
        return 0
    if settings.method == "sum":
        return total if settings.rank is None else min(total, settings.rank, room)
    return min(settings.rank or total, room)


def _load(parts: Sequence[Part | None], ranks: tuple[int, ...], settings: Settings, lost: Lost, like: Part) -> Factors:
    """(E, R, in) and (E, out, R) of one part, R the largest of `ranks`."""
    factors = [part.load() if part is not None else None for part in parts]
    a = torch.zeros(len(ranks), max(1, *ranks), like.inputs)
    b = torch.zeros(len(ranks), like.outputs, max(1, *ranks))
    for expert, rank in enumerate(ranks):
        if rank:
            matrices = [
                _matrix(part, pair, expert, weight, like)
                for part, pair, weight in zip(parts, factors, settings.weights, strict=True)
            ]
            one_a, one_b, fraction = METHODS[settings.method](matrices, rank, settings, (like.name, expert))
            a[expert, : len(one_a)], b[expert, :, : len(one_a)] = one_a, one_b
            lost.fractions.append(fraction)
    return a, b


def _matrix(
    part: Part | None, factors: Factors | None, expert: int, weight: float, like: Part
) -> tuple[Tensor, Tensor]:
    """A (r, in) and w · B (out, r) of an adapter for one expert; of rank 0 where it has nothing for it."""
    if part is None or factors is None:
        return torch.zeros(0, like.inputs), torch.zeros(like.outputs, 0)
    own = part.ranks[expert]
    return factors[0][expert, :own], factors[1][expert, :, :own] * weight


def combine(
    base: Path,
    adapters: Sequence[Path],
    out: Path,
    settings: Settings,
    *,
    base_name: str,
    overwrite: bool = False,
    progress: Progress | None = None,
    check: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Writes the combination of `adapters` as a standard PEFT directory, whole or not at all.

    Args:
        base: the model that all of them are for.
        base_name: recorded as `base_model_name_or_path`.
        progress: called with (bytes written, bytes in all).
        check: called with the folder before it appears under its name; what it raises leaves nothing.

    Returns:
        {"out", "method", "adapters", "rank", "tensors", "parameters", "bytes", "lost", "warnings"}.

    Raises:
        AdapterFileError: an adapter cannot be read, is for another base, or a setting is out of its range.
        OutputExistsError: `out` exists, and not as an adapter directory that may be overwritten.
    """
    out = Path(os.path.abspath(out))
    _check_settings(settings, len(adapters))
    _check_output(adapters, out, overwrite)
    sidecars = [read_sidecar(adapter) for adapter in adapters]
    warnings = [line for sidecar in sidecars if sidecar for line in check_base(sidecar, base)]
    opened_by_base = [MergedWeights(base, adapter) for adapter in adapters]
    lost = Lost()
    parts = combined_parts([parts_of(opened(merged)) for merged in opened_by_base], settings, lost)
    merged, held = opened_by_base[0], [sidecar.held_elsewhere if sidecar else None for sidecar in sidecars]
    with new_directory(out, overwrite) as directory:
        facts = write_standard(directory, parts, merged, base_name, progress=progress)
        same = held[0] if all(one == held[0] for one in held) else None
        write_sidecar(directory, peft_sidecar(merged.layout, expert_count(merged), base_name, base, same))
        (directory / RECORD).write_text(
            json.dumps(_record(adapters, settings, lost), indent=2) + "\n", encoding="utf-8"
        )
        warnings += _copy_template(adapters, directory)
        if check:
            check(directory)
    warnings += _warnings(settings, lost)
    return {
        "out": str(out),
        "adapters": len(adapters),
        "method": settings.method,
        **facts,
        "lost": lost.as_dict(),
        "warnings": sorted(set(warnings)),
    }


def _record(adapters: Sequence[Path], settings: Settings, lost: Lost) -> dict[str, Any]:
    """What the result was made of: adapters by name and hash, not by their place on this machine."""
    inputs = []
    for adapter in adapters:
        with (adapter / WEIGHTS).open("rb") as file:
            inputs.append({"name": adapter.resolve().name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()})
    return {**vars(settings), "weights": list(settings.weights), "adapters": inputs, "lost": lost.as_dict()}


def _copy_template(adapters: Sequence[Path], directory: Path) -> list[str]:
    """Puts in the first chat template that an adapter brings along; says so where another brings another one."""
    own = [adapter for adapter in adapters if own_template(adapter)]
    for adapter in own[:1]:
        copy_template(adapter, directory)
    texts = {adapter: (adapter / TEMPLATE).read_bytes() for adapter in own}
    others = [adapter for adapter in own if texts[adapter] != texts[own[0]]]
    return [f"the chat template is that of {own[0]}; {other} was trained with another one" for other in others]


def _warnings(settings: Settings, lost: Lost) -> list[str]:
    largest = lost.as_dict()["largest"]
    if largest <= 0.1:
        return []
    return [
        f"rank {settings.rank or 'of the sum'} leaves out up to {largest:.0%} of a combined change (Frobenius norm); "
        "a larger --rank holds more"
    ]


def _check_settings(settings: Settings, adapters: int) -> None:
    problem = ""
    if settings.method not in METHODS:
        problem = f"method {settings.method!r}: allowed are {', '.join(METHODS)}"
    elif adapters < 1 or len(settings.weights) != adapters:
        problem = f"{len(settings.weights)} weights for {adapters} adapters: give one of each, in their order"
    elif not all(math.isfinite(weight) and weight != 0 for weight in settings.weights):
        problem = f"weights {list(settings.weights)}: each is a number other than 0; leave an adapter out instead"
    elif settings.rank is not None and settings.rank < 1:
        problem = f"rank {settings.rank}: at least 1"
    elif not 0 < settings.density <= 1:
        problem = f"density {settings.density}: above 0, at most 1"
    if problem:
        raise AdapterFileError(problem)


def _check_output(adapters: Sequence[Path], out: Path, overwrite: bool) -> None:
    here = out.resolve()
    for adapter in adapters:
        if here == adapter.resolve() or here in adapter.resolve().parents or adapter.resolve() in here.parents:
            raise OutputExistsError(f"{out} holds, or lies in, an adapter that is being read; choose another output")
    if os.path.lexists(out):
        if not overwrite:
            raise OutputExistsError(f"{out} exists already; choose another output or pass --overwrite")
        if out.is_symlink() or not (out / CONFIG).is_file():
            raise OutputExistsError(f"{out} is no adapter directory ({CONFIG}); it is never overwritten")
