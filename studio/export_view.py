"""What `studio export` shows: the plan, bars while it runs, and the certificate with every check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from studio.export_plan import ExportPlan
from studio.follow import EndsIn, PhaseBar
from studio.progress import merged_into
from studio.quantities import as_bytes
from studio.terminal import clean, warning_text

MARKS = {"passed": ("✓", "green"), "failed": ("✗", "red"), "not run": ("–", "yellow")}


def plan_view(plan: ExportPlan) -> RenderableType:
    """What will be written, how large, and what will be checked."""
    shown = Table(box=None, show_header=False, pad_edge=False)
    shown.add_column(style="bold", no_wrap=True)
    shown.add_column(overflow="fold")
    title = plan.consumer.title if plan.consumer else plan.format.title
    shown.add_row("Export", Text(clean(f"{plan.name} for {title} ({plan.format.name})")))
    if plan.origin.adapter:
        shown.add_row("Adapter", Text(clean(str(plan.origin.adapter))))
    shown.add_row("Base", Text(clean(plan.origin.base_name)))
    if plan.chooses:
        shown.add_row("Merged into", "whichever has the lower held-out loss: its own weights, or as training held them")
    shown.add_row("Folder", Text(clean(str(plan.out))))
    for number, (what, size) in enumerate(plan.files):
        shown.add_row("" if number else "Files", Text(clean(what + (f", about {as_bytes(size)}" if size else ""))))
    if plan.command:
        shown.add_row("Command", Text(clean(plan.command)))
    shown.add_row("Disk", f"about {as_bytes(plan.bytes)} of {as_bytes(plan.free_bytes)} free")
    for number, words in enumerate(plan.checks or ["nothing: verification is switched off"]):
        shown.add_row("" if number else "Checks", Text(words))
    return Group(shown, *(warning_text(words) for words in plan.warnings))


@contextmanager
def export_progress(console: Console, quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """One bar a stage, as the callback of `studio.export`: bytes where they are known. None shows nothing."""
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}"),
        PhaseBar(bar_width=26),
        TextColumn("{task.fields[count]}", justify="right"),
        EndsIn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for earlier in tasks.values():
                    bars.update(earlier, completed=1, total=1)
                tasks[stage] = bars.add_task(stage, total=None, count="")
            count = f"{as_bytes(done)} / {as_bytes(total)}" if total else ""
            bars.update(tasks[stage], completed=done, total=total or None, count=count)

        yield update
        for task in tasks.values():
            bars.update(task, completed=1, total=1)


def certificate_view(report: Mapping[str, Any]) -> RenderableType:
    """Every check with its outcome, where the export lies, and the command that runs it."""
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("Export", Text(clean(str(report["out"]))))
    if into := merged_into(report.get("facts", {})):
        facts.add_row("Merged into", Text(clean(into)))
    facts.add_row("Verified", verdict(report["checks"]))
    if report.get("command"):
        facts.add_row("Run it", Text(clean(report["command"])))
    return Group(checks_table(report["checks"]), "", facts)


def checks_table(checks: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("Check")
    table.add_column("")
    table.add_column("Found", overflow="fold")
    for check in checks:
        mark, style = MARKS.get(check["status"], ("?", "red"))
        table.add_row(clean(check["name"]), Text(mark, style), Text(clean(check["detail"])))
    return table


def verdict(checks: Sequence[Mapping[str, Any]]) -> Text:
    """How many passed, and in plain words what was not run."""
    if not any(check["status"] == "passed" for check in checks):
        return Text("not verified: it was switched off", "yellow")
    passed = sum(check["status"] == "passed" for check in checks)
    left = [check["name"] for check in checks if check["status"] == "not run"]
    failed = len(checks) - passed - len(left)
    said = (
        f"{passed} checks passed, {failed} failed"
        if failed
        else f"{passed} check{'s' * (passed > 1)} passed, none failed"
    )
    text = Text(said, "" if failed else "green")
    return text.append(f"; not run: {', '.join(left)}", "yellow") if left else text


def push_view(report: Mapping[str, Any]) -> RenderableType:
    """What goes, or went, where."""
    shown = Table(box=None, show_header=False, pad_edge=False)
    shown.add_column(style="bold", no_wrap=True)
    shown.add_column(overflow="fold")
    seen = "only you and your organisation see it" if report["private"] else "everyone sees it"
    shown.add_row("Repository", Text(clean(f"{report['repository']} ({seen})")))
    shown.add_row("Files", f"{len(report['files'])}, {as_bytes(report['bytes'])}")
    shown.add_row("Certificate", Text(clean(report["verdict"])))
    shown.add_row("Licence", Text(clean(report["licence"] or "the base names none: find out before others see it")))
    shown.add_row("Uploaded", Text(clean(report["url"] or "nothing: this was a dry run")))
    return shown
