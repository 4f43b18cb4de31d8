"""The pictures of the routing for the browser: plotly figures, drawn there by the copy that ships with Gradio.

Grounds are transparent and colours run from see-through to full, so that a figure stands on a light page and on a dark
one; text takes its colour from style/pictures.css.

Dimension legend: L MoE layers, E experts.
"""

from __future__ import annotations

import json
from html import escape as escape_html
from typing import Any

import plotly.graph_objects as go
from gradio.components.plot import PlotData
from plotly.subplots import make_subplots

from studio import Heatmap
from studio.progress import ROUTER_MEASURES, Rows, router_rows
from studio.quantities import as_percent

CLEAR = {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)"}
NOTHING = "rgba(128,128,128,0.1)"
"""Cells without a value: experts without an adapter."""

FONT = {"family": "'IBM Plex Sans', system-ui, sans-serif", "size": 12}
COLOURS = {
    "use": [[0, "rgba(13,148,136,0.05)"], [1, "rgba(13,148,136,1)"]],
    "rank": [[0, "rgba(47,111,190,0.2)"], [1, "rgba(47,111,190,1)"]],
    "change": [
        [0, "rgba(47,111,190,1)"],
        [0.5, "rgba(47,111,190,0)"],
        [0.5, "rgba(217,112,43,0)"],
        [1, "rgba(217,112,43,1)"],
    ],
    "delta": [[0, "rgba(124,79,196,0.15)"], [1, "rgba(139,92,214,1)"]],
}
"""As in studio/pictures.py, with the ground shining through where there is little."""

DEPTHS = ((43, 169, 157), (59, 130, 200), (139, 92, 214), (208, 90, 160))
UNADAPTED = ("rank", "delta")
MOST_STEPS = 400
MOST_LABELS = 12
MOST_NAMED = 16
"""Layers up to which each stands in the legend; more of them are told apart by a colour bar."""


def heatmap_figure(heatmap: Heatmap) -> go.Figure:
    """Layers down, experts across; whoever points at a cell reads layer, expert, share and rank."""
    layers, experts = heatmap.values.shape
    gap = 1 if experts <= 64 else 0
    cells = go.Heatmap(
        z=[[_cell(heatmap, value) for value in row] for row in heatmap.values.tolist()],
        x=list(range(experts)),
        y=list(range(layers)),
        text=_hovers(heatmap),
        hovertemplate="%{text}<extra></extra>",
        hoverongaps=True,
        xgap=gap,
        ygap=gap,
        colorscale=COLOURS[heatmap.kind],
        colorbar=_bar(heatmap),
        **_range(heatmap),
    )
    below = {"text": _escaped(heatmap.unit), "font": {"size": 12}}
    title = {"text": _escaped(heatmap.title), "subtitle": below, "x": 0, "xref": "paper", "font": {"size": 14}}
    margin, height = {"l": 46, "r": 8, "t": 54, "b": 40}, round(min(560, max(210, 124 + 26 * layers)))
    figure = go.Figure(cells)
    figure.update_layout(template="none", font=FONT, title=title, margin=margin, height=height, **CLEAR)
    figure.update_layout(hoverlabel={"font": FONT})
    if heatmap.kind in UNADAPTED:
        figure.update_layout(plot_bgcolor=NOTHING)
    _label_axes(figure, heatmap)
    return figure


def _escaped(text: str) -> str:
    """No tag of plotly's; quotes stay, for plotly would show &quot; as it stands."""
    return escape_html(text, quote=False)


