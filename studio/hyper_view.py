"""Suggestions, range tests and sweeps as the command line shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from studio.progress import loss_line, metric_text, steps
from studio.quantities import as_duration

if TYPE_CHECKING:
    from studio.defaults import Suggested
    from studio.jobs import Job

STATES = {"complete": "green", "pruned": "yellow", "failed": "red", "running": "cyan", "stopped": "dim"}


def suggestion_table(rows: Sequence[tuple[Suggested, Any]]) -> RenderableType:
    """(suggestion, what the recipe has) rows."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("Field", "Recipe", "Suggested", "Why", "Source"):
        table.add_column(name, justify="right" if name in ("Recipe", "Suggested") else "left", overflow="fold")
    for suggested, has in rows:
        table.add_row(
            suggested.field, _text(has), Text(_text(suggested.value), "bold"), suggested.why, suggested.source
        )
    words = "Starting points, not optima: studio lr-test and studio sweep measure. Sources: docs/hyperparameters.md"
    return Group(table, Text(words, "dim"))


def _text(value: Any) -> str:
    if value is None:
        return "null"
    return f"{value:g}" if isinstance(value, float) else str(value)


def lr_test_view(report: dict[str, Any]) -> RenderableType:
    """What a range test found."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row("Suggested rate", Text(f"{report['suggested']:.2g}", "bold green"), "training.learning_rate")
    table.add_row("Steepest fall at", f"{report['steepest']:.2g}", "the smoothed loss falls fastest")
    table.add_row("Least loss at", f"{report['least']:.2g}", "beyond it the rate is too high")
    ended = report["diverged"]
    table.add_row(
        "Diverged at", f"{ended:.2g}" if ended else "–", "the test stopped" if ended else "it went to its end"
    )
    table.add_row("Steps", str(len(report["points"])), "")
    return Group(table, Text(f"Picture  {report['job']}/lr_test.png"))


def sweep_table(results: dict[str, Any]) -> RenderableType:
    """A row a trial, the best one in bold."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("Trial", justify="right")
    for field in results["params"]:
        table.add_column(field.rpartition(".")[2], justify="right")
    for name in (results["metric"], "95 %", "State", "Time"):
        table.add_column(name, justify="left" if name == "State" else "right")
    for trial in results["trials"]:
        table.add_row(
            str(trial["number"]),
            *(_text(trial["params"].get(field, "")) for field in results["params"]),
            _value(results["metric"], trial),
            _interval(results["metric"], trial["interval"]),
            Text(_state(trial), STATES[trial["state"]]),
            as_duration(trial["seconds"]) if trial["seconds"] is not None else "",
            style="bold" if trial["number"] == results["best"] else "",
        )
    return table


def _value(metric: str, trial: dict[str, Any]) -> str:
    if trial["value"] is not None:
        return metric_text(metric, trial["value"])
    if trial["last"] is None:
        return ""
    return f"({trial['last']:.4g})" if metric == "loss" else f"(loss {trial['last']:.4g})"


def _interval(metric: str, ends: Sequence[float | None] | None) -> str:
    if not ends or ends[0] is None or ends[1] is None:
        return ""
    return f"{metric_text(metric, ends[0])} – {metric_text(metric, ends[1])}"


def _state(trial: dict[str, Any]) -> str:
    if trial["state"] == "pruned":
        return f"pruned at {100 * trial['part']:.0f} %"
    return str(trial["state"])


def sweep_view(results: dict[str, Any]) -> RenderableType:
    """The table, and which trial was best, with its values."""
    lines: list[RenderableType] = [sweep_table(results), ""]
    if (best := results["best"]) is not None:
        trial = next(trial for trial in results["trials"] if trial["number"] == best)
        values = ", ".join(f"{field}: {_text(value)}" for field, value in trial["params"].items())
        lines.append(Text(f"Best: trial {best}, {results['metric']} {trial['value']:.4g}, with {values}"))
        lines.append(Text(f"Its job  {trial['job']}"))
    for trial in results["trials"]:
        if trial["error"]:
            lines.append(Text(f"Trial {trial['number']} failed: {trial['error'].splitlines()[0]}", "red"))
    lines.append(Text(f"Picture  {results['sweep']}/sweep.png"))
    return Group(*lines)


@contextmanager
def sweep_progress(console: Console, quiet: bool) -> Iterator[Callable[[dict[str, Any], Job | None], None] | None]:
    """The table, redrawn as trials go on, as the callback of `run_sweep`; plain lines where there is no terminal."""
    if quiet:
        yield None
        return
    if not console.is_terminal:
        said: set[int] = set()
        began: list[set[int]] = []

        def line(results: dict[str, Any], job: Job | None) -> None:
            over = {trial["number"]: trial for trial in results["trials"] if trial["state"] != "running"}
            if not began:  # what is over at the first look is of an earlier run
                began.append(set(over) if job else set())
            for number in sorted(over.keys() - said):
                said.add(number)
                before = ", from before" if number in began[0] else ""
                value = _value(results["metric"], over[number])
                named = f"{results['metric']} {value}" if value else ""
                console.print(Text(f"trial {number}: {_state(over[number])}{before} {named}".rstrip()))

        yield line
        return
    with Live(console=console, refresh_per_second=2) as live:

        def redraw(results: dict[str, Any], job: Job | None) -> None:
            live.update(Group(sweep_table(results), Text(_now(results, job), "cyan")))

        yield redraw


def _now(results: dict[str, Any], job: Job | None) -> str:
    finished = [trial for trial in results["trials"] if trial["state"] in ("complete", "pruned", "failed")]
    seconds = [trial["seconds"] for trial in finished if trial["seconds"]]
    left = results["wanted"] - len(finished)
    eta = f" · about {as_duration(left * sum(seconds) / len(seconds))} left" if seconds else ""
    words = f"{len(finished)} of {results['wanted']} trials{eta}"
    if job is None:
        return words
    state = job.state()
    return f"{words}\n{job.name}: {state.phase}, step {steps(state)} · {loss_line(job.metrics())}"
