"""`studio evaluate`: a finished job, an adapter or a model, measured on a file of rows and on tasks of lm-eval.

    evaluate("runs/quickstart", data=None, tasks=["tasks/domains.yaml"]) ─▶ report

The base is loaded as training held it and the adapter is computed as in training, so the numbers are those of the job.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio.errors import StudioError

if TYPE_CHECKING:
    from studio.export_origin import Origin
    from studio.recipe import Recipe

Progress = Callable[[str, int, int], None]

READ = ("data", "training", "rewards", "sampling")
"""Sections of a job's recipe that say how it is measured."""

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def evaluate(
    what: str,
    *,
    data: Path | None = None,
    tasks: Sequence[str] = (),
    examples: int | None = None,
    json_schema: Path | None = None,
    chat_template: bool | None = None,
    base: str | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures `what`; of a job or an adapter the base too.

    Args:
        what: a job, an adapter directory, or a model (a directory, "embedded", or a hub id).
        data: rows in any form that a recipe reads; a job's own held-out file where neither this nor tasks are given.
        examples: the first so many rows, and of each task.
        batch_size, chat_template: a job's own where None; 8, and no template.

    Returns:
        {"what", "base", "adapter", "data", "before", "after", "change"}, of a model "before" alone.

    Raises:
        StudioError: there is no such thing, or nothing to measure it on.
    """
    from studio.evaluation_inputs import check_evaluation
    from studio.export_origin import find_origin

    os.environ.update(OFFLINE)  # before the libraries are loaded, which read it then
    origin = find_origin(what, base)
    recipe, file = _recipe(origin, data, tasks, examples, json_schema, chat_template, batch_size)
    if file is None and not tasks:
        raise StudioError(f"there is nothing to measure {what} on: give --data FILE, --task NAME or FILE, or both")
    check_evaluation(recipe.evaluation)
    rows = _rows(recipe, file)
    report = _measured(origin, recipe, rows, progress)
    return {
        "what": what,
        "base": origin.base_name,
        "adapter": str(origin.adapter) if origin.adapter else None,
        "data": str(file) if file else None,
        "tasks": list(recipe.evaluation.tasks),
        **report,
    }


def _recipe(
    origin: Origin,
    data: Path | None,
    tasks: Sequence[str],
    examples: int | None,
    json_schema: Path | None,
    chat_template: bool | None,
    batch_size: int | None,
) -> tuple[Recipe, Path | None]:
    """The job's recipe, or one like it for an adapter or a model; and the file of rows."""
    from studio.recipe import Recipe

    sidecar = origin.sidecar
    held = {name: value for name, value in ((sidecar.held if sidecar else None) or {}).items() if name != "dtype"}
    model = {"base": str(origin.base), **(held or {"quantization": "none"})}
    values: dict[str, Any] = {"model": model, "data": {"train": "unused"}, "output": {"dir": "unused"}}
    job = origin.job.recipe() if origin.job else None
    if job:
        values = {
            **job.model_dump(mode="json", include={"data", "training", "rewards", "sampling"}),
            **values,
            "model": model,
        }
        values["data"] = job.data.model_dump(mode="json")
    settings = job.evaluation.model_dump(mode="json") if job else {}
    settings |= {"tasks": list(tasks), "gate": [], "every_steps": None}
    given = {"task_examples": examples, "task_chat_template": chat_template, "json_schema": json_schema}
    settings |= {name: value for name, value in given.items() if value is not None}
    settings["examples"] = examples or settings.get("examples", 200)
    file = data or (job.data.eval if job and not tasks else None)
    values["data"] = {**values["data"], "eval": str(file.absolute()) if file else None}
    if file is None:
        settings["json_schema"] = None
    training = {**values.get("training", {}), "learning_rate": 1e-4}
    training["batch_size"] = batch_size or training.get("batch_size", 8)
    if batch_size and job:  # what the method asks of a batch is about learning
        training["batch_size"] = max(batch_size, 2) if job.training.method == "kto" else batch_size
        training["gradient_accumulation_steps"] = job.sampling.completions
    return Recipe.model_validate({**values, "training": training, "evaluation": settings}), file


def _rows(recipe: Recipe, file: Path | None) -> list[Any]:
    from studio.data import read_rows
    from studio.data.reading import KINDS

    return read_rows(file, tuple(KINDS))[: recipe.evaluation.examples] if file else []


def _measured(origin: Origin, recipe: Recipe, rows: list[Any], progress: Progress | None) -> dict[str, Any]:
    from adapters.applied import AppliedAdapter
    from studio.base_model import load_recipe_base
    from studio.measuring import Measuring
    from studio.metrics import changes_as_json

    def shown(name: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(name, done, total) if progress else None

    measuring = Measuring(recipe, rows)  # tasks that are not here are refused before the base is loaded
    model, tokenizer = load_recipe_base(recipe, shown("loading"))
    adapter = AppliedAdapter(model, origin.adapter) if origin.adapter else None
    before = measuring.run(model, tokenizer, shown("measuring base" if adapter else "measuring"))
    if adapter is None:
        return {"before": before.summary(), "after": None, "change": {}}
    with adapter:
        after = measuring.run(model, tokenizer, shown("measuring tuned"))
    change = changes_as_json(before.measures, after.measures)
    return {"before": before.summary(), "after": after.summary(), "change": change}
