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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

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
SHOWN_LINES = 5
"""Of rows with the same problem."""


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


@dataclass
class ProblemGroup:
    """Problems that say the same of one or several rows of a file.

    Attributes:
        first: of them.
        lines: of the first few, 1-based.
        count: of all.
    """

    first: Problem
    lines: list[int]
    count: int = 0

    @property
    def where(self) -> str:
        """The lines, as "line 2", "lines 2, 3" or "lines 2, 3, 4, … (300 rows)"; "" where none applies."""
        if not self.lines:
            return ""
        listed = ", ".join(map(str, self.lines))
        if self.count > len(self.lines):
            listed += f", … ({self.count:,} rows)"
        return f"{self.first.counted}{'s' if self.count > 1 else ''} {listed}"

    def __str__(self) -> str:
        where = ", ".join(part for part in (self.where, self.first.field) if part)
        return f"{where}: {self.first.message}" if where else self.first.message


class ProblemGroups:
    """Problems as they are found, equal ones of several rows once; in the memory of 20 groups a file.

    Attributes:
        found: file → its first 20 groups.
        counts: file → how many problems it has.
        rows: file → how many rows or lines have problems; those of one row come one after the other.
    """

    def __init__(self, problems: Iterable[Problem] = ()):
        self.found: dict[str | None, dict[Problem, ProblemGroup]] = {}
        self.counts: dict[str | None, int] = {}
        self.rows: dict[str | None, int] = {}
        self._last: tuple[str | None, int | None] | None = None
        for problem in problems:
            self.add(problem)

    def add(self, problem: Problem) -> None:
        """Counts a problem, and keeps it where it is one of the first or equals one of them but for its line."""
        file = problem.file
        self.counts[file] = self.counts.get(file, 0) + 1
        place = (file, problem.line)
        self.rows[file] = self.rows.get(file, 0) + (place != self._last)
        self._last = place
        groups = self.found.setdefault(file, {})
        same = replace(problem, line=None)
        if same not in groups and len(groups) == SHOWN_PROBLEMS:
            return
        group = groups.setdefault(same, ProblemGroup(problem, []))
        group.count += 1
        if problem.line is not None and len(group.lines) < SHOWN_LINES:
            group.lines.append(problem.line)

    def of(self, file: str | None) -> list[ProblemGroup]:
        """The groups of a file, in the order in which they were found."""
        return list(self.found.get(file, {}).values())

    @property
    def all(self) -> list[ProblemGroup]:
        return [group for groups in self.found.values() for group in groups.values()]

    @property
    def hidden_count(self) -> int:
        """Problems that are in no group."""
        return sum(self.counts.values()) - sum(group.count for group in self.all)

    def head(self, file: str | None, of_rows: bool) -> str:
        """How many problems a file has, and of a file of rows how many rows have them, where these are fewer."""
        count, rows = self.counts[file], self.rows[file]
        within = f" in {rows:,} row{'s' if rows > 1 else ''}" if of_rows and rows < count else ""
        return f"{file or 'recipe'}: {count:,} problem{'s' if count > 1 else ''}{within}"


class ProblemsError(StudioError):
    """Input that was read to its end, with everything found wrong in it.

    Attributes:
        problems: the problems in file order, at most 20 of each file.
        hidden_count: how many more there were.
        groups: all of them, equal ones of several rows once, as the text has them; unlisted_count: those in none.
    """

    def __init__(self, problems: Sequence[Problem], hidden_count: int = 0, groups: ProblemGroups | None = None):
        self.problems = list(problems)
        self.hidden_count = hidden_count
        self.groups = groups or ProblemGroups(self.problems)
        self.unlisted_count = self.groups.hidden_count if groups else hidden_count
        super().__init__(_as_text(self.groups, self.unlisted_count, isinstance(self, DataError)))


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


def _as_text(groups: ProblemGroups, hidden_count: int, of_rows: bool) -> str:
    lines: list[str] = []
    for file in groups.counts:
        lines.append(groups.head(file, of_rows))
        lines += [f"  - {group}" for group in groups.of(file)]
    if hidden_count:
        lines.append(f"  … and {hidden_count:,} more")
    return "\n".join(lines)
