"""What the page Fine-tune says of a draft: its problems by line, and what is next to do."""

from __future__ import annotations

from markupsafe import Markup

from ui.drafts import Draft
from ui.html import el, join
from ui.views import note


def verdict_view(draft: Draft) -> Markup:
    """Every problem with its line, under the editor, and a style that marks these lines in it."""
    if not draft.problems:
        return note("good", "This recipe is valid.")
    count = len(draft.problems)
    items = [
        el(
            "li",
            el("span", f"line {p.line}", cls="line") if p.line else None,
            f"{p.field}: " if p.field else "",
            p.message,
        )
        for p in draft.problems
    ]
    locked = el("p", "The form waits until the YAML can be read again.") if draft.values is None else None
    title = f"{count} problem{'s' if count > 1 else ''} in the recipe"
    return join(_marks(draft), note("error", title, el("ul", *items), locked))


def _marks(draft: Draft) -> Markup:
    """Numbers of lines alone go into this style."""
    rules = [
        f".yaml .cm-line:nth-child({int(line)}), .yaml .cm-lineNumbers .cm-gutterElement:nth-child({int(line) + 1})"
        for line in draft.lines()
    ]
    return el("style", Markup(", ".join(rules) + " { background: var(--mark) !important; }") if rules else "")


def status_view(draft: Draft, planned: str) -> Markup:
    if draft.recipe is None:
        count = len(draft.problems)
        return el("p", f"{count} problem{'s' if count > 1 else ''} to solve before the plan can be made.", cls="bad")
    if planned == draft.text:
        return el("p", f"Ready to train. The job is named {draft.recipe.output.dir.name}.")
    if planned:
        return el("p", "The recipe has changed since this plan.")
    return el("p", "The recipe is valid. Next, see what it will do and what it needs.")
