"""What a placement is and what it covers, in words, figures and bars; and what the watched router warned of."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from studio import Plan, SourceCoverage
from studio.progress import Rows, warnings
from studio.quantities import as_count, as_percent
from ui.html import el
from ui.views import figure, figures, note

MOST_WARNINGS = 5


def placement_view(plan: Plan) -> Markup | None:
    """The rule, how many experts get an adapter, and what that saves against all of them; None for a dense model."""
    placement = plan.placement
    if placement is None:
        return None
    entries = [
        figure("Placement rule", placement.rule, _rank_range(placement.ranks)),
        figure("Adapted experts", f"{placement.experts_adapted:,} of {placement.experts_in_all:,}", _where(plan)),
        figure(
            "Expert parameters",
            as_count(placement.parameters),
            _saved(placement.parameters, placement.parameters_saved),
        ),
    ]
    return el("section", figures(*entries), cls="placement", aria_label="Placement")


def _rank_range(ranks: Sequence[Sequence[int]]) -> str:
    given = sorted({rank for layer in ranks for rank in layer if rank})
    if not given:
        return "no routed expert is adapted"
    return f"rank {given[0]}" if len(given) == 1 else f"ranks from {given[0]} to {given[-1]}"


def _where(plan: Plan) -> str:
    shared = any(entry.name == "shared_expert" for entry in plan.classes)
    return f"routed experts of {plan.moe_layers} layers{', shared ones not counted' if shared else ''}"


def _saved(parameters: int, saved: int) -> str:
    if not saved:
        return "nothing saved: every expert has this rank" if parameters else "none"
    return f"{as_percent(saved / (parameters + saved))} less than with the largest rank on every expert"


def coverage_view(sources: Sequence[SourceCoverage]) -> Markup | None:
    """A row for each data source: how few experts it reaches, and the share of its tokens on adapted ones as a bar."""
    if not sources:
        return None
    rows = [_coverage_row(entry) for entry in sources]
    covered = any(entry.covered_fraction is not None for entry in sources)
    head = ("Data source", "Tokens", "Experts reached", "Covered by the placement" if covered else "")
    return el(
        "section",
        el("h3", "Where each data source goes"),
        el("table", el("thead", el("tr", *(el("th", name, scope="col") for name in head))), el("tbody", *rows)),
        el(
            "p",
            "Experts reached: the fewest experts of a layer that together get 90 % of the source's routed tokens. "
            "Covered: the share of its routed tokens that meet an expert with an adapter.",
            cls="quiet-text small",
        ),
        cls="coverage",
        aria_label="Coverage",
    )


def _coverage_row(entry: SourceCoverage) -> Markup:
    covered = None
    if entry.covered_fraction is not None:
        bar = el("span", el("span", style=f"width:{100 * entry.covered_fraction:.1f}%"), cls="meter")
        covered = el("span", bar, el("b", as_percent(entry.covered_fraction)), cls="covered")
    return el(
        "tr",
        el("th", entry.source, scope="row"),
        el("td", as_count(entry.tokens)),
        el("td", f"{entry.reached:.1f} of {entry.experts}"),
        el("td", covered),
    )


def warnings_view(rows: Rows) -> Markup | None:
    """The newest warnings: of the watched router, which have a step, and of the training as a whole."""
    found = warnings(rows)
    if not found:
        return None
    hidden = len(found) - MOST_WARNINGS
    more = el("p", f"and {hidden:,} earlier ones, in metrics.jsonl") if hidden > 0 else None
    items = [el("li", words[:1].upper() + words[1:]) for words in found[-MOST_WARNINGS:]]
    of_router = all("step" in row for row in rows if row.get("kind") == "warning")
    title = "The router passed a limit of the recipe" if of_router else "Warnings of the training"
    return note("warning", title, el("ul", *items), more)
