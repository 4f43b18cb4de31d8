"""The pictures of a routing as one group of components, the same on the page Fine-tune and on the page Jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from studio import Heatmap, Plan, RoutingView
from ui.heatmaps import as_plot, heatmap_figure
from ui.html import el
from ui.look import show
from ui.routing_views import coverage_view, placement_view

KINDS = ("use", "rank", "change", "delta")
ALL = "all sources"
MOST_BESIDE = 64

Updates = dict[Any, Any]


@dataclass
class RoutingPanel:
    """The components. `view` is what they show now, for whoever chooses another source."""

    box: Any
    placement: Any
    source: Any
    plots: dict[str, Any]
    coverage: Any
    view: Any

    @property
    def outputs(self) -> list[Any]:
        return [self.box, self.placement, self.source, *self.plots.values(), self.coverage, self.view]

    def updates(self, view: RoutingView | None, plan: Plan | None) -> Updates:
        """Shows `view` and the placement of `plan`; hides itself where there is nothing to see."""
        sources = view.profile.sources if view and view.profile else ()
        placement = placement_view(plan) if plan else None
        coverage = coverage_view(view.coverage()) if view else None
        return {
            self.box: gr.update(visible=bool(placement or (view and view.heatmaps()))),
            self.placement: gr.update(value=placement or "", visible=placement is not None),
            self.source: gr.update(choices=[ALL, *sources], value=ALL, visible=len(sources) > 1),
            self.coverage: gr.update(value=coverage or "", visible=coverage is not None),
            self.view: view,
            **self._plots(view, None),
        }

    def on_source(self, view: RoutingView | None, source: str) -> Updates:
        """The pictures for the tokens of one data source."""
        return self._plots(view, None if source == ALL else source)

    def _plots(self, view: RoutingView | None, source: str | None) -> Updates:
        known = {heatmap.kind: heatmap for heatmap in view.heatmaps(source)} if view else {}
        return {
            plot: _shown(known[kind]) if kind in known else gr.update(value=None, visible=False)
            for kind, plot in self.plots.items()
        }


def _shown(heatmap: Heatmap) -> Any:
    """Many experts take the whole width, so that each of them can be pointed at."""
    wide = heatmap.values.shape[1] > MOST_BESIDE
    return gr.update(
        value=as_plot(heatmap_figure(heatmap)), visible=True, elem_classes=["picture", "wide"] if wide else ["picture"]
    )


def build_routing_panel(title: str = "", kinds: Sequence[str] = KINDS) -> RoutingPanel:
    """The group in the current Gradio context, hidden until it has something to show; a card where it has a title."""
    with gr.Column(visible=False, elem_classes=["routing", "card"] if title else "routing") as box:
        if title:
            show(el("h2", title))
        placement = show(visible=False)
        coverage = show(visible=False)
        source = gr.Dropdown(
            [ALL], value=ALL, label="Tokens of", interactive=True, filterable=False, elem_classes="field source"
        )
        plots = {}
        with gr.Row(elem_classes="pictures"):
            for kind in kinds:
                plots[kind] = gr.Plot(
                    visible=False, show_label=False, container=False, min_width=400, elem_classes="picture"
                )
    panel = RoutingPanel(box, placement, source, plots, coverage, gr.State(None))
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    source.input(panel.on_source, [panel.view, source], list(plots.values()), **quiet)
    return panel
