"""Suggestions, the ramp of a range test, what a sweep varies, and its results, without training anything."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from studio.data import Example, Message
from studio.defaults import Facts, settled, settled_learning_rate, suggest, suggestions
from studio.errors import JobError, OutputExistsError, RecipeError, StudioError
from studio.hyper_pictures import _height
from studio.hyper_view import sweep_progress, sweep_table
from studio.lr_test import Ramp, Smoother, points, smoothed, submit_lr_test, suggestion
from studio.methods import METHODS
from studio.placing import placement_record, plan_placement
from studio.plan import recipe_base
from studio.recipe import Recipe, load_recipe, parse_recipe
from studio.sweep import plan_sweep
from studio.sweep_run import _go_on, _next, _study, _suggested, parts_of
from studio.sweep_space import Choices, Range, as_values, check_space, read_params, split_param, value_of, with_values

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
SCOUT = Facts("sft", "llama4_text", 5120, 1, 3_000_000, 20_000, 4_000_000)


def found(facts: Facts) -> dict[str, float]:
    return {entry.field.rpartition(".")[2]: entry.value for entry in suggestions(facts)}


# -------------------------------------------------------------------- suggestions


def test_the_rate_follows_the_published_formula() -> None:
    """tinker-cookbook's hyperparam_utils: 5e-5 · 10 · (2000 / hidden)^p."""
    assert found(SCOUT)["learning_rate"] == pytest.approx(5e-4 * (2000 / 5120) ** 0.781, rel=0.02)
    qwen = replace(SCOUT, model_type="qwen3_moe", hidden_size=2048)
    assert found(qwen)["learning_rate"] == pytest.approx(5e-4, rel=0.02)
    assert found(replace(SCOUT, alpha=64))["learning_rate"] == pytest.approx(
        found(SCOUT)["learning_rate"] / 2, rel=0.05
    )


def test_preference_methods_begin_at_ten_times_trls_rate() -> None:
    dpo = found(replace(SCOUT, method="dpo", hidden_size=4096))
    assert dpo["learning_rate"] == pytest.approx(1e-5) and dpo["epochs"] == 1 and dpo["warmup_fraction"] == 0.1
    assert found(replace(SCOUT, method="reward", hidden_size=4096))["learning_rate"] == pytest.approx(1e-4)
    assert found(replace(SCOUT, method="grpo"))["attention_rank"] == 8
    assert found(replace(SCOUT, method="grpo", completions=6))["batch_size"] == 24, "it counts completions"
    said = {entry.field: entry.why for entry in suggestions(replace(SCOUT, max_steps=40))}
    assert "max_steps 40 instead" in said["training.epochs"]


def test_more_data_mean_more_rank_fewer_epochs_and_larger_batches() -> None:
    small, large = found(replace(SCOUT, rows=100)), found(replace(SCOUT, rows=200_000, learned_tokens=80_000_000))
    assert (small["batch_size"], large["batch_size"]) == (8, 32)
    assert small["epochs"] * 100 / small["batch_size"] >= 100 and large["epochs"] == 1
    assert small["attention_rank"] == 8 and large["attention_rank"] == 32
    assert found(replace(SCOUT, top_k=8, learned_tokens=10**12))["routed_experts_rank"] == 128 // 8
    assert "routed_experts_rank" not in found(replace(SCOUT, top_k=0))


@pytest.mark.parametrize("method", [*METHODS, "dpo", "kto", "orpo", "cpo", "reward", "grpo", "rloo"])
def test_every_suggestion_is_a_value_that_the_recipe_allows(method: str) -> None:
    for width in (16, 256, 16384):
        for rows in (1, 499, 10**7):
            facts = Facts(method, "llama", width, 2, 1, rows, 10**9)
            recipe = parse_recipe("data: {train: a}\noutput: {dir: b}")
            with_values(recipe, {entry.field: entry.value for entry in suggestions(facts)})


def test_auto_is_settled_from_the_base_and_the_data() -> None:
    recipe = with_values(load_recipe(QUICKSTART), {"training.learning_rate": "auto"})
    with pytest.raises(StudioError, match="still auto"):
        settled_learning_rate(recipe)
    rows = [Example((Message("user", "q"),), (Message("assistant", "a"),))] * 10
    rate = settled_learning_rate(settled(recipe, recipe_base(recipe), rows))
    assert rate == pytest.approx(5e-4 * (2000 / 256) ** 0.781 * 32 / 64, rel=0.05)
    shown = {entry.field: has for entry, has in suggest(recipe)}
    assert shown["training.learning_rate"] == "auto" and shown["training.batch_size"] == 16
    with pytest.raises(
        RecipeError, match=r"training\.learning_rate: received the text \"hot\"; allowed: a number, above 0"
    ):
        with_values(recipe, {"training.learning_rate": "hot"})


