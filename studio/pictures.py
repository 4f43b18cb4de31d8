"""Pictures of the routing as PNG files, for the job directory and for reports. matplotlib's Agg alone, no window.

    write_job_pictures(job_dir)    pictures/use.png, rank.png, change.png, delta.png, coverage.png, router.png,
                                   scores.png, preference.png, rewards.png

Dimension legend: L MoE layers, E experts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from studio import job_files as files
from studio.preference_view import Panel, preference_panels
from studio.progress import ROUTER_MEASURES, Rows, first_measured, reward_rows, router_rows
from studio.quantities import as_percent
from studio.routing_view import Heatmap, SourceCoverage, job_routing

DPI = 130
INK, QUIET, NOTHING = "#16202e", "#556274", "#eef1f4"
COLOURS: dict[str, tuple[str, ...]] = {
    "use": ("#f1f8f7", "#5fb8ad", "#0b5f58"),
    "rank": ("#dbe7f6", "#5b94d1", "#1b4a86"),
    "change": ("#2563ab", "#f7f8f9", "#c2571a"),
    "delta": ("#ece4f8", "#a98ae0", "#4f2c94"),
    "layers": ("#2ba99d", "#2563ab", "#7c4fc4", "#c0478f"),
}
"""From the least value to the largest; for a change, blue is less and orange more."""

SIDES = {
    "chosen": "#0f766e", "rejected": "#c2571a", "margin": "#2563ab", "accuracy": "#2563ab", "kl": "#7c4fc4",
    "mean": "#2563ab", "lowest": "#c2571a", "highest": "#0f766e",
}  # fmt: skip
"""Lines of the course of a preference job."""
SCORE_COLOURS = {"easiest": "#b9c3cf", "": "#0f766e", "hardest": "#c2571a"}
"""By why a row is left out; "": it is kept."""

UNADAPTED = ("rank", "delta")
"""Pictures in which experts without an adapter are left grey."""


def draw_heatmap(path: Path, heatmap: Heatmap) -> Path:
    """Layers down, experts across, a colour bar in the unit of the values."""
    layers, experts = heatmap.values.shape
    figure = Figure(figsize=(_inches(experts, 5.2, 13.0), _inches(layers, 1.7, 8.5)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    values = np.where(heatmap.values > 0, heatmap.values, np.nan) if heatmap.kind in UNADAPTED else heatmap.values
    colours = LinearSegmentedColormap.from_list(heatmap.kind, COLOURS[heatmap.kind])
    axes.set_facecolor(NOTHING)
    image = axes.imshow(values, cmap=colours, norm=_norm(heatmap), aspect="auto", interpolation="nearest")
    axes.set_title(heatmap.title, loc="left", fontsize=11, fontweight="bold", color=INK)
    _label_axes(axes, heatmap)
    _add_bar(figure, axes, image, heatmap)
    return written(figure, path)


def draw_coverage(path: Path, sources: Sequence[SourceCoverage]) -> Path:
    """A bar for each data source: the share of its routed tokens on experts with an adapter."""
    figure = Figure(figsize=(7.2, 1.1 + 0.5 * len(sources)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    fractions = [entry.covered_fraction or 0.0 for entry in sources]
    axes.barh(range(len(sources)), [1.0] * len(sources), color=NOTHING, height=0.6)
    axes.barh(range(len(sources)), fractions, color="#0f766e", height=0.6)
    for row, fraction in enumerate(fractions):
        axes.text(1.02, row, as_percent(fraction), va="center", fontsize=9, color=INK)
    axes.set_yticks(range(len(sources)), [_plain(entry.source) for entry in sources])
    axes.set(xlim=(0, 1.16), ylim=(len(sources) - 0.5, -0.5), xticks=[0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(FuncFormatter(_percent))
    axes.set_xlabel("share of the source's routed tokens on adapted experts", fontsize=9, color=QUIET)
    axes.set_title("How much of each data source the placement covers", loc="left", fontsize=11, fontweight="bold")
    quiet_frame(axes)
    return written(figure, path)


def draw_router(path: Path, rows: Rows) -> Path:
    """The router while training: one panel a measure, one line a layer, coloured by its depth.

    Args:
        rows: of metrics.jsonl; those of kind "router" are drawn.
    """
    found = router_rows(rows)
    figure = Figure(figsize=(10, 6), dpi=DPI, layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    layers = found[-1]["layers"] if found else []
    colours = LinearSegmentedColormap.from_list("layers", COLOURS["layers"])
    for axes, (measure, (title, unit)) in zip(panels.flat, ROUTER_MEASURES.items(), strict=True):
        for index in range(len(layers)):
            points = [(row["step"], row[measure][index]) for row in found if row.get(measure)]
            colour = colours(index / max(1, len(layers) - 1))
            axes.plot(
                *zip(*points, strict=True) if points else ((), ()),
                color=colour,
                linewidth=1.3 if len(layers) <= 16 else 0.7,
            )
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
        axes.set_ylabel(unit, fontsize=8.5, color=QUIET)
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=measure == "dead"))
        quiet_frame(axes)
    for axes in panels[1]:
        axes.set_xlabel("step", fontsize=8.5, color=QUIET)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _add_layer_bar(figure, panels, layers, colours)
    return written(figure, path)


def draw_preference(path: Path, panels: Sequence[Panel]) -> Path:
    """The course of a preference job: a panel each for rewards, margin, accuracy and the KL from the base."""
    lines = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 0.6 + 2.7 * lines), dpi=DPI, layout="constrained")
    for axes, panel in zip(np.ravel(figure.subplots(lines, 2, squeeze=False)), panels, strict=False):
        for name, points in panel.lines.items():
            axes.plot(*zip(*points, strict=True), color=SIDES[name], linewidth=1.5, label=name)
        axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", color=INK)
        axes.set_ylabel(panel.unit, fontsize=8.5, color=QUIET)
        axes.set_xlabel("step", fontsize=8.5, color=QUIET)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if panel.title == "Accuracy":
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(FuncFormatter(_percent))
        if len(panel.lines) > 1:
            axes.legend(fontsize=8.5, frameon=False)
        quiet_frame(axes)
    for axes in figure.axes[len(panels) :]:
        axes.set_visible(False)
    return written(figure, path)


def draw_scores(path: Path, rows: Sequence[tuple[float, str]]) -> Path:
    """How many rows have which loss on the base, and which of them were left out.

    Args:
        rows: (score in nats a token, why it was left out, or "").
    """
    finite = [(score, why) for score, why in rows if np.isfinite(score)]
    edges = np.histogram_bin_edges([score for score, _ in finite], bins=60)
    figure = Figure(figsize=(7.2, 3.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    sides = [[score for score, why in finite if why == side] for side in SCORE_COLOURS]
    labels = [f"{side or 'kept'}: {len(of):,}" for side, of in zip(SCORE_COLOURS, sides, strict=True)]
    axes.hist(sides, bins=list(edges), stacked=True, color=list(SCORE_COLOURS.values()), label=labels)
    axes.set_xlabel("the base's loss on a row, nats a token", fontsize=9, color=QUIET)
    axes.set_ylabel("rows", fontsize=9, color=QUIET)
    axes.set_title("How hard the rows are for the base", loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.legend(frameon=False, fontsize=8.5)
    quiet_frame(axes)
    return written(figure, path)


def _scores_in(folder: Path) -> list[tuple[float, str]]:
    """Score and fate of the rows that a job's selection by loss kept and left out."""
    rows = [row for name in ("kept", "left_out") for row in files.read_json_lines(folder / f"{name}.jsonl")]
    return [(row["score"], str(row.get("dropped", ""))) for row in rows if isinstance(row.get("score"), float)]


