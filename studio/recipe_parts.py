"""What the sections of a recipe are made of: frozen settings, paths, and refusals in the studio's words."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo
from pydantic_core import PydanticCustomError

from studio.recipe_text import describe

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_DATA = re.compile(rf"hub:{HUB_ID.pattern}(:[\w.-]+)?")


class Settings(BaseModel):
    """A section of the recipe: frozen, no unknown keys, no silent conversions ("16" is not a number)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def refusal(message: str) -> PydanticCustomError:
    """A problem of one field, or of the section that raises it."""
    return PydanticCustomError("refused", "{message}", {"message": message})


def refused_keys(problems: dict[str, str]) -> PydanticCustomError:
    """Problems of several keys below the place that raises it, by key."""
    listed = "; ".join(f"{name}: {message}" for name, message in problems.items())
    return PydanticCustomError("refused_keys", "{message}", {"message": listed, "keys": problems})


def absolute(value: Any, info: ValidationInfo) -> Any:
    """A path text made absolute against the recipe's folder, or the working directory where there is none."""
    if not isinstance(value, str | Path):
        return value
    return as_path(str(value), (info.context or {}).get("folder") or Path.cwd())


def as_path(text: str, folder: Path) -> Path:
    if not text.strip() or not text.isprintable():
        raise refusal(f"received {describe(text)}; allowed: a path")
    return Path(os.path.abspath(folder / os.path.expanduser(text)))


def _absolute_or_hub(value: Any, info: ValidationInfo) -> Any:
    """As `absolute`; "hub:org/name:split" stays as it is."""
    if not str(value).startswith("hub:"):
        return absolute(value, info)
    if not HUB_DATA.fullmatch(str(value)):
        raise refusal(f'received {describe(str(value))}; allowed: "hub:org/name" or "hub:org/name:split"')
    return Path(str(value))


def _absolute_from_cwd(value: Any) -> Any:
    return as_path(str(value), Path.cwd()) if isinstance(value, str | Path) else value


DataPath = Annotated[Path, BeforeValidator(_absolute_or_hub)]
InputPath = Annotated[Path, BeforeValidator(absolute)]
OutputPath = Annotated[Path, BeforeValidator(_absolute_from_cwd)]