def test_the_rate_goes_by_the_scale_that_the_adapter_has(tmp_path: Path) -> None:
    quick = load_recipe(QUICKSTART)
    rows = [Example((Message("user", "q"),), (Message("assistant", "a"),))] * 10

    def rate(**adapter: object) -> float:
        values = {"training.learning_rate": "auto", **{f"adapter.{name}": value for name, value in adapter.items()}}
        recipe = with_values(quick, values)
        return settled_learning_rate(settled(recipe, recipe_base(recipe), rows))

    assert rate(rslora=True, alpha=8.0) == rate(alpha=32.0)  # 8 / sqrt(16) = 32 / 16
    folder = tmp_path / "given"
    folder.mkdir()
    recipe = with_values(quick, {"adapter.alpha": 16.0})
    base = recipe_base(recipe)
    record = placement_record(recipe, base, plan_placement(recipe, base))
    (folder / "placement.json").write_text(json.dumps(record))
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").touch()
    assert rate(start_from=str(folder)) == rate(alpha=16.0)  # of the adapter, not the recipe's 64


# -------------------------------------------------------------------- range test


def test_the_ramp_goes_from_its_start_to_its_end_by_a_constant_factor() -> None:
    ramp = Ramp(1e-5, 1.0, 51)
    rates = [ramp.rate(step) for step in range(51)]
    assert rates[0] == 1e-5 and rates[-1] == pytest.approx(1.0)
    assert {round(b / a, 9) for a, b in pairwise(rates)} == {round(10**0.1, 9)}


def test_smoothing_is_a_corrected_running_mean() -> None:
    losses = [3.0, 2.0, 5.0, 1.0]
    weights = [[0.1 * 0.9 ** (n - i) for i in range(n + 1)] for n in range(4)]
    expected = [sum(w * x for w, x in zip(row, losses, strict=False)) / sum(row) for row in weights]
    assert smoothed(losses) == pytest.approx(expected)


def test_the_suggestion_lies_where_the_loss_still_falls() -> None:
    rates = [10 ** (-6 + 0.1 * i) for i in range(61)]
    curve = [(rate, 2 - 1.5 / (1 + (1e-3 / rate) ** 2) + (rate / 0.1) ** 2) for rate in rates]  # falls at 1e-3
    made = suggestion(curve)
    assert (
        1e-3 < made.least < 0.2 and made.steepest < made.least and made.least / 10 <= made.suggested <= made.least / 3
    )
    assert made.diverged is None and suggestion(curve, ended=False).diverged == rates[-1]
    with pytest.raises(JobError, match="never fell"):
        suggestion([(rate, 1 + rate) for rate in rates])
    with pytest.raises(JobError, match="too few"):
        suggestion(curve[:5])


def test_a_test_stops_far_above_the_least_loss_or_at_no_number() -> None:
    smoother = Smoother()
    assert not any(smoother.has_diverged(1.0) for _ in range(20))
    assert any(smoother.has_diverged(50.0) for _ in range(3))
    assert Smoother().has_diverged(math.nan)
    for losses in ([0.69 - 0.045 * i for i in range(16)] + [0.1] * 20, [0.5 - 0.05 * i for i in range(40)]):
        smoother = Smoother()  # of a preference loss that is nearly 0, and of one below it
        assert not any(smoother.has_diverged(loss) for loss in losses)
        assert any(smoother.has_diverged(60.0) for _ in range(3))
    assert points([{"kind": "lr_test", "rate": 1.0, "loss": None}, {"kind": "train"}]) == []


def test_a_loss_that_says_nothing_of_the_answers_gives_no_rate() -> None:
    recipe = load_recipe(QUICKSTART.with_name("embedded-grpo-sites.yaml"))
    with pytest.raises(StudioError, match="the metric reward"):
        submit_lr_test(recipe, Ramp(1e-5, 1.0, 20))


# -------------------------------------------------------------------- sweep


def test_ranges_and_lists_are_read() -> None:
    space = read_params({"a": "1e-4..1e-2:log", "b": "4..64:step=4", "c": "4,8,16", "d": [True, None], "e": "auto,0.1"})
    assert space["a"] == Range(1e-4, 1e-2, log=True) and space["b"] == Range(4, 64, step=4)
    assert (
        space["c"] == Choices((4, 8, 16))
        and space["d"] == Choices((True, None))
        and space["e"] == Choices(("auto", 0.1))
    )
    assert space["b"].holds(8) and not space["b"].holds(9) and not space["a"].holds(1.0) and not space["b"].holds(8.5)


@pytest.mark.parametrize(
    "text", ["5..1", "0..1:log", "1..2:cubic", "a..b", "1..2:step=0", "1,1", "", "[1],2", "1..nan"]
)
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        read_params({"training.learning_rate": text})
    with pytest.raises(RecipeError, match="FIELD=RANGE"):
        split_param("training.learning_rate")


