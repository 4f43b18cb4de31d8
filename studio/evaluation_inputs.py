"""What an evaluation reads, checked before any work is spent: schema file, task files, lm-eval itself. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from studio.errors import DataError, Problem, StudioError
from studio.json_answers import read_schema
from studio.recipe_evaluation import EvaluationSettings


def check_evaluation(settings: EvaluationSettings) -> None:
    """Refuses a schema or a task that cannot be read.

    Raises:
        DataError: a file that is missing, or is none. StudioError: lm-eval is not installed.
    """
    if settings.json_schema is not None:
        read_schema(settings.json_schema)
    check_tasks(settings.tasks)


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuses task files that are not there, and any task where lm-eval is not installed. Names are looked up later.

    Raises:
        DataError, StudioError
    """
    if tasks and find_spec("lm_eval") is None:
        raise StudioError('tasks need lm-eval, which is not installed: pip install -e ".[evaluate]" -c constraints.txt')
    problems = [
        Problem("", None, "cannot be read: no such file", task)
        for task in tasks
        if task.endswith((".yaml", ".yml")) and not Path(task).is_file()
    ]
    if problems:
        raise DataError(problems)
