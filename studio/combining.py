"""`combine`: several adapters of one base → one adapter. For both interfaces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from adapters.verify.run import verify_combined
from studio.checking import BeforeItAppears
from studio.errors import AdapterFileError
from studio.merging import _recorded_base, adapter_directory
from studio.models import resolve_base
from studio.quantities import as_bytes

DENSITIES = {"sum": 1.0, "ties": 0.2, "dare": 0.5}
"""The methods, and the fraction of values that each keeps by default: all; as in the paper of TIES; half."""


def combine(
    adapters: Sequence[Path | str],
    out: Path | str,
    *,
    weights: Sequence[float] | None = None,
    method: str = "sum",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    base: str | None = None,
    verify: bool = True,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Combines adapters of one base into one that stock PEFT loads and `merge` merges.

    Args:
        adapters: adapter directories, or job directories that hold one.
        out: the adapter directory to write; it appears only when it is whole.
        weights: of each adapter, in their order; 1 each where none are given. A negative one takes a task away.
        method: "sum", "ties" or "dare" (`adapters.combine`).
        rank: of the result. None: of the sum of their ranks, with which "sum" is exact.
        density: the fraction of values that ties (0.2) and dare (0.5) keep.
        seed: of dare's choice.
        base: "embedded", a directory or a hub id; None reads it from the adapters.
        verify: hold the result against the adapters, as far as there is a second way to it, in a fresh process, before
            `out` appears.

    Returns:
        {"out", "adapters", "method", "rank", "tensors", "parameters", "bytes", "lost": {"largest", "mean"},
        "warnings", "checks"}; `lost` are fractions of the Frobenius norm of a tensor's combined change.

    Raises:
        VerificationError: a check failed; it has all of them. Nothing is kept.
        StudioError: an adapter or the base cannot be read, they do not fit, or `out` exists; nothing is written.
    """
    directories = [adapter_directory(Path(adapter)) for adapter in adapters]
    name = base or _common_base(directories)
    if method not in DENSITIES:
        raise AdapterFileError(f"method {method!r}: allowed are {', '.join(DENSITIES)}")
    if density is not None and method == "sum":
        raise AdapterFileError("density is for ties and dare: a sum keeps every value")
    from adapters.combine import Settings
    from adapters.combine import combine as combined

    settings = Settings(
        method=method,
        weights=tuple(weights) if weights else (1.0,) * len(directories),
        rank=rank,
        density=DENSITIES[method] if density is None else density,
        seed=seed,
    )
    source = resolve_base(name)
    compare = partial(
        verify_combined, base=source, adapters=directories, weights=settings.weights, method=settings.method
    )
    check = BeforeItAppears(Path(out), compare if verify else None)
    report = combined(
        source,
        directories,
        Path(out),
        settings,
        base_name=name,
        overwrite=overwrite,
        progress=progress,
        check=check,
    )
    return {**report, "checks": check.as_json()}


def _common_base(directories: Sequence[Path]) -> str:
    if not directories:
        raise AdapterFileError("no adapters given: name two or more adapter directories")
    names = sorted({_recorded_base(directory) for directory in directories})
    if len(names) > 1:
        raise AdapterFileError(
            f"the adapters name {len(names)} bases: {', '.join(names)}. If they are the same model, give it with --base"
        )
    return names[0]


def summary(report: dict[str, Any]) -> str:
    """What a combination has written, in a line or two, and its warnings."""
    lines = [
        f"Adapter in {report['out']}: {report['method']} of {report['adapters']} adapters, rank {report['rank']}, "
        f"{report['parameters']:,} parameters, {as_bytes(report['bytes'])}"
    ]
    if report["lost"]["largest"] > 0:
        lost = report["lost"]
        lines.append(
            f"Left out by the rank: {lost['mean']:.1%} of a tensor's change on average, {lost['largest']:.1%} at most"
        )
    return "\n".join([*lines, *(f"warning: {line}" for line in report["warnings"])])
