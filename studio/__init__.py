"""MoE Studio: fine-tune Mixture-of-Experts models, experts and routers included.

    recipe.yaml ── load_recipe ──▶ Recipe ── make_plan ──▶ Plan ── submit ──▶ Job ──▶ adapter/ ── merge ──▶ model

The command line and the browser UI call the functions named here, and nothing else. Names are looked up on first
use, so that `import studio` loads neither torch nor pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from studio.combining import combine
    from studio.data.inspection import DataReport, inspect_data
    from studio.defaults import suggest
    from studio.errors import (
        AdapterFileError,
        CheckpointError,
        DataError,
        ExportError,
        GateError,
        JobError,
        LayoutError,
        OutputExistsError,
        Problem,
        ProblemsError,
        ProfileError,
        QuantizationError,
        RecipeError,
        RewardError,
        StudioError,
        TargetError,
        TrainingError,
        VerificationError,
    )
    from studio.evaluating import evaluate
    from studio.export_plan import ExportPlan, ExportRequest, plan_export
    from studio.exporting import consumers, export, formats, gguf_types, list_exports, read_export
    from studio.jobs import Job, JobState, list_jobs, open_job, submit
    from studio.lr_test import submit_lr_test
    from studio.merging import convert, merge
    from studio.plan import Plan, make_plan
    from studio.profile import find_profile, make_profile
    from studio.pushing import push
    from studio.recipe import Recipe, load_recipe, parse_recipe, recipe_schema, recipe_to_yaml
    from studio.routing_view import Heatmap, RoutingView, SourceCoverage, job_routing, plan_routing
    from studio.sweep import plan_sweep
    from studio.sweep_run import run_sweep
    from studio.verifying import verify

__version__ = "0.1.0"

__all__ = [
    "AdapterFileError",
    "CheckpointError",
    "DataError",
    "DataReport",
    "ExportError",
    "ExportPlan",
    "ExportRequest",
    "GateError",
    "Heatmap",
    "Job",
    "JobError",
    "JobState",
    "LayoutError",
    "OutputExistsError",
    "Plan",
    "Problem",
    "ProblemsError",
    "ProfileError",
    "QuantizationError",
    "Recipe",
    "RecipeError",
    "RewardError",
    "RoutingView",
    "SourceCoverage",
    "StudioError",
    "TargetError",
    "TrainingError",
    "VerificationError",
    "combine",
    "consumers",
    "convert",
    "evaluate",
    "export",
    "find_profile",
    "formats",
    "gguf_types",
    "inspect_data",
    "job_routing",
    "list_exports",
    "list_jobs",
    "load_recipe",
    "make_plan",
    "make_profile",
    "merge",
    "open_job",
    "parse_recipe",
    "plan_export",
    "plan_routing",
    "plan_sweep",
    "push",
    "read_export",
    "recipe_schema",
    "recipe_to_yaml",
    "run_sweep",
    "submit",
    "submit_lr_test",
    "suggest",
    "verify",
]

_HOMES = {
    "studio.combining": ("combine",),
    "studio.data.inspection": ("DataReport", "inspect_data"),
    "studio.defaults": ("suggest",),
    "studio.evaluating": ("evaluate",),
    "studio.export_plan": ("ExportPlan", "ExportRequest", "plan_export"),
    "studio.exporting": ("consumers", "export", "formats", "gguf_types", "list_exports", "read_export"),
    "studio.jobs": ("Job", "JobState", "list_jobs", "open_job", "submit"),
    "studio.lr_test": ("submit_lr_test",),
    "studio.merging": ("convert", "merge"),
    "studio.plan": ("Plan", "make_plan"),
    "studio.profile": ("find_profile", "make_profile"),
    "studio.pushing": ("push",),
    "studio.recipe": ("Recipe", "load_recipe", "parse_recipe", "recipe_schema", "recipe_to_yaml"),
    "studio.routing_view": ("Heatmap", "RoutingView", "SourceCoverage", "job_routing", "plan_routing"),
    "studio.sweep": ("plan_sweep",),
    "studio.sweep_run": ("run_sweep",),
    "studio.verifying": ("verify",),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'studio' has no attribute {name!r}")
    home = next((module for module, names in _HOMES.items() if name in names), "studio.errors")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
