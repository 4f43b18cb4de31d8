"""The recipe in the editor: its text, what the form shows of it, and everything that is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

import studio
from studio import Problem, Recipe, RecipeError
from ui import fields
from ui.fields import FormValue
from ui.places import Places, Source, checked_name

MAX_CHARACTERS = 200_000


@dataclass(frozen=True)
class Draft:
    """A checked text.

    Attributes:
        text: as typed, valid or not.
        values: what the form shows, or None where the text is no YAML mapping.
        problems: in line order; empty for a recipe that can be planned.
        recipe: the recipe, where there is no problem.
    """

    text: str
    values: dict[str, FormValue] | None
    problems: tuple[Problem, ...]
    recipe: Recipe | None

    def by_place(self) -> dict[str, str]:
        """The problems by the field or section that shows them ("" for the text as a whole), in words."""
        found: dict[str, list[str]] = {}
        known = {field.path for field in fields.fields()} | {section.name for section in fields.sections()}
        for problem in self.problems:
            place, rest = _place(problem.field, known)
            found.setdefault(place, []).append(f"{rest}: {problem.message}" if rest else problem.message)
        return {place: ". ".join(_sentence(message) for message in messages) for place, messages in found.items()}

    def lines(self) -> list[int]:
        return sorted({problem.line for problem in self.problems if problem.line})


def check(text: str, source: Source, places: Places) -> Draft:
    """Checks the text in the editor; never raises, whatever was typed."""
    document = _document(text)
    values = fields.shown(document) if document is not None else None
    problems: list[Problem] = []
    recipe: Recipe | None = None
    try:
        recipe = studio.parse_recipe(text, places.file_of(source))
    except RecipeError as error:
        problems += error.problems
    if document is not None and not any(problem.field.startswith("output") for problem in problems):
        problems += _output_problems(document, places)
    return Draft(text, values, tuple(problems), None if problems else recipe)


def from_form(text: str, values: Mapping[str, FormValue]) -> str:
    """The text after an edit in the form; the same text where it is no YAML mapping (the form is locked then)."""
    document = _document(text)
    return fields.written(text, fields.let_go(fields.shown(document), values)) if document is not None else text


def opened(source: Source, places: Places) -> str:
    """The text of a source, with an output directory that no job has yet.

    Raises:
        StudioError: it cannot be read.
    """
    return with_free_name(places.text_of(source), places, source.name)


def with_free_name(text: str, places: Places, otherwise: str = "job") -> str:
    """The text with its job directory in the jobs root, under the first name like its own that nothing there has."""
    document = _document(text)
    written = fields.shown(document)["output.dir"] if document is not None else None
    return renamed(text, places.free_name(Path(str(written)).name if written else otherwise), places)


def renamed(text: str, name: str, places: Places) -> str:
    """The text with the job directory `name` in the jobs root."""
    return from_form(text, {"output.dir": places.output_dir(name)})


def _document(text: str) -> CommentedMap | None:
    if len(text) > MAX_CHARACTERS:
        return None
    try:
        return fields.load(text)
    except (YAMLError, ValueError, RecursionError):
        return None


def _output_problems(document: CommentedMap, places: Places) -> list[Problem]:
    """Jobs started here are also found here: the directory lies in the jobs root itself."""
    output = document.get("output")
    if not isinstance(output, CommentedMap) or not isinstance(output.get("dir"), str):
        return []
    path = Path(os.path.abspath(os.path.expanduser(output["dir"])))
    line = output.lc.key("dir")[0] + 1
    if path.parent != places.jobs_root:
        example = places.output_dir("my-job")
        message = f"received {path}; jobs started in the browser go into {places.jobs_root}, for instance {example}"
        return [Problem("output.dir", line, message)]
    try:
        checked_name(path.name)
    except studio.StudioError as error:
        return [Problem("output.dir", line, str(error))]
    return []


def _place(field: str, known: set[str]) -> tuple[str, str]:
    """The nearest field or section that the form has for "adapter.alpah", and the rest of the path."""
    steps: Sequence[str] = field.split(".")
    for count in range(len(steps), 0, -1):
        if (place := ".".join(steps[:count])) in known:
            return place, ".".join(steps[count:])
    return "", field


def _sentence(message: str) -> str:
    return message[:1].upper() + message[1:]
