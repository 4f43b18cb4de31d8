"""The shipped recipe of each preference method as a job of a few steps on the embedded base: what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from studio import open_job
from studio.methods import REWARD_HEAD
from tests.e2e.conftest import REPOSITORY, studio

SHIPPED = sorted((REPOSITORY / "recipes").glob("embedded-*.yaml"))
PREFERENCE = [path for path in SHIPPED if "preference" in yaml.safe_load(path.read_text()) or "reward" in path.stem]


@pytest.mark.parametrize("shipped", PREFERENCE, ids=lambda path: path.stem.split("-")[1])
def test_a_shipped_recipe_trains_and_says_what_came_of_it(shipped: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(shipped.read_text())
    recipe["data"] |= {name: str(shipped.parent / recipe["data"][name]) for name in ("train", "eval")}
    recipe["training"] |= {"epochs": None, "max_steps": 4, "logging_steps": 1, "batch_size": 4}
    recipe["evaluation"] |= {"examples": 12, "generations": 1, "max_new_tokens": 4}
    recipe["router"] = {"watch": False}  # two profiles fewer to wait for
    recipe["output"] = {"dir": str(tmp_path / "job")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = studio("run", tmp_path / "recipe.yaml")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Preference accuracy" in run.stdout
    job = open_job(tmp_path / "job")
    result, scores = json.loads((job.path / "result.json").read_text()), recipe["training"]["method"] == "reward"
    for side in (result["before"], result["after"]):
        found = side["metrics"]["preference_accuracy"]
        assert found["low"] < found["value"] < found["high"] and found["n"] == 12
        assert (side["loss"] is None) == scores and ("reference_kl" in side["metrics"]) != scores
    assert (job.path / "pictures" / "preference.png").read_bytes().startswith(b"\x89PNG")
    assert (job.path / "adapter" / REWARD_HEAD).exists() == scores
    if scores:
        assert load_file(job.path / "adapter" / REWARD_HEAD)["weight"].dtype == torch.float32
        assert "studio merge" in run.stdout and "studio export" not in run.stdout
        export = studio("export", job.path, "--for", "transformers", "--out", tmp_path / "out")
        assert export.returncode == 1 and "is a reward model" in " ".join(export.stderr.split())
        assert not (tmp_path / "out").exists()
        recipe["adapter"] = {"start_from": str(job.path)}
        recipe["training"] |= {"max_steps": 1, "learning_rate": 1e-9}
        recipe["output"] = {"dir": str(tmp_path / "further")}
        (tmp_path / "further.yaml").write_text(yaml.safe_dump(recipe))
        run = studio("run", tmp_path / "further.yaml")
        assert run.returncode == 0, run.stdout + run.stderr
        gone_on = json.loads((tmp_path / "further" / "result.json").read_text())  # with its head, not a new one
        given, was = (found["metrics"]["preference_margin"] for found in (gone_on["start"], result["after"]))
        assert given["value"] == pytest.approx(was["value"], rel=1e-4) and was["value"] != 0
    else:
        kl = {side: result[side]["metrics"]["reference_kl"]["value"] for side in ("before", "after")}
        assert abs(kl["before"]) < 1e-6 < kl["after"]
        assert [row["kl"] for row in job.metrics() if row["kind"] == "reference"][-1] > 0
        assert len(result["generations"]) == 1
    if recipe["training"]["method"] == "dpo":
        again = studio("evaluate", job.path, "--json")
        assert again.returncode == 0, again.stdout + again.stderr
        found = json.loads(again.stdout)["after"]["metrics"]
        assert found["preference_accuracy"] == result["after"]["metrics"]["preference_accuracy"]
