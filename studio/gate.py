"""The gate of a recipe: how much worse a metric may get from base, or start, to tuned. No torch.

judge(rules, {"base": …, "start": …}, tuned) ─▶ [Verdict]      in result.json as "gate"; GateError where one has failed
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from studio.errors import GateError, TrainingError
from studio.metrics import Measure, Metric, changes
from studio.recipe_evaluation import GateRule, wrong_way


@dataclass(frozen=True)
class Verdict:
    """What became of one rule.

    Attributes:
        base: the value of what the rule is against: the base, or the adapter as it was given ("start").
        limit: the most that the metric may get worse, in its own unit.
        worse: how much worse it got; negative where it got better. With `certain` the end of the interval that is
            nearest to no change for the worse.
    """

    metric: str
    rule: str
    base: float
    tuned: float
    limit: float
    worse: float
    passed: bool
    against: str = "base"  # absent from older results


def check_gate(rules: Sequence[GateRule], measured: Mapping[str, Measure]) -> None:
    """Refuses a gate on a metric that is not measured, or on its change for the better, before anything is trained.

    Raises:
        TrainingError
    """
    missing = sorted({rule.metric for rule in rules if rule.metric not in measured})
    if missing:
        raise TrainingError(
            f"evaluation.gate asks for {', '.join(missing)}, which this job does not measure; measured: "
            f"{', '.join(measured) or 'nothing'}. json_valid is measured where every reference is JSON. Nothing was "
            "trained and no adapter was written"
        )
    for rule in rules:
        if wrong := wrong_way(rule, measured[rule.metric].better):
            raise TrainingError(f"evaluation.{wrong}. Nothing was trained and no adapter was written")


def judge(
    rules: Sequence[GateRule], sides: Mapping[str, Mapping[str, Measure]], tuned: Mapping[str, Measure]
) -> list[Verdict]:
    """One verdict a rule, in their order; `sides` are what a rule may be against, by name."""
    change = {name: changes(side, tuned) for name, side in sides.items()}
    return [
        _verdict(
            rule, sides[rule.against][rule.metric].metric, tuned[rule.metric].metric, change[rule.against][rule.metric]
        )
        for rule in rules
    ]


def raise_failed(verdicts: Sequence[Verdict], adapter: str) -> None:
    """Raises:
    GateError: a rule has failed.
    """
    if failed := [verdict for verdict in verdicts if not verdict.passed]:
        listed = "; ".join(said(verdict) for verdict in failed)
        raise GateError(
            f"the gate failed: {listed}. The adapter was written all the same: {adapter}. Use it, train another way "
            "(fewer steps, a lower learning rate, fewer experts), or change evaluation.gate"
        )


def said(verdict: Verdict) -> str:
    """A verdict in words."""
    least = f"; worse by {verdict.worse:.4g} at least" if "certain" in verdict.rule and not verdict.passed else ""
    return (
        f"{verdict.metric}: {verdict.tuned:.4g}, was {verdict.base:.4g} ({verdict.against}){least}; "
        f"allowed {verdict.rule}"
    )


def _verdict(rule: GateRule, base: Metric, tuned: Metric, change: Metric) -> Verdict:
    rises = rule.max_rise is not None
    share = rule.max_rise if rule.max_rise is not None else rule.max_drop
    assert share is not None
    limit = share * abs(base.value) if rule.relative else share
    end = change.low if rises else change.high  # of the interval, the one with less of the change for the worse
    found = end if rule.certain and end is not None else change.value
    worse = found if rises else -found
    return Verdict(
        metric=rule.metric,
        rule=_words(rule, share, limit, rises),
        base=base.value,
        tuned=tuned.value,
        limit=limit,
        worse=worse,
        passed=math.isfinite(tuned.value) and worse <= limit + 1e-12,
        against=rule.against,
    )


def _words(rule: GateRule, share: float, limit: float, rises: bool) -> str:
    whose = "the start's" if rule.against == "start" else "the base's"
    most = f"{100 * share:g} % of {whose} value ({limit:.4g})" if rule.relative else f"{share:g}"
    certain = ", judged by the certain end of the interval" if rule.certain else ""
    return f"{'rise' if rises else 'drop'} {most}{certain}"
