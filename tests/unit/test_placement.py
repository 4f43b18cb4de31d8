"""Placement rules: properties of every one, what each refuses, and the record of a placement."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise, product
from math import log1p
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import AdapterFileError, ProfileError, TargetError
from adapters.placement import PLACEMENTS, TRAINING_BYTES, ExpertGrid, Placement, budget, esft, manual, top_fraction
from adapters.router_profile import RouterProfile
from studio import DataError, Recipe, find_profile, make_plan
from studio.placing import coverage, placement_record, plan_placement, read_placement
from studio.plan import recipe_base
from studio.profile import fingerprints, profile_path
from studio.recipe_model import PlacementSettings

TICKETS = Path(__file__).parents[2] / "recipes" / "data" / "tickets-train.jsonl"
PROFILED = [name for name, rule in PLACEMENTS.items() if rule.score]
Layers = list[list[float]]


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate({"data": {"train": TICKETS}, "output": {"dir": "unused"}, **sections})


def profile_of(layers: tuple[int, ...] = (0, 1, 2, 3), experts: int = 16) -> RouterProfile:
    """Two sources: "even" goes everywhere alike, "first" to experts 0 and 1 alone, 30 and 70 of 100 tokens."""
    even = np.full((len(layers), experts), 70)
    first = np.zeros_like(even)
    first[:, 0], first[:, 1] = 840, 280
    routed = np.stack([even, first])
    return RouterProfile(
        base="b" * 64,
        data="d" * 64,
        seed=0,
        wanted_tokens=2240,
        layers=layers,
        top_k=1,
        shared_experts=1,
        sources=("even", "first"),
        tokens=np.array([1120, 1120]),
        routed=routed,
        gate=routed[:, :, ::-1] * 0.5,
        together=np.zeros((len(layers), experts, experts), dtype=np.int64),
    )


def grid_of(scores: Layers, costs: list[int] | None = None) -> ExpertGrid:
    return ExpertGrid(tuple(range(len(scores))), len(scores[0]), tuple(costs or [10] * len(scores)))


uses = st.sampled_from([0.0, 0.0, 0.1, 0.25, 1 / 3]) | st.floats(0, 1)
tables = st.integers(1, 9).flatmap(
    lambda experts: st.lists(
        st.lists(uses, min_size=experts, max_size=experts).filter(any).map(lambda row: [u / sum(row) for u in row]),
        min_size=1,
        max_size=4,
    )
)


# -------------------------------------------------------------------- properties


@given(tables, st.floats(1e-6, 1))
def test_esft_takes_the_fewest_of_the_most_used_experts_that_make_up_p(scores: Layers, p: float) -> None:
    ranks = esft(grid_of(scores), scores, p=p, rank=3)
    for row, layer in zip(scores, ranks, strict=True):
        taken = [use for use, rank in zip(row, layer, strict=True) if rank]
        left = [use for use, rank in zip(row, layer, strict=True) if not rank]
        assert set(layer) <= {0, 3} and taken and min(taken) >= max(left, default=0)
        assert sum(taken) >= p - 1e-6
        assert len(taken) == 1 or sum(taken) - min(taken) < p


def test_a_p_of_1_takes_every_used_expert_and_no_other() -> None:
    scores = [[0.1] * 10 + [0.0] * 3, [1 / 3] * 3 + [0.0] * 10]
    assert [sum(map(bool, layer)) for layer in esft(grid_of(scores), scores, p=1.0, rank=1)] == [10, 3]


@given(tables, st.floats(1e-6, 1), st.sampled_from(["layer", "model"]))
def test_top_fraction_takes_as_many_as_it_says_and_the_most_used(scores: Layers, fraction: float, scope: Any) -> None:
    ranks = top_fraction(grid_of(scores), scores, fraction=fraction, scope=scope, rank=5)
    if scope == "layer":
        groups = list(zip(scores, ranks, strict=True))
    else:
        groups = [([u for row in scores for u in row], tuple(r for layer in ranks for r in layer))]
    for row, layer in groups:
        chosen = sum(map(bool, layer))
        assert fraction * len(row) - 1e-6 <= chosen < fraction * len(row) + 1
        taken = [use for use, rank in zip(row, layer, strict=True) if rank]
        left = [use for use, rank in zip(row, layer, strict=True) if not rank]
        assert min(taken) >= max(left, default=0)


def test_a_fraction_is_not_rounded_up_by_the_error_of_floats() -> None:
    scores = [[1 / 100] * 100]
    assert sum(map(bool, top_fraction(grid_of(scores), scores, fraction=0.07, scope="layer", rank=1)[0])) == 7


steps = st.sampled_from([(1, 1, 8), (4, 4, 64), (4, 2, 16), (8, 4, 8), (6, 3, 21)])


@settings(max_examples=200)
@given(tables, st.integers(1, 20_000), steps, st.booleans(), st.data())
def test_budget(scores: Layers, parameters: int, ranks_of: tuple[int, int, int], alike: bool, data: Any) -> None:
    """Within the budget, in steps, more rank for more use, and nothing left that another step would fit into."""
    smallest, step, largest = ranks_of
    costs = [7] * len(scores) if alike else data.draw(st.lists(st.integers(1, 50), min_size=4, max_size=4))
    grid = grid_of(scores, costs[: len(scores)])
    settings = {"min_rank": smallest, "rank_step": step, "max_rank": largest}
    least = smallest * min(cost for cost, row in zip(grid.costs, scores, strict=True) if any(row))
    if parameters < least:
        with pytest.raises(TargetError, match=f"smallest that works is {least:,} parameters"):
            budget(grid, scores, parameters=parameters, **settings)
        parameters = least
    ranks = budget(grid, scores, parameters=parameters, **settings)
    spent = grid.parameters(ranks)
    assert 0 < spent <= parameters
    assert ranks == budget(grid, scores, parameters=parameters, **settings)
    for cost, row, layer in zip(grid.costs, scores, ranks, strict=True):
        assert all(rank == 0 or (smallest <= rank <= largest and (rank - smallest) % step == 0) for rank in layer)
        by_use = sorted(zip(row, layer, strict=True))
        assert all(a <= b for (u, a), (v, b) in pairwise(by_use) if u < v)
        for use, rank in zip(row, layer, strict=True):
            next_step = smallest if rank == 0 else step
            assert (rank == 0) if use == 0 else (rank + step > largest or next_step * cost > parameters - spent)


def test_budget_maximises_what_it_says() -> None:
    """Against every other way to spend the same, where all steps cost the same."""
    scores, grid = [[0.6, 0.3, 0.1], [0.4, 0.35, 0.25]], ExpertGrid((0, 1), 3, (5, 5))

    def value(ranks: Any) -> float:
        pairs = (pair for row, layer in zip(scores, ranks, strict=True) for pair in zip(row, layer, strict=True))
        return sum(use * log1p(rank) for use, rank in pairs)

    for parameters in (10, 35, 60, 90):
        found = budget(grid, scores, parameters=parameters, min_rank=2, rank_step=2, max_rank=6)
        others = (
            split
            for flat in product((0, 2, 4, 6), repeat=6)
            if grid.parameters(split := (flat[:3], flat[3:])) <= parameters
        )
        assert value(found) == pytest.approx(max(map(value, others)))


def test_budget_buys_more_where_a_rank_costs_less() -> None:
    scores, grid = [[0.5, 0.5], [0.5, 0.5]], ExpertGrid((0, 1), 2, (10, 40))
    ranks = budget(grid, scores, parameters=400, min_rank=1, rank_step=1, max_rank=64)
    assert min(ranks[0]) > 2 * max(ranks[1]) > 0


@given(st.integers(1, 12), st.data())
def test_manual_gives_exactly_what_is_listed(experts: int, data: Any) -> None:
    grid = ExpertGrid((1, 3, 5), experts, (1, 1, 1))
    ids = st.lists(st.integers(0, experts - 1), min_size=1, unique=True)
    listed = data.draw(ids | st.dictionaries(st.sampled_from(grid.layers), ids, min_size=1))
    ranks = manual(grid, experts=listed, rank=2)
    for number, layer in zip(grid.layers, ranks, strict=True):
        wanted = listed.get(number, []) if isinstance(listed, dict) else listed
        assert [expert for expert, rank in enumerate(layer) if rank == 2] == sorted(wanted)


def test_the_recipe_offers_exactly_the_rules_of_the_table() -> None:
    assert list(get_args(PlacementSettings.model_fields["rule"].annotation)) == list(PLACEMENTS)


# -------------------------------------------------------------------- from a recipe


def placed(profile: RouterProfile | None = None, **sections: Any) -> Placement:
    wanted = recipe(**sections)
    return plan_placement(wanted, recipe_base(wanted), profile)


def chosen(placement: Placement) -> list[list[int]]:
    return [[expert for expert, rank in enumerate(layer) if rank] for layer in placement.routed]


def test_each_rule_on_a_profile() -> None:
    profile = profile_of()
    assert placed(placement={"rule": "attention"}) == Placement(attention=16, alpha=32)
    assert placed(placement={"rule": "shared"}) == Placement(attention=16, shared_expert=16, alpha=32)
    assert placed().adapted_experts == 64
    assert chosen(placed(profile, placement={"rule": "esft_token", "p": 0.5})) == [[0, 1]] * 4
    assert chosen(placed(profile, placement={"rule": "esft_token"})) == [[0]] * 4  # p 0.2
    assert chosen(placed(profile, placement={"rule": "esft_gate"})) == [[15]] * 4  # gate is mirrored
    assert chosen(placed(profile, placement={"rule": "top_fraction"})) == [[0, 1, 2, 3]] * 4  # 0.25
    everywhere = placed(profile, placement={"rule": "top_fraction", "fraction": 0.125, "scope": "model"})
    assert chosen(everywhere) == [[0, 1]] * 4
    assert chosen(placed(placement={"rule": "manual", "experts": {2: [5]}})) == [[], [], [5], []]


def test_bytes_of_a_budget_are_parameters_times_16_and_the_plan_counts_what_was_given() -> None:
    sections = {"placement": {"rule": "budget", "training_bytes": 200_000 * TRAINING_BYTES}}
    by_bytes = make_plan(recipe(**sections), profile=profile_of())
    sections = {"placement": {"rule": "budget", "parameters": 200_000}}
    wanted = recipe(adapter={"routed_experts_rank": 0}, **sections)
    plan = make_plan(wanted, profile=profile_of())
    (routed,) = [entry for entry in plan.classes if entry.name == "routed_experts"]
    assert by_bytes.classes == plan.classes and plan.placement and by_bytes.placement == plan.placement
    assert 0 < routed.trainable_parameters <= 200_000
    config = json.loads((recipe_base(wanted).directory / "config.json").read_text())  # type: ignore[operator]
    one = 2 * config["hidden_size"] + 3 * config["intermediate_size"]
    assert routed.trainable_parameters == one * sum(map(sum, plan.placement.ranks))
    assert routed.rank == max(map(max, plan.placement.ranks))
    assert plan.placement.parameters == routed.trainable_parameters
    assert plan.placement.parameters_saved == one * 64 * routed.rank - plan.placement.parameters


def test_coverage_by_source() -> None:
    wanted = recipe(placement={"rule": "esft_token", "p": 0.5})
    plan = make_plan(wanted, profile=profile_of())
    assert plan.placement and plan.placement.coverage == pytest.approx({"all": 0.5625, "even": 0.125, "first": 1.0})
    assert (plan.placement.experts_adapted, plan.placement.experts_in_all) == (8, 64)
    assert plan.placement.shared_experts == 1
    assert coverage(Placement(), profile_of()) == {"all": 0.0, "even": 0.0, "first": 0.0}


def test_a_router_trained_in_full_is_counted_whole() -> None:
    plan = make_plan(recipe(router={"mode": "full"}))
    (router,) = [entry for entry in plan.classes if entry.name == "router"]
    assert router.trainable_parameters == router.parameters and router.rank == 16
    assert placed(router={"mode": "full"}).router_full and not placed(router={"mode": "lora"}).router_full


# -------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("rule", PROFILED)
def test_a_rule_that_needs_a_profile_says_how_to_make_it(rule: str) -> None:
    size = {"parameters": 10**6} if rule == "budget" else {}
    with pytest.raises(ProfileError, match=rf"rule {rule} .* make it with `studio profile RECIPE`"):
        placed(placement={"rule": rule, **size})


@pytest.mark.parametrize("other", [profile_of(layers=(0, 1)), profile_of(experts=8), profile_of(layers=(0, 2, 4, 6))])
def test_a_profile_of_another_model_is_refused(other: RouterProfile) -> None:
    with pytest.raises(ProfileError, match=r"is of another model: .* embedded has 16 in"):
        placed(other, placement={"rule": "top_fraction"})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rule": "manual", "experts": [3, 16]}, r"experts \[16\] do not exist; this model has experts 0 to 15"),
        ({"rule": "manual", "experts": {0: [1], 9: [2]}}, r"layers \[9\] have no routed experts"),
        ({"rule": "manual", "experts": {1: [99]}}, r"experts \[99\] do not exist"),
        ({"rule": "budget", "parameters": 10}, r"too small for one expert at min_rank 4; the smallest that works is"),
    ],
)
def test_what_the_model_cannot_do_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(TargetError, match=said):
        placed(profile_of(), placement=settings)


def test_the_smallest_budget_named_in_the_error_works() -> None:
    with pytest.raises(TargetError) as caught:
        placed(profile_of(), placement={"rule": "budget", "training_bytes": 160})
    smallest = int(str(caught.value).rpartition("(")[2].split()[0].replace(",", ""))
    assert placed(profile_of(), placement={"rule": "budget", "training_bytes": smallest}).adapted_experts == 1
    with pytest.raises(TargetError):
        placed(profile_of(), placement={"rule": "budget", "training_bytes": smallest - 1})


def test_the_plan_finds_the_profile_of_this_data_and_of_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wanted = recipe(placement={"rule": "esft_token", "p": 0.5})
    with pytest.raises(ProfileError, match="studio profile RECIPE"):
        make_plan(wanted)
    assert (before := make_plan(recipe()).placement) and before.coverage is None
    profile_of().save(profile_path(wanted))
    assert make_plan(wanted).placement == make_plan(wanted, profile=profile_of()).placement
    assert (after := make_plan(recipe()).placement) and after.coverage == {"all": 1.0, "even": 1.0, "first": 1.0}
    other = {"data": {"train": TICKETS.with_name("tickets-eval.jsonl")}, "placement": {"rule": "esft_token"}}
    with pytest.raises(ProfileError, match="no router profile of this base and this data"):
        make_plan(recipe(**other))
    replace(profile_of(), base=fingerprints(wanted)[0]).save(profile_path(wanted))
    with pytest.raises(ProfileError, match="there is one of this base, made from other data"):
        make_plan(recipe(**other))
    replace(profile_of(), data=fingerprints(wanted)[1]).save(profile_path(wanted))
    with pytest.raises(ProfileError, match="there is one of these data, made on another base"):
        make_plan(recipe(model={"quantization": "fp4"}, placement={"rule": "esft_token"}))
    profile_path(wanted).write_bytes(b"torn")
    with pytest.raises(ProfileError, match="no router profile of this base and this data"):
        make_plan(wanted)
    assert make_plan(recipe()).placement == before


def test_a_missing_data_file_is_told_as_one_whatever_profiles_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    profile_of().save(profile_path(recipe()))
    gone = recipe(data={"train": tmp_path / "gone.jsonl"})
    for call in (make_plan, find_profile):
        with pytest.raises(DataError, match=r"gone\.jsonl|cannot be read"):
            call(gone)


def test_a_profile_of_a_model_of_other_size_is_refused_for_any_rule() -> None:
    with pytest.raises(ProfileError, match="is of another model"):
        make_plan(recipe(), profile=profile_of(experts=8))


def test_a_published_shape_has_no_profile() -> None:
    with pytest.raises(ProfileError, match=r"published shape, which has no router profile; .* need none: all_experts"):
        make_plan(recipe(placement={"rule": "esft_gate"}), "llama4-scout")


# -------------------------------------------------------------------- placement.json


@pytest.mark.parametrize(
    "sections",
    [
        {"placement": {"rule": "esft_token", "p": 0.5}},
        {"placement": {"rule": "manual", "experts": {2: [5]}}, "router": {"mode": "lora", "rank": 3}},
        {"placement": {"rule": "attention"}, "router": {"mode": "full"}},
        {"placement": {"rule": "budget", "parameters": 300_000}, "adapter": {"alpha": 7.5}},
    ],
    ids=lambda sections: sections["placement"]["rule"],
)
def test_the_record_reads_back_to_the_same_placement(tmp_path: Path, sections: dict[str, Any]) -> None:
    wanted, profile = recipe(**sections), profile_of()
    base = recipe_base(wanted)
    placement = plan_placement(wanted, base, profile)
    record = placement_record(wanted, base, placement, profile)
    file = tmp_path / "placement.json"
    file.write_text(json.dumps(record))
    assert read_placement(file) == placement
    plan = make_plan(wanted, profile=profile)
    assert record["trainable_parameters"] == {c.name: n for c in plan.classes if (n := c.trainable_parameters)}
    assert record["optimizer_bytes"] == 8 * plan.trainable_parameters
    assert record["layers"] == [0, 1, 2, 3] and record["coverage"].keys() == {"all", "even", "first"}
    assert record["profile"]["tokens"] == 2240 and record["rule"] == sections["placement"]["rule"]


def test_the_record_says_the_settings_that_were_left_out(tmp_path: Path) -> None:
    wanted, profile = recipe(placement={"rule": "esft_gate"}), profile_of()
    base = recipe_base(wanted)
    record = placement_record(wanted, base, plan_placement(wanted, base, profile), profile)
    assert record["settings"] == {"p": 0.1, "rank": 16}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 2}', '{"version": 1}', '{"version": 1, "attention": 1.5}']
)
def test_a_record_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "placement.json"
    file.write_text(text)
    with pytest.raises(AdapterFileError, match=r"placement\.json"):
        read_placement(file)