def test_values_go_into_the_recipe_and_wrong_ones_are_all_named_before_anything_runs() -> None:
    recipe = load_recipe(QUICKSTART)
    changed = with_values(recipe, {"training.max_steps": 7, "adapter.attention_rank": 4})
    assert changed.training.epochs is None and changed.training.max_steps == 7 and changed.adapter.attention_rank == 4
    assert with_values(recipe, {"training.seed": 0}) == recipe and value_of(recipe, "training.epochs") == 2
    space = read_params({"training.learning_rate": "1e-4..3.0", "adapter.attention_rnk": "4,8", "trainin.seed": "1,2"})
    with pytest.raises(RecipeError) as error:
        check_space(recipe, space)
    said = str(error.value)
    assert "with 3.0" in said and 'did you mean "attention_rank"' in said and "no such field" in said


def test_a_sweep_is_planned_from_a_recipe_or_a_file_and_refuses_what_cannot_run(tmp_path: Path) -> None:
    plan = plan_sweep(
        QUICKSTART, {"training.learning_rate": "1e-4..1e-2:log"}, out=tmp_path / "s", trials=3, prune_after=0
    )
    assert plan.settings.trials == 3 and plan.settings.prune_after is None and plan.direction == "minimize"
    file = tmp_path / "sweep.yaml"
    file.write_text(
        f"recipe: {QUICKSTART}\ndir: {tmp_path / 't'}\nmetric: exact_match\nparams: {{training.seed: '0,1'}}\n"
    )
    plan = plan_sweep(file)
    assert (
        plan.folder == tmp_path / "t"
        and plan.direction == "maximize"
        and plan.space["training.seed"] == Choices((0, 1))
    )
    for params, given, said in (
        ({}, {}, "varies something"),
        ({"training.seed": "0..5"}, {"sampler": "grid"}, "lists alone"),
        ({"training.seed": "0,1"}, {"metric": "lss"}, "received the metric"),
        ({"training.seed": "0,1"}, {"sampler": "best"}, "sampler"),
        ({"training.seed": "0,1"}, {"metric": "schema_valid"}, "json_schema is not set"),
        ({"training.seed": "0,1"}, {"metric": "domains/acc"}, "tasks lists none"),
        ({"training.seed": "0,1"}, {"metric": "reward"}, "has no rewards"),
        ({"training.seed": "0,1"}, {"metric": "preference_accuracy"}, "reads no pairs"),
    ):
        with pytest.raises(StudioError, match=said):
            plan_sweep(QUICKSTART, params, out=tmp_path / "s", **given)
    assert not (tmp_path / "s").exists()  # planning writes nothing
    with pytest.raises(OutputExistsError, match="to go on"):
        plan_sweep(QUICKSTART, {"training.seed": "0,1"}, out=tmp_path)
    with pytest.raises(JobError, match="is no sweep"):
        plan_sweep(tmp_path)


def test_held_out_losses_are_compared_at_the_same_share_of_the_steps() -> None:
    rows = [{"kind": "held_out", "step": step, "loss": 10.0 - step} for step in (2, 3, 4, 6)]
    assert parts_of([*rows, {"kind": "train", "step": 5, "loss": 1.0}], 20) == [(1, 8.0), (2, 6.0), (3, 4.0)]
    assert parts_of([{"kind": "held_out", "step": 5, "loss": None}], 50) == [(1, 1e30)]


def test_a_recipe_says_the_same_after_a_sweep_has_kept_it(tmp_path: Path) -> None:
    from studio.sweep_space import from_values

    recipe: Recipe = load_recipe(QUICKSTART)
    assert from_values(json.loads(json.dumps(as_values(recipe)))) == recipe


def test_a_grid_is_every_combination_once_and_then_ends_also_after_a_kill(tmp_path: Path) -> None:
    params = {"training.seed": "0,1,2", "adapter.attention_rank": "4,8"}
    plan = plan_sweep(QUICKSTART, params, out=tmp_path / "s", sampler="grid", trials=20)
    seen = []
    for trial_of_each_process in range(6):
        study = _study(plan)  # as a new process would
        trial = _next(plan, study)
        assert trial is not None and trial.number == trial_of_each_process
        seen.append(tuple(_suggested(plan, trial).values()))
        study.tell(trial, float(trial.number))
    assert sorted(seen) == [(seed, rank) for seed in (0, 1, 2) for rank in (4, 8)]
    assert _next(plan, _study(plan)) is None