def _label_axes(figure: go.Figure, heatmap: Heatmap) -> None:
    """Decoder layer numbers down, from the first at the top; as many of them as can be read."""
    layers, experts = heatmap.values.shape
    shown = list(range(0, layers, -(-layers // MOST_LABELS)))
    names = [str(heatmap.layers[row]) for row in shown]
    axis = {"showgrid": False, "zeroline": False, "ticks": "", "fixedrange": True}
    figure.update_xaxes(title=_small("expert"), dtick=_stride(experts), tickangle=0, **axis)
    figure.update_yaxes(title=_small("layer"), autorange="reversed", tickvals=shown, ticktext=names, **axis)


def router_figure(rows: Rows, total_steps: int | None = None) -> go.Figure:
    """The router while training: a panel for each measure, a line for each layer, coloured by its depth.

    Args:
        total_steps: where the steps end; None: where the rows do.
    """
    titles = [f"<b>{title}</b>  {unit}" for title, unit in ROUTER_MEASURES.values()]
    spacing = {"vertical_spacing": 0.16, "horizontal_spacing": 0.1}
    figure = make_subplots(2, 2, shared_xaxes=True, subplot_titles=titles, **spacing)
    found = _thinned(router_rows(rows))
    for place, measure in enumerate(ROUTER_MEASURES):
        for line in _layer_lines(found, measure, named=place == 0):
            figure.add_trace(line, row=place // 2 + 1, col=place % 2 + 1)
    if found and len(found[-1]["layers"]) > MOST_NAMED:
        figure.add_trace(_depth_bar(found[-1]["layers"]), row=1, col=1)
    margin = {"l": 48, "r": 12, "t": 34, "b": 40}
    figure.update_layout(template="none", font=FONT, margin=margin, height=430, hovermode="closest", **CLEAR)
    figure.update_layout(hoverlabel={"font": FONT}, legend={"orientation": "h", "y": -0.14, "x": 0})
    figure.update_annotations(font={"size": 12.5}, xanchor="left", yshift=4)
    for place, title in enumerate(figure.layout.annotations):
        title.x = figure.layout[f"xaxis{place + 1 if place else ''}"].domain[0]
    axis = {"zeroline": False, "fixedrange": True, "gridcolor": "rgba(128,128,128,0.2)"}
    figure.update_xaxes(**axis, range=[0, total_steps] if total_steps else None)
    figure.update_yaxes(**axis, rangemode="nonnegative")
    figure.update_xaxes(title=_small("step"), row=2)
    most_dead = max((count for row in found for count in row.get("dead") or ()), default=0)
    figure.update_yaxes(rangemode="tozero", dtick=max(1, -(-most_dead // 4)), row=2, col=2)
    return figure


def _layer_lines(found: list[dict[str, Any]], measure: str, named: bool) -> list[go.Scatter]:
    """One line for each layer; rows that lack the measure, as those without a probe set, are passed over.

    Args:
        named: the layers of these lines stand in the legend, if they are not too many; a click there hides a layer.
    """
    rows = [row for row in found if row.get(measure)]
    layers = rows[-1]["layers"] if rows else []
    few = len(layers) <= MOST_NAMED
    return [
        go.Scatter(
            x=[row["step"] for row in rows],
            y=[row[measure][index] for row in rows],
            mode="lines" if len(rows) > 1 else "markers",
            line={"color": depth_colour(index / max(1, len(layers) - 1)), "width": 1.6 if few else 0.9},
            hovertemplate=f"layer {layer}, step %{{x}}: %{{y:.4~g}}<extra></extra>",
            name=f"layer {layer}",
            legendgroup=str(layer),
            showlegend=named and few,
        )
        for index, layer in enumerate(layers)
    ]


def _depth_bar(layers: list[int]) -> go.Scatter:
    """No line, only the colour bar of the layers."""
    scale = [[i / (len(DEPTHS) - 1), f"rgb{colour}"] for i, colour in enumerate(DEPTHS)]
    bar = {"thickness": 12, "outlinewidth": 0, "nticks": 8, "title": {"text": "layer", "font": {"size": 12}}}
    ends = {"color": [layers[0]], "cmin": layers[0], "cmax": layers[-1]}
    marker = {**ends, "colorscale": scale, "showscale": True, "colorbar": bar}
    return go.Scatter(x=[None], y=[None], mode="markers", marker=marker, showlegend=False, hoverinfo="skip")


def as_plot(figure: go.Figure) -> PlotData:
    """What gr.Plot takes, without plotly's bar of buttons, one of which is a link to plotly."""
    settings = {"displayModeBar": False, "displaylogo": False, "showTips": False}
    return PlotData(type="plotly", plot=json.dumps({**json.loads(figure.to_json()), "config": settings}))


def depth_colour(depth: float) -> str:
    """From the first layer, 0, to the last, 1."""
    place = depth * (len(DEPTHS) - 1)
    left = min(int(place), len(DEPTHS) - 2)
    mixed = (round(a + (place - left) * (b - a)) for a, b in zip(DEPTHS[left], DEPTHS[left + 1], strict=True))
    return f"rgb({','.join(map(str, mixed))})"


def _stride(experts: int) -> int:
    """Experts from one label to the next: all of up to 16, else at most ten labels, at powers of two."""
    return 1 if experts <= 16 else next(2**n for n in range(1, 32) if experts <= 10 * 2**n)


def _small(text: str) -> dict[str, Any]:
    return {"text": text, "standoff": 6, "font": {"size": 12}}


def _cell(heatmap: Heatmap, value: float) -> float | None:
    return None if heatmap.kind in UNADAPTED and not value else value


def _hovers(heatmap: Heatmap) -> list[list[str]]:
    layers, experts = heatmap.values.shape
    return [[_hover(heatmap, row, expert) for expert in range(experts)] for row in range(layers)]


def _hover(heatmap: Heatmap, row: int, expert: int) -> str:
    """Layer, expert, then what is known of the two, each on a line of its own."""
    lines = [f"<b>layer {heatmap.layers[row]}, expert {expert}</b>"]
    if heatmap.share is not None:
        lines.append(f"{as_percent(float(heatmap.share[row, expert]))} of the layer's tokens")
    if heatmap.rank is not None:
        rank = int(heatmap.rank[row, expert])
        lines.append(f"rank {rank}" if rank else "no adapter")
    value = float(heatmap.values[row, expert])
    if heatmap.kind == "change":
        lines.append(f"{value:+.2f} points after training")
    if heatmap.kind == "delta":
        lines.append(f"update of norm {value:.4g}")
    return "<br>".join(lines)


def _range(heatmap: Heatmap) -> dict[str, float]:
    largest = max((abs(value) for row in heatmap.values.tolist() for value in row), default=0.0) or 1.0
    return {"zmin": -largest if heatmap.kind == "change" else 0.0, "zmax": largest}


def _bar(heatmap: Heatmap) -> dict[str, Any]:
    bar: dict[str, Any] = {"thickness": 12, "outlinewidth": 0, "nticks": 5, "xpad": 8, "len": 1, "ypad": 0}
    if heatmap.kind == "use":
        bar["tickformat"] = ".3~%"
    if heatmap.kind == "rank":
        bar["tickformat"] = "d"
    return bar


def _thinned(rows: list[dict[str, Any]], most: int = MOST_STEPS) -> list[dict[str, Any]]:
    """At most `most` rows, evenly chosen, the last one always among them."""
    if len(rows) <= most:
        return rows
    return [rows[round((i + 1) * len(rows) / most) - 1] for i in range(most)]
