"""The root of the studio's error tree and the part of it that the core raises.

    StudioError
    ├── LayoutError         the model family is not known, or its tensors do not fit its layout
    ├── CheckpointError     base weights missing, truncated, non-finite, of the wrong shape, or pickled
    ├── QuantizationError   a tensor that should be 4-bit is not
    ├── TargetError         an adapter target that matches no tensor
    ├── AdapterFileError    an adapter directory that cannot be read or does not fit the base
    ├── OutputExistsError   an output that exists already
    └── ExportError         a format that this model, or this machine, cannot be exported to
        └── VerificationError   an export that its consumer does not agree with

`studio.errors` adds the rest. Each message says what was received, what is allowed and what to do next.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class StudioError(Exception):
    """Anything the studio refuses to do, with a message for the person who asked."""


class LayoutError(StudioError):
    """The model family is unknown to `adapters.layouts`, or the model does not look like its family."""


class CheckpointError(StudioError):
    """Base weights that must not be trained on: missing, truncated, non-finite, misshapen or pickled.

    Attributes:
        problems: every problem found, one line each (the message shows the first 20).
    """

    def __init__(self, where: Path | str, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__(listed(f"{where}: {len(self.problems)} problem(s) in the base weights", self.problems))


class QuantizationError(StudioError):
    """A base tensor of a class that the plan has in 4 bit was left in 16 or 32 bit."""


class TargetError(StudioError):
    """An adapter was asked for a class of tensors, or an expert, that the model does not have."""


class ProfileError(StudioError):
    """A router profile that is missing, unreadable, or made from another base or other data."""


class AdapterFileError(StudioError):
    """An adapter directory that is incomplete, unreadable, or made for another base."""


class OutputExistsError(StudioError):
    """The output is there already and nobody said to replace it."""


class ExportError(StudioError):
    """A format that cannot hold this model, or needs a tool that is not installed."""


class VerificationError(ExportError):
    """An export that was written and does not agree with the trained model. Nothing of it is kept.

    Attributes:
        checks: every check that was made, passed ones too (`adapters.verify.Check`).
    """

    def __init__(self, message: str, checks: Sequence[Any] = ()):
        self.checks = list(checks)
        super().__init__(message)


def listed(title: str, lines: Sequence[str], most: int = 20) -> str:
    """`title` followed by the first `most` lines, and a count of the rest."""
    shown = [f"  - {line}" for line in lines[:most]]
    if len(lines) > most:
        shown.append(f"  … and {len(lines) - most} more")
    return "\n".join([title, *shown])
