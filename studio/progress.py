"""How far a job is, in numbers and words, the same in the terminal and in the browser."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from studio.errors import JobError
from studio.jobs import Job, JobState, list_jobs
from studio.metrics import METRICS, is_share, title_of
from studio.quantities import as_bytes, as_count, as_duration, as_percent

EXPORT_STAGES = (
    "Choosing the weights to merge into",
    "Writing",
    "Verifying in fresh processes",
    "Card and certificate",
)
MERGED_INTO = {"original": "the base's own weights", "quantized": "the base as training held it, quantised"}
PHASES = ("loading", "evaluating base", "training", "evaluating tuned", "saving")
SAMPLING = "sampling"
"""What rejection sampling does before it trains, in each round."""

Rows = Sequence[dict[str, Any]]
Counts = tuple[int, int]
"""(done, total); total is 0 where it is not known."""


def phase_counts(state: JobState, rows: Rows) -> dict[str, Counts]:
    """(done, total) of each phase that has begun; total 0 where it is not known."""
    counts: dict[str, Counts] = dict.fromkeys(phases_over(state), (0, 0))
    for row in rows:
        if row.get("kind") == "progress" and row.get("phase") in (*PHASES, SAMPLING):
            counts[row["phase"]] = (int(row.get("done") or 0), int(row.get("total") or 0))
    if state.step or state.phase == "training":
        counts["training"] = (state.step, state.total_steps)
    if state.phase in PHASES:
        counts.setdefault(state.phase, (0, 0))
    return counts


def phases_over(state: JobState) -> tuple[str, ...]:
    """The phases that lie behind the job."""
    if state.status == "succeeded" or state.phase == "done":  # a failed gate is found at the end
        return PHASES
    phase = "training" if state.phase == SAMPLING else state.phase
    return PHASES[: PHASES.index(phase)] if phase in PHASES else ()


def count_text(phase: str, done: int, total: int) -> str:
    """`done` of `total`: bytes while loading, steps while training, a share of the work elsewhere."""
    if phase == "loading":
        return f"{as_bytes(done)} / {as_bytes(total)}"
    return f"{done:,} / {total:,} steps" if phase == "training" else f"{100 * done // total} %"


def losses(rows: Rows) -> list[float]:
    """The training losses logged so far."""
    return [row["loss"] for row in rows if row.get("kind") == "train" and row.get("loss") is not None]


def first_measured(rows: Rows) -> Rows:
    """What was measured before the first step of the model that is trained: of the given adapter, else of the base."""
    found = {row.get("when"): row for row in rows if row.get("kind") == "eval"}
    return [found[when] for when in ("start", "before") if when in found][:1]


def loss_line(rows: Rows) -> str:
    """Loss, learning rate, gradient norm and speed of the newest training row; of a preference job also how it does."""
    newest = next((row for row in reversed(rows) if row.get("kind") == "train"), None)
    if newest is None:
        return ""
    parts = [f"loss {newest['loss']:.4f}" if newest.get("loss") is not None else "loss not finite"]
    for key, text in (("reward", "reward {:.3f}"), ("learning_rate", "lr {:.2g}"), ("grad_norm", "grad norm {:.2g}")):
        if newest.get(key) is not None:
            parts.append(text.format(newest[key]))
    for key, text in (("rewards_accuracies", "accuracy {:.0%}"), ("rewards_margins", "margin {:.2g}")):
        if newest.get(key) is not None:
            parts.append(text.format(newest[key]))
    if newest.get("tokens_per_second"):
        parts.append(f"{as_count(newest['tokens_per_second'])} tokens/s")
    return " · ".join(parts)


def training_lines(state: JobState, rows: Rows, parts: int = 20) -> list[str]:
    """The training rows of which each is the first in its twentieth of the steps, as text."""
    lines: dict[int, str] = {}
    for row in rows:
        if row.get("kind") == "train" and row.get("step") is not None:
            part = parts * row["step"] // max(1, state.total_steps)
            lines.setdefault(part, f"  step {row['step']:,}/{state.total_steps:,} · {loss_line([row])}")
    return list(lines.values())


def waiting_for(job: Job) -> str | None:
    """The name of the job of the same root that runs now, if any."""
    for other in list_jobs(job.path.parent):
        with suppress(JobError):  # deleted meanwhile
            if other.path != job.path and other.state().status == "running":
                return other.name
    return None


def steps(state: JobState) -> str:
    return f"{state.step:,}/{state.total_steps:,}"


def merged_into(facts: Mapping[str, Any]) -> str:
    """What the adapter of an export was merged into, and why; "" where there was nothing to choose."""
    into = facts.get("into")
    if not into:
        return ""
    losses = into.get("losses") or {}
    said = [f"{name} {losses[name]:.4f}" for name in ("original", "quantized") if name in losses]
    return f"{MERGED_INTO.get(into['chosen'], into['chosen'])}: {into['why']}" + (
        f" ({', '.join(said)})" if said else ""
    )


def ran_for(state: JobState, now: float | None = None) -> str:
    """How long the job has run, or ran; "" before it started or where its end is unknown."""
    if state.started_at is None or (state.ended_at is None and state.ended):
        return ""
    return as_duration((state.ended_at or now or time.time()) - state.started_at)


# -------------------------------------------------------------------- the router while training

ROUTER_MEASURES = {
    "load_entropy": ("Load entropy", "1: even use, 0: one expert for all"),
    "busiest": ("Busiest expert", "share of the layer's tokens"),
    "kl": ("Drift from the base", "KL of the routing, nats"),
    "dead": ("Dead experts", "experts without a token"),
}
"""What a "router" row of metrics.jsonl has for each layer: its title, and the unit or what its values mean."""


def router_rows(rows: Rows) -> list[dict[str, Any]]:
    """The rows that the watched router wrote, in order."""
    return [row for row in rows if row.get("kind") == "router" and row.get("layers")]


def reward_rows(rows: Rows) -> list[dict[str, Any]]:
    """The training rows of a method that samples in every step, in order."""
    return [row for row in rows if row.get("kind") == "train" and row.get("reward") is not None]


def warnings(rows: Rows) -> list[str]:
    """What the rules of the recipe warned of so far, each message once."""
    return list(dict.fromkeys(str(row["message"]) for row in rows if row.get("kind") == "warning" and "message" in row))


# -------------------------------------------------------------------- metrics


SIDES = ("base", "start", "tuned")
"""Whose answers and metrics a report shows; "start", the adapter that was given, only where one was."""


class MetricRow(NamedTuple):
    """One metric in words: values, intervals ("" where there are none) and whether the change is beyond doubt.

    `verdict` is better or worse where the whole interval of the change lies on one side of 0, else "". `start` is of
    the adapter that was given, "" where none was.
    """

    name: str
    title: str
    base: str
    base_interval: str
    tuned: str
    tuned_interval: str
    change: str
    change_interval: str
    verdict: str
    start: str = ""
    start_interval: str = ""


def metric_rows(
    before: Mapping[str, Any],
    after: Mapping[str, Any] | None,
    change: Mapping[str, Any] | None,
    start: Mapping[str, Any] | None = None,
) -> list[MetricRow]:
    """The metrics of result.json's "before", "after" and "change", the studio's own first, then those of tasks.

    Args:
        start: its "start", of the adapter as it was given.
    """
    base, tuned, given = metrics_of(before), metrics_of(after or {}), metrics_of(start or {})
    known = [name for name in METRICS if name in base]
    names = [*known, *(name for name in base if name not in METRICS)]
    return [_metric_row(name, base[name], tuned.get(name), (change or {}).get(name), given.get(name)) for name in names]


def metrics_of(side: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of one side of a result; of one that was written before there were intervals, what it has."""
    found: dict[str, Any] = side.get("metrics") or {
        name: {"value": side[name], "low": None, "high": None, "n": side.get("examples")}
        for name in ("loss", "exact_match")
        if side.get(name) is not None
    }
    return found


