"""Pieces that several pages show: figures, tables, notes, and the plan as a picture."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from studio import Plan, ProblemsError, StudioError
from studio.quantities import as_bytes, as_count, as_percent
from ui.html import Child, el, join

MEMORY_PARTS = {
    "runtime": "Libraries",
    "weights": "Base weights",
    "adapters": "Adapters",
    "gradients": "Gradients",
    "optimizer": "Optimizer",
    "activations": "Activations",
    "workspace": "Dequantised weights",
    "logits": "Logits",
    "reward_models": "Reward models",
    "tasks": "lm-eval's tasks",
}
"""The parts of a MemoryPlan, by the name before `_bytes`, as the legend says them."""

CLASS_TITLES = {"lm_head": "Output head", "dense_mlp": "Dense feed-forward"}
"""Classes of tensors whose names read badly."""


def figure(label: str, value: Child, note: Child = None, tone: str = "") -> Markup:
    """A number with its name, and what it means below."""
    below = el("span", note, cls="figure-note") if note else None
    return el(
        "div", el("span", label, cls="figure-label"), el("strong", value), below, cls=f"figure {tone}", role="group"
    )


def figures(*entries: Markup) -> Markup:
    return el("div", *entries, cls="figures")


def note(tone: str, title: str, *body: Child) -> Markup:
    """A boxed message; `tone` is error, warning, good or quiet."""
    role = "alert" if tone == "error" else "status"
    return el("div", el("strong", title), *body, cls=f"note {tone}", role=role)


def meter(title: str, done: float, total: float, *words: str) -> Markup:
    """A bar with its words below; total 0: not known yet."""
    share = min(1.0, done / total) if total else 0.0
    bar = el("div", el("span", style=f"width:{100 * share:.1f}%"), cls="meter")
    text = " · ".join(word for word in (title, *words, f"{100 * share:.0f} %" if total and not words else "") if word)
    return el("div", bar, el("p", text, cls="meter-text"), role="status")


def error_note(title: str, error: StudioError) -> Markup:
    """An error in its own words; several problems as a list for each file."""
    if not isinstance(error, ProblemsError):
        return note("error", title, el("p", str(error), cls="words"))
    return note("error", title, *_problem_lists(error))


def _problem_lists(error: ProblemsError) -> list[Markup]:
    parts: list[Markup] = []
    for file in error.groups.counts:
        if file:
            parts.append(el("p", file, cls="words path"))
        parts.append(el("ul", *(el("li", str(group)) for group in error.groups.of(file))))
    if error.unlisted_count:
        parts.append(el("p", f"… and {error.unlisted_count:,} more"))
    return parts


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[Child]], foot: Sequence[Child] = ()) -> Markup:
    """A table whose first column names the row; the others are numbers, set to the right."""
    body = [el("tr", el("th", row[0], scope="row"), *(el("td", cell) for cell in row[1:])) for row in rows]
    last = (
        el("tfoot", el("tr", el("th", foot[0], scope="row"), *(el("td", cell) for cell in foot[1:]))) if foot else None
    )
    return el(
        "div",
        el(
            "table",
            el("caption", caption),
            el("thead", el("tr", *(el("th", name, scope="col") for name in head))),
            el("tbody", *body),
            last,
        ),
        cls="scroll",
    )


def plan_view(plan: Plan) -> Markup:
    """The plan: its figures, the memory at the peak as a bar, and a row for each class of tensors."""
    moe = f", {plan.moe_layers} of them with {plan.experts} experts, {plan.top_k} active per token"
    model = f"{plan.model} · {plan.model_type} · {plan.layers} layers{moe if plan.experts else ''}"
    held_out = f"{plan.train_examples:,} examples to train on, {plan.eval_examples:,} held out"
    return el(
        "div",
        el("p", model, cls="words quiet-text"),
        _truncation(plan),
        *(note("warning", "Before you start", el("p", words)) for words in plan.warnings),
        figures(
            figure("Base model", as_count(plan.parameters), _base_note(plan)),
            figure(
                "Trainable", as_percent(plan.trainable_fraction), f"{as_count(plan.trainable_parameters)} parameters"
            ),
            figure("Peak memory", as_bytes(plan.memory.peak_bytes), _memory_note(plan)),
            figure("Steps", f"{plan.total_steps:,}", held_out),
        ),
        memory_bar(plan),
        class_table(plan),
        cls="plan",
    )


def _base_note(plan: Plan) -> str:
    active = f", {as_count(plan.active_parameters)} active per token" if plan.experts else ""
    return f"parameters in {as_bytes(plan.bytes)}{active}"


def _memory_note(plan: Plan) -> str:
    at_hand = "" if plan.memory_at_hand_bytes is None else f"; {as_bytes(plan.memory_at_hand_bytes)} at hand"
    return f"predicted{at_hand}{f', {plan.expert_path} expert path' if plan.experts else ''}"


def _truncation(plan: Plan) -> Markup | None:
    if not plan.truncated_examples:
        return None
    count = plan.truncated_examples
    title = f"{count:,} of {plan.train_examples:,} training examples will be cut"
    words = f"They are longer than {plan.longest_tokens:,} tokens; data.max_length_tokens sets the length."
    return note("warning", title, el("p", words))


def memory_bar(plan: Plan) -> Markup:
    """Predicted peak memory as one stacked bar and its legend."""
    parts = plan.memory.model_dump()
    sizes = {name: int(parts[f"{name}_bytes"]) for name in MEMORY_PARTS}
    peak = max(1, plan.memory.peak_bytes)
    bars = [
        el(
            "span",
            cls=f"part {name}",
            style=f"flex-grow:{size / peak:.5f}",
            title=f"{MEMORY_PARTS[name]}: {as_bytes(size)}",
        )
        for name, size in sizes.items()
        if size
    ]
    legend = [
        el("li", el("span", cls=f"dot {name}"), el("span", MEMORY_PARTS[name]), el("b", as_bytes(size)))
        for name, size in sizes.items()
        if size
    ]
    words = ", ".join(f"{MEMORY_PARTS[name]} {as_bytes(size)}" for name, size in sizes.items() if size)
    return el(
        "figure",
        el("figcaption", "Where the memory goes at the peak"),
        el("div", *bars, cls="bar", role="img", aria_label=f"Predicted peak memory: {words}"),
        el("ul", *legend, cls="legend"),
        cls="memory",
    )


def class_table(plan: Plan) -> Markup:
    """Parameters, type, memory, rank and trainable share of each class of tensors."""
    rows = []
    for entry in plan.classes:
        trained = entry.trainable_parameters
        rows.append(
            (
                CLASS_TITLES.get(entry.name, entry.name.replace("_", " ").capitalize()),
                f"{entry.tensors:,}",
                as_count(entry.parameters),
                entry.dtype,
                as_bytes(entry.bytes),
                str(entry.rank) if entry.rank else "frozen",
                as_count(trained) if trained else "–",
                as_percent(trained / entry.parameters) if trained else "–",
            )
        )
    total = (
        "Total",
        f"{sum(entry.tensors for entry in plan.classes):,}",
        as_count(plan.parameters),
        "",
        as_bytes(plan.bytes),
        "",
        as_count(plan.trainable_parameters),
        as_percent(plan.trainable_fraction),
    )
    head = ("Tensors", "Count", "Parameters", "Type", "Memory", "LoRA rank", "Trainable", "Share")
    return table("What is held and what is trained", head, rows, total)


def page_head(title: str, text: str) -> Markup:
    return join(el("h1", title), el("p", text, cls="quiet-text"))
