"""The form: one Gradio component for each field of the recipe's schema, and the updates that keep it in step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import gradio as gr

from ui import fields
from ui.drafts import Draft
from ui.fields import Field, FormValue, Section
from ui.html import Child, el, join
from ui.look import show

ALWAYS = "field"
WIDE = {"model.base", "data.train", "data.eval", "training.method", "output.dir", "rewards", "trl"}
"""Fields that take a whole row: paths and free text."""

Updates = dict[Any, Any]
Shown = dict[str, Any]
"""What the page shows now: the error of each place, whether the form is locked, the fields that are left out, and
why others are not read."""


@dataclass
class Form:
    """The components by field path, the note of each section, and the boxes of sections that come and go whole."""

    components: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    boxes: dict[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> list[Any]:
        return list(self.components.values())

    @property
    def outputs(self) -> list[Any]:
        return [*self.components.values(), *self.notes.values(), *self.boxes.values()]

    def values(self, given: Sequence[FormValue]) -> dict[str, FormValue]:
        """The values that Gradio hands over, by field path."""
        return dict(zip(self.components, given, strict=True))

    def updates(self, draft: Draft, given: Mapping[str, FormValue], before: Shown, after: Shown) -> Updates:
        """Updates by component: values that the draft has otherwise than the form, and what `errors` finds."""
        values = draft.values or given
        changes = self._changes(before, after)
        for path, value in values.items():
            if value != given.get(path):
                changes.setdefault(path, {})["value"] = value
        return self._as_updates(changes) | self._section_updates(before, after)

    def errors(self, before: Shown, after: Shown) -> Updates:
        """Updates by component for the errors that came or went; no value is touched."""
        return self._as_updates(self._changes(before, after)) | self._section_updates(before, after)

    def _changes(self, before: Shown, after: Shown) -> dict[str, dict[str, Any]]:
        found = {entry.path: _field_changes(entry, before, after) for entry in fields.fields()}
        return {path: changes for path, changes in found.items() if changes}

    def _as_updates(self, changes: Mapping[str, dict[str, Any]]) -> Updates:
        return {self.components[path]: gr.update(**change) for path, change in changes.items()}

    def _section_updates(self, before: Shown, after: Shown) -> Updates:
        found: Updates = {}
        for section in fields.sections():
            if section.name in self.boxes and _is_shown(section, before) != _is_shown(section, after):
                found[self.boxes[section.name]] = gr.update(visible=_is_shown(section, after))
        for name, component in self.notes.items():
            error = after["errors"].get(name)
            if error != before["errors"].get(name):
                view = el("p", error, cls="section-error", role="alert") if error else ""
                found[component] = gr.update(value=view, visible=bool(error))
        return found


def shown_of(draft: Draft, before: Shown) -> Shown:
    """What to show of the draft; a text that is no YAML locks the form and changes nothing else of it."""
    errors = draft.by_place()
    if draft.values is None:
        return {**before, "errors": errors, "locked": True}
    return {"errors": errors, "locked": False, **_unread(draft.values, errors)}


def _unread(values: Mapping[str, FormValue], errors: Mapping[str, str]) -> Shown:
    """Fields that nothing reads: left out, and where they hold something, shown with the reason."""
    reasons, defaults = fields.unread(values), fields.shown({})
    hidden = [path for path in reasons if values[path] == defaults[path] and path not in errors]
    return {"hidden": hidden, "idle": {path: words for path, words in reasons.items() if path not in hidden}}


def _is_shown(section: Section, shown: Shown) -> bool:
    """Whether any field of the section is."""
    return any(entry.path not in shown["hidden"] for entry in section.fields)


NOTHING_SHOWN: Shown = {"errors": {}, "locked": False, **_unread(fields.shown({}), {})}


def build_form() -> Form:
    """The form in the current Gradio context, its fields at their defaults."""
    form = Form()
    for section in fields.sections():
        with gr.Column(elem_classes=["card", "section"], visible=_is_shown(section, NOTHING_SHOWN)) as box:
            _build_section(form, section)
        if all(entry.switch for entry in section.fields):
            form.boxes[section.name] = box
    return form


def _build_section(form: Form, section: Section) -> None:
    essential = [entry for entry in section.fields if entry.essential]
    rare = [entry for entry in section.fields if not entry.essential]
    title = rare[0].title if not essential and len(rare) == 1 else section.name.capitalize()
    if essential:
        show(join(el("h2", title), el("p", *_words(section.hint), cls="quiet-text") if section.hint else None))
        form.notes[section.name] = show(visible=False)
        _build_fields(form, essential)
    if rare:
        label = f"More {section.name} settings" if essential else title
        with gr.Accordion(label, open=False, elem_classes=["more"] + ([] if essential else ["alone"])):
            _build_fields(form, rare)


def _words(hint: str) -> list[Child]:
    """A docstring's text, with what stands in backticks as code."""
    return [el("code", part) if number % 2 else part for number, part in enumerate(hint.split("`"))]


def _build_fields(form: Form, entries: Sequence[Field]) -> None:
    """Wide ones first; then rows of fields that come and go together."""
    wide = [entry for entry in entries if entry.path in WIDE]
    narrow = [entry for entry in entries if entry.path not in WIDE]
    for entry in wide:
        form.components[entry.path] = _component(entry)
    for _, together in groupby(narrow, key=_company):
        _build_rows(form, list(together))


def _company(entry: Field) -> tuple[Any, ...]:
    """Equal for fields that come and go together; those that are there at first may share a row in any case."""
    return () if entry.path not in NOTHING_SHOWN["hidden"] else (entry.switch, entry.switched_on)


def _build_rows(form: Form, entries: Sequence[Field]) -> None:
    """Two or three a row; the odd one out stands first, so that those after it stay pairs."""
    columns = 3 if len(entries) in (3, 5, 6) else 2
    first = len(entries) % 2 if columns == 2 else 0
    for start in range(first - columns if first else 0, len(entries), columns):
        with gr.Row(equal_height=True):
            for entry in entries[max(0, start) : start + columns]:
                form.components[entry.path] = _component(entry)


def _component(entry: Field) -> Any:
    common: dict[str, Any] = {"label": entry.title, "info": entry.hint, "elem_classes": [ALWAYS], "min_width": 120}
    common["visible"] = entry.path not in NOTHING_SHOWN["hidden"]
    value: Any = fields.shown({})[entry.path]
    if entry.kind == "switch":
        return gr.Checkbox(value, interactive=True, **common)
    if entry.kind == "choice":
        return gr.Dropdown(list(entry.choices), value=value, interactive=True, filterable=False, **common)
    empty = "empty: null" if entry.nullable else ""
    return gr.Textbox(value, placeholder=empty, interactive=True, max_lines=1, **common)


def _field_changes(entry: Field, before: Shown, after: Shown) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    error, idle = after["errors"].get(entry.path), after["idle"].get(entry.path)
    if (error, idle) != (before["errors"].get(entry.path), before["idle"].get(entry.path)):
        tone = ["invalid"] if error else ["idle"] if idle else []
        changes |= {"info": error or idle or entry.hint, "elem_classes": [ALWAYS, *tone]}
    if after["locked"] != before["locked"]:
        changes["interactive"] = not after["locked"]
    if (hidden := entry.path in after["hidden"]) != (entry.path in before["hidden"]):
        changes["visible"] = not hidden
    return changes
