"""Metrics, gate and tasks of real jobs; the range test; a sweep that is killed and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from studio import open_job
from tests.e2e.conftest import REPOSITORY, build_base, studio, write_recipe

DOMAINS = REPOSITORY / "recipes" / "tasks" / "domains.yaml"
SCHEMA = {"type": "object", "required": ["asset", "site", "fault", "priority"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base("qwen3_moe", tmp_path_factory.mktemp("base"))


def small(path: Path, base: Path, **sections: dict[str, Any]) -> Path:
    sections["adapter"] = {"shared_expert_rank": 0, **sections.get("adapter", {})}
    sections["model"] = {"base": str(base), **sections.get("model", {})}
    return write_recipe(path, **sections)


def foreign_task(folder: Path) -> Path:
    """A task of text that the tickets make less likely."""
    rows = [{"text": f"{letter * 3} ## {letter * 2}"} for letter in "QXZJKVWY"]
    (folder / "foreign.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "foreign",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "foreign.jsonl"}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "%",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    (folder / "foreign.yaml").write_text(yaml.safe_dump(task))
    return folder / "foreign.yaml"


def test_one_job_measures_everything_fails_its_gate_and_loses_nothing(base: Path, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    foreign = foreign_task(tmp_path)
    evaluation = {
        "json_schema": "schema.json",
        "every_steps": 4,
        "tasks": [str(DOMAINS), str(foreign)],
        "task_examples": 8,
        "gate": [
            {"metric": "loss", "max_rise": 0.1, "relative": True},
            {"metric": "domains/acc", "max_drop": 1.0},
            {"metric": "foreign/perplexity", "max_rise": 0.0},  # of what the tickets are not: this one fails
        ],
    }
    recipe = small(
        tmp_path / "recipe.yaml", base, evaluation=evaluation, training={"learning_rate": "auto", "epochs": None}
    )
    run = studio("run", recipe, "--json")
    assert run.returncode == 1, run.stderr
    answer = json.loads(run.stdout)
    assert answer["status"] == "failed" and answer["error"]["type"] == "GateError"
    assert "foreign/perplexity: " in answer["error"]["message"] and "allowed rise 0" in answer["error"]["message"]

    job, result = open_job(tmp_path / "job"), answer["result"]
    assert 0 < job.recipe().training.learning_rate < 0.01  # settled at submission
    assert [entry["passed"] for entry in result["gate"]] == [True, True, False]
    assert (job.path / "adapter" / "adapter_model.safetensors").is_file()
    for side in ("before", "after"):
        metrics = result[side]["metrics"]
        assert metrics.keys() == {
            *("loss", "perplexity", "exact_match", "json_valid", "schema_valid", "domains/acc", "domains/acc_norm"),
            *("foreign/perplexity", "foreign/acc"),
        }
        assert all(entry["low"] <= entry["value"] <= entry["high"] and entry["n"] == 8 for entry in metrics.values())
    assert result["after"]["loss"] == result["after"]["metrics"]["loss"]["value"] < result["before"]["loss"]
    assert result["change"]["loss"]["high"] < 0  # paired: the fall is certain though the two intervals may overlap
    held_out = [row for row in job.metrics() if row["kind"] == "held_out"]
    assert [row["step"] for row in held_out] == [4, 8]
    assert held_out[-1]["loss"] == pytest.approx(result["after"]["loss"], rel=1e-6)

    shown = studio("jobs", "show", tmp_path / "job")
    for words in ("Held-out loss", "JSON by the schema", "domains/acc", "gate failed", "GateError", "gate passed"):
        assert words in shown.stdout
    assert "done, step 8/8" in shown.stdout and "Next" not in shown.stdout  # an export is not what comes next

    again = studio("evaluate", tmp_path / "job", "--examples", "8", "--json")
    assert again.returncode == 0, again.stdout + again.stderr
    report = json.loads(again.stdout)
    for side in ("before", "after"):  # the adapter from its file, applied without PEFT, is what was trained
        for name in ("loss", "exact_match", "json_valid"):
            found, wanted = (entry[side]["metrics"][name]["value"] for entry in (report, result))
            assert found == pytest.approx(wanted, rel=1e-5), (side, name)


def test_lm_eval_runs_on_a_model_and_refuses_what_is_not_here(base: Path, tmp_path: Path) -> None:
    run = studio("evaluate", base, "--task", DOMAINS, "--examples", "12", "--json")
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(run.stdout)
    assert report["adapter"] is None and report["after"] is None
    accuracy = report["before"]["metrics"]["domains/acc"]
    assert accuracy["n"] == 12 and accuracy["stderr"] > 0 and accuracy["low"] < accuracy["value"] < accuracy["high"]
    away = studio("evaluate", base, "--task", "arc_easy", "--json")
    assert away.returncode == 1 and "not downloaded" in json.loads(away.stdout)["error"]["message"]


def test_a_range_test_suggests_a_rate_that_trains(base: Path, tmp_path: Path) -> None:
    recipe = small(tmp_path / "recipe.yaml", base, data={"eval": None})
    run = studio("lr-test", recipe, "--from", "1e-5", "--to", "10", "--steps", "40", "--json")
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(run.stdout)
    assert 1e-4 < report["suggested"] < report["least"] <= 10 and len(report["points"]) >= 10
    rates = [point["rate"] for point in report["points"]]
    assert rates[1] / rates[0] == pytest.approx((10 / 1e-5) ** (1 / 39))
    job = open_job(tmp_path / "job-lr-test")
    assert (job.path / "lr_test.png").read_bytes().startswith(b"\x89PNG") and not (job.path / "adapter").exists()
    assert not (tmp_path / "job").exists()


def test_a_killed_sweep_goes_on_and_prunes(base: Path, tmp_path: Path) -> None:
    recipe = small(tmp_path / "recipe.yaml", base, training={"max_steps": 80}, evaluation={"max_new_tokens": 4})
    wanted = ["--param", "training.learning_rate=1e-8..5e-3:log", "--param", "adapter.attention_rank=2,4"]
    out = tmp_path / "sweep"
    command = ["sweep", recipe, *wanted, "--trials", "3", "--prune-after", "1", "--out", out]
    sweep = subprocess.Popen([sys.executable, "-m", "studio.cli", *map(str, command)], stdout=subprocess.PIPE)
    wait_for(lambda: (out / "001" / "metrics.jsonl").is_file() and open_job(out / "001").state().phase == "training")
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.communicate()
    begun = open_job(out / "001").state().created_at
    taken = studio("sweep", recipe, *wanted, "--out", out, "--json")
    assert taken.returncode == 1 and "to go on with" in json.loads(taken.stdout)["error"]["message"]

    run = studio("sweep", out, "--json")
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads(run.stdout)
    assert [trial["number"] for trial in results["trials"]] == [0, 1, 2]
    assert open_job(out / "001").state().created_at == begun  # the job that ran meanwhile was followed, not repeated
    first, *others = results["trials"]
    assert first["params"] == {"training.learning_rate": 5e-3, "adapter.attention_rank": 4}  # the recipe as it is
    assert first["state"] == "complete" and results["best"] == 0
    loss = json.loads((out / "000" / "result.json").read_text())["after"]["loss"]
    assert first["value"] == pytest.approx(loss)
    pruned = [trial for trial in others if trial["state"] == "pruned"]
    assert pruned, [trial["state"] for trial in others]
    for trial in pruned:
        state = open_job(trial["job"]).state()
        assert state.status == "cancelled" and state.step < 80 and trial["last"] > first["value"]
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "results.json").read_text()) == results


def wait_for(condition: Callable[[], bool], timeout_seconds: float = 180.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)
