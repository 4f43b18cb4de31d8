"""What `studio data inspect` shows: counts, lengths, duplicates, bad rows, rows with the learned tokens marked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from studio.data.formats import FORMATS
from studio.quantities import as_count, as_percent
from studio.terminal import clean, warning_text

if TYPE_CHECKING:
    from studio.data.inspection import DataReport, Pair
    from studio.data.rendered import Rendered

MOST_CHARACTERS = 1500
"""Of an example's segment that are shown: its start and its end."""

SHOWN_PAIRS = 5
TRAINED, READ = "bold green", "dim"


def report_view(report: DataReport) -> RenderableType:
    """The report, from what the file is to what of it is trained."""
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, words in _facts(report):
        facts.add_row(name, words)
    parts: list[RenderableType] = [facts, ""]
    if report.tokens:
        parts += [_lengths(report), ""]
    if report.problems:
        parts += [*_problems(report), ""]
    if report.examples:
        parts.append(_legend(report))
        parts += [_example(example) for example in report.examples]
    return Group(*parts, *(warning_text(words) for words in report.notes))


def _facts(report: DataReport) -> Iterator[tuple[str, RenderableType]]:
    yield "File", Text(clean(f"{report.file}, {report.kind}"))
    yield "Format", _format(report)
    bad = Text(f", {report.bad_rows:,} of them bad", "bold red") if report.bad_rows else Text(", all good")
    yield "Rows", Text.assemble(f"{report.rows:,}", bad, _listed(_kinds(report)))
    if report.other_method:
        yield "Method", Text(report.other_method, "bold red")
    if report.unread:
        columns = " · ".join(f"{clean(name)} {count:,}" for name, count in report.unread.items())
        yield "Not read", Text(f"columns, in how many of the first {report.detected_rows:,} rows: {columns}")
    if report.traits:
        yield "With", Text(" · ".join(f"{name} {count:,}" for name, count in report.traits.items()))
    if report.roles:
        yield "Turns", Text(" · ".join(f"{clean(name)} {count:,}" for name, count in report.roles.items()))
    if len(report.sources) > 1:
        yield "Sources", Text(" · ".join(f"{clean(name)} {count:,}" for name, count in report.sources.items()))
    if report.scripts:
        shares = [f"{name} {as_percent(share)}" for name, share in list(report.scripts.items())[:6]]
        yield "Scripts", Text(" · ".join(shares) + ("" if len(report.scripts) <= 6 else " · …"))
    yield "Equal", _duplicates(report.duplicate_rows, report.good_rows, report.duplicates)
    looked = "" if report.near_rows == report.good_rows else f" of the first {report.near_rows:,}"
    yield "Alike", _duplicates(report.near_duplicate_rows, report.near_rows, report.near_duplicates, looked)


def _format(report: DataReport) -> Text:
    if not report.format:
        return Text("none that is known; studio data formats lists them", "bold red")
    title = FORMATS[report.format].title
    style = "green" if report.sure > 0.999 else "yellow"
    words = f"{report.sure:.0%} of the first {report.detected_rows:,} rows fit it and no other"
    return Text.assemble((title, "bold"), f" ({report.format}), ", (words, style))


def _kinds(report: DataReport) -> list[str]:
    names = {"example": "conversation", "text": "text", "preference": "pair", "labelled": "labelled completion"}
    names["prompt"] = "prompt"
    return [f"{count:,} {names[kind]}{'s' if count > 1 else ''}" for kind, count in report.kinds.items()]


def _listed(parts: list[str]) -> str:
    return f": {', '.join(parts)}" if parts else ""


def _duplicates(count: int, rows: int, pairs: tuple[Pair, ...], looked: str = "") -> Text:
    if not count:
        return Text(f"no rows{looked}")
    named = [f"{pair.line} = {pair.earlier_line}" for pair in pairs[:SHOWN_PAIRS] if pair.file == pair.earlier_file]
    lines = f"; {pairs[0].counted}s {', '.join(named)}" + (", …" if count > len(named) else "") if named else ""
    share = as_percent(count / max(1, rows))
    return Text(f"{count:,} row{'s' if count > 1 else ''}{looked} as an earlier one, {share}{lines}", "yellow")


def _lengths(report: DataReport) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("Tokens", style="bold")
    names = [name for name in report.tokens if name != "total"]
    for name in names:
        title = {"0 %": "least", "50 %": "median", "100 %": "most"}.get(name, name)
        table.add_column(title, justify="right")
    table.add_column("in all", justify="right")
    cells = [
        Text(f"{report.tokens[name]:,}", "yellow" if report.tokens[name] > report.max_length_tokens else "")
        for name in names
    ]
    table.add_row("of a row", *cells, as_count(report.tokens["total"]))
    share = report.truncated_rows / max(1, report.good_rows)
    rows = f"{report.truncated_rows:,} of {report.good_rows:,} rows ({as_percent(share)})"
    cut = f"{rows} have more than {report.max_length_tokens:,} tokens: their ends are cut off"
    line = Text(cut if report.truncated_rows else f"None is longer than {report.max_length_tokens:,} tokens")
    if report.long_prompts:
        counted = report.long_prompt_problems[0]["counted"]
        places = ", ".join(f"{problem['line']}" for problem in report.long_prompt_problems[:SHOWN_PAIRS])
        more = ", …" if report.long_prompts > SHOWN_PAIRS else ""
        said = f"Of {report.long_prompts:,} the prompt alone fills that, which training refuses: "
        line.append(f"\n{said}{counted} {places}{more}", "bold red")
    return Group(table, line)


def _problems(report: DataReport) -> Iterator[RenderableType]:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("Where", style="red", max_width=46)
    table.add_column("What is wrong", overflow="fold")
    for problem in report.problem_groups:
        field = f"{problem['field']} " if problem["field"] else ""
        table.add_row(problem["where"] or "file", Text(clean(f"{field}{problem['message']}")))
    yield table
    if report.ungrouped_problems:
        yield Text(f"… and {report.ungrouped_problems:,} more", "red")


def _legend(report: DataReport) -> Text:
    what = {"completion": "the completion", "assistant": "the assistant's turns", "all": "everything"}
    return Text.assemble(
        ("Rows as the model reads them", "bold"),
        f": with loss on {what.get(report.loss_on, report.loss_on)}, ",
        ("⟦green⟧ is learned", TRAINED),
        ", ",
        ("the rest", READ),
        " is only read",
    )


def _example(example: Rendered) -> Panel:
    text = Text()
    for segment in example.segments:
        words = _shortened(clean(segment.text))
        text.append(f"⟦{words}⟧" if segment.trained else words, TRAINED if segment.trained else READ)
    if example.cut:
        text.append(" ⟨cut here⟩", "bold yellow")
    title = " · ".join(filter(None, [f"{example.counted} {example.line}", example.title]))
    counts = f"{example.tokens:,} tokens, {example.trained_tokens:,} learned"
    return Panel(text, title=title, subtitle=counts, title_align="left", subtitle_align="right", border_style="dim")


def _shortened(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]} ⟨… {len(text) - 2 * half:,} characters …⟩ {text[-half:]}"


def format_table(formats: Mapping[str, Any]) -> RenderableType:
    """The formats that are recognised."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("Format", "What it is", "A row"):
        table.add_column(name, overflow="fold")
    for name, entry in formats.items():
        table.add_row(name, entry.title, Text(entry.looks_like))
    return table


@contextmanager
def reading_progress(console: Console, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar with the time that is left, as the callback of `inspect_data`. None shows nothing."""
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (TextColumn("reading"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("reading", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total or None)
