"""Metrics on held-out examples, each with its interval: of one model, and of the change from base to tuned. No torch.

    Scores ─▶ measured ─▶ Metric(value, low, high, n)             of one model
    two Scores of the same examples ─▶ changed ─▶ Metric          of tuned minus base, paired by example

All intervals are of 95 %, over the held-out examples: how far the value may be from the one on all such examples. They
say nothing about another seed of the training.

    share      of examples: Wilson's score interval (Wilson, 1927, JASA 22); of a difference Newcombe's interval for
               paired shares, which does not shrink to nothing at 0 and 1 (Newcombe, 1998, Stat. Med. 17, 2635-2650,
               method 10)
    per_token  sum over tokens by number of tokens, as the loss: a ratio of two sums over examples. Normal, with the
               linearised error of a ratio (Cochran, 1977, Sampling Techniques, 6.4); tokens of one example are not
               taken for independent
    exp        exp of such a ratio, as perplexity: the exp of its interval; a difference by the delta method
    mean       of one number an example. Normal, with the error of the mean; a difference by that of the differences

A further metric is an entry in `METRICS` and its `Scores`; reports, gate, sweeps and pages need nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

Kind = Literal["share", "per_token", "exp", "mean"]
Better = Literal["lower", "higher"]

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


class MetricKind(NamedTuple):
    """How a metric is called, what its number is, and which way is better."""

    title: str
    kind: Kind
    better: Better
    unit: str = ""


METRICS: dict[str, MetricKind] = {
    "loss": MetricKind("Held-out loss", "per_token", "lower", "nats a token"),
    "perplexity": MetricKind("Perplexity", "exp", "lower"),
    "exact_match": MetricKind("Exact match", "share", "higher"),
    "json_valid": MetricKind("Valid JSON", "share", "higher"),
    "schema_valid": MetricKind("JSON by the schema", "share", "higher"),
    "preference_accuracy": MetricKind("Preference accuracy", "share", "higher"),
    "preference_accuracy_per_token": MetricKind("Preference accuracy by the mean a token", "share", "higher"),
    "preference_margin": MetricKind("Preference margin", "mean", "higher"),
    "label_auc": MetricKind("Labels ranked by the reward against the base (AUC)", "mean", "higher"),
    "label_accuracy": MetricKind("Rewards against the base with their label's sign", "share", "higher"),
    "reward": MetricKind("Held-out reward", "mean", "higher"),
    "reference_kl": MetricKind("KL from the base", "per_token", "lower", "nats a token"),
}
"""The studio's own metrics, by name, in the order in which they are shown. Tasks of lm-eval add TASK/METRIC."""


@dataclass(frozen=True)
class Scores:
    """What one metric is made from.

    Attributes:
        values: a number an example: the summed loss in nats, or 1.0 for an example that is right.
        tokens: of each example, for a ratio of sums.
    """

    kind: Kind
    better: Better
    values: tuple[float, ...]
    tokens: tuple[int, ...] = ()

    @property
    def ratio(self) -> float:
        """Sum of the values by the number of tokens."""
        return math.fsum(self.values) / max(1, sum(self.tokens))


@dataclass(frozen=True)
class Metric:
    """A value with its interval of 95 %, None where there is none, over `n` examples."""

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Measure:
    """A metric of one model with what its change is made from.

    Attributes:
        scores: by example; None where another program gave the value alone.
        error: the standard error that this program gave.
    """

    metric: Metric
    better: Better
    scores: Scores | None = None
    error: float | None = None


def measure(scores: Scores) -> Measure:
    """The metric of these scores."""
    return Measure(measured(scores), scores.better, scores)


def changes(base: Mapping[str, Measure], tuned: Mapping[str, Measure]) -> dict[str, Metric]:
    """Tuned minus base of every metric that both have: by example where both have the same, else as if independent."""
    return {name: _change(base[name], tuned[name]) for name in base if name in tuned}


def changes_as_json(base: Mapping[str, Measure], tuned: Mapping[str, Measure]) -> dict[str, dict[str, Any]]:
    """`changes` as JSON, each with the way that is "better"."""
    found = as_json(changes(base, tuned))
    return {name: {**entry, "better": base[name].better} for name, entry in found.items()}


def _change(base: Measure, tuned: Measure) -> Metric:
    first, second = base.scores, tuned.scores
    if first and second and first.tokens == second.tokens and len(first.values) == len(second.values):
        return changed(_alike(first, second), _alike(second, first))
    return apart(base.metric, base.error, tuned.metric, tuned.error)


def _alike(scores: Scores, other: Scores) -> Scores:
    """As means where one side is a share and the other is not: a task's numbers may all be 0 or 1 by chance."""
    return replace(scores, kind="mean") if scores.kind != other.kind else scores


def scores_of(name: str, values: Sequence[float], tokens: Sequence[int] = ()) -> Scores:
    """The scores of one of the studio's own metrics."""
    entry = METRICS[name]
    return Scores(entry.kind, entry.better, tuple(map(float, values)), tuple(tokens))


