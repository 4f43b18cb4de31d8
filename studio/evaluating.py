"""`studio evaluate`: a finished job, an adapter or a model, measured on a file of rows and on tasks of lm-eval.

    evaluate("runs/quickstart", data=None, tasks=["tasks/domains.yaml"]) ─▶ report

The base is loaded as training held it and the adapter is computed as in training, so the numbers are those of the job.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

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
    recipe = _recipe(origin, data, tasks, examples, json_schema, chat_template, batch_size)
    if not recipe.data.held_out and not tasks:
        raise StudioError(f"there is nothing to measure {what} on: give --data FILE, --task NAME or FILE, or both")
    check_evaluation(recipe.evaluation)
    rows = _rows(recipe, data)
    report = _measured(origin, recipe, rows, progress)
    return {
        "what": what,
        "base": origin.base_name,
        "adapter": str(origin.adapter) if origin.adapter else None,
        "data": _named(recipe),
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
) -> Recipe:
    """The job's recipe, or one like it for an adapter or a model, with what is asked for here.

    Its held-out rows are those to measure; it has none where there is nothing but tasks.
    """
    from studio.recipe import Recipe
    from studio.sweep_space import with_values

    job = origin.job.recipe() if origin.job else None
    held = dict((origin.sidecar.held if origin.sidecar else None) or {"quantization": "none"})
    held.pop("dtype", None)
    model = {"model.base": str(origin.base), **{f"model.{name}": value for name, value in held.items()}}
    like = job or Recipe.model_validate({"data": {"train": "no rows"}, "output": {"dir": "no job"}})
    settings = like.evaluation
    given: dict[str, Any] = {"json_schema": json_schema}
    given |= {"task_examples": examples, "task_chat_template": chat_template} if tasks else {}
    asked = {name: str(value) if name == "json_schema" else value for name, value in given.items() if value is not None}
    rows = {"data.eval": str(data.absolute()) if data else None, "data.eval_fraction": None}
    measured = data is not None or (not tasks and like.data.held_out)
    values: dict[str, Any] = {
        **model,
        **(rows if data or tasks else {}),
        "adapter.start_from": None,
        "training.learning_rate": 1e-4,
        **_batch(job, batch_size),
        "evaluation.tasks": list(tasks),
        **({} if tasks else {"evaluation.task_examples": None, "evaluation.task_chat_template": False}),
        "evaluation.gate": [],
        "evaluation.every_steps": None,
        "evaluation.examples": examples or (settings.examples if job else 200),
        **{f"evaluation.{name}": value for name, value in asked.items()},
        **({} if measured else {"evaluation.json_schema": None}),
    }
    return with_values(like, values)


def _batch(job: Recipe | None, batch_size: int | None) -> dict[str, Any]:
    """Rows in a forward pass; what a job's method asks of a batch is about learning, and is met in passing."""
    if job is None or batch_size is None:
        return {"training.batch_size": batch_size or (job.training.batch_size if job else 8)}
    least = 2 if job.training.method == "kto" else 1
    return {
        "training.batch_size": max(batch_size, least),
        "training.gradient_accumulation_steps": job.sampling.completions,
    }


def _named(recipe: Recipe) -> str | None:
    """Where the rows come from."""
    if recipe.data.eval_fraction is not None:
        return f"{100 * recipe.data.eval_fraction:g} % of the training rows, held out"
    return str(recipe.data.eval) if recipe.data.eval else None


def _rows(recipe: Recipe, data: Path | None) -> list[Any]:
    """The rows of the file, of any kind; else those that the job held out."""
    from studio.data import held_out_rows, read_rows
    from studio.data.reading import KINDS, Reading

    rows = read_rows(data, tuple(KINDS), Reading.of(recipe).for_other(data)) if data else held_out_rows(recipe)
    return rows[: recipe.evaluation.examples]


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
    if adapter:
        cast(Any, model).disable_adapter = adapter.off  # the base, for what is measured against it
    before = measuring.run(model, tokenizer, shown("measuring base" if adapter else "measuring"))
    if adapter is None:
        return {"before": before.summary(), "after": None, "change": {}}
    with adapter:
        after = measuring.run(model, tokenizer, shown("measuring tuned"))
    change = changes_as_json(before.measures, after.measures)
    return {"before": before.summary(), "after": after.summary(), "change": change}