def test_a_sweep_begins_with_the_recipe_as_it_is_where_that_lies_in_the_ranges(tmp_path: Path) -> None:
    for name, ends, own in (("in", "1e-4..1e-2:log", True), ("out", "1e-4..1e-3:log", False)):
        plan = plan_sweep(QUICKSTART, {"training.learning_rate": ends}, out=tmp_path / name)
        trial = _next(plan, _study(plan))
        assert trial is not None
        assert (_suggested(plan, trial)["training.learning_rate"] == 2e-3) is own


def test_a_sweep_measures_on_a_held_out_part_too_and_a_reward_model_by_its_pairs(tmp_path: Path) -> None:
    folder = QUICKSTART.parent
    for name, changes in (
        ("quickstart", {"data.eval": None, "data.eval_fraction": 0.1}),
        ("embedded-reward-experts", {}),
    ):
        values = as_values(with_values(load_recipe(folder / f"{name}.yaml"), changes))
        (tmp_path / f"{name}.yaml").write_text(json.dumps(values))
    params = {"training.seed": "0,1"}
    assert plan_sweep(tmp_path / "quickstart.yaml", params, out=tmp_path / "a").recipe.data.eval_fraction == 0.1
    with pytest.raises(StudioError, match="take preference_accuracy"):
        plan_sweep(tmp_path / "embedded-reward-experts.yaml", params, out=tmp_path / "b")
    plan = plan_sweep(
        tmp_path / "embedded-reward-experts.yaml", params, out=tmp_path / "b", metric="preference_accuracy"
    )
    assert plan.direction == "maximize"


@pytest.mark.parametrize(
    ("metric", "direction"),
    [("t/word_perplexity,strict-filter", "minimize"), ("t/exact_match,my-filter", "maximize"), ("t/acc", "maximize")],
)
def test_the_direction_of_a_tasks_metric_is_that_of_its_name_and_not_of_its_filter(
    metric: str, direction: str, tmp_path: Path
) -> None:
    recipe = with_values(load_recipe(QUICKSTART), {"evaluation.tasks": ["t"]})
    (tmp_path / "recipe.yaml").write_text(json.dumps(as_values(recipe)))
    plan = plan_sweep(tmp_path / "recipe.yaml", {"training.seed": "0,1"}, out=tmp_path / "s", metric=metric)
    assert plan.direction == direction


def test_an_option_of_trl_can_be_varied(tmp_path: Path) -> None:
    plan = plan_sweep(QUICKSTART, {"trl.neftune_noise_alpha": "1,5"}, out=tmp_path / "s")
    trial = _next(plan, _study(plan))
    assert trial is not None and _suggested(plan, trial)["trl.neftune_noise_alpha"] in (1, 5)


def test_values_that_were_queued_are_not_lost_where_a_sweep_is_killed_before_their_job(tmp_path: Path) -> None:
    params = {"training.seed": "0,1,2,3", "adapter.attention_rank": "4,8,16"}
    plan = plan_sweep(QUICKSTART, params, out=tmp_path / "s", sampler="grid")
    assert _next(plan, _study(plan)) is not None  # asked for, and killed before a value was drawn
    study, seen = _study(plan), []
    _go_on(plan, study)
    while (trial := _next(plan, study)) is not None:
        seen.append(tuple(_suggested(plan, trial).values()))
        study.tell(trial, 1.0)
    assert sorted(seen) == [(seed, rank) for seed in range(4) for rank in (4, 8, 16)]


def test_a_pruned_trials_loss_is_no_value_of_another_metric(tmp_path: Path) -> None:
    trial = {"number": 0, "state": "pruned", "value": None, "last": 2.5, "part": 0.1, "params": {}, "seconds": 1.0}
    results = {"metric": "exact_match", "params": {}, "best": None, "trials": [{**trial, "interval": None}]}
    console = Console(width=100, record=True, file=StringIO())
    console.print(sweep_table(results))
    assert "(loss 2.5)" in console.export_text()
    assert _height(trial, "exact_match") is None and _height(trial, "loss") == 2.5
    assert _height({**trial, "value": 0.0}, "exact_match") == 0.0


def test_a_sweep_says_each_trial_once_with_its_metric_and_which_are_from_before() -> None:
    def results(*states: str) -> dict[str, Any]:
        trials = [{"number": n, "state": state, "value": 0.5, "last": None} for n, state in enumerate(states)]
        return {"metric": "exact_match", "trials": trials}

    console = Console(record=True, file=StringIO())
    with sweep_progress(console, quiet=False) as shown:
        assert shown is not None
        job: Any = object()
        shown(results("complete", "running"), job)
        shown(results("complete", "complete", "running"), job)
        shown(results("complete", "complete", "complete"), None)
    lines = console.export_text().split("\n")[:-1]
    assert lines == [
        "trial 0: complete, from before exact_match 50.0 %",
        "trial 1: complete exact_match 50.0 %",
        "trial 2: complete exact_match 50.0 %",
    ]
