"""What the runs of benchmarks/placement.py say together: intervals over seeds, paired differences, claims, tables.

An interval is the mean ± that of Student's t over seeds, 95 %. A paired difference is taken seed by seed: the same
order of the same rows, another placement.
"""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from placement_runs import ALL, ATTENTION, FRACTION, LEAST, RANDOM, TOP
from rich.console import Console
from rich.table import Table

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""97.5 % quantiles of Student's t for 1, 2, … degrees of freedom."""
MOST_SEEDS = len(T_975) + 1

QUARTERS = (TOP, RANDOM, LEAST)
WITHIN, FEWER_PARAMETERS = 0.02, 0.70
Run = Mapping[str, Any]


@dataclass(frozen=True)
class Interval:
    """Mean of n values and the half width of its 95 % interval, which is infinite for one value."""

    mean: float
    half: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def text(self, digits: int = 4, sign: str = "") -> str:
        return f"{self.mean:{sign}.{digits}f} ± {self.half:.{digits}f}"

    def percent(self) -> str:
        return f"{100 * self.mean:+.1f} % ± {100 * self.half:.1f}"


def interval(values: Sequence[float]) -> Interval:
    n = len(values)
    if n < 2:
        return Interval(statistics.fmean(values), math.inf, n)
    return Interval(statistics.fmean(values), T_975[n - 2] * statistics.stdev(values) / math.sqrt(n), n)


def relative_difference(ours: float, theirs: float) -> float:
    return ours / theirs - 1


class Results:
    """The runs of one task, by arm and seed, and the base's losses."""

    def __init__(self, base: Mapping[str, Any], runs: Sequence[Run]) -> None:
        self.base = base
        self.by_arm: dict[str, dict[int, Run]] = {}
        for run in runs:
            self.by_arm.setdefault(run["arm"], {})[run["seed"]] = run

    def target(self, run: Run) -> float:
        return float(run["target"])

    def gain(self, arm: str) -> Interval | None:
        """What the arm takes off the base's target loss, of what all experts take off it with the same seed."""
        before = self.base["target"]
        return self.paired(arm, ALL, lambda run: before - self.target(run), operator.truediv)

    def forgetting(self, run: Run) -> float:
        """Mean loss of the other domains, after less before."""
        others: Mapping[str, float] = run["others"]
        return statistics.fmean(after - self.base["others"][domain] for domain, after in others.items())

    def of(self, arm: str, measure: Callable[[Run], float]) -> Interval:
        return interval([measure(run) for run in self.by_arm[arm].values()])

    def paired(
        self, arm: str, other: str, measure: Callable[[Run], float], compare: Callable[[float, float], float]
    ) -> Interval | None:
        """`compare`(arm, other) over the seeds that both have. None: no such seed."""
        ours, theirs = self.by_arm.get(arm, {}), self.by_arm.get(other, {})
        pairs = [(measure(ours[seed]), measure(theirs[seed])) for seed in sorted(ours.keys() & theirs.keys())]
        return interval([compare(a, b) for a, b in pairs]) if pairs else None


# -- claims -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """What was claimed, whether it holds, and the numbers."""

    text: str
    verdict: str
    numbers: str


def verdict(difference: Interval, most: float) -> str:
    """Whether a mean is at most `most`, judged by its whole interval."""
    if difference.high <= most:
        return "holds"
    if difference.low > most:
        return "does not hold"
    return "not decided by these seeds (the mean " + ("would hold)" if difference.mean <= most else "would not hold)")


def claims(results: Results) -> list[Claim]:
    return [claim for make in (near_all_experts, better_than_random, forgets_no_more) if (claim := make(results))]


def near_all_experts(results: Results) -> Claim | None:
    difference = results.paired(TOP, ALL, results.target, relative_difference)
    if difference is None:
        return None
    ours, theirs = (next(iter(results.by_arm[arm].values()))["parameters"]["routed"] for arm in (TOP, ALL))
    fewer = 1 - ours / theirs
    found = verdict(difference, WITHIN) if fewer >= FEWER_PARAMETERS else "does not hold"
    numbers = f"target loss {difference.percent()} against all experts, {fewer:.0%} fewer expert parameters"
    return Claim("routed 25 % within 2 % of all experts' target loss, ≥ 70 % fewer expert parameters", found, numbers)


def better_than_random(results: Results) -> Claim | None:
    difference = results.paired(TOP, RANDOM, results.target, operator.sub)
    if difference is None:
        return None
    relative = results.paired(TOP, RANDOM, results.target, relative_difference)
    assert relative is not None
    found = "holds" if difference.high < 0 else "does not hold" if difference.low > 0 else verdict(difference, 0)
    numbers = f"target loss {difference.text(sign='+')} nats against random 25 % ({relative.percent()})"
    return Claim("routed 25 % better than random 25 % beyond the interval", found, numbers)


