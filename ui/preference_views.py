"""The course of a preference job in the browser: rewards, margin, accuracy and the KL from the base."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from studio.preference_view import Panel
from ui.heatmaps import CLEAR, FONT

COLOURS = {
    "chosen": "#0f766e", "rejected": "#c2571a", "margin": "#2563ab", "accuracy": "#2563ab", "kl": "#7c4fc4",
    "mean": "#2563ab", "lowest": "#c2571a", "highest": "#0f766e",
}  # fmt: skip


def preference_figure(panels: Sequence[Panel], total_steps: int | None = None) -> go.Figure:
    """Two panels a row, a line for each side.

    Args:
        total_steps: where the steps end; None: where the rows do.
    """
    titles = [f"<b>{panel.title}</b>  {panel.unit}" for panel in panels]
    rows = -(-len(panels) // 2)
    figure = make_subplots(rows, 2, subplot_titles=titles, vertical_spacing=0.2, horizontal_spacing=0.1)
    for place, panel in enumerate(panels):
        for name, points in panel.lines.items():
            figure.add_trace(_line(name, points, len(panel.lines) > 1), row=place // 2 + 1, col=place % 2 + 1)
    margin = {"l": 48, "r": 12, "t": 34, "b": 40}
    figure.update_layout(template="none", font=FONT, margin=margin, height=70 + 190 * rows, **CLEAR)
    figure.update_layout(hoverlabel={"font": FONT}, legend={"orientation": "h", "y": -0.14, "x": 0})
    figure.update_annotations(font={"size": 12.5}, xanchor="left", yshift=4)
    for place, title in enumerate(figure.layout.annotations):
        title.x = figure.layout[f"xaxis{place + 1 if place else ''}"].domain[0]
    axis = {"zeroline": False, "fixedrange": True, "gridcolor": "rgba(128,128,128,0.2)"}
    figure.update_xaxes(**axis, range=[0, total_steps] if total_steps else None)
    figure.update_yaxes(**axis)
    for place, panel in enumerate(panels):
        if panel.title == "Accuracy":
            figure.update_yaxes(range=[0, 1.02], tickformat=".0%", row=place // 2 + 1, col=place % 2 + 1)
    return figure


def _line(name: str, points: Sequence[tuple[int, float]], named: bool) -> go.Scatter:
    return go.Scatter(
        x=[step for step, _ in points],
        y=[value for _, value in points],
        mode="lines" if len(points) > 1 else "markers",
        line={"color": COLOURS[name], "width": 1.8},
        hovertemplate=f"{name}, step %{{x}}: %{{y:.4~g}}<extra></extra>",
        name=name,
        showlegend=named,
    )
