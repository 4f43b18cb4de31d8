"""adapter.start_from: which adapter a recipe trains further, what it has, and whether it is for this base.

No torch, but for an adapter that no job of the studio made.

continued(recipe, base) ─▶ Continued      its directory, its placement, warnings
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters.errors import AdapterFileError, TargetError
from adapters.placement import LINEAR, Placement, dora_problem
from adapters.sidecar import check_base, read_sidecar
from studio.merging import adapter_directory
from studio.methods import METHODS
from studio.recipe import Recipe
from studio.weights import Base, expert_grid

WEIGHTS = ("adapter_model.safetensors", "compact_adapter.safetensors")


@dataclass(frozen=True)
class Continued:
    """An adapter to train further.

    Attributes:
        directory: of its files.
        placement: its ranks and its method, with the recipe's dropout.
        warnings: what has changed of the base since.
    """

    directory: Path
    placement: Placement
    warnings: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Its name and the hash of its weights: what a later reader knows it by."""
        with self._weights().open("rb") as file:
            return {"name": self.directory.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    def _weights(self) -> Path:
        return next(file for name in WEIGHTS if (file := self.directory / name).is_file())


def continued(recipe: Recipe, base: Base) -> Continued | None:
    """The adapter of `adapter.start_from`; None without one.

    Raises:
        AdapterFileError: there is none, it cannot be read, or it is of another base.
        TargetError: the recipe's router.mode or quantisation is not what the adapter needs.
    """
    if recipe.adapter.start_from is None:
        return None
    directory = adapter_directory(recipe.adapter.start_from)
    if not (directory / "adapter_config.json").is_file() or not any((directory / name).is_file() for name in WEIGHTS):
        raise AdapterFileError(
            f"adapter.start_from: {directory} holds no adapter_config.json and weights beside it; expected the "
            "directory of an adapter, or of a job that has ended well"
        )
    sidecar = read_sidecar(directory)
    warnings = check_base(sidecar, base.directory) if sidecar and base.directory else []
    placement = _placement(directory, base)
    _check(recipe, base, placement, (sidecar.held if sidecar else None) or {})
    method = replace(placement.method, dropout=recipe.adapter.dropout)
    return Continued(directory, replace(placement, method=method), tuple(warnings))


def _placement(directory: Path, base: Base) -> Placement:
    from studio.placing import read_placement

    if (directory / "placement.json").is_file():
        return read_placement(directory / "placement.json")
    from adapters.continuing import placement_of

    return placement_of(directory, base.layout)


def _check(recipe: Recipe, base: Base, placement: Placement, held: dict[str, Any] | Any) -> None:
    grid, mode = expert_grid(base), "full" if placement.router_full else "lora" if placement.router else "frozen"
    if placement.routed and [len(layer) for layer in placement.routed] != [grid.experts] * len(grid.layers):
        have = f"{len(placement.routed)} layers of {len(placement.routed[0])} experts"
        raise TargetError(
            f"adapter.start_from is an adapter for {have}, this base has {len(grid.layers)} of {grid.experts}"
        )
    if mode != recipe.router.mode:
        raise TargetError(
            f"adapter.start_from is an adapter whose routers are {mode}, and router.mode is {recipe.router.mode}; "
            f"set router.mode to {mode}"
        )
    if placement.method.start == "loftq":
        model = recipe.model.model_dump(mode="json")
        other = [name for name in ("quantization", "double_quant", "int8_experts") if held.get(name) != model[name]]
        if other:
            needs = ", ".join(f"{name}: {held.get(name)}" for name in other)
            raise TargetError(
                f"adapter.start_from began with what its quantisation lost (loftq) and is right on that alone; set "
                f"model.{needs}"
            )
    if placement.method.dora and (problem := dora_problem(placement, base.layout.peft_fuses)):
        raise TargetError(f"adapter.start_from: {problem}")


def differing_ranks(recipe: Recipe, placement: Placement) -> list[str]:
    """Where the ranks of the adapter are not those that the recipe says, which are not read."""
    routed = placement.routed_rank
    ranks = {**{name: getattr(placement, name) for name in LINEAR}, "routed_experts": routed}
    return [name for name, rank in ranks.items() if getattr(recipe.adapter, f"{name}_rank") != rank]


def reference_parameters(recipe: Recipe, trainable: int) -> int:
    """Parameters of the adapter that is held once more, as it began, for methods that compare with it."""
    beta = METHODS[recipe.training.method].beta
    return trainable if recipe.adapter.start_from and recipe.trl.get("beta", beta) else 0
