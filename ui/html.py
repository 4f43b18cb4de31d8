"""HTML for the views, escaped by construction: text from models, files and users is shown, never interpreted.

`el` escapes every child and attribute that is not itself made by `el`. No other way to HTML is used in `ui`.
"""

from __future__ import annotations

from markupsafe import Markup, escape

Child = Markup | str | int | None


def el(name: str, *children: Child, **attributes: str | int | None) -> Markup:
    """An element; `cls` stands for class, a trailing or inner underscore for a dash, None leaves something out."""
    given = {_attribute(key): value for key, value in attributes.items() if value is not None}
    head = Markup("").join(Markup(' {}="{}"').format(Markup(key), value) for key, value in given.items())
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), head, join(*children))


def join(*children: Child) -> Markup:
    """The children after one another, each escaped unless it is made by `el`."""
    return Markup("").join(escape(child) for child in children if child is not None)


def _attribute(key: str) -> str:
    return {"cls": "class", "for_": "for"}.get(key, key).replace("_", "-")
