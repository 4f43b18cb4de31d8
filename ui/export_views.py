"""Exports as the browser shows them: the list, what will be written, how far one is, and the certificate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from studio import ExportPlan, consumers
from studio.progress import EXPORT_STAGES, merged_into
from studio.quantities import as_bytes, as_duration
from ui.exporting import Run
from ui.html import Child, el, join
from ui.job_views import ago
from ui.views import figure, figures, meter, note

Export = Mapping[str, Any]

VERDICTS = {
    "verified": ("succeeded", "verified"),
    "weights verified, behaviour not run": ("queued", "weights verified"),
    "not verified": ("queued", "not verified"),
    "failed": ("failed", "failed"),
}
"""The colour of a verdict, and its word where there is little room."""

MARKS = {"passed": ("succeeded", "passed"), "failed": ("failed", "failed"), "not run": ("queued", "not run")}


def export_list(exports: Sequence[Export], selected: str | None, running: Run | None, now: float) -> Markup:
    """Links to the exports, newest first; the one that runs is above them."""
    items = [_running_link(running)] if running and not running.ended else []
    items += [_link(export, selected, now) for export in exports]
    if not items:
        return el("p", "No exports yet.", cls="quiet-text")
    return el("nav", el("ul", *items), cls="jobs", aria_label="Exports")


def _running_link(run: Run) -> Markup:
    line = el("span", el("span", "running", cls="pill running"), cls="job-line")
    return el("li", el("a", el("span", run.request.out.name, cls="job-name"), line, href="export"))


def _link(export: Export, selected: str | None, now: float) -> Markup:
    name = Path(export["out"]).name
    colour, word = VERDICTS.get(export["verdict"], ("failed", export["verdict"]))
    created = datetime.fromisoformat(export["created"]).timestamp()
    line = el("span", el("span", word, cls=f"pill {colour}"), el("span", ago(created, now)), cls="job-line")
    here = "page" if name == selected else None
    return el(
        "li",
        el(
            "a", el("span", name, cls="job-name"), line, href=f"export?export={quote(name, safe='')}", aria_current=here
        ),
    )


# -------------------------------------------------------------------- before


def plan_view(plan: ExportPlan) -> Markup:
    """What will be written, how it is run, and what will be compared before it appears."""
    checks = [el("li", words) for words in plan.checks]
    return el(
        "div",
        *(note("warning", "Before you start", el("p", words)) for words in plan.warnings),
        figures(
            figure("Size", f"about {as_bytes(plan.bytes)}", plan.format.title),
            figure("Disk", as_bytes(plan.free_bytes), "free where it goes"),
            figure("Verified in", plan.verified_in or "nothing", "a fresh process, before the folder appears"),
        ),
        el("div", el("h3", "Files"), el("ul", *(_planned(what, size) for what, size in plan.files)), cls="list"),
        el("div", el("h3", "What is compared"), el("ul", *checks), cls="list") if checks else None,
        _command("How it is run", plan.command),
        cls="plan",
    )


def _planned(what: str, size: int | None) -> Markup:
    return el("li", el("span", what), el("b", f"about {as_bytes(size)}") if size else None)


def _command(title: str, command: str) -> Markup | None:
    return el("div", el("h3", title), el("pre", command, cls="command")) if command else None


# -------------------------------------------------------------------- meanwhile


def progress_view(run: Run, now: float) -> Markup:
    """The stages, and the bar of the present one."""
    here = EXPORT_STAGES.index(run.stage) if run.stage in EXPORT_STAGES else -1
    stages = [
        el("li", stage, cls=("over", "present", "ahead")[(number >= here) + (number > here)])
        for number, stage in enumerate(EXPORT_STAGES)
    ]
    words = "Clearing up" if run.status == "cancelling" else run.stage or "Checking that everything fits"
    left = run.seconds_left(now)
    ends = f"{as_duration(left)} left" if left else ""
    counted = f"{as_bytes(run.done)} / {as_bytes(run.total)}" if run.total else ""
    return el(
        "div",
        el("div", el("h1", run.request.out.name), el("span", run.status, cls="pill running"), cls="job-head"),
        el("ol", *stages, cls="stages", aria_label="Stages"),
        meter(words, run.done, run.total, counted, ends, f"for {as_duration(now - run.started_at)}"),
    )


def failure_view(run: Run) -> Markup:
    """Why there is no export, with every check where it came so far."""
    if run.status == "cancelled":
        return note("quiet", f"{run.request.out.name} was cancelled", el("p", "Nothing of it is left."))
    title = f"{run.request.out.name} was not exported"
    if not run.checks:
        return note("error", title, el("p", run.error, cls="words"))
    failed = sum(check["status"] == "failed" for check in run.checks)
    words = f"{failed} of {len(run.checks)} checks failed, so nothing was written. They stand first in this list."
    order = sorted(run.checks, key=lambda check: check["status"] != "failed")
    return join(note("error", title, el("p", words)), _checks(order, "Checks"))


# -------------------------------------------------------------------- afterwards


def export_view(export: Export) -> Markup:
    """The certificate: verdict, every check, every file; and how the export is run and taken away."""
    name = Path(export["out"]).name
    return join(_head(export, name), _checks(export["checks"]), _files(export))


def _head(export: Export, name: str) -> Markup:
    colour, _ = VERDICTS.get(export["verdict"], ("failed", ""))
    titles = {consumer.name: consumer.title for consumer in consumers()}
    whose = titles.get(export["consumer"], "")
    size = sum(file["bytes"] for file in export["files"].values())
    link = el("a", "Download", href=f"export/{quote(name, safe='')}.zip", download="", cls="button primary small")
    return el(
        "section",
        el("div", el("h1", name), el("span", export["verdict"], cls=f"pill {colour}"), link, cls="job-head"),
        el("p", " · ".join(part for part in (whose, export["format"], as_bytes(size)) if part), cls="quiet-text"),
        _command("How it is run", export["command"]),
        el("dl", *_facts(export), cls="files"),
        cls="card head",
        aria_label="Export",
    )


def _facts(export: Export) -> list[Markup]:
    facts = {
        "Folder": export["out"],
        "Base": export["base"]["name"],
        "Merged into": merged_into(export["facts"]) or None,
        "Options": ", ".join(f"{key} {value}" for key, value in export["options"].items()) or None,
        "Verified with": export["prompts"] or None,
    }
    return [join(el("dt", name), el("dd", el("span", text))) for name, text in facts.items() if text]


def _checks(checks: Sequence[Mapping[str, Any]], title: str = "Certificate") -> Markup:
    passed = sum(check["status"] == "passed" for check in checks)
    rows = [el("tr", *_check(check)) for check in checks]
    head = el("thead", el("tr", *(el("th", name, scope="col") for name in ("Check", "", "Found"))))
    return el(
        "section",
        el("h2", title),
        el("p", f"{passed} of {len(checks)} checks passed.", cls="quiet-text"),
        el("div", el("table", el("caption", "Every check"), head, el("tbody", *rows)), cls="scroll checks"),
        cls="card",
        aria_label=title,
    )


def _check(check: Mapping[str, Any]) -> tuple[Child, ...]:
    colour, word = MARKS.get(check["status"], ("failed", str(check["status"])))
    return (
        el("th", check["name"], scope="row"),
        el("td", el("span", word, cls=f"pill {colour}")),
        el("td", check["detail"], cls="words"),
    )


def _files(export: Export) -> Markup:
    rows = [
        el("tr", el("th", name, scope="row"), el("td", as_bytes(file["bytes"])), el("td", el("code", file["sha256"])))
        for name, file in export["files"].items()
    ]
    head = el("thead", el("tr", *(el("th", name, scope="col") for name in ("File", "Size", "sha256"))))
    return el(
        "section",
        el("h2", "Files"),
        el("div", el("table", head, el("tbody", *rows)), cls="scroll hashes"),
        cls="card",
        aria_label="Files",
    )
