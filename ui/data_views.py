"""A report on a data file, as the page Data shows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from studio import DataReport, Recipe
from studio.quantities import as_percent
from ui.html import Child, el
from ui.views import figure, figures, note, table

KINDS = {
    "example": "conversations",
    "text": "plain texts",
    "preference": "preference pairs",
    "labelled": "labelled completions",
    "prompt": "prompts",
}
SHOWN_SOURCES = 8


def report_view(report: DataReport, recipe: Recipe) -> Markup:
    """The figures, what is wrong, how long the rows are, and three of them as the model reads them."""
    return el(
        "div",
        el(
            "section",
            el("h2", Path(report.file).name),
            el("p", f"{report.kind} · tokens of {report.base}", cls="words quiet-text"),
            _figures(report),
            *(note("quiet", "Note", el("p", words)) for words in report.notes),
            cls="card",
        ),
        _other_method(report),
        _problems(report),
        _examples(report),
        *([_details(report), _recipe_lines(recipe)] if report.good_rows else []),
        cls="plan",
    )


def _figures(report: DataReport) -> Markup:
    kinds = ", ".join(f"{count:,} {KINDS[kind]}" for kind, count in report.kinds.items()) or "none that can be used"
    title = report.formats[0].title if report.formats else "not recognised"
    sure = f"{as_percent(report.sure)} of the first {report.detected_rows:,} rows fit it and no other"
    cut, tokens = report.truncated_rows, report.tokens
    return figures(
        figure("Rows", f"{report.rows:,}", kinds),
        figure("Cannot be used", f"{report.bad_rows + report.other_rows:,}", _why_not(report), _tone(report)),
        figure("Format", title, sure if report.formats else "no row fits a known format"),
        figure("Tokens of a row", f"{tokens['50 %']:,}" if tokens else "–", _longest(tokens)),
        figure("Cut", f"{cut:,}", f"longer than {report.max_length_tokens:,} tokens", "warning" if cut else ""),
        figure("Seen before", f"{report.duplicate_rows:,}", _near(report)),
    )


def _tone(report: DataReport) -> str:
    return "bad" if report.bad_rows or report.other_rows else ""


def _why_not(report: DataReport) -> str:
    words = ["listed below"] * bool(report.bad_rows) + ["by this recipe's method"] * bool(report.other_rows)
    return ", ".join(words) or "none"


def _longest(tokens: Mapping[str, int]) -> str:
    return f"median; 99 % have at most {tokens['99 %']:,}, the longest {tokens['100 %']:,}" if tokens else ""


def _near(report: DataReport) -> str:
    looked = "" if report.near_rows == report.good_rows else f" of the first {report.near_rows:,}"
    return f"equal to an earlier row; {report.near_duplicate_rows:,}{looked} nearly so"


def _other_method(report: DataReport) -> Markup | None:
    words = f"{report.other_method}. Choose a recipe with one of these, or change its method on the page Fine-tune."
    return note("warning", "Another method is needed", el("p", words)) if report.other_method else None


def _problems(report: DataReport) -> Markup | None:
    if not report.problems:
        return None
    lines = [el("li", _place(problem), str(problem["message"])) for problem in report.problem_groups]
    more = el("p", f"… and {report.ungrouped_problems:,} more") if report.ungrouped_problems else None
    return note("error", f"{report.bad_rows:,} rows cannot be trained on", el("ul", *lines), more)


def _place(problem: Mapping[str, Any]) -> Markup:
    where = ", ".join(part for part in (problem["where"], str(problem["field"])) if part)
    return el("b", f"{where}: " if where else "")


def _examples(report: DataReport) -> Markup | None:
    if not report.examples:
        return None
    legend = el("p", el("mark", "Marked"), f" tokens are learned (loss on: {report.loss_on}).", cls="words quiet-text")
    return el(
        "section",
        el("h2", "As the model reads them"),
        legend,
        *map(_example, report.examples),
        cls="card data-examples",
    )


def _example(shown: Any) -> Markup:
    learned = f"{shown.trained_tokens:,} of {shown.tokens:,} tokens learned"
    place = f"{shown.counted} {shown.line:,}".capitalize()
    words = " · ".join(part for part in (place, shown.title, learned, "cut" if shown.cut else "") if part)
    text = [el("mark" if segment.trained else "span", segment.text) for segment in shown.segments]
    return el("figure", el("figcaption", words), el("pre", *text))


def _details(report: DataReport) -> Markup:
    quantiles = [(name, f"{count:,}") for name, count in report.tokens.items() if name != "total"]
    total = ("Together", f"{report.tokens['total']:,}") if report.tokens else ()
    lists: list[Child] = [
        table("How long the rows are", ("Share of the rows", "At most, tokens"), quantiles, total),
        _counts("Turns", report.roles),
        _counts("Rows with", report.traits),
        _counts(f"Columns that are not read, of the first {report.detected_rows:,} rows", report.unread),
        _counts("Sources", dict(list(report.sources.items())[:SHOWN_SOURCES])),
        _counts("Scripts", {name: as_percent(share) for name, share in report.scripts.items()}),
        _pairs("Equal to an earlier row", report.duplicates),
        _pairs("Nearly equal to an earlier row", report.near_duplicates),
    ]
    return el("section", el("h2", "In numbers"), el("div", *lists, cls="data-lists"), cls="card")


def _counts(title: str, counts: Mapping[str, Any]) -> Markup | None:
    if not counts:
        return None
    rows = [(name, f"{count:,}" if isinstance(count, int) else str(count)) for name, count in counts.items()]
    return table(title, ("", "Count" if isinstance(next(iter(counts.values())), int) else "Share"), rows)


def _pairs(title: str, pairs: tuple[Any, ...]) -> Markup | None:
    if not pairs:
        return None
    return table(
        title,
        (pairs[0].counted.capitalize(), "The earlier one"),
        [(f"{p.line:,}", f"{p.earlier_line:,}") for p in pairs],
    )


def _recipe_lines(recipe: Recipe) -> Markup:
    """What a recipe says to read this file so."""
    data = recipe.data
    lines = ["data:", f"  train: {data.train}", f"  format: {data.format}"]
    lines += ["  columns:", *(f"    {ours}: {theirs}" for ours, theirs in data.columns.items())] if data.columns else []
    words = el("p", "In a recipe, with the rest of its section data:", cls="words quiet-text")
    return el("section", el("h2", "To train on it"), words, el("pre", "\n".join(lines)), cls="card")
