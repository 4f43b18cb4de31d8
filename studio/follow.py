"""Follows a job from its files until it ends: bars and a loss curve on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from typing import Any, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.text import Text

from studio.jobs import Job, JobState
from studio.progress import (
    Rows,
    count_text,
    loss_line,
    losses,
    phase_counts,
    phases_over,
    router_rows,
    training_lines,
    waiting_for,
)
from studio.quantities import sparkline
from studio.terminal import warning_text

LOOK_SECONDS = 0.25


class View(Protocol):
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def show(self, state: JobState, rows: Rows, waits_for: str | None) -> None: ...


def follow(job: Job, console: Console) -> JobState:
    """Shows `job` on `console` until it has ended; returns the state in which it ended."""
    with LiveView(console) if console.is_terminal else PlainView(console) as view:
        while True:
            state = job.state()  # before the metrics: at the end, all of them are shown
            view.show(state, job.metrics(), waiting_for(job) if state.status == "queued" else None)
            if state.ended:
                return state
            time.sleep(LOOK_SECONDS)


def wait(job: Job) -> JobState:
    """Waits in silence until `job` has ended."""
    while not (state := job.state()).ended:
        time.sleep(LOOK_SECONDS)
    return state


def router_line(rows: Rows) -> str:
    """The largest KL and the lowest load entropy of the newest row of the router, each with its layer."""
    row: dict[str, Any] = next(reversed(router_rows(rows)), {})
    parts = (
        _worst(row, "kl", 1, "largest KL", "{:.3g} nats"),
        _worst(row, "load_entropy", -1, "lowest load entropy", "{:.3f}"),
    )
    return " · ".join(part for part in parts if part)


def _worst(row: dict[str, Any], key: str, sign: int, name: str, text: str) -> str:
    """A null in a row stands for a number that is not finite, which is the worst."""
    values = row.get(key)
    if not values:
        return ""
    position = max(range(len(values)), key=lambda i: math.inf if values[i] is None else sign * values[i])
    value = "not finite" if values[position] is None else text.format(values[position])
    return f"{name} {value} (layer {row['layers'][position]})"


class WarningPrinter:
    """Prints each row with a warning once."""

    def __init__(self, console: Console):
        self._console = console
        self._printed = 0

    def show(self, rows: Rows) -> None:
        found = [row for row in rows if row.get("kind") == "warning" and "message" in row]
        for row in found[self._printed :]:
            self._console.print(warning_text(str(row["message"])), soft_wrap=True)
        self._printed = len(found)


class LiveView:
    """One bar per phase, and the course of the loss and the router under them, redrawn in place; warnings above."""

    def __init__(self, console: Console):
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            PhaseBar(bar_width=26),
            TextColumn("{task.fields[count]}", justify="right"),
            EndsIn(compact=True, elapsed_when_finished=True),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._line = Text("starting")
        self._warnings = WarningPrinter(console)
        self._live = Live(console=console, refresh_per_second=8, get_renderable=self._render)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, state: JobState, rows: Rows, waits_for: str | None) -> None:
        if state.status == "queued":
            self._line = Text(f"queued, waits for {waits_for}" if waits_for else "starting", style="yellow")
            return
        self._warnings.show(rows)
        over = phases_over(state)
        for phase, (done, total) in phase_counts(state, rows).items():
            self._show_phase(phase, done, total, over=phase in over)
        router = router_line(rows)
        lines = f"{loss_line(rows)}\n  router: {router}" if router else loss_line(rows)
        self._line = Text.assemble("  ", lines, "\n  ", (sparkline(losses(rows)), "cyan"))

    def _show_phase(self, phase: str, done: int, total: int, over: bool) -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(phase, total=None, count="")
        if over:
            done = total = total or done or 1
        count = count_text(phase, done, total) if total > 1 else ""
        self._progress.update(self._tasks[phase], completed=done, total=total or None, count=count)

    def _render(self) -> Group:
        return Group(self._progress, self._line)


class PhaseBar(BarColumn):
    """A bar that stands still, instead of pulsing, where the total is not known."""

    def render(self, task: Task) -> ProgressBar:
        bar = super().render(task)
        bar.pulse = task.total is None
        return bar


class EndsIn(TimeRemainingColumn):
    """The time that is left, and for a finished phase the time it took."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        return super().render(task) if task.finished else Text.assemble(("ETA ", "dim"), super().render(task))


class PlainView:
    """A line for each phase that begins, each twentieth part of the training and each warning; no control codes."""

    def __init__(self, console: Console):
        self._console = console
        self._said: set[str] = set()
        self._warnings = WarningPrinter(console)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def show(self, state: JobState, rows: Rows, waits_for: str | None) -> None:
        if waits_for:
            self._say(f"queued, waits for {waits_for}")
        for phase in phase_counts(state, rows):
            self._say(phase)
        for line in training_lines(state, rows):
            self._say(line)
        self._warnings.show(rows)

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._console.print(Text(line), soft_wrap=True)