def forgets_no_more(results: Results) -> Claim | None:
    difference = results.paired(TOP, ALL, results.forgetting, operator.sub)
    if difference is None:
        return None
    numbers = f"forgetting {difference.text(sign='+')} nats against all experts"
    return Claim("routed 25 % forgets no more than all experts", verdict(difference, 0), numbers)


# -- tables -------------------------------------------------------------------------------------------------------


HEADINGS = (
    "arm", "target loss", "gain", "forgetting", "against all experts", "against random", "parameters (routed / all)",
    "adapter", "optimizer", "peak (training alone)", "step", "covered", "seeds",
)  # fmt: skip


def table_rows(results: Results) -> list[tuple[str, ...]]:
    return [arm_row(results, arm) for arm in results.by_arm]


def arm_row(results: Results, arm: str) -> tuple[str, ...]:
    runs = list(results.by_arm[arm].values())
    against = [
        results.paired(arm, other, results.target, relative_difference) if arm != other else None
        for other in (ALL, RANDOM)
    ]
    gain = results.gain(arm)
    counts = runs[0]["parameters"]
    covered = [statistics.fmean(run["coverage"]) for run in runs if run["coverage"]]
    peak = statistics.fmean(run["peak_bytes"] for run in runs), statistics.fmean(run["training_bytes"] for run in runs)
    return (
        arm,
        results.of(arm, results.target).text(),
        f"{100 * gain.mean:.1f} % ± {100 * gain.half:.1f}" if gain and arm != ALL else "-",
        results.of(arm, results.forgetting).text(sign="+"),
        *(found.percent() if found else "-" for found in against),
        f"{counts['routed']:,} / {counts['all']:,}",
        f"{4 * counts['all'] / 1e3:,.0f} kB",
        f"{runs[0]['optimizer_bytes'] / 1e3:,.0f} kB",
        f"{peak[0] / 1e6:.0f} MB ({peak[1] / 1e6:.0f})",
        f"{1e3 * statistics.median(run['step_seconds'] for run in runs):.0f} ms",
        f"{statistics.fmean(covered):.0%}" if covered else "-",
        str(len(runs)),
    )


def show(console: Console, name: str, task: Mapping[str, Any], results: Results) -> None:
    before = statistics.fmean(results.base["others"].values())
    start = f"before training: target {results.base['target']:.4f}, other domains {before:.4f}"
    facts = task["described"]
    title = f"{name}, on {facts['target']}: {facts['steps']} steps of {facts['batch_rows']} rows; {start}"
    table = Table(*HEADINGS, title=title)
    for row in table_rows(results):
        table.add_row(*row)
    console.print(table)
    console.print(concentration_text(task["concentration"]), highlight=False)
    if text := covered_text(results):
        console.print(text, highlight=False)
    for claim in claims(results):
        console.print(f"  {claim.text}: {claim.verdict.upper()}: {claim.numbers}", highlight=False)


def concentration(share: Sequence[Sequence[float]], entropy: Sequence[float]) -> dict[str, list[float]]:
    """By layer: what the busiest quarter of the experts gets of the target's tokens, and the load's entropy."""
    quarter = [sum(sorted(layer, reverse=True)[: math.ceil(FRACTION * len(layer))]) for layer in share]
    return {"busiest_quarter": quarter, "load_entropy": list(entropy)}


def concentration_text(found: Mapping[str, Sequence[float]]) -> str:
    quarter = ", ".join(f"{value:.0%}" for value in found["busiest_quarter"])
    entropy = ", ".join(f"{value:.2f}" for value in found["load_entropy"])
    return (
        f"  by layer, the busiest quarter of the experts gets {quarter} of the target's tokens; load entropy {entropy}"
    )


def covered_text(results: Results) -> str:
    """Whether what the chosen quarter covers of the target's tokens goes with its loss, over arms and seeds."""
    runs = [run for arm in QUARTERS for run in results.by_arm.get(arm, {}).values()]
    pairs = [(statistics.fmean(run["coverage"]), results.target(run)) for run in runs]
    if len(pairs) < 3 or len(set(pairs)) < 3:
        return ""
    r = statistics.correlation(*zip(*pairs, strict=True))
    return f"  over the {len(pairs)} runs with a quarter of the experts, coverage and target loss correlate: {r:+.2f}"


def order(arms: Sequence[str]) -> list[str]:
    """Arms in the order that gives claims first: those that the claims compare."""
    first = [arm for arm in (TOP, ALL, RANDOM, ATTENTION) if arm in arms]
    return first + [arm for arm in arms if arm not in first]
