"""Metrics as the command line shows them: base, tuned, the change with its interval, and the gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from studio.progress import MetricRow, gate_text, metric_rows

Row = Mapping[str, Any]


def metric_table(
    before: Row, after: Row | None, change: Row, start: Row | None = None, change_from_start: Row | None = None
) -> Table:
    """A row a metric: the values with their intervals, and the change from base (and from start) to tuned."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    count = before.get("examples")
    table.add_column(f"Held-out, {count:,} examples" if count else "Measured")
    sides = ("base", *(["start"] if start else []), "tuned", "change") if after else ("value",)
    if after and start:
        sides = ("base", "start", "tuned", "change from base", "change from start")
    of_start = {row.name: row for row in metric_rows(start, after, change_from_start)} if after and start else {}
    for name in sides:
        table.add_column(name, justify="right")
    for row in metric_rows(before, after, change, start):
        cells = [Text.assemble(row.base, ("  " + row.base_interval, "dim"))]
        if start:
            cells.append(Text.assemble(row.start, ("  " + row.start_interval, "dim")))
        if after:
            cells.append(Text.assemble((row.tuned, "bold"), ("  " + row.tuned_interval, "dim")))
            for each in (row, of_start.get(row.name)) if start else (row,):
                cells.append(_change(each) if each else Text())
        table.add_row(row.title, *cells)
    return table


def _change(row: MetricRow) -> Text:
    style = {"better": "green", "worse": "red"}.get(row.verdict, "")
    return Text.assemble((row.change, style), ("  " + row.change_interval, "dim"))


def gate_lines(verdicts: list[dict[str, Any]]) -> list[Text]:
    """A line a rule of the gate."""
    lines = []
    for entry in verdicts:
        mark, style = ("passed", "green") if entry["passed"] else ("failed", "bold red")
        lines.append(Text.assemble("gate ", (mark, style), f": {gate_text(entry)}"))
    return lines


def report_view(report: Row) -> RenderableType:
    """What `studio evaluate` found."""
    lines = [("Base", report["base"])]
    if report["adapter"]:
        lines.append(("Adapter", report["adapter"]))
    if report["data"]:
        lines.append(("Rows", report["data"]))
    head = [Text.assemble((f"{name:<9}", "bold"), str(words)) for name, words in lines]
    table = metric_table(report["before"], report["after"], report["change"])
    return Group(*head, "", table, Text("Intervals of 95 % over the examples; changes paired by example", "dim"))


@contextmanager
def measuring_progress(console: Console, quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar for each part of the work, as the callback of `studio.evaluate`; None where nothing is to be shown."""
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def update(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done, total=total)

        yield update
