"""Several sources of training data in a recipe, and the phases in which their mixture changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from studio.data.files import source_name
from studio.methods import METHODS
from studio.recipe_parts import DataPath, Settings, refusal

if TYPE_CHECKING:
    from studio.recipe import Recipe
    from studio.recipe_data import DataSettings

Weight = Annotated[float, Field(ge=0, le=1_000_000)]
LONGEST_NAME = 60
RESERVED_NAMES = ("all", "all sources")
ONE_FILE, SEVERAL = "one file", "several sources"


class DataSource(Settings):
    """One source of a mixture."""

    path: DataPath
    """The file, as for `data.train`. A relative path starts at the recipe file."""

    weight: Weight | None = None
    """Its part of the rows that are trained on, beside the other sources' weights. null: by its size."""

    name: str | None = Field(default=None, min_length=1, max_length=LONGEST_NAME)
    """What plans, profiles and `data.phases` call it. null: the file's name without its endings."""

    @field_validator("name")
    @classmethod
    def _name_can_be_shown(cls, value: str | None) -> str | None:
        if value is not None and (not value.isprintable() or value != value.strip() or value in RESERVED_NAMES):
            raise refusal(f'received "{value}"; allowed: printable text without spaces at its ends, but not "all"')
        return value

    @property
    def label(self) -> str:
        return (self.name or source_name(self.path))[:LONGEST_NAME]


class MixturePhase(Settings):
    """A stretch of the training with a mixture of its own."""

    until_steps: int | None = Field(default=None, ge=1)
    """The optimizer step after which the next phase begins. null: by tokens, or at the end of the training."""

    until_tokens: int | None = Field(default=None, ge=1)
    """The tokens read, counted from the start of the training, after which the next phase begins."""

    weights: dict[str, Weight]
    """Weight of each source in this phase, by its name; a source that is left out gives no rows."""

    @model_validator(mode="after")
    def _has_rows_and_one_end(self) -> MixturePhase:
        if not any(self.weights.values()):
            raise refusal("every weight is 0: the phase would have no rows")
        if self.until_steps is not None and self.until_tokens is not None:
            raise refusal("until_steps and until_tokens are both given; one of them ends the phase")
        return self


def _form(value: Any) -> str:
    return SEVERAL if isinstance(value, list | tuple) else ONE_FILE


Sources = Annotated[
    Annotated[DataPath, Tag(ONE_FILE)] | Annotated[tuple[DataSource, ...], Tag(SEVERAL), Field(strict=False)],
    Discriminator(_form),
]
"""A path, or a list of sources."""


def mixture_problems(data: DataSettings) -> dict[str, str]:
    """What of the section `data` does not go together, by key."""
    return {**_of_sources(data), **_of_phases(data), **_of_selection(data)}


def _of_sources(data: DataSettings) -> dict[str, str]:
    if not data.mixed:
        alone = {"temperature": data.temperature is not None, "phases": bool(data.phases)}
        return {name: "is read where train lists several sources" for name, given in alone.items() if given}
    if not data.sources:
        return {"train": "is an empty list; name at least one source, such as {path: rows.jsonl}"}
    names = Counter(source.label for source in data.sources)
    if twice := [name for name, count in names.items() if count > 1]:
        return {"train": f"two sources are called {twice[0]}; give each a name of its own"}
    weighted = [source for source in data.sources if source.weight is not None]
    if weighted and len(weighted) < len(data.sources):
        return {"train": "some sources have a weight and some none; give one to all, or to none"}
    if weighted and not any(source.weight for source in weighted):
        return {"train": "every weight is 0: there would be no rows"}
    if data.temperature is not None and (weighted or data.phases):
        return {"temperature": "mixes by size; leave it out where sources or phases have weights"}
    if data.phases and weighted:
        return {"phases": "have weights of their own; leave those of the sources out"}
    if data.streaming and len(data.sources) > 1 and not weighted and not data.phases:
        return {"streaming": "reads no file to its end, so sizes are not known; give each source a weight"}
    return {}


def _of_phases(data: DataSettings) -> dict[str, str]:
    phases = data.phases
    names = [source.label for source in data.sources] if data.mixed else []
    unknown = [name for phase in phases for name in phase.weights if name not in names]
    if not phases or not data.mixed:
        return {}
    if unknown:
        return {"phases": f"{unknown[0]} is no source; the sources are {', '.join(names)}"}
    if phases[-1].until_steps is not None or phases[-1].until_tokens is not None:
        return {"phases": "the last phase goes on to the end of the training: leave its until_steps and until_tokens"}
    ends = [phase.until_steps or 0 for phase in phases[:-1]], [phase.until_tokens or 0 for phase in phases[:-1]]
    if not any(all(of_kind) for of_kind in ends):
        return {"phases": "each phase but the last needs until_steps, or each until_tokens"}
    given = next(of_kind for of_kind in ends if all(of_kind))
    if any(later <= earlier for earlier, later in pairwise(given)):
        return {"phases": f"each phase ends after the one before it, received {', '.join(map(str, given))}"}
    return {}


def _of_selection(data: DataSettings) -> dict[str, str]:
    if data.eval is not None and data.eval_fraction is not None:
        return {"eval_fraction": "is given, and so is eval; held-out rows come from one of them"}
    if data.drop_easiest + data.drop_hardest >= 1:
        return {"drop_hardest": "drop_easiest and drop_hardest together leave no row"}
    if data.streaming and data.bad_rows == "drop":
        return {"bad_rows": "rows of a stream are seen only while it trains, so that nothing lists the dropped ones"}
    if data.streaming:
        whole = ("eval_fraction", "drop_easiest", "drop_hardest")
        given = [name for name in whole if getattr(data, name)]
        return dict.fromkeys(given, "needs all rows at once; with streaming prepare the files beforehand")
    return {}


def training_problems(recipe: Recipe) -> dict[str, str]:
    """What of the section `data` does not go with the section `training` or `trl`, by key."""
    data, packing = recipe.data, bool(recipe.trl.get("packing"))
    method = recipe.training.method
    problems = {}
    if data.phases and packing:
        problems["phases"] = "trl.packing puts several rows into one sequence, so that steps have no fixed rows"
    if data.streaming and recipe.training.max_steps is None:
        problems["streaming"] = "has no end that an epoch could be counted by; set training.max_steps"
    if data.streaming and not METHODS[method].streams:
        able = ", ".join(name for name, entry in METHODS.items() if entry.streams)
        problems["streaming"] = f"is read by {able}; TRL's trainer for {method} needs all rows before its first step"
    if data.streaming and recipe.trl.get("precompute_ref_log_probs"):
        problems["streaming"] = "knows no rows before it trains; leave trl.precompute_ref_log_probs out"
    if data.ordered and (taken := _taken(recipe.trl)):
        problems["train"] = f"the mixture fixes the order of the rows; leave trl.{taken[0]} out"
    return problems


def _taken(options: Mapping[str, Any]) -> Sequence[str]:
    """Options of TRL that set the order of the rows."""
    return [name for name in ("train_sampling_strategy", "shuffle_dataset") if options.get(name)]
