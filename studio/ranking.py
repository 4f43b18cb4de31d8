"""How well scores put wanted rows above unwanted ones: the area under the ROC curve, with its interval. No torch."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from studio.metrics import Measure, Metric, Z

STEPS = 60
"""Of the bisection for an end of the interval: as fine as float64."""


def auc(wanted: Sequence[float], unwanted: Sequence[float]) -> Measure | None:
    """Of the pairs of a wanted and an unwanted row the share in which the wanted one scores higher; a tie counts half.

    With the interval of Newcombe (2006, Stat. Med. 25, 559-573, method 5), which inverts the score test and is not
    empty where all pairs are right. Where all rows score alike, as a base does against itself, it is 0.5 and has none.

    Returns:
        None where one of the sides is empty.
    """
    m, n = len(wanted), len(unwanted)
    if not m or not n:
        return None
    if min(*wanted, *unwanted) == max(*wanted, *unwanted):
        return Measure(Metric(0.5, None, None, m + n), "higher", error=0.0)
    below = sorted(unwanted)
    wins = sum(bisect_left(below, score) + bisect_right(below, score) for score in wanted)
    value = wins / (2 * m * n)
    low, high = (_end(value, end, m, n) for end in (0.0, 1.0))
    return Measure(Metric(value, low, high, m + n), "higher", error=(high - low) / (2 * Z))


def _end(value: float, outer: float, m: int, n: int) -> float:
    """The farthest area on the side of `outer` that `value` does not speak against."""
    inner = value
    for _ in range(STEPS):
        middle = (inner + outer) / 2
        agrees = abs(middle - value) <= Z * math.sqrt(_variance(middle, m, n))
        inner, outer = (middle, outer) if agrees else (inner, middle)
    return inner


def _variance(area: float, m: int, n: int) -> float:
    """Of the estimate of an area, after Hanley and McNeil (1982), with both group sizes at their mean."""
    size = (m + n) / 2 - 1
    spread = 1 + size * (1 - area) / (2 - area) + size * area / (1 + area)
    return area * (1 - area) * spread / (m * n)
