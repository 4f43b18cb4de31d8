"""A job as the browser shows it: the list, where it stands, its figures, its answers and its files."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from studio import Job, JobState
from studio.progress import (
    PHASES,
    SIDES,
    Rows,
    count_text,
    first_measured,
    gate_text,
    metric_rows,
    phase_counts,
    phases_over,
    ran_for,
)
from studio.quantities import as_bytes, as_count, as_duration, as_percent
from ui.downloads import has_adapter
from ui.html import Child, el, join
from ui.views import figure, figures, meter, note, table

Row = dict[str, Any]

PHASE_TITLES = {
    "loading": "Load the base",
    "evaluating base": "Measure the base",
    "training": "Train",
    "evaluating tuned": "Measure the tuned",
    "saving": "Save the adapter",
}
SHARES = ("exact_match", "preference_accuracy")
MOST_POINTS = 2_000
MOST_COMPARED = 1_000_000
ALIKE = 0.6


def job_list(jobs: Sequence[tuple[Job, JobState]], selected: str | None, now: float) -> Markup:
    """Links to the jobs, newest first."""
    if not jobs:
        return el("p", "No jobs yet.", cls="quiet-text")
    return el(
        "nav", el("ul", *(_job_link(job, state, selected, now) for job, state in jobs)), cls="jobs", aria_label="Jobs"
    )


def _job_link(job: Job, state: JobState, selected: str | None, now: float) -> Markup:
    here = job.name == selected
    lines = join(
        el("span", job.name, cls="job-name"),
        el("span", pill(state), el("span", ago(state.created_at, now)), cls="job-line"),
    )
    return el("li", el("a", lines, href=f"jobs?job={quote(job.name, safe='')}", aria_current="page" if here else None))


def pill(state: JobState) -> Markup:
    return el("span", state.status, cls=f"pill {state.status}")


def ago(then: float, now: float) -> str:
    """How long ago, in the one unit that matters."""
    seconds = max(0.0, now - then)
    for size, unit in ((86_400, "day"), (3_600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


# -------------------------------------------------------------------- where it stands


def head(job: Job, state: JobState, rows: Rows, waits_for: str | None) -> Markup:
    """Name and status, the phases, the progress of the present one, and what went wrong."""
    started = time.strftime("%d %b %Y, %H:%M", time.localtime(state.created_at))
    facts = [f"Submitted {started}", f"ran for {ran_for(state)}" if state.ended and ran_for(state) else None]
    return el(
        "section",
        el("div", el("h1", job.name), pill(state), _again(job) if state.ended else None, cls="job-head"),
        el("p", " · ".join(fact for fact in facts if fact), cls="quiet-text"),
        _trouble(job, state),
        None if state.status == "succeeded" else _stages(state, rows),
        _present(state, rows, waits_for),
        cls="card head",
        aria_label="Where the job stands",
    )


def _again(job: Job) -> Markup:
    return el("a", "Use this recipe again", href=f"./?recipe=job:{quote(job.name, safe='')}", cls="button small")


def _stages(state: JobState, rows: Rows) -> Markup:
    over = phases_over(state)
    items = []
    for phase in PHASES:
        now = phase == state.phase
        stage = "over" if phase in over else _present_stage(state) if now else "ahead"
        items.append(el("li", PHASE_TITLES[phase], cls=stage, aria_current="step" if stage == "present" else None))
    return el("ol", *items, cls="stages", aria_label="Phases")


def _present_stage(state: JobState) -> str:
    """The phase in which the job is, or ended."""
    return {"cancelled": "stopped", "failed": "broken", "lost": "broken"}.get(state.status, "present")


def _present(state: JobState, rows: Rows, waits_for: str | None) -> Markup | None:
    """The bar of the phase that runs now, with its count and, in training, the time that is left."""
    if state.ended:
        return None
    if state.status == "queued":
        text = f"Waiting for {waits_for} to end: one job runs at a time." if waits_for else "Starting …"
        return el("p", text, cls="meter-text", role="status")
    done, total = phase_counts(state, rows).get(state.phase, (0, 0))
    left = seconds_left(state, rows)
    title = PHASE_TITLES.get(state.phase, state.phase)
    counted = count_text(state.phase, done, total) if total else ""
    return meter(title, done, total, counted, f"{as_duration(left)} left" if left else "")


def seconds_left(state: JobState, rows: Rows) -> float | None:
    """Seconds to the end of the training, at the speed since its first logged step."""
    points = [(row["time"], row["step"]) for row in rows if row.get("kind") == "train" and "time" in row]
    if state.phase != "training" or len(points) < 2:
        return None
    (begun, first), (now, last) = points[0], points[-1]
    return (now - begun) / (last - first) * max(0, state.total_steps - last) if last > first else None


def _trouble(job: Job, state: JobState) -> Markup | None:
    if state.status == "cancelled":
        return note("quiet", "This job was cancelled", None if has_adapter(job) else el("p", "No adapter was written."))
    if not state.error:
        return None
    title = "This job was lost" if state.status == "lost" else "This job failed"
    message = state.error.message[:1].upper() + state.error.message[1:]
    more = (
        "Its adapter and its result are below."
        if state.error.type == "GateError"
        else "The last lines of its log are below."
    )
    return note("error", title, el("p", message, cls="words"), el("p", more))


# -------------------------------------------------------------------- figures


def live_figures(state: JobState, rows: Rows, result: dict[str, Any] | None) -> Markup | None:
    """Held-out loss and exact match, base to tuned, as they come; then memory and time."""
    before, after = (
        next((r for r in rows if r.get("kind") == "eval" and r.get("when") == w), None) for w in ("before", "after")
    )
    cards = [
        _before_after("Held-out loss", "loss", before, after),
        _before_after("Exact match", "exact_match", before, after),
        _before_after("Preference accuracy", "preference_accuracy", before, after),
        _reference_kl(after),
    ]
    if before is not None and "reward" in before:
        cards.append(_before_after("Held-out reward", "reward", before, after))
    newest = next((row for row in reversed(rows) if row.get("kind") == "train"), None)
    if result:
        cards += [_memory(result), _time(result)]
    elif newest:
        cards += [_loss_now(newest), _speed(newest)]
    kept = [card for card in cards if card is not None]
    return figures(*kept) if kept else None


def _before_after(label: str, key: str, before: Row | None, after: Row | None) -> Markup | None:
    if before is None or key not in before or (key == "exact_match" and before[key] is None):
        return None
    first = _quantity(key, before.get(key))
    if after is None:
        return figure(label, first, "base model, held-out examples")
    second = _quantity(key, after.get(key))
    return figure(
        label,
        join(el("span", first, cls="was"), el("span", " → ", cls="to"), second),
        _change(key, before, after),
        "hero",
    )


def _quantity(key: str, value: float | None) -> str:
    if value is None:
        return "not finite"
    return as_percent(value) if key in SHARES else f"{value:.3f}"


def _reference_kl(after: Row | None) -> Markup | None:
    value = after.get("reference_kl") if after else None
    return None if value is None else figure("KL from the base", f"{value:.3g}", "nats a token, held-out answers")


def _change(key: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    one, two = before.get(key), after.get(key)
    if one is None or two is None:
        return "base → tuned"
    if key in SHARES:
        return f"base → tuned, {100 * (two - one):+.1f} points"
    return f"base → tuned, {100 * (two - one) / one:+.0f} %" if one else "base → tuned"


def _loss_now(row: dict[str, Any]) -> Markup:
    return figure("Training loss", _quantity("loss", row.get("loss")), f"at step {row.get('step', 0):,}")


def _speed(row: dict[str, Any]) -> Markup | None:
    speed = row.get("tokens_per_second")
    return figure("Speed", as_count(speed), "tokens per second") if speed else None


def _memory(result: dict[str, Any]) -> Markup | None:
    memory = result.get("memory")
    if not memory:
        return None
    predicted, measured = memory["predicted_bytes"], memory["measured_bytes"]
    return figure("Peak memory", as_bytes(measured), f"measured, {as_bytes(predicted)} predicted")


def _time(result: dict[str, Any]) -> Markup | None:
    seconds = result.get("seconds")
    if not seconds:
        return None
    return figure("Time", as_duration(seconds["total"]), f"of which training {as_duration(seconds.get('train', 0))}")


def loss_points(rows: Rows, most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """(step, loss) of the training so far, at most `most` of them: the mean of each stretch where there are more."""
    points = [(r["step"], r["loss"]) for r in rows if r.get("kind") == "train" and r.get("loss") is not None]
    if len(points) <= most:
        return points
    edges = [round(i * len(points) / most) for i in range(most + 1)]
    stretches = [points[a:b] for a, b in pairwise(edges)]
    return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in stretches]


def held_out_points(rows: Rows) -> list[tuple[int, float]]:
    """(step, held-out loss): at step 0 of the adapter that was given, else of the base; then as it was measured."""
    during = [(r["step"], r["loss"]) for r in rows if r.get("kind") == "held_out"]
    first = [(0, row["loss"]) for row in first_measured(rows) if row.get("loss") is not None]
    return [*first, *((step, loss) for step, loss in during if loss is not None)] if during else []


def log_view(lines: Sequence[str]) -> Markup:
    """The lines in a box that stands at its end."""
    text = "\n".join(lines) or "The log is empty so far."
    return el("div", el("pre", text), cls="log", role="log", tabindex="0", aria_label="Last lines of the log")


# -------------------------------------------------------------------- result


def result_view(job: Job, result: dict[str, Any]) -> Markup:
    """The adapter to take away, the answers side by side, and where the files lie."""
    parts = (_adapter(job, result), _metrics(result), _answers(result.get("generations") or []), _files(job, result))
    return join(_rates(job, result), *parts)


def _rates(job: Job, result: dict[str, Any]) -> Markup | None:
    """What a learning-rate range test found."""
    found = result.get("lr_test")
    if not found:
        return None
    return el(
        "section",
        el("h2", "Learning-rate range test"),
        figures(
            figure("Suggested rate", f"{found['suggested']:.2g}", "training.learning_rate", "hero"),
            figure("Steepest fall at", f"{found['steepest']:.2g}", "the smoothed loss falls fastest"),
            figure("Least loss at", f"{found['least']:.2g}", "beyond it the rate is too high"),
        ),
        el("p", "The picture: ", el("code", str(job.path / "lr_test.png")), cls="quiet-text"),
        cls="card",
        aria_label="Range test",
    )


def _metrics(result: dict[str, Any]) -> Markup | None:
    """Every metric, base and tuned, with its interval; what the gate said of them."""
    before, start, after = (result.get(side) for side in ("before", "start", "after"))
    if not before or not after:
        return None
    rows = [
        (
            row.title,
            _with_interval(row.base, row.base_interval),
            *([_with_interval(row.start, row.start_interval)] if start else []),
            _with_interval(row.tuned, row.tuned_interval),
            el("span", _with_interval(row.change, row.change_interval), cls=f"change {row.verdict}"),
        )
        for row in metric_rows(before, after, result.get("change"), start)
    ]
    count = before.get("examples")
    words = "In small print the interval of 95 % over the examples; the change is paired by example."
    if start:
        words += " Start is the adapter that was given; the change is from the base."
    return el(
        "section",
        el("h2", "Base against tuned"),
        el("p", f"On {count:,} held-out examples. {words}" if count else words, cls="quiet-text"),
        table("Metrics of the base and of the tuned model", _columns(start), rows),
        _gate(result.get("gate") or []),
        cls="card metrics",
        aria_label="Metrics",
    )


def _columns(start: Row | None) -> tuple[str, ...]:
    return ("Metric", "Base", *(["Start"] if start else []), "Tuned", "Change")


def _with_interval(value: str, interval: str) -> Markup:
    return join(value, el("small", interval) if interval else None)


def _gate(verdicts: Sequence[dict[str, Any]]) -> Markup | None:
    if not verdicts:
        return None
    items = [
        el(
            "li",
            el("span", "passed" if entry["passed"] else "failed", cls=f"pill {_pill(entry)}"),
            el("span", gate_text(entry)),
        )
        for entry in verdicts
    ]
    return join(el("h3", "Gate"), el("ul", *items, cls="gate"))


def _pill(entry: dict[str, Any]) -> str:
    return "succeeded" if entry["passed"] else "failed"


def _adapter(job: Job, result: dict[str, Any]) -> Markup | None:
    if not has_adapter(job):
        return None
    saved = result.get("adapter") or {}
    size = f"{as_count(saved['parameters'])} parameters, {as_bytes(saved['bytes'])}. " if "bytes" in saved else ""
    words = f"{size}A standard PEFT directory: it loads on the base model with stock transformers and peft."
    link = el(
        "a", "Download the adapter", href=f"adapter/{quote(job.name, safe='')}", download="", cls="button primary"
    )
    export = el("a", "Export", href=f"export?job={quote(job.name, safe='')}", cls="button")
    return el(
        "section",
        el("div", el("h2", "Adapter"), el("p", words)),
        el("div", export, link, cls="links"),
        cls="card take",
        aria_label="Adapter",
    )


def _answers(generations: Sequence[dict[str, str]]) -> Markup | None:
    if not generations:
        return None
    compared = [entry for entry in generations if entry["reference"].strip()]
    right = {side: sum(g[side].strip() == g["reference"].strip() for g in compared) for side in _sides(generations)}
    said = ", ".join(f"{side} {number} of {len(compared)}" for side, number in right.items())
    text = f"Answers that match the reference: {said}."
    text = text if compared else "The prompts have no references to compare with."
    cards = (_answer(number, entry) for number, entry in enumerate(generations, start=1))
    return el(
        "section",
        el("h2", "Base and tuned, side by side"),
        el("p", text, cls="quiet-text"),
        *cards,
        cls="answers",
        aria_label="Answers",
    )


def _sides(generations: Sequence[dict[str, str]]) -> list[str]:
    return [side for side in SIDES if side in generations[0]]


def _answer(number: int, entry: dict[str, str]) -> Markup:
    reference = entry["reference"].strip()
    return el(
        "article",
        el("p", entry["prompt"].strip(), cls="prompt"),
        el("div", *(_side(side, entry[side].strip(), reference) for side in _sides([entry])), cls="sides"),
        *_reference(reference),
        cls="card answer",
        aria_label=f"Answer {number}",
    )


def _reference(reference: str) -> list[Markup]:
    """Nothing of a prompt alone."""
    shown = el("div", el("span", "Reference", cls="side-name"), el("pre", reference), cls="wanted")
    return [shown] if reference else []


def _side(side: str, answer: str, reference: str) -> Markup:
    same = answer == reference
    mark = el("span", "matches" if same else "differs", cls=f"pill {'succeeded' if same else 'plain'}")
    mark = mark if reference else Markup("")
    body = _marked(answer, reference) if answer and reference and not same else join(answer or el("em", "(nothing)"))
    return el(
        "div", el("div", el("span", side.capitalize(), cls="side-name"), mark), el("pre", body), cls=f"side {side}"
    )


def _marked(answer: str, reference: str) -> Markup:
    """The answer with the words that the reference does not have marked, where the two are alike at all."""
    found, wanted = (re.findall(r"\w+|\W", text) for text in (answer, reference))
    if len(found) * len(wanted) > MOST_COMPARED:
        return join(answer)
    matcher = SequenceMatcher(None, found, wanted, autojunk=False)
    if matcher.ratio() < ALIKE:
        return join(answer)
    parts: list[Child] = []
    for kind, start, end, _, _ in matcher.get_opcodes():
        text = "".join(found[start:end])
        parts.append(text if kind == "equal" else el("mark", text) if text else None)
    return join(*parts)


def _files(job: Job, result: dict[str, Any]) -> Markup:
    places = {"job": str(job.path), **(result.get("files") or {})}
    rows = [
        join(el("dt", name.replace("_", " ").capitalize()), el("dd", el("code", str(path))))
        for name, path in places.items()
    ]
    return el("section", el("h2", "Where the files lie"), el("dl", *rows, cls="files"), cls="card", aria_label="Files")
