"""What lies in memory beside the model in training: reward models, lm-eval with its tasks, the reward head."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from studio import Recipe, load_recipe, make_plan
from studio.beside import LM_EVAL_BYTES, LM_EVAL_NAMES_BYTES
from studio.jobs import create_job
from studio.memory import MemoryPlan
from studio.methods import REWARD_HEAD
from studio.placing import placement_record, plan_placement
from studio.plan import recipe_base
from studio.sweep_space import with_values

RECIPES = Path(__file__).parents[2] / "recipes"
DOMAINS = str(RECIPES / "tasks" / "domains.yaml")


def memory(name: str, **values: Any) -> MemoryPlan:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    return make_plan(with_values(recipe, {key.replace("__", "."): value for key, value in values.items()})).memory


def test_tasks_take_what_lm_eval_takes_and_names_the_list_of_its_own() -> None:
    without, own, named = (
        memory("quickstart", evaluation__tasks=tasks) for tasks in ([], [DOMAINS], [DOMAINS, "arc_easy"])
    )
    assert (without.tasks_bytes, own.tasks_bytes) == (0, LM_EVAL_BYTES)
    assert named.tasks_bytes == LM_EVAL_BYTES + LM_EVAL_NAMES_BYTES
    assert named.peak_bytes - without.peak_bytes == named.tasks_bytes == named.fixed_bytes - without.fixed_bytes


def test_the_reward_head_is_trained_too() -> None:
    adapters = memory("embedded-reward-experts").adapters_bytes - memory("embedded-dpo-experts").adapters_bytes
    assert adapters == 4 * 256


def reward_job(folder: Path, **values: Any) -> Recipe:
    recipe = with_values(load_recipe(RECIPES / "embedded-reward-experts.yaml"), {"output.dir": str(folder), **values})
    base = recipe_base(recipe)
    job, lock = create_job(recipe, make_plan(recipe), placement_record(recipe, base, plan_placement(recipe, base)))
    os.close(lock)
    (job.path / "adapter").mkdir()
    (job.path / "adapter" / REWARD_HEAD).touch()
    return recipe


def test_a_reward_model_counts_once_as_its_own_recipe_holds_it(tmp_path: Path) -> None:
    held = {
        "small": reward_job(tmp_path / "small"),
        "whole": reward_job(tmp_path / "whole", **{"model.quantization": "none", "adapter.init": "pissa"}),
    }
    plan = load_recipe(RECIPES / "embedded-grpo-sites.yaml")
    alone = make_plan(plan).memory.peak_bytes

    def beside(*names: str) -> int:
        rewards = [{"function": "reward_model", "job": str(tmp_path / name)} for name in names]
        recipe = Recipe.model_validate({**plan.model_dump(mode="json"), "rewards": rewards})
        found = make_plan(recipe).memory
        assert found.peak_bytes - alone == found.reward_models_bytes
        return found.reward_models_bytes

    sizes = {}
    for name, recipe in held.items():
        own = make_plan(recipe)
        factors = 2 if recipe.adapter.init == "pissa" else 1
        sizes[name] = own.bytes + 4 * factors * own.trainable_parameters
        assert beside(name) == sizes[name]
    assert beside("small", "whole", "small") == sum(sizes.values())