def measured(scores: Scores) -> Metric:
    """The metric of one model."""
    n = len(scores.values)
    if scores.kind == "share":
        return Metric(math.fsum(scores.values) / n, *wilson(round(math.fsum(scores.values)), n), n)
    if scores.kind == "mean":
        return _normal(math.fsum(scores.values) / n, _error_of_mean(scores.values), n)
    loss = _not_below_0(_normal(scores.ratio, _error_of_ratio(_residuals(scores), scores.tokens), n))
    if scores.kind == "per_token":
        return loss
    low, high = (None if end is None else _exp(end) for end in (loss.low, loss.high))
    return Metric(_exp(loss.value), low, high, n)


def _not_below_0(metric: Metric) -> Metric:
    """With an interval cut at 0: no loss and no KL lies below it, nor a perplexity below exp(0)."""
    return metric if metric.low is None else replace(metric, low=min(metric.value, max(0.0, metric.low)))


def changed(base: Scores, tuned: Scores) -> Metric:
    """Tuned minus base, over the same examples in the same order."""
    n = len(base.values)
    assert len(tuned.values) == n and tuned.tokens == base.tokens and tuned.kind == base.kind
    if base.kind == "share":
        return Metric(measured(tuned).value - measured(base).value, *newcombe(base.values, tuned.values), n)
    if base.kind == "mean":
        differences = [after - before for before, after in zip(base.values, tuned.values, strict=True)]
        return _normal(math.fsum(differences) / n, _error_of_mean(differences), n)
    slopes = [_exp(side.ratio) if base.kind == "exp" else 1.0 for side in (base, tuned)]
    sides = zip(_residuals(base), _residuals(tuned), strict=True)
    residuals = [slopes[1] * after - slopes[0] * before for before, after in sides]
    change = measured(tuned).value - measured(base).value
    return _normal(change, _error_of_ratio(residuals, base.tokens), n)


def apart(base: Metric, base_error: float | None, tuned: Metric, tuned_error: float | None) -> Metric:
    """Tuned minus base where nothing is known of single examples: their errors added as if they were independent."""
    error = None if base_error is None or tuned_error is None else math.hypot(base_error, tuned_error)
    return _normal(tuned.value - base.value, error, min(base.n, tuned.n))


def from_error(value: float, error: float | None, n: int) -> Metric:
    """A value whose standard error another program gave."""
    return _normal(value, error, n)


def wilson(right: int, n: int, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval of a share: `right` of `n`."""
    p, spread = right / n, z * z / n
    middle = (p + spread / 2) / (1 + spread)
    half = z * math.sqrt(p * (1 - p) / n + spread / (4 * n)) / (1 + spread)
    return (0.0 if right == 0 else middle - half), (1.0 if right == n else middle + half)


def newcombe(base: Sequence[float], tuned: Sequence[float]) -> tuple[float, float]:
    """Newcombe's interval (method 10) of the difference of two shares of the same examples, each 1.0 or 0.0."""
    n = len(base)
    pairs = list(zip(tuned, base, strict=True))
    both, only_tuned, only_base, neither = (pairs.count(pair) for pair in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0, 0)))
    first, second = (both + only_tuned) / n, (both + only_base) / n
    (l1, u1), (l2, u2) = wilson(both + only_tuned, n), wilson(both + only_base, n)
    phi = _phi(both, only_tuned, only_base, neither)
    below = _root((first - l1) ** 2 - 2 * phi * (first - l1) * (u2 - second) + (u2 - second) ** 2)
    above = _root((u1 - first) ** 2 - 2 * phi * (u1 - first) * (second - l2) + (second - l2) ** 2)
    return first - second - below, first - second + above


def _phi(a: int, b: int, c: int, d: int) -> float:
    """The correlation of the two marks, with Newcombe's correction for continuity."""
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    if not margins:
        return 0.0
    product: float = a * d - b * c
    if product > 0:
        product = max(product - (a + b + c + d) / 2, 0)
    return product / math.sqrt(margins)


def _root(square: float) -> float:
    return math.sqrt(max(0.0, square))  # rounding alone makes it negative


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _residuals(scores: Scores) -> list[float]:
    ratio = scores.ratio
    return [value - ratio * tokens for value, tokens in zip(scores.values, scores.tokens, strict=True)]


def _error_of_ratio(residuals: Sequence[float], tokens: Sequence[int]) -> float | None:
    n = len(residuals)
    if n < 2:
        return None
    return math.sqrt(n / (n - 1) * math.fsum(r * r for r in residuals)) / max(1, sum(tokens))


def _error_of_mean(values: Sequence[float]) -> float | None:
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def _normal(value: float, error: float | None, n: int) -> Metric:
    if error is None or not math.isfinite(error):
        return Metric(value, None, None, n)
    return Metric(value, value - Z * error, value + Z * error, n)


# -------------------------------------------------------------------- reports


def as_json(found: Mapping[str, Metric | Measure]) -> dict[str, dict[str, Any]]:
    """{name: {"value", "low", "high", "n"}}, and "stderr" where another program gave one."""
    table = {name: asdict(each.metric if isinstance(each, Measure) else each) for name, each in found.items()}
    for name, each in found.items():
        if isinstance(each, Measure) and each.error is not None:
            table[name]["stderr"] = each.error
    return table


def title_of(name: str) -> str:
    """What a metric is called: one of a task by its own name."""
    return METRICS[name].title if name in METRICS else name


def is_share(name: str) -> bool:
    """Whether a metric of the studio is a share, and is shown in per cent."""
    return name in METRICS and METRICS[name].kind == "share"
