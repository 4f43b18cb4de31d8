"""Pydantic's validation errors, told as problems of a recipe: line, what was received, what is allowed."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml.comments import CommentedMap

from studio.errors import Problem
from studio.recipe_text import describe, line_of
from studio.trl_options import trl_problem

Schema = dict[str, Any]

KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "object": "a mapping",
    "array": "a list",
    "null": "null",
}
MOVED = {
    "adapter.routed_experts": "the experts are chosen by placement: {rule: manual, experts: […]}, or another rule",
    "adapter.router_rank": "write router: {mode: lora, rank: …}, or leave the router frozen",
}
"""Fields of older recipes, and what took their place."""

BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def problems_of(error: ValidationError, marked: CommentedMap, schema: Schema, file: str | None) -> list[Problem]:
    """Every problem in `error`, in file order."""
    problems: list[Problem] = []
    for detail in error.errors(include_url=False):
        for location, message in _messages(detail, schema):
            field = ".".join(str(step) for step in location)
            problems.append(Problem(field, line_of(marked, location), message, file))
    return sorted(problems, key=lambda problem: problem.line or 0)


def allowed(schema: Schema, root: Schema) -> str:
    """What a field's JSON Schema allows, in words: `a whole number, at least 0, at most 1024`."""
    schema = _resolved(schema, root)
    if "anyOf" in schema:
        return " or ".join(allowed(option, root) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " | ".join(str(value) for value in schema.get("enum", [schema.get("const")]))
    kind = "a path" if schema.get("format") == "path" else KINDS.get(schema.get("type", ""), "another value")
    return ", ".join([kind, *(f"{text} {schema[key]}" for key, text in BOUNDS.items() if key in schema)])


def _messages(detail: ErrorDetails, schema: Schema) -> list[tuple[list[str | int], str]]:
    location = list(detail["loc"])
    kind = detail["type"]
    if kind == "refused_keys":
        return [([*location, key], message) for key, message in detail["ctx"]["keys"].items()]
    if kind == "refused":
        return [(location, detail["msg"])]
    if kind == "extra_forbidden":
        return [(location, _unknown_key(location, detail["input"], schema))]
    field = _field_schema(location, schema)
    if kind == "missing":
        return [(location, f"is missing. {_first_sentence(field, schema)}")]
    if field is None:
        return [(location, f"received {describe(detail['input'])}; {detail['msg'].lower()}")]
    return [(location, f"received {describe(detail['input'])}; allowed: {allowed(field, schema)}")]


def _unknown_key(location: list[str | int], value: Any, schema: Schema) -> str:
    key = str(location[-1])
    if moved := MOVED.get(".".join(map(str, location))):
        return f"no longer a field; {moved}"
    siblings = _properties(_field_schema(location[:-1], schema), schema)
    if near := get_close_matches(key, siblings, n=1):
        return f'unknown key; did you mean "{near[0]}"?'
    for section, section_schema in _properties(schema, schema).items():
        if key in _properties(section_schema, schema):
            return f"unknown key here; did you mean {section}.{key}?"
    if trl_problem(key, value) is None:
        return f"unknown key; it is an option of TRL: write it as trl.{key}"
    return f"unknown key; allowed here: {', '.join(siblings)}"


def _field_schema(location: list[str | int], root: Schema) -> Schema | None:
    """The JSON Schema at `location`, or None where the location leaves the sections and fields."""
    schema: Schema | None = root
    for step in location:
        inside = _resolved(schema, root) if schema else {}
        schema = inside.get("items") if isinstance(step, int) else inside.get("properties", {}).get(str(step))
        if schema is None:
            return None
    return schema


def _properties(schema: Schema | None, root: Schema) -> dict[str, Schema]:
    return _resolved(schema, root).get("properties", {}) if schema else {}


def _resolved(schema: Schema, root: Schema) -> Schema:
    reference = schema.get("$ref")
    return root["$defs"][reference.rsplit("/", 1)[-1]] if reference else schema


def _first_sentence(field: Schema | None, root: Schema) -> str:
    """What a field or a section is for: its own description, or that of its section."""
    text = str({**_resolved(field, root), **field}.get("description", "")) if field else ""
    return text.split(". ")[0].rstrip(".")
