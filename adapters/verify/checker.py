"""The process that checks an export, asked by adapters.verify.run.

python -m adapters.verify.checker QUESTION ANSWER
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapters.errors import StudioError
from adapters.export import EXPORTERS, Options, Source
from adapters.verify import Check, Evidence


def check(question: dict[str, Any]) -> list[Check]:
    """The checks of the question's format; an error of the studio's is a failed check that says it."""
    try:
        return EXPORTERS[question["format"]].check(
            Path(question["directory"]),
            source_from(question["source"]),
            Evidence(**{**question["evidence"], "logits": _path(question["evidence"]["logits"])}),
            options_from(question["options"]),
        )
    except StudioError as error:
        return [Check(f"{question['format']}: can be read", "failed", str(error))]


def source_from(given: dict[str, Any]) -> Source:
    """A `Source` as it was before it went through JSON."""
    return Source(**{**given, "base": Path(given["base"]), "adapter": _path(given["adapter"])})


def options_from(given: dict[str, Any]) -> Options:
    """`Options` as they were before they went through JSON."""
    return Options(**{**given, "importance": _path(given["importance"])})


def _path(value: str | None) -> Path | None:
    return None if value is None else Path(value)


if __name__ == "__main__":
    found = check(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps([asdict(row) for row in found]), encoding="utf-8")