def draw_rewards(path: Path, rows: Rows) -> Path:
    """Online training: rewards (held-out ones as dots), KL to the base, length of the completions, and those cut off.

    Args:
        rows: of metrics.jsonl; those of kind "train" that have a reward, and of kind "eval".
    """
    found = reward_rows(rows)
    figure = Figure(figsize=(10, 6), dpi=DPI, layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    named = sorted({name for row in found for name in row if name.startswith("rewards_")})
    lines: dict[str, dict[str, str]] = {
        "Reward of sampled completions": {"reward": "total"} | {name: _reward_name(name) for name in named},
        "Drift from the base (KL, nats a token)": {"kl": "KL"},
        "Length of completions (tokens)": {"completions_mean_length": "mean", "completions_max_length": "longest"},
        "Completions cut off, groups without a difference": {
            "completions_clipped_ratio": "cut off",
            "frac_reward_zero_std": "all rewarded alike",
        },
    }
    for axes, (title, columns) in zip(panels.flat, lines.items(), strict=True):
        for number, (column, name) in enumerate(columns.items()):
            points = [(row["step"], row[column]) for row in found if row.get(column) is not None]
            if points:
                colour = INK if number == 0 else COLOURS["layers"][number % 4]
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.8 if number == 0 else 1.2, label=name)
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
        quiet_frame(axes)
    _add_held_out(panels.flat[0], rows, found[-1]["step"] if found else 0)
    for axes in panels.flat:
        if axes.lines:
            axes.legend(fontsize=8, frameon=False)
        else:
            axes.text(0.5, 0.5, "not measured: trl.beta is 0", ha="center", transform=axes.transAxes, color=QUIET)
    for axes in panels[1]:
        axes.set_xlabel("step", fontsize=8.5, color=QUIET)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return written(figure, path)


