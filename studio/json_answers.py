"""Whether an answer is JSON, and whether it fits a schema. No torch, no network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from studio.errors import DataError, Problem


def json_record(text: str) -> Any | None:
    """The JSON object or array that `text` is, white space at its ends aside; None for anything else."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def is_json(text: str) -> bool:
    """Whether `text` is a JSON object or array; NaN and Infinity are no JSON."""
    return json_record(text) is not None


def read_schema(path: Path) -> Callable[[str], bool]:
    """Whether a text is JSON that fits the JSON Schema in the file at `path`. References to other files are refused.

    Raises:
        DataError: no such file, no JSON, or no schema.
    """
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    try:
        schema = json.loads(path.read_bytes())
        kind = validator_for(schema)
        kind.check_schema(schema)
        validator = kind(schema, registry=Registry())  # an empty one: the default fetches references from the network
        validator.is_valid({})
    except OSError as error:
        raise _problem(path, f"cannot be read: {error.strerror or error}") from None
    except SchemaError as error:
        where = ".".join(map(str, error.absolute_path))
        raise _problem(path, f"is no JSON Schema: {f'{where}: ' if where else ''}{error.message}") from None
    except Unresolvable as error:
        raise _problem(path, f"refers to another schema, which is not followed: {error.ref}") from None
    except (ValueError, RecursionError, TypeError, AttributeError) as error:
        raise _problem(path, f"is no JSON Schema: {error}") from None

    def fits(text: str) -> bool:
        value = json_record(text)
        return value is not None and bool(validator.is_valid(value))

    return fits


def _problem(path: Path, message: str) -> DataError:
    return DataError([Problem("", None, message, str(path))])


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
