"""Quantities as people read them, the same in the terminal and in the browser."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

SPARKS = "▁▂▃▄▅▆▇█"


def as_bytes(count: float) -> str:
    """12_400_000 -> "12.4 MB" (decimal units)."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def as_count(count: float) -> str:
    """5_300_000 -> "5.30 M"."""
    return _scaled(count, ("", "k", "M", "B", "T"))


def as_percent(fraction: float) -> str:
    """0.715 -> "71.5 %"; small shares keep two figures."""
    percent = 100 * fraction
    return f"{percent:.1f} %" if percent == 0 or percent >= 1 else f"{percent:.2g} %"


def as_duration(seconds: float) -> str:
    """75.2 -> "1 min 15 s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The course of `values` in at most `width` characters, each the mean of its share of them."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(SPARKS[round((mean - low) / span * (len(SPARKS) - 1))] for mean in means)


def _scaled(count: float, units: Sequence[str]) -> str:
    """`count` with three figures in the unit that fits; whole numbers in the smallest one."""
    step = 0
    while abs(count) >= 999.5 and step < len(units) - 1:
        count, step = count / 1000, step + 1
    decimals = 0 if step == 0 or count >= 99.95 else 1 if count >= 9.995 else 2
    return f"{count:.{decimals}f} {units[step]}".rstrip()
