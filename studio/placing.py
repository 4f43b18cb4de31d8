"""Recipe → Placement: the recipe's rule, and what the router did with the data, give each expert its rank. No torch.

plan_placement(recipe, base, profile) ─▶ Placement
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.checkpoint import read_json_object
from adapters.errors import AdapterFileError, ProfileError, TargetError
from adapters.layouts import ExpertLayout
from adapters.placement import LINEAR, PLACEMENTS, STARTS, TRAINING_BYTES, Method, Placement, Ranks, dora_problem
from studio.recipe import Recipe
from studio.recipe_model import FRACTION_UNSET, P_UNSET, RouterSettings
from studio.starting import continued
from studio.weights import Base, expert_grid, trainable_parameters

if TYPE_CHECKING:
    from adapters.router_profile import RouterProfile

VERSION = 1
ADAMW_BYTES = 8
"""AdamW's two moments of a parameter, in float32."""


def needs_profile(recipe: Recipe) -> bool:
    """Whether the recipe's rule chooses by a router profile."""
    return PLACEMENTS[recipe.placement.rule].score is not None


def plan_placement(recipe: Recipe, base: Base, profile: RouterProfile | None = None) -> Placement:
    """The recipe's adapter, placement and router sections as a placement on this model.

    Args:
        profile: of this base and data, for a rule that needs one.

    Raises:
        TargetError: a class with a rank that no tensor of the model belongs to, a layer or an expert that does not
            exist, a budget that is too small, something in the section router that this model cannot have.
        ProfileError: the rule needs a profile and there is none, or it is of another model.
    """
    if profile is not None:
        _check_profile(profile, base)
    going_on = continued(recipe, base)
    placement = going_on.placement if going_on else _chosen(recipe, base, profile)
    _check_classes(placement, base)
    check_router(recipe.router, base.layout, base.experts, base.config)
    return placement


def _chosen(recipe: Recipe, base: Base, profile: RouterProfile | None) -> Placement:
    adapter, router, joins = recipe.adapter, recipe.router, PLACEMENTS[recipe.placement.rule].joins
    placement = Placement(
        **{name: getattr(adapter, f"{name}_rank") for name in joins},
        router=router.rank if router.mode == "lora" else 0,
        routed=_routed(recipe, base, profile),
        alpha=adapter.alpha,
        router_full=router.mode == "full",
        method=Method(rslora=adapter.rslora, dora=adapter.dora, start=adapter.init, dropout=adapter.dropout),
    )
    if adapter.dora and (problem := dora_problem(placement, base.layout.peft_fuses)):
        raise TargetError(f"adapter: {problem}")
    return placement


def check_router(router: RouterSettings, layout: ExpertLayout, experts: int, config: Mapping[str, Any]) -> None:
    """Refuses losses and rules on the routing that could do nothing on this model.

    Args:
        experts: routed experts of a layer, 0 for a dense model. config: of the language model.

    Raises:
        TargetError
    """
    asked = {
        name: value
        for name, value in router.model_dump().items()
        if (value and name.endswith("_coef")) or (value is not None and name.startswith(("warn_", "stop_")))
    }
    if asked and not experts:
        raise TargetError(
            f"router.{', router.'.join(asked)} is set, but this {layout.model_type} model has no routed experts; "
            "leave it out"
        )
    for name in ("warn_entropy", "stop_entropy"):
        if name in asked:
            _check_entropy(f"router.{name}", asked[name], experts, layout.top_k, config.get(layout.top_k))


def _check_entropy(name: str, limit: float, experts: int, key: str, top_k: Any) -> None:
    """The entropy is least where the same experts get every token; by the layer with the fewest of them."""
    fewest = min(top_k, default=0) if isinstance(top_k, list) else top_k
    if type(fewest) is not int or fewest < 1:
        raise TargetError(
            f"{name} is set, but config.json: {key} is {top_k!r}; expected the experts of a token, from 1"
        )
    if fewest >= experts:
        raise TargetError(
            f"{name} is set, but cannot work on this model: each token goes to {fewest} of {experts} experts, so the "
            "load is always even; leave it out"
        )
    least = math.log(fewest) / math.log(experts)
    if limit <= least:
        raise TargetError(
            f"{name} is {limit:g}, which is never reached: each token goes to {fewest} of {experts} experts, so the "
            f"relative load entropy is {least:.3g} at least; allowed: above {least:.3g}"
        )


def coverage(placement: Placement, profile: RouterProfile) -> dict[str, float]:
    """The share of the routed (token, expert) pairs that adapted experts get, mean over the layers: of "all" the data,
    and of each source. Shared experts see every token and are not counted."""

    def covered(source: str | None) -> float:
        shares = profile.share(source).tolist()
        pairs = zip(shares, placement.routed, strict=False)  # no routed adapters: no ranks
        return sum(share for layer, ranks in pairs for share, rank in zip(layer, ranks, strict=True) if rank) / len(
            shares
        )

    return {"all": covered(None), **{source: covered(source) for source in profile.sources}}


