"""What a recipe says of the comparison of base and tuned model."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from studio.metrics import METRICS, Better
from studio.recipe_parts import InputPath, Settings
from studio.recipe_parts import absolute as _absolute
from studio.recipe_parts import refusal as _refusal


class GateRule(Settings):
    """A limit on how much worse a metric may get in training; past it the job fails, with its adapter kept."""

    metric: str
    """Its name: loss, perplexity, exact_match, json_valid, schema_valid, reward, …, or TASK/METRIC of a task."""

    max_drop: float | None = Field(default=None, ge=0)
    """Most that the metric may fall. Either this or max_rise."""

    max_rise: float | None = Field(default=None, ge=0)
    """Most that the metric may rise."""

    relative: bool = False
    """Whether the limit is a share of the value before."""

    against: Literal["base", "start"] = "base"
    """What the tuned model is held against: the base, or the adapter of adapter.start_from as it was given."""

    certain: bool = False
    """Whether the whole 95 % interval of the change must lie past the limit for the job to fail."""

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if (self.max_drop is None) == (self.max_rise is None):
            raise _refusal("a rule of the gate has one of max_drop and max_rise, and only one")
        if self.metric in METRICS and (problem := wrong_way(self, METRICS[self.metric].better)):
            raise _refusal(problem)
        return self


def wrong_way(rule: GateRule, better: Better) -> str | None:
    """What is wrong with a limit on a change for the better; None where it is on one for the worse."""
    given = "max_drop" if rule.max_rise is None else "max_rise"
    wanted = "max_rise" if better == "lower" else "max_drop"
    if given == wanted:
        return None
    return f"gate: {rule.metric} is better when it is {better}, so {given} would fail what got better; write {wanted}"


def _task(value: Any, info: ValidationInfo) -> Any:
    """A task of lm-eval: its name, or its file, whose path starts at the recipe."""
    return str(_absolute(value, info)) if isinstance(value, str) and value.endswith((".yaml", ".yml")) else value


TaskName = Annotated[str, BeforeValidator(_task), Field(min_length=1)]


class EvaluationSettings(Settings):
    """The comparison of base and tuned model on held-out examples."""

    examples: int | None = Field(default=200, ge=1)
    """Held-out examples for loss and exact match. null: all of them."""

    generations: int = Field(default=5, ge=0, le=1000)
    """Held-out examples whose answers are shown side by side, base and tuned."""

    max_new_tokens: int = Field(default=96, ge=1, le=65536)
    """Longest answer to generate, in tokens."""

    json_schema: InputPath | None = None
    """JSON Schema file that answers should fit. null: where all references are JSON, answers need only be JSON."""

    every_steps: int | None = Field(default=None, ge=1, le=100_000_000)
    """Optimizer steps between two held-out losses while training. null: none."""

    tasks: tuple[TaskName, ...] = ()
    """Tasks of lm-eval to run on base and tuned: names of tasks whose data are here, or YAML files of your own."""

    task_examples: int | None = Field(default=None, ge=1)
    """First examples of each task. null: all of them."""

    task_chat_template: bool = False
    """Whether the tasks' prompts are put into the model's chat template."""

    gate: tuple[GateRule, ...] = ()
    """Limits such as {metric: loss, max_rise: 0.05}: a job that is past one of them fails, with its adapter kept."""

    @field_validator("tasks", "gate", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _tasks_read_what_is_given(self) -> Self:
        given = [name for name in ("task_examples", "task_chat_template") if getattr(self, name)]
        if given and not self.tasks:
            raise _refusal(f"{', '.join(given)} is given, but tasks lists none; leave it out")
        return self

    @model_validator(mode="after")
    def _the_gate_asks_for_what_is_measured(self) -> Self:
        tasks = {Path(task).stem for task in self.tasks}
        for rule in self.gate:
            task, slash, _ = rule.metric.partition("/")
            if not slash and rule.metric not in METRICS:
                near = get_close_matches(rule.metric, METRICS, n=1)
                hint = f'; did you mean "{near[0]}"?' if near else ""
                raise _refusal(
                    f'gate: received the metric "{rule.metric}"; allowed: {", ".join(METRICS)}, or TASK/METRIC{hint}'
                )
            if slash and not tasks and task != "reward":  # reward/FUNCTION is of the section rewards
                raise _refusal(f'gate: "{rule.metric}" is a metric of the task {task}, but tasks lists none')
            if rule.metric == "schema_valid" and self.json_schema is None:
                raise _refusal("gate: schema_valid is measured with json_schema alone; set it")
        return self
