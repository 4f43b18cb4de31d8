"""The main job end to end: recipe → accelerate launch → adapter → merge → stock transformers and stock PEFT."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from studio import open_job
from studio.job_files import lock_holders
from tests.e2e.conftest import build_base, studio, write_recipe

LOGITS_ATOL = 1e-4


@pytest.fixture(scope="module", params=["llama4_text", "qwen3_moe"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One finished 4-bit job per family, its answer and its merged model."""
    folder = tmp_path_factory.mktemp(request.param)
    base = build_base(request.param, folder / "base")
    adapter = {"shared_expert_rank": 0} if request.param == "qwen3_moe" else {}
    sections = {"adapter": adapter, "router": {"mode": "lora", "rank": 2}}
    recipe = write_recipe(folder / "recipe.yaml", model={"base": str(base)}, **sections)
    run = studio("run", recipe, "--json")
    assert run.returncode == 0, run.stdout + run.stderr
    options = ("--into", "original", "--dtype", "float32", "--json")
    merge = studio("merge", folder / "job", "--out", folder / "merged", *options)
    assert merge.returncode == 0, merge.stdout + merge.stderr
    return {"folder": folder, "base": base, "answer": json.loads(run.stdout), "merge": json.loads(merge.stdout)}


def test_the_job_says_what_it_did(trained: dict[str, Any]) -> None:
    answer, job = trained["answer"], open_job(trained["folder"] / "job")
    result = answer["result"]
    assert answer["status"] == "succeeded" and job.state().status == "succeeded"
    assert result["steps"] == 8
    assert result["after"]["loss"] < result["before"]["loss"]
    assert len(result["generations"]) == 2 and set(result["generations"][0]) == {"prompt", "reference", "base", "tuned"}
    assert 0 < result["memory"]["measured_bytes"] < 4e9 and result["memory"]["predicted_bytes"] > 0
    losses = [row["loss"] for row in job.metrics() if row["kind"] == "train"]
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert {p.name for p in (job.path / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_plan_and_run_agree_on_what_is_trained(trained: dict[str, Any]) -> None:
    plan = open_job(trained["folder"] / "job").plan()
    assert trained["answer"]["result"]["adapter"]["parameters"] == plan.trainable_parameters
    assert next(c for c in plan.classes if c.name == "routed_experts").dtype == "nf4"


def test_stock_transformers_and_stock_peft_agree_with_each_other(trained: dict[str, Any]) -> None:
    folder = trained["folder"]
    script = Path(__file__).with_name("stock_check.py")
    paths = [trained["base"], folder / "job" / "adapter", folder / "merged"]
    check = subprocess.run(
        [sys.executable, "-I", str(script), *map(str, paths)], capture_output=True, text=True, timeout=120, cwd=folder
    )
    assert check.returncode == 0, check.stderr
    found = json.loads(check.stdout.splitlines()[-1])
    assert found["adapter_minus_merged"] <= LOGITS_ATOL
    assert found["adapter_minus_base"] > 100 * LOGITS_ATOL
    assert len(found["expert_deltas"]) == 2 * 2 * 4  # layers, projections, experts
    assert all(delta > 0 for delta in found["expert_deltas"].values()), found["expert_deltas"]
    assert found["chat_template"]


def test_what_a_4_bit_jobs_adapter_is_merged_into_is_measured_on_its_held_out_data(trained: dict[str, Any]) -> None:
    folder = trained["folder"]
    merge = studio("merge", folder / "job", "--out", folder / "better", "--json")
    assert merge.returncode == 0, merge.stdout + merge.stderr
    report = json.loads(merge.stdout)
    losses = report["into"]["losses"]
    assert losses.keys() == {"original", "quantized"} and losses["original"] != losses["quantized"]
    assert report["into"]["chosen"] == min(losses, key=losses.get)
    assert losses["quantized"] == pytest.approx(trained["answer"]["result"]["after"]["loss"], rel=0.5)  # of 8 examples
    assert report["sha256"].keys() == {file.name for file in (folder / "better").iterdir()}


def test_merge_reports_every_expert(trained: dict[str, Any]) -> None:
    matrices = 3 if trained["folder"].name.startswith("qwen3_moe") else 2  # gate, up, down; or gate_up, down
    assert trained["merge"]["experts_changed"] == 2 * matrices * 4


def test_a_listed_expert_alone_is_adapted(tmp_path: Path) -> None:
    base = build_base("llama4_text", tmp_path / "base")
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        model={"base": str(base)},
        adapter={"attention_rank": 0, "shared_expert_rank": 0},
        placement={"rule": "manual", "experts": [1, 2]},
        training={"max_steps": 2},
        evaluation={"examples": 2, "generations": 1, "max_new_tokens": 4},
    )
    assert studio("run", recipe).returncode == 0
    merge = studio("merge", tmp_path / "job" / "adapter", "--out", tmp_path / "merged", "--into", "original")
    assert merge.returncode == 0, merge.stderr
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "merged"))
    for name, tensor in before.items():
        if ".experts." not in name:
            assert torch.equal(tensor, after[name]), name
    stack = "model.layers.1.feed_forward.experts.down_proj"
    changed = [not torch.equal(before[stack][e], after[stack][e]) for e in range(4)]
    assert changed == [False, True, True, False]