def placement_record(
    recipe: Recipe, base: Base, placement: Placement, profile: RouterProfile | None = None
) -> dict[str, Any]:
    """What placement.json holds: what was chosen, by which rule, from which profile."""
    rule, settings, trained = (
        PLACEMENTS[recipe.placement.rule],
        _settings(recipe),
        trainable_parameters(base, placement),
    )
    made_from, going_on = None, continued(recipe, base)
    if profile:
        seen = {"base": profile.base, "data": profile.data, "tokens": int(profile.tokens.sum()), "seed": profile.seed}
        made_from = {**seen, "sources": list(profile.sources), "shared_experts": profile.shared_experts}
    return {
        "version": VERSION,
        "rule": "start_from" if going_on else recipe.placement.rule,
        "settings": {} if going_on else {key: settings[key] for key in rule.settings},
        "start_from": going_on.record() if going_on else None,
        "profile": made_from,
        "layers": list(expert_grid(base).layers),
        "routed": [list(layer) for layer in placement.routed],
        "alpha": placement.alpha,
        **{name: getattr(placement, name) for name in LINEAR},
        "router": {"mode": recipe.router.mode, "rank": placement.router},
        "method": asdict(placement.method),
        "coverage": coverage(placement, profile) if profile else None,
        "trainable_parameters": trained,
        "optimizer_bytes": ADAMW_BYTES * sum(trained.values()),
    }


def read_placement(path: Path) -> Placement:
    """The placement in the file that holds a `placement_record`.

    Raises:
        AdapterFileError: no such file, or not such a record.
    """
    record = read_json_object(path, AdapterFileError)
    if record.get("version") != VERSION:
        raise AdapterFileError(
            f"{path} is no placement of version {VERSION}: received version {record.get('version')!r}"
        )
    try:
        return Placement(
            **{name: _rank(record[name]) for name in LINEAR},
            router=_rank(record["router"]["rank"]),
            routed=tuple(tuple(_rank(rank) for rank in layer) for layer in record["routed"]),
            alpha=float(record["alpha"]),
            router_full=record["router"]["mode"] == "full",
            method=_method(record.get("method", {})),  # absent from the records of older jobs
        )
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{path} is no placement: {type(error).__name__} {error}") from None


def _method(record: Mapping[str, Any]) -> Method:
    method = Method(**record)
    if method.start not in STARTS:
        raise ValueError(f"start {method.start!r}")
    return method


def _rank(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no rank")
    return value


def _routed(recipe: Recipe, base: Base, profile: RouterProfile | None) -> Ranks:
    name, rule = recipe.placement.rule, PLACEMENTS[recipe.placement.rule]
    if name != "all_experts" and rule.settings and not base.moe:
        raise TargetError(
            f"placement.rule {name} chooses routed experts, but this {base.layout.model_type} model has none; "
            "allowed: attention, or all_experts with adapter.routed_experts_rank 0"
        )
    scores = [_scores(recipe, rule.score, base, profile)] if rule.score else []
    settings = _settings(recipe)
    return rule.choose(expert_grid(base), *scores, **{key: settings[key] for key in rule.settings})


def _check_profile(profile: RouterProfile, base: Base) -> None:
    layers, grid = tuple(profile.layers), expert_grid(base)
    if (layers, profile.experts) != (grid.layers, grid.experts):
        raise ProfileError(
            f"the router profile is of another model: {profile.experts} experts in layers {list(layers)}, but "
            f"{base.name} has {grid.experts} in {list(grid.layers)}; make one with `studio profile RECIPE`"
        )


def _scores(recipe: Recipe, score: str, base: Base, profile: RouterProfile | None) -> list[list[float]]:
    name = recipe.placement.rule
    if profile is None and base.directory is None:
        others = ", ".join(rule for rule, entry in PLACEMENTS.items() if entry.score is None)
        raise ProfileError(
            f"placement.rule {name} chooses by where the data goes, and {base.name} is a published shape, which has no "
            f"router profile; these rules need none: {others}"
        )
    if profile is None:
        from studio.profile import others_kept

        raise ProfileError(
            f"placement.rule {name} chooses by where the data goes, and there is no router profile of this base and "
            "this data; make it with `studio profile RECIPE`, or add --profile to `studio plan` and `studio run`"
            + others_kept(recipe)
        )
    table: list[list[float]] = (profile.share() if score == "share" else profile.gate_share()).tolist()
    return table


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What the rules read, by the names of their keywords; what is null at its value."""
    wanted = recipe.placement
    return {
        **wanted.model_dump(exclude={"training_bytes", "profile_tokens", "rule"}),
        "rank": recipe.adapter.routed_experts_rank,
        "p": wanted.p or P_UNSET.get(wanted.rule),
        "fraction": wanted.fraction or FRACTION_UNSET,
        "parameters": wanted.parameters or (wanted.training_bytes or 0) // TRAINING_BYTES,
    }


def _check_classes(placement: Placement, base: Base) -> None:
    ranks = {**placement.class_ranks(), "router": placement.router or placement.router_full}
    present = {tensor.class_name for tensor in base.tensors}
    missing = [name for name, rank in ranks.items() if rank and name not in present]
    if missing:
        settings = [f"adapter.{name}_rank to 0" if name != "router" else "router.mode to frozen" for name in missing]
        raise TargetError(
            f"this {base.layout.model_type} model has no tensor of class {', '.join(missing)}; "
            f"set {', '.join(settings)}"
        )