def _metric_row(name: str, base: Any, tuned: Any, change: Any, start: Any) -> MetricRow:
    difference = _difference(base, tuned, change)
    return MetricRow(
        name,
        title_of(name),
        metric_text(name, base["value"]),
        _interval(name, base),
        metric_text(name, tuned["value"]) if tuned else "",
        _interval(name, tuned) if tuned else "",
        _signed(name, difference.get("value"), base["value"]),
        _signed_interval(name, difference),
        _verdict(name, difference),
        metric_text(name, start["value"]) if start else "",
        _interval(name, start) if start else "",
    )


def metric_text(name: str, value: float | None) -> str:
    """A metric's value: shares in per cent, the others with four figures."""
    if value is None:
        return "not finite"
    return as_percent(value) if is_share(name) else f"{value:.4g}"


def _difference(base: Any, tuned: Any, change: Any) -> dict[str, Any]:
    if change:
        return dict(change)
    if not tuned or base["value"] is None or tuned["value"] is None:
        return {}
    return {"value": tuned["value"] - base["value"]}


def _interval(name: str, metric: Any) -> str:
    if metric.get("low") is None or metric.get("high") is None:
        return ""
    return f"{_bare(name, metric['low'])} – {_bare(name, metric['high'])}"


def _bare(name: str, value: float) -> str:
    return f"{100 * value:.1f}" if is_share(name) else f"{value:.4g}"


def _signed(name: str, value: float | None, base: float | None) -> str:
    if value is None:
        return ""
    if is_share(name):
        return f"{100 * value:+.1f} points"
    has_zero = name in METRICS and METRICS[name].kind != "mean"  # of a margin or a reward, a share says nothing
    relative = f", {100 * value / base:+.0f} %" if base and has_zero else ""
    return f"{value:+.4g}{relative}"


def _signed_interval(name: str, change: Mapping[str, Any]) -> str:
    if change.get("low") is None or change.get("high") is None:
        return ""
    return " to ".join(
        f"{100 * end:+.1f}" if is_share(name) else f"{end:+.4g}" for end in (change["low"], change["high"])
    )


def _verdict(name: str, change: Mapping[str, Any]) -> str:
    low, high = change.get("low"), change.get("high")
    if low is None or high is None or low <= 0 <= high:
        return ""
    better = METRICS[name].better if name in METRICS else change.get("better", "higher")
    return "better" if (low > 0) == (better == "higher") else "worse"


def gate_text(verdict: Mapping[str, Any]) -> str:
    """A verdict of the gate in result.json, in words."""
    from studio.gate import Verdict, said

    return said(Verdict(**verdict))
