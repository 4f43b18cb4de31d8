"""A sweep: Optuna proposes values for fields of a recipe, each trial is an ordinary job, the held-out loss decides.

    SWEEP/sweep.yaml  journal.log  results.json  sweep.png  000/ 001/ …   the trials' job directories

    plan_sweep(recipe | sweep.yaml | folder, …) ─▶ SweepPlan ─▶ studio.sweep_run.run_sweep(plan, shown) ─▶ results

This file says what a sweep is; studio/sweep_run.py runs it. No torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from studio.errors import JobError, OutputExistsError, StudioError
from studio.methods import METHODS
from studio.metrics import METRICS
from studio.recipe import Recipe
from studio.recipe_parts import Settings
from studio.sweep_space import Choices, Space, as_values, check_space, from_values, read_params

SETTINGS, JOURNAL = "sweep.yaml", "journal.log"
FALLING = ("perplexity", "bits_per_byte", "brier_score", "loss", "ter")
"""Ends of the names of lm-eval's metrics that are better when lower."""


class SweepSettings(Settings):
    """A sweep as it is wanted: what `sweep.yaml` holds."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    recipe: dict[str, Any]
    """The recipe that is varied, whole."""

    params: dict[str, Any]
    """Fields and their ranges or lists, as `studio.sweep_space` reads them."""

    trials: int = Field(default=20, ge=1, le=100_000)
    """Trials in all, pruned ones among them."""

    metric: str = "loss"
    """What decides: a metric of the evaluation."""

    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """Optuna's tree-structured Parzen estimator, random values, or every combination of lists."""

    prune_after: int | None = Field(default=4, ge=1)
    """Finished trials before trials are pruned. null: none is."""

    seed: int = Field(default=0, ge=0, le=2**31)
    """Of the sampler."""


class SweepPlan:
    """A checked sweep and its folder."""

    def __init__(self, folder: Path, settings: SweepSettings, recipe: Recipe, space: Space):
        self.folder, self.settings, self.recipe, self.space = folder, settings, recipe, space

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        entry = METRICS.get(self.settings.metric)
        name = self.settings.metric.rpartition("/")[2].partition(",")[0]  # TASK/METRIC,FILTER
        falls = entry.better == "lower" if entry else name.endswith(FALLING)
        return "minimize" if falls else "maximize"


def plan_sweep(
    what: Path | str, params: Mapping[str, Any] | None = None, *, out: Path | None = None, **given: Any
) -> SweepPlan:
    """A new sweep of a recipe or of a sweep's YAML, or the one in a folder; checked, nothing is written.

    Args:
        params: field → range or list; over those of a sweep's YAML.
        given: fields of `SweepSettings`; None where not given. prune_after 0 is for none.

    Raises:
        StudioError: everything that would make a trial fail and can be known now; a folder that exists.
    """
    path = Path(what)
    wanted = {name: value for name, value in given.items() if value is not None}
    if wanted.get("prune_after") == 0:
        wanted["prune_after"] = None
    if path.is_dir():
        return _opened(path, dict(params or {}), wanted)
    values, recipe = _read(path)
    own = {**values.pop("params", {}), **(params or {})}
    named = values.pop("dir", None)
    folder = (
        out or (Path(named) if named else recipe.output.dir.with_name(f"{recipe.output.dir.name}-sweep"))
    ).absolute()
    if os.path.lexists(folder):
        raise OutputExistsError(f"{folder} exists already; to go on with the sweep in it: studio sweep {folder}")
    return _planned(folder, {**values, **wanted, "recipe": as_values(recipe), "params": own}, recipe)


def _read(path: Path) -> tuple[dict[str, Any], Recipe]:
    """The fields of a sweep's YAML but its recipe, and that; of a recipe's YAML none."""
    from studio.recipe import load_recipe
    from studio.recipe_text import read_mapping

    try:
        values, _ = read_mapping(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError):
        return {}, load_recipe(path)  # which says what is wrong
    if "params" not in values:
        return {}, load_recipe(path)
    named = values.pop("recipe", None)
    if not isinstance(named, str) or not isinstance(values["params"], dict):
        raise StudioError(f"{path}: a sweep names its recipe (recipe: FILE) and its params (a mapping of fields)")
    return values, load_recipe(path.parent / named)


def _opened(folder: Path, params: dict[str, Any], wanted: dict[str, Any]) -> SweepPlan:
    """The sweep in a folder; of its settings the number of trials and the pruning may be others."""
    from studio.recipe_text import read_mapping

    if changed := [*params, *(name for name in wanted if name not in ("trials", "prune_after"))]:
        raise StudioError(
            f"{folder} is a sweep that has begun; its {', '.join(changed)} cannot change, only its trials"
        )
    try:
        values, _ = read_mapping((folder / SETTINGS).read_text(encoding="utf-8"), str(folder / SETTINGS))
    except OSError as error:
        raise JobError(f"{folder} is no sweep: {SETTINGS} cannot be read ({error.strerror})") from None
    if not isinstance(values.get("recipe"), dict) or not (folder / JOURNAL).is_file():
        raise JobError(f"{folder} is no sweep that has begun: it needs {SETTINGS} with the whole recipe, and {JOURNAL}")
    return _planned(folder.absolute(), {**values, **wanted}, from_values(values["recipe"]))


def _planned(folder: Path, values: Mapping[str, Any], recipe: Recipe) -> SweepPlan:
    try:
        settings = SweepSettings.model_validate(values)
    except ValidationError as error:
        listed = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors())
        raise StudioError(f"the sweep cannot be used: {listed}") from None
    if not recipe.data.held_out:
        raise StudioError(
            "a sweep compares trials on held-out examples; set data.eval or data.eval_fraction in the recipe"
        )
    space = read_params(settings.params)
    if not space:
        raise StudioError(
            "a sweep varies something: give --param FIELD=RANGE, such as training.learning_rate=1e-4..1e-2:log"
        )
    if settings.sampler == "grid" and not all(isinstance(entry, Choices) for entry in space.values()):
        raise StudioError("the sampler grid needs lists alone; write the ranges as lists, or take tpe")
    if settings.metric not in METRICS and "/" not in settings.metric:
        raise StudioError(f"received the metric {settings.metric!r}; allowed: {', '.join(METRICS)}, or TASK/METRIC")
    if problem := unmeasured(recipe, settings.metric):
        raise StudioError(f"the sweep's metric is {settings.metric}, but {problem}")
    check_space(recipe, space)
    return SweepPlan(folder, settings, recipe, space)


def unmeasured(recipe: Recipe, metric: str) -> str | None:
    """Why no job of this recipe could measure the metric, as far as that is known without its rows; else None."""
    name, method = recipe.training.method, METHODS[recipe.training.method]
    task, slash, _ = metric.partition("/")
    if metric == "schema_valid" and recipe.evaluation.json_schema is None:
        return "evaluation.json_schema is not set"
    if task == "reward" and not method.samples:
        return f"training.method {name} has no rewards"
    if slash and task != "reward":
        return None if recipe.evaluation.tasks else "evaluation.tasks lists none"
    if metric.startswith(("preference_", "reference_")) and "preference" not in method.rows:
        return f"training.method {name} reads no pairs"
    if method.scores and metric not in ("preference_accuracy", "preference_margin"):
        return "a reward model writes no text; take preference_accuracy or preference_margin"
    return None
