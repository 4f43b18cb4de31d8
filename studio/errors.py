"""Every error the studio raises on purpose, in one tree.

    StudioError                 (adapters.errors, re-exported here with the rest of the core's errors)
    ├── ProblemsError           several problems found in one pass, each with its file, line and field
    │   ├── RecipeError         a recipe that cannot be read, or says something that is not allowed
    │   └── DataError           a training or evaluation file with missing, empty or malformed rows
    ├── JobError                a job directory that is missing or damaged, or a job that cannot do what was asked
    ├── TrainingError           training that had to stop: non-finite loss, a process that died
    ├── GateError               a tuned model that is worse than its recipe's gate allows; its adapter was written
    ├── RewardError             a reward that cannot be computed: a bad option, or a completion it has no number for
    ├── LayoutError  CheckpointError  QuantizationError  TargetError  ProfileError  AdapterFileError    from the core
    ├── ExportError  VerificationError      from the core: a format that cannot be written, or did not verify
    └── OutputExistsError       an output that exists already and that nobody said to replace

Messages say what was received, what is allowed and what to do next. Anything else that is raised is a bug of ours
and travels to the edge of the process, where the job records it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adapters.errors import (
    AdapterFileError,
    CheckpointError,
    ExportError,
    LayoutError,
    OutputExistsError,
    ProfileError,
    QuantizationError,
    StudioError,
    TargetError,
    VerificationError,
)

__all__ = [
    "AdapterFileError",
    "CheckpointError",
    "DataError",
    "ExportError",
    "GateError",
    "JobError",
    "LayoutError",
    "OutputExistsError",
    "Problem",
    "ProblemsError",
    "ProfileError",
    "QuantizationError",
    "RecipeError",
    "RewardError",
    "StudioError",
    "TargetError",
    "TrainingError",
    "VerificationError",
]

SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an input file.

    Attributes:
        field: where in the recipe or row, as "adapter.alpha"; "" for the file as a whole.
        line: 1-based line in the file, or None where no line applies.
        message: what was received and what is allowed.
        file: the file, or None for text that came from no file.
        counted: what `line` counts: lines, or the rows of a file without lines.
    """

    field: str
    line: int | None
    message: str
    file: str | None = None
    counted: str = "line"

    def __str__(self) -> str:
        line = f"{self.counted} {self.line}" if self.line is not None else ""
        where = ", ".join(part for part in (line, self.field) if part)
        return f"{where}: {self.message}" if where else self.message


@dataclass(frozen=True)
class FileProblem(Problem):
    """A problem that ends the reading of a file: what follows in it is not known, so it cannot be dropped as a row."""


class ProblemsError(StudioError):
    """Input that was read to its end, with everything found wrong in it.

    Attributes:
        problems: the problems in file order, at most 20 of each file.
        hidden_count: how many more there were.
    """

    def __init__(self, problems: Sequence[Problem], hidden_count: int = 0):
        self.problems = list(problems)
        self.hidden_count = hidden_count
        super().__init__(_as_text(self.problems, hidden_count))


class RecipeError(ProblemsError):
    """A recipe that cannot be used. Nothing was started."""


class DataError(ProblemsError):
    """A data file that must not be trained on. Nothing was started."""


class JobError(StudioError):
    """A job that does not exist, is damaged, or is in a state in which it cannot do what was asked."""


class TrainingError(StudioError):
    """Training stopped before its end; no adapter was written."""


class GateError(StudioError):
    """The tuned model is worse than the base by more than the recipe's gate allows. The adapter was written."""


class RewardError(StudioError):
    """A reward function failed, or was given options that cannot work. A bad completion is no error: it scores low."""


def _as_text(problems: list[Problem], hidden_count: int) -> str:
    lines: list[str] = []
    for file in dict.fromkeys(problem.file for problem in problems):
        own = [problem for problem in problems if problem.file == file]
        lines.append(f"{file or 'recipe'}: {len(own)} problem{'s' if len(own) > 1 else ''}")
        lines += [f"  - {problem}" for problem in own]
    if hidden_count:
        lines.append(f"  … and {hidden_count} more")
    return "\n".join(lines)