def test_a_loss_that_is_not_finite_fails_the_job_and_writes_no_adapter(tmp_path: Path) -> None:
    base = build_base("llama4_text", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = torch.full_like(weights["lm_head.weight"], 3e38)  # finite, but its logits are not
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    recipe = write_recipe(tmp_path / "recipe.yaml", model={"base": str(base)}, data={"eval": None})
    run = studio("run", recipe, "--json")
    answer = json.loads(run.stdout)
    assert run.returncode == 1
    assert answer["status"] == "failed" and answer["error"]["type"] == "TrainingError"
    assert "at step 1" in answer["error"]["message"]
    assert not (tmp_path / "job" / "adapter").exists()


def test_bad_base_weights_fail_before_training(tmp_path: Path) -> None:
    base = build_base("llama4_text", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.feed_forward.experts.down_proj"][2, 0, 0] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    run = studio("run", write_recipe(tmp_path / "recipe.yaml", model={"base": str(base)}))
    assert run.returncode == 1
    said = " ".join((run.stdout + run.stderr).split())
    assert "experts.down_proj (expert 2) holds NaN or infinity" in said
    job = open_job(tmp_path / "job")
    assert job.state().status == "failed" and not [row for row in job.metrics() if row["kind"] == "train"]


def test_ctrl_c_cancels_and_leaves_no_half_adapter(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", training={"max_steps": 100_000}, data={"eval": None})
    process = subprocess.Popen(
        [sys.executable, "-m", "studio.cli", "run", str(recipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: (tmp_path / "job" / "metrics.jsonl").exists() and open_job(tmp_path / "job").state().step > 1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "cancelled" in output
    job = open_job(tmp_path / "job")
    assert job.state().status == "cancelled" and not job.is_alive()
    assert not (job.path / "adapter").exists()
    assert "exists already" in (again := studio("run", recipe)).stderr and again.returncode == 1


def wait_for(condition: Any, timeout_seconds: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)


def test_a_killed_worker_loses_neither_the_job_nor_its_result(tmp_path: Path) -> None:
    base = build_base("llama4_text", tmp_path / "base")
    recipe = write_recipe(tmp_path / "recipe.yaml", model={"base": str(base)}, training={"max_steps": 30})
    assert studio("run", recipe, "--detach").returncode == 0
    job = open_job(tmp_path / "job")
    wait_for(lambda: job.state().phase == "training")
    workers = [pid for pid in lock_holders(job.path / "lock") if os.getsid(pid) == pid]
    os.kill(workers[0], signal.SIGKILL)
    assert job.state().status == "running"  # the training process holds the lock
    wait_for(lambda: job.state().ended)
    assert job.state().status == "succeeded" and (job.path / "adapter" / "adapter_config.json").exists()


def test_a_job_whose_processes_are_all_killed_is_lost_and_can_be_replaced(tmp_path: Path) -> None:
    base = build_base("llama4_text", tmp_path / "base")
    long = write_recipe(tmp_path / "long.yaml", model={"base": str(base)}, training={"max_steps": 100_000})
    assert studio("run", long, "--detach").returncode == 0
    job = open_job(tmp_path / "job")
    wait_for(lambda: job.state().phase == "training")
    for pid in lock_holders(job.path / "lock"):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not job.is_alive())
    assert job.state().status == "lost" and not (job.path / "adapter").exists()
    short = write_recipe(tmp_path / "short.yaml", model={"base": str(base)}, training={"max_steps": 2})
    assert studio("run", short, "--overwrite").returncode == 0