def _reward_name(column: str) -> str:
    return column.removeprefix("rewards_").removesuffix("_mean")


def _add_held_out(axes: Axes, rows: Rows, last_step: int) -> None:
    last = [row for row in rows if row.get("kind") == "eval" and row.get("when") == "after"]
    measured = [*((0, row) for row in first_measured(rows)), *((last_step, row) for row in last)]
    points = [(step, row["reward"]) for step, row in measured if row.get("reward") is not None]
    if points:
        axes.plot(*zip(*points, strict=True), "o", color="#c2571a", markersize=6, label="held out, greedy")


def write_job_pictures(job_dir: Path | str) -> list[Path]:
    """Draws what the files of a job directory allow into its folder pictures/; returns what was written."""
    folder = Path(job_dir)
    view, rows = job_routing(folder), files.read_json_lines(folder / "metrics.jsonl")
    pictures, maps, sources = folder / "pictures", view.heatmaps() if view else (), view.coverage() if view else ()
    drawn = [draw_heatmap(pictures / f"{heatmap.kind}.png", heatmap) for heatmap in maps]
    if sources and sources[0].covered_fraction is not None:
        drawn.append(draw_coverage(pictures / "coverage.png", sources))
    if scores := _scores_in(folder):
        drawn.append(draw_scores(pictures / "scores.png", scores))
    if router_rows(rows):
        drawn.append(draw_router(pictures / "router.png", rows))
    if panels := preference_panels(rows):
        drawn.append(draw_preference(pictures / "preference.png", panels))
    if reward_rows(rows):
        drawn.append(draw_rewards(pictures / "rewards.png", rows))
    return drawn


def _inches(count: int, least: float, most: float) -> float:
    return min(most, max(least, 1.2 + 0.26 * count))


def _norm(heatmap: Heatmap) -> Normalize:
    if heatmap.kind == "change":
        largest = float(np.abs(heatmap.values).max()) or 1.0
        return Normalize(-largest, largest)
    return Normalize(0, float(heatmap.values.max()) or 1.0)


def _label_axes(axes: Axes, heatmap: Heatmap) -> None:
    layers, experts = heatmap.values.shape
    shown = range(0, layers, -(-layers // 16))
    axes.set_yticks(shown, [str(heatmap.layers[row]) for row in shown])
    axes.set_xticks(range(0, experts, max(1, -(-experts // 32))))
    axes.set_xlabel("expert", fontsize=9, color=QUIET)
    axes.set_ylabel("layer", fontsize=9, color=QUIET)
    axes.tick_params(labelsize=8, length=0, colors=INK)
    for side in axes.spines.values():
        side.set_visible(False)
    if experts <= 64 and layers <= 64:  # thin white lines between the cells; more of them would hide the colours
        axes.set_xticks(np.arange(experts - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(layers - 1) + 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.8)
        axes.tick_params(which="minor", length=0)


def _add_bar(figure: Figure, axes: Axes, image: Any, heatmap: Heatmap) -> None:
    bar = figure.colorbar(image, ax=axes, pad=0.015, fraction=0.05, aspect=14 if len(heatmap.layers) <= 16 else 30)
    bar.set_label("\n".join(_wrapped(heatmap.unit)), fontsize=8.5, color=QUIET)
    bar.ax.tick_params(labelsize=8, length=0)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(4, integer=heatmap.kind == "rank")
    if heatmap.kind == "use":
        bar.formatter = FuncFormatter(_percent)
    bar.update_ticks()


def _add_layer_bar(figure: Figure, panels: Any, layers: Sequence[int], colours: LinearSegmentedColormap) -> None:
    if len(layers) < 2:
        return
    scale = ScalarMappable(Normalize(layers[0], layers[-1]), colours)
    bar = figure.colorbar(scale, ax=panels, pad=0.01, fraction=0.03, aspect=40)
    bar.set_label("layer", fontsize=8.5, color=QUIET)
    bar.locator = MaxNLocator(8, integer=True)
    bar.update_ticks()
    bar.outline.set_visible(False)


def quiet_frame(axes: Axes) -> None:
    axes.tick_params(labelsize=8.5, length=0, colors=INK)
    axes.grid(axis="both" if axes.lines else "x", color="#e5e9ee", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def _wrapped(text: str, width: int = 26) -> list[str]:
    from textwrap import wrap

    return wrap(text, width)


def _plain(text: str) -> str:
    """A name that matplotlib shows as it is: a dollar sign would begin a formula."""
    return text.replace("$", r"\$")


def _percent(value: float, _position: int | None = None) -> str:
    return f"{100 * value:.3g} %"


def written(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    figure.savefig(beside, format="png", facecolor="white")
    beside.replace(path)
    return path


if __name__ == "__main__":
    write_job_pictures(sys.argv[1])
