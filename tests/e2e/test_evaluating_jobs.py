"""`studio evaluate` on finished jobs: the rows, columns, rewards and pairs that the job itself measures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from adapters.lora import attach
from adapters.peft_files import save_adapter
from studio.base_model import load_recipe_base
from studio.data import held_out_rows
from studio.evaluating import evaluate
from studio.jobs import create_job
from studio.measuring import Measuring
from studio.placing import placement_record, plan_placement
from studio.plan import make_plan, recipe_base
from studio.recipe import parse_recipe
from tests.e2e.conftest import TICKETS, build_base

KINDS: dict[str, dict[str, Any]] = {
    "a part held out, columns of other names": {
        "data": {"train": "renamed.jsonl", "eval_fraction": 0.3, "columns": {"prompt": "ask", "completion": "reply"}}
    },
    "rewards": {
        "training": {"method": "grpo"},
        "rewards": [{"function": "exact_match"}],
        "sampling": {"completions": 4},
    },
    "pairs": {
        "training": {"method": "dpo"},
        "data": {name: str(TICKETS / f"ticket-pairs-{name}.jsonl") for name in ("train", "eval")},
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_job_measures_is_measured_again(kind: str, tmp_path: Path) -> None:
    base = build_base("qwen3_moe", tmp_path / "base")
    rows = [{"ask": f"what is {n}?", "reply": f"it is {n * n}"} for n in range(30)]
    (tmp_path / "renamed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {name: str(TICKETS / f"tickets-{name}.jsonl") for name in ("train", "eval")}
    sections = {
        "model": {"base": str(base)},
        "data": data,
        "adapter": {"attention_rank": 2, "shared_expert_rank": 0, "routed_experts_rank": 2},
        "evaluation": {"examples": 6, "max_new_tokens": 4},
        "output": {"dir": str(tmp_path / "job")},
        **KINDS[kind],
    }
    sections["training"] = {"batch_size": 4, "max_steps": 1, **sections.get("training", {})}
    recipe = parse_recipe(yaml.safe_dump(sections), tmp_path / "recipe.yaml")
    shapes = recipe_base(recipe)
    placement = plan_placement(recipe, shapes)
    job, lock = create_job(recipe, make_plan(recipe), placement_record(recipe, shapes, placement))
    os.close(lock)
    model, tokenizer = load_recipe_base(recipe)
    trained = attach(model, placement)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    held = recipe.model.model_dump(mode="json", exclude={"base"}) | {"dtype": "float32"}
    save_adapter(trained, placement, job.path / "adapter", base_name=str(base), base=base, held=held)

    report = evaluate(str(job.path))
    measuring = Measuring(recipe, held_out_rows(recipe)[:6])
    with trained.disable_adapter():
        before = measuring.run(trained, tokenizer).summary()
    after = measuring.run(trained, tokenizer).summary()
    assert report["before"] == before and before["examples"] == 6
    assert report["after"]["metrics"].keys() == after["metrics"].keys()
    for name, metric in after["metrics"].items():
        assert report["after"]["metrics"][name]["value"] == pytest.approx(metric["value"], rel=1e-4), name
    assert {"rewards": "reward", "pairs": "reference_kl"}.get(kind, "loss") in after["metrics"]
