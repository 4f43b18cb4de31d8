"""What a recipe says of its data."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import (
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from studio.data.formats import COLUMNS
from studio.recipe_mixture import DataSource, MixturePhase, Sources, mixture_problems
from studio.recipe_parts import DataPath, Settings, refused_keys
from studio.recipe_parts import refusal as _refusal


class DataSettings(Settings):
    """The data: JSON Lines, JSON, CSV, TSV, Parquet, an Arrow directory, a folder of text, or a hub's data set."""

    train: Sources
    """File or folder of training rows, or "hub:org/name:split", or a list of sources {path, weight, name} that are
    mixed. A relative path starts at the recipe file."""

    eval: DataPath | None = None
    """The same of held-out rows, for the comparison before and after. null: no comparison."""

    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "alpaca",
        "prompt_completion",
        "preference",
        "preference_implicit",
        "kto",
        "prompt",
        "text",
    ] = "auto"
    """What the rows look like. auto: each row is recognised by its columns; `studio data inspect` says as what."""

    columns: dict[str, str] = Field(default_factory=dict)
    """Columns with other names, as {ours: theirs}, such as {"prompt": "ask", "completion": "reply"}."""

    bad_rows: Literal["refuse", "drop"] = "refuse"
    """Rows that cannot be trained on: refuse the file, or drop them, counted and listed in dropped_rows.jsonl."""

    max_length_tokens: int = Field(default=256, ge=16, le=1_048_576)
    """Examples are cut to this many tokens. Memory for activations grows with it."""

    temperature: float | None = Field(default=None, gt=0, le=1000)
    """Sources without weights share the rows by size^(1/temperature): 1 as they are, larger evens out. null: 1."""

    phases: tuple[MixturePhase, ...] = Field(default=(), strict=False)
    """A curriculum: [{until_steps: 100, weights: {name: 1}}, …, {weights: {…}}]. []: one mixture throughout."""

    eval_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of the training rows that is held out instead of a file `eval`; rows with one prompt stay together."""

    leakage: Literal["warn", "refuse", "off"] = "warn"
    """What happens where held-out rows occur in the training data, as they are or nearly. off: nobody looks."""

    drop_easiest: float = Field(default=0.0, ge=0, lt=1)
    """Share of each source's rows that is left out: those with the least loss of the base. 0: none. Needs
    `studio data score`."""

    drop_hardest: float = Field(default=0.0, ge=0, lt=1)
    """The same of the rows with the largest loss, often broken ones. 0: none."""

    streaming: bool = False
    """Read rows while training, through a shuffle buffer, for data larger than memory. Needs training.max_steps."""

    @model_validator(mode="after")
    def _settings_go_together(self) -> Self:
        if problems := mixture_problems(self):
            raise refused_keys(problems)
        return self

    @property
    def mixed(self) -> bool:
        """Whether `train` lists sources, so that the order of the rows is planned."""
        return not isinstance(self.train, Path)

    @property
    def ordered(self) -> bool:
        """Whether trainers read the rows in an order that is fixed before they start."""
        return self.mixed or self.streaming

    @property
    def sources(self) -> tuple[DataSource, ...]:
        return (DataSource(path=self.train),) if isinstance(self.train, Path) else self.train

    @property
    def held_out(self) -> bool:
        """Whether there are rows to be measured on."""
        return self.eval is not None or self.eval_fraction is not None

    @field_validator("columns")
    @classmethod
    def _columns_are_ours(cls, columns: dict[str, str]) -> dict[str, str]:
        allowed = f"unknown; the studio's name is on the left, the file's on the right. Allowed: {', '.join(COLUMNS)}"
        known = {name: allowed for name in columns if name not in COLUMNS}
        empty = {name: "received an empty name; allowed: a column of the file" for name in columns if not columns[name]}
        if found := {**empty, **known}:
            listed = "; ".join(f"{name}: {message}" for name, message in found.items())
            raise PydanticCustomError("refused_keys", "{message}", {"message": listed, "keys": found})
        if twice := sorted({theirs for theirs in columns.values() if list(columns.values()).count(theirs) > 1}):
            raise _refusal(f"received {', '.join(twice)} for several columns; allowed: each column of the file once")
        return columns
