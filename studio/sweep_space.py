"""What a sweep varies: fields of the recipe, each over a range or a list. No torch, no optuna.

1e-4..1e-2:log      a range of numbers, searched by its logarithm
4..64:step=4        a range of whole numbers
4,8,16              a list of values, as YAML reads them
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from ruamel.yaml import YAML

from studio.errors import Problem, RecipeError
from studio.recipe import Recipe, parse_recipe, recipe_to_yaml
from studio.recipe_text import describe, plain

HOW = "allowed: a range as 1e-4..1e-2, with :log or :step=N after it, or a list as 4,8,16"


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; whole ones where both are."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def ends(self) -> tuple[Any, ...]:
        return (self.low, self.high)

    def holds(self, value: Any) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not self.low <= value <= self.high or (self.whole and value != int(value)):
            return False
        return self.step is None or math.isclose((value - self.low) % self.step, 0, abs_tol=1e-12)

    def as_json(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "log": self.log, "step": self.step}


@dataclass(frozen=True)
class Choices:
    """A list of values."""

    values: tuple[Any, ...]

    def ends(self) -> tuple[Any, ...]:
        return self.values

    def holds(self, value: Any) -> bool:
        return value in self.values

    def as_json(self) -> dict[str, Any]:
        return {"choices": list(self.values)}


Space = dict[str, Range | Choices]


def read_params(given: Mapping[str, Any]) -> Space:
    """The space that {field: text or list} describes.

    Raises:
        RecipeError: everything in it that is no range and no list.
    """
    space: Space = {}
    problems = []
    for field, value in given.items():
        try:
            space[field] = _parsed(value)
        except ValueError as error:
            problems.append(Problem(field, None, f"received {describe(value)}; {error}", "the sweep's parameters"))
    if problems:
        raise RecipeError(problems)
    return space


def split_param(text: str) -> tuple[str, str]:
    """ "training.learning_rate=1e-4..1e-2" → its two sides.

    Raises:
        RecipeError
    """
    field, sign, value = text.partition("=")
    if not sign or not field.strip() or not value.strip():
        message = (
            f"received {describe(text)}; allowed: FIELD=RANGE or FIELD=LIST, as training.learning_rate=1e-4..1e-2:log"
        )
        raise RecipeError([Problem("", None, message, "the sweep's parameters")])
    return field.strip(), value.strip()


def _parsed(value: Any) -> Range | Choices:
    if isinstance(value, list):
        return _choices(value)
    if not isinstance(value, str):
        raise ValueError(HOW)
    if ".." not in value:
        return _choices(plain(YAML(typ="safe").load(f"[{value}]")))
    ends, *options = value.split(":")
    low_text, _, high_text = ends.partition("..")
    low, high = _number(low_text), _number(high_text)
    if not (isinstance(low, int) and isinstance(high, int)):
        low, high = float(low), float(high)
    log, step = False, None
    for option in options:
        if option == "log":
            log = True
        elif option.startswith("step="):
            step = _number(option.removeprefix("step="))
        else:
            raise ValueError(HOW)
    if low >= high or (log and (low <= 0 or step is not None)) or (step is not None and step <= 0):
        raise ValueError("allowed: the lower end first; with :log both above 0 and no step")
    return Range(low, high, log, step)


def _choices(values: list[Any]) -> Choices:
    if not values or any(isinstance(value, dict | list) for value in values) or len(set(values)) < len(values):
        raise ValueError(f"{HOW}, each value once")
    return Choices(tuple(values))


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        pass
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(HOW)
    return number


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with other values in some fields.

    Raises:
        RecipeError: a field that there is not, or a recipe that is not allowed.
    """
    whole = as_values(recipe)
    for field, value in values.items():
        section, _, name = field.rpartition(".")
        if section not in whole or not isinstance(whole[section], dict):
            raise RecipeError(
                [Problem(field, None, f"no such field; allowed: SECTION.FIELD of a recipe, such as {_near(field)}")]
            )
        whole[section][name] = value
    training = whole["training"]
    for name, other in (("training.max_steps", "epochs"), ("training.epochs", "max_steps")):
        if name in values:
            training[other] = None
    return from_values(whole)


def as_values(recipe: Recipe) -> dict[str, Any]:
    """The whole recipe as plain values, which `from_values` reads back."""
    values: dict[str, Any] = plain(YAML(typ="safe").load(recipe_to_yaml(recipe)))
    return values


def from_values(values: Mapping[str, Any]) -> Recipe:
    """The recipe that the values say.

    Raises:
        RecipeError
    """
    text = StringIO()
    YAML().dump(dict(values), text)
    return parse_recipe(text.getvalue())


def check_space(recipe: Recipe, space: Space) -> None:
    """Refuses a space with an end, or a value of a list, that the recipe does not allow.

    Raises:
        RecipeError
    """
    problems: list[Problem] = []
    for field, values in space.items():
        for value in values.ends():
            try:
                with_values(recipe, {field: value})
            except RecipeError as error:
                found = [
                    Problem(field, None, f"with {value}: {each.message}", "the sweep's parameters")
                    for each in error.problems
                ]
                problems += [problem for problem in found if problem not in problems]
    if problems:
        raise RecipeError(problems)


def value_of(recipe: Recipe, field: str) -> Any:
    """What the recipe has in `field`, as JSON; None for an option of `trl` that it does not set."""
    section, _, name = field.rpartition(".")
    return recipe.model_dump(mode="json")[section].get(name)


def _near(field: str) -> str:
    from difflib import get_close_matches

    fields = [
        f"{section}.{name}"
        for section, inner in Recipe.model_fields.items()
        for name in getattr(inner.annotation, "model_fields", ())
    ]
    near: Sequence[str] = get_close_matches(field, fields, n=1, cutoff=0.3) or ["training.learning_rate"]
    return near[0]
