"""The reward for JSON that fits a schema. No torch; jsonschema is loaded where it is used."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio.errors import RewardError
from studio.rewards.scoring import Attempt, Score, each
from studio.rewards.texts import NOT_JSON, parsed

if TYPE_CHECKING:
    from studio.recipe_training import RewardSettings


def json_schema(settings: RewardSettings) -> Score:
    """1 where the answer is JSON, white space around it aside, that the schema accepts; else 0."""
    assert settings.json_schema is not None
    validator = compiled(read_schema(settings.json_schema))

    def score(attempt: Attempt) -> float:
        value = parsed(attempt.answer)
        return float(value is not NOT_JSON and validator.is_valid(value))

    return each(score)


def read_schema(schema: Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema itself, or what its file holds.

    Raises:
        RewardError: the file cannot be read or holds no JSON object.
    """
    if not isinstance(schema, Path):
        return schema
    try:
        found = json.loads(schema.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise RewardError(f"the schema {schema} cannot be read: {reason}") from None
    if not isinstance(found, dict):
        raise RewardError(f"the schema {schema} is no JSON object; expected a JSON Schema such as {{type: object, …}}")
    return found


def compiled(schema: Mapping[str, Any]) -> Any:
    """A validator of jsonschema's, by the draft that `$schema` names, 2020-12 where it names none.

    Raises:
        RewardError: it is no JSON Schema, or refers to another document: nothing is fetched.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    if outside := [ref for ref in _refs(schema) if not ref.startswith("#")]:
        raise RewardError(
            f"the schema refers to {outside[0]}; allowed: references inside it, such as #/$defs/name; nothing is "
            "fetched, so write that schema into $defs"
        )
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        where = "/".join(map(str, error.absolute_path)) or "its top"
        raise RewardError(f"is no JSON Schema: at {where}, {error.message}") from None
    return kind(schema, registry=Registry())


def _refs(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key in ("$ref", "$dynamicRef") and isinstance(value, str):
                yield value
            yield from _refs(value)
    elif isinstance(node, list | tuple):
        for item in node:
            yield from _refs(item)
