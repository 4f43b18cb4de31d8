"""Pictures of the search for hyper-parameters, as PNG files.

python -m studio.hyper_pictures lr-test JOB_DIR       JOB_DIR/lr_test.png
python -m studio.hyper_pictures sweep SWEEP_DIR       SWEEP_DIR/sweep.png
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from studio import job_files as files
from studio.pictures import DPI, INK, QUIET, quiet_frame, written

ACCENT, BAD, PALE = "#0f766e", "#c2571a", "#b8c4cf"
STATES = {"complete": (ACCENT, "o"), "pruned": (PALE, "X"), "failed": (BAD, "x")}
MOST_TICKS = 3
"""Decades of an axis up to which there is a tick between two powers of ten."""


def draw_lr_test(path: Path, report: dict[str, Any]) -> Path:
    """Loss by rate, single and smoothed, with the suggested rate and the two that it comes from."""
    figure = Figure(figsize=(8, 4.4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    rates = [point["rate"] for point in report["points"]]
    axes.plot(rates, [point["loss"] for point in report["points"]], color=PALE, linewidth=1, label="loss of a step")
    smooth = [point["smoothed"] for point in report["points"]]
    axes.plot(rates, smooth, color=ACCENT, linewidth=2, label="smoothed")
    for name, style in (("steepest", ":"), ("least", "--"), ("suggested", "-")):
        colour = INK if name == "suggested" else QUIET
        axes.axvline(report[name], color=colour, linestyle=style, linewidth=1.2, label=f"{name} {report[name]:.2g}")
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(top=max(smooth[: max(2, len(smooth) // 2)]) * 1.3)
    _label(axes, "Learning-rate range test", "learning rate", "training loss, nats a token")
    axes.legend(fontsize=8.5, frameon=False, loc="lower left")
    return written(figure, path)


def draw_sweep(path: Path, table: dict[str, Any]) -> Path:
    """The metric by trial, and by each parameter."""
    names, title = list(table["params"]), table["metric"]
    panels = 1 + len(names)
    figure = Figure(figsize=(4.2 * min(3, panels), 3.4 * -(-panels // 3)), dpi=DPI, layout="constrained")
    grid = figure.subplots(-(-panels // 3), min(3, panels), squeeze=False).flat
    first, *others = list(grid)
    _scatter(first, table["trials"], [trial["number"] for trial in table["trials"]], title)
    for trial in (trial for trial in table["trials"] if trial["number"] == table["best"]):
        first.scatter(trial["number"], trial["value"], s=120, facecolors="none", edgecolors=INK, label="best", zorder=4)
    done = [trial for trial in table["trials"] if trial["state"] == "complete"]
    best: list[float] = []
    choose = min if table["direction"] == "minimize" else max
    for trial in done:
        best.append(choose([trial["value"], *best[-1:]]))
    first.step([trial["number"] for trial in done], best, where="post", color=ACCENT, linewidth=1, label="best so far")
    _label(first, "By trial", "trial", title)
    first.xaxis.get_major_locator().set_params(integer=True)
    first.legend(fontsize=8, frameon=False)
    for axes, name in zip(others, names, strict=False):
        _by_parameter(axes, table, name, title)
    for axes in (first, *others[: len(names)]):
        _spread(axes, [_height(trial, title) for trial in table["trials"]])
    for axes in others[len(names) :]:
        axes.set_visible(False)
    return written(figure, path)


def _spread(axes: Axes, values: Sequence[float | None]) -> None:
    """By the logarithm where the values differ by more than a factor of five; lines at them in any case."""
    found = [value for value in values if value is not None]
    if found and min(found) > 0 and max(found) > 5 * min(found):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="both", color="#e5e9ee", linewidth=0.8)


def _by_parameter(axes: Axes, table: dict[str, Any], name: str, title: str) -> None:
    kind = table["params"][name]
    trials = [trial for trial in table["trials"] if name in trial["params"]]
    values = [trial["params"][name] for trial in trials]
    if "choices" in kind:
        places = [str(choice) for choice in kind["choices"]]
        axes.set_xticks(range(len(places)), places)
        axes.set_xlim(-0.5, len(places) - 0.5)
        values = [places.index(str(value)) for value in values]
    elif kind["log"]:
        decades = math.log10(kind["high"] / kind["low"])
        axes.set_xscale("log")
        axes.set_xlim(kind["low"] / 1.3, kind["high"] * 1.3)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if decades <= MOST_TICKS else (1,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    _scatter(axes, trials, values, title)
    _label(axes, name.rpartition(".")[2].replace("_", " "), name, title)


def _height(trial: dict[str, Any], metric: str) -> float | None:
    """A trial's metric; of one that was pruned its last held-out loss, where that is the metric."""
    value: float | None = trial["value"]
    return trial["last"] if value is None and metric == "loss" else value


def _scatter(axes: Axes, trials: Sequence[dict[str, Any]], places: Sequence[Any], metric: str) -> None:
    for state, (colour, marker) in STATES.items():
        found = [
            (place, _height(trial, metric))
            for trial, place in zip(trials, places, strict=True)
            if trial["state"] == state
        ]
        found = [(place, value) for place, value in found if value is not None]
        if found:
            xs, ys = zip(*found, strict=True)
            label = "pruned: its last loss" if state == "pruned" else state
            axes.scatter(xs, ys, color=colour, marker=marker, s=34, label=label, zorder=3)


def _label(axes: Axes, title: str, below: str, beside: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    axes.set_xlabel(below, fontsize=9, color=QUIET)
    axes.set_ylabel(beside, fontsize=9, color=QUIET)
    quiet_frame(axes)


def main(kind: str, folder: Path) -> None:
    if kind == "lr-test":
        draw_lr_test(folder / "lr_test.png", files.read_json(folder / "result.json")["lr_test"])
    else:
        draw_sweep(folder / "sweep.png", files.read_json(folder / "results.json"))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
