"""What a placement is and what it covers, in words, figures and bars; and what the watched router warned of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from studio import RoutingView, SourceCoverage
from studio.progress import Rows, warnings
from studio.quantities import as_count, as_percent
from ui.html import el
from ui.views import figure, figures, note

MOST_WARNINGS = 5


def placement_view(view: RoutingView) -> Markup | None:
    """The rule, how many experts have an adapter, and what that saves against all of them."""
    placed = view.placed()
    if view.placement is None:
        return None
    rule = str(view.placement["rule"])
    entries = [figure("Placement rule", rule, _settings(view.placement.get("settings") or {}))]
    if placed is not None:
        entries.append(
            figure("Adapted experts", f"{placed.adapted:,} of {placed.experts:,}", "over all layers with experts")
        )
        if placed.adapted:
            words = f"against rank {placed.largest_rank} on every expert"
            entries.append(figure("Expert parameters saved", as_percent(placed.saved_fraction), words))
    return el("section", el("h3", "Placement"), figures(*entries), cls="placement", aria_label="Placement")


def _settings(settings: dict[str, Any]) -> str | None:
    known = {name: value for name, value in settings.items() if value is not None and not isinstance(value, dict)}
    return ", ".join(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in known.items()) or None


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


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
    """The newest warnings of the watched router."""
    found = warnings(rows)
    if not found:
        return None
    hidden = len(found) - MOST_WARNINGS
    more = el("p", f"and {hidden:,} earlier ones, in metrics.jsonl") if hidden > 0 else None
    items = [el("li", words) for words in found[-MOST_WARNINGS:]]
    return note("warning", "The router passed a limit of the recipe", el("ul", *items), more)
