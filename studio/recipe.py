"""The Recipe: what is wanted, validated and frozen, from one YAML file.

    recipe.yaml ── load_recipe ──▶ Recipe ── recipe_to_yaml ──▶ the same recipe, complete and with absolute paths

Its sections are in recipe_model.py, recipe_data.py, recipe_training.py and recipe_evaluation.py, the only places where
a default is written. Each field's docstring is the one text that the command line, the form in the browser, the JSON
Schema and the docs show.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, Self

from pydantic import (
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.representer import RoundTripRepresenter

from adapters.placement import PLACEMENTS, Method, Placement, dora_problem
from studio.errors import Problem, RecipeError
from studio.methods import METHODS, readers_of
from studio.preference_losses import preference_problems
from studio.recipe_data import DataSettings
from studio.recipe_evaluation import EvaluationSettings
from studio.recipe_mixture import training_problems
from studio.recipe_model import AdapterSettings, ModelSettings, PlacementSettings, RouterSettings, readers
from studio.recipe_parts import OutputPath, Settings, refused_keys
from studio.recipe_problems import problems_of
from studio.recipe_text import read_mapping
from studio.recipe_training import PreferenceSettings, RewardSettings, SamplingSettings, TrainingSettings
from studio.trl_options import trl_problem


def _refused_section(name: str, message: str) -> PydanticCustomError:
    return refused_keys({name: message})


class OutputSettings(Settings):
    """Where the job and its adapter go."""

    dir: OutputPath
    """The job directory, made when the job is submitted. A relative path starts at the working directory."""


class Recipe(Settings):
    """A fine-tuning job as it is wanted."""

    model: ModelSettings = ModelSettings()
    data: DataSettings
    adapter: AdapterSettings = AdapterSettings()
    placement: PlacementSettings = PlacementSettings()
    router: RouterSettings = RouterSettings()
    training: TrainingSettings = TrainingSettings()
    preference: PreferenceSettings = PreferenceSettings()
    rewards: tuple[RewardSettings, ...] = ()
    """What completions that the model writes are rewarded for, such as [{"function": "exact_match"}]."""

    sampling: SamplingSettings = SamplingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    trl: dict[str, JsonValue] = Field(default_factory=dict)
    """Any further option of the method's class in TRL, by its TRL name, such as {"neftune_noise_alpha": 5}."""

    output: OutputSettings

    @model_validator(mode="after")
    def _held_out_metrics_have_examples(self) -> Self:
        evaluation = self.evaluation
        asked = [f"gate ({rule.metric})" for rule in evaluation.gate if "/" not in rule.metric]
        asked += [name for name in ("json_schema", "every_steps") if getattr(evaluation, name) is not None]
        if asked and self.data.eval is None and self.data.eval_fraction is None:
            needed = "needs held-out examples; set data.eval or data.eval_fraction"
            raise _refused_section("evaluation", f"{', '.join(asked)} {needed}")
        if evaluation.every_steps and METHODS[self.training.method].scores:
            raise _refused_section("evaluation", "every_steps measures a loss of text, and a reward model writes none")
        return self

    @model_validator(mode="after")
    def _something_is_trained(self) -> Self:
        rule, adapter = PLACEMENTS[self.placement.rule], self.adapter
        if adapter.start_from:  # the ranks are those of that adapter
            return self
        if adapter.dense_mlp_rank and "dense_mlp" not in rule.joins:
            problem = f"dense_mlp_rank is not 0, but placement.rule {self.placement.rule} adapts no dense MLP"
            raise _refused_section("adapter", problem)
        ranks = [getattr(adapter, f"{name}_rank") for name in rule.joins]
        routed = adapter.routed_experts_rank if "rank" in rule.settings else "parameters" in rule.settings
        if not any((*ranks, routed)) and self.router.mode == "frozen":
            raise _refused_section(
                "adapter",
                "every rank that placement.rule reads is 0, nothing would be trained; set at least one rank above 0",
            )
        if "rank" in rule.settings and not routed and self.placement.rule != "all_experts":
            raise _refused_section(
                "adapter",
                f"routed_experts_rank is 0, but placement.rule {self.placement.rule} chooses experts; "
                "set it above 0, or the rule to shared",
            )
        return self

    @model_validator(mode="after")
    def _the_method_reads_what_is_given(self) -> Self:
        if problems := preference_problems(self.training.method, self.preference):
            raise PydanticCustomError(
                "refused_keys",
                "{message}",
                {"message": "; ".join(problems.values()), "keys": {f"preference.{k}": v for k, v in problems.items()}},
            )
        training = self.training
        if training.method != "sft" and training.loss_on != "completion":
            raise _refused_section("training", f"loss_on is read by sft alone, and the method is {training.method}")
        if training.method == "kto" and training.batch_size == 1:
            raise _refused_section(
                "training", "batch_size is 1, but kto estimates the KL from other rows of the batch: 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _data_go_with_the_training(self) -> Self:
        if problems := training_problems(self):
            raise refused_keys({f"data.{name}": message for name, message in problems.items()})
        return self

    @model_validator(mode="after")
    def _the_method_fits(self) -> Self:
        adapter = self.adapter
        if adapter.init == "loftq" and self.model.quantization == "none":
            lost = "init is loftq, but model.quantization is none: nothing was lost; set init to zero or pissa"
            raise _refused_section("adapter", lost)
        if adapter.dropout and self.training.method == "rloo":
            dropped = (
                "dropout is not 0, and rloo compares how probable whole answers were and are, which dropout changes by "
                "itself; set it to 0, or take grpo, which compares token by token"
            )
            raise _refused_section("adapter", dropped)
        if adapter.dora and (problem := dora_problem(self._wanted())):
            raise _refused_section("adapter", problem)
        return self

    def _wanted(self) -> Placement:
        """The classes and the method that are asked for, as far as they are known without a model."""
        rule, adapter = PLACEMENTS[self.placement.rule], self.adapter
        routed = adapter.routed_experts_rank if "rank" in rule.settings else int("parameters" in rule.settings)
        return Placement(
            **{name: getattr(adapter, f"{name}_rank") for name in rule.joins},
            routed=((routed,),) if routed else (),
            router=int(self.router.mode != "frozen"),
            method=Method(rslora=adapter.rslora, dora=adapter.dora, start=adapter.init, dropout=adapter.dropout),
        )

    @field_validator("rewards", mode="before")
    @classmethod
    def _rewards_are_a_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _rewards_and_the_method_fit(self) -> Self:
        method, samples = self.training.method, METHODS[self.training.method].samples
        if samples and not self.rewards:
            raise _refused_section(
                "rewards", f"training.method {method} needs a reward, such as [{{function: exact_match}}]"
            )
        if self.rewards and not samples:
            readers = ", ".join(name for name, entry in METHODS.items() if entry.samples)
            raise _refused_section("rewards", f"given, but training.method is {method}; rewards are read by {readers}")
        if method in ("grpo", "rloo"):
            batch = self.training.batch_size * self.training.gradient_accumulation_steps
            if batch % self.sampling.completions:
                raise _refused_section(
                    "training",
                    f"batch_size times gradient_accumulation_steps is {batch} completions a step; allowed: a multiple "
                    f"of sampling.completions, {self.sampling.completions}, so that each prompt has all of its own",
                )
        return self

    @field_validator("trl")
    @classmethod
    def _options_exist_in_trl(cls, options: dict[str, JsonValue], info: ValidationInfo) -> dict[str, JsonValue]:
        method = info.data["training"].method if "training" in info.data else "sft"  # absent where it has problems
        found = {name: message for name, value in options.items() if (message := trl_problem(name, value, method))}
        if found:
            listed = "; ".join(f"{name}: {message}" for name, message in found.items())
            raise PydanticCustomError("refused_keys", "{message}", {"message": listed, "keys": found})
        return options


def load_recipe(path: Path | str) -> Recipe:
    """The recipe in the YAML file at `path`.

    Raises:
        RecipeError: the file cannot be read, or anything in it is not allowed; all problems together.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise RecipeError([Problem("", None, f"cannot be read: {reason}", str(path))]) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise RecipeError([Problem("", line, "is not UTF-8 text", str(path))]) from None
    return parse_recipe(text, path)


def parse_recipe(text: str, source: Path | None = None) -> Recipe:
    """The recipe that the YAML `text` says; relative data paths start at the folder of `source`.

    Raises:
        RecipeError: anything in it is not allowed; all problems together, each with its line.
    """
    file = str(source) if source else None
    values, marked = read_mapping(text, file)
    folder = Path(os.path.abspath(source)).parent if source else Path.cwd()
    try:
        return Recipe.model_validate(values, context={"folder": folder})
    except ValidationError as error:
        raise RecipeError(problems_of(error, marked, recipe_schema(), file)) from None


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe, for editors and for the form in the browser.

    A field that another one switches on says so as "x-read-when": {"placement.rule": ["budget"]}.
    """
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
    for section, name, switch, values in _switched():
        schema["$defs"][section]["properties"][name]["x-read-when"] = {switch: list(values)}
    return schema


def _switched() -> Iterator[tuple[str, str, str, Sequence[Any]]]:
    """(section class, field, the field that switches it on, its values that do)."""
    for name, rules in readers().items():
        yield "PlacementSettings", name, "placement.rule", rules
    for name in ("attention", "shared_expert", "dense_mlp"):
        joined = [rule for rule, entry in PLACEMENTS.items() if name in entry.joins]
        yield "AdapterSettings", f"{name}_rank", "placement.rule", joined
    ranked = [rule for rule, entry in PLACEMENTS.items() if "rank" in entry.settings]
    yield "AdapterSettings", "routed_experts_rank", "placement.rule", ranked
    yield "RouterSettings", "rank", "router.mode", ("lora",)
    for name in PreferenceSettings.model_fields:
        yield "PreferenceSettings", name, "training.method", readers_of(name)
    yield "TrainingSettings", "loss_on", "training.method", ("sft",)
    for name in RouterSettings.model_fields:
        if name.endswith("_coef"):
            yield "RouterSettings", name, "router.mode", ("lora", "full")
        if name.startswith(("probe_", "warn_", "stop_")):
            yield "RouterSettings", name, "router.watch", (True,)
    sampling = tuple(name for name, entry in METHODS.items() if entry.samples)
    for name in SamplingSettings.model_fields:
        alone = name in ("threshold", "keep", "rounds")
        yield "SamplingSettings", name, "training.method", ("rejection",) if alone else sampling


def recipe_to_yaml(recipe: Recipe) -> str:
    """YAML text with every field of `recipe`, which `parse_recipe` reads back to an equal recipe."""
    stream = StringIO()
    yaml = YAML()
    yaml.Representer = _ExplicitNull
    yaml.width = 10_000  # one line per value
    values = recipe.model_dump(mode="json")
    if isinstance(experts := recipe.placement.experts, dict):
        values["placement"]["experts"] = {layer: list(ids) for layer, ids in experts.items()}  # JSON's keys are text
    yaml.dump(values, stream)
    return stream.getvalue()


class _ExplicitNull(RoundTripRepresenter):
    """Writes null as `null`, where ruamel writes nothing."""


_ExplicitNull.add_representer(type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null"))
