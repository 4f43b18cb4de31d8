"""Adapter methods end to end: a job of each kind on a tiny 4-bit base, both merges, a job that goes on, stock PEFT."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from studio import open_job
from tests.e2e.conftest import build_base, studio, write_recipe

LOGITS_ATOL = 2e-4
STOCK_CHECK = Path(__file__).with_name("stock_check.py")
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "pissa": (
        "llama4_text",
        {
            "adapter": {"init": "pissa", "rslora": True, "alpha": 8, "dropout": 0.1},
            "training": {"lora_plus_ratio": 4, "learning_rate": 2e-3},
            "router": {"mode": "lora", "rank": 2},
        },
    ),
    "loftq": ("qwen3_moe", {"adapter": {"init": "loftq", "shared_expert_rank": 0}}),
    "dora": ("llama4_text", {"adapter": {"dora": True, "dropout": 0.1}, "placement": {"rule": "shared"}}),
}


def finished(folder: Path, base: Path, name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    short = {"examples": 8, "generations": 1, "max_new_tokens": 4}
    sections = {"evaluation": short, **sections, "output": {"dir": str(folder / name)}}
    run = studio("run", write_recipe(folder / f"{name}.yaml", model={"base": str(base)}, **sections), "--json")
    assert run.returncode == 0, run.stdout + run.stderr
    answer: dict[str, Any] = json.loads(run.stdout)
    return answer


def stock_agrees(folder: Path, base: Path, adapter: Path, name: str) -> None:
    """Stock PEFT with the adapter on the base says what stock transformers says of the merged model."""
    options = ("--into", "original", "--dtype", "float32", "--json")
    merge = studio("merge", adapter, "--out", folder / name, *options)
    assert merge.returncode == 0, merge.stdout + merge.stderr
    command = [sys.executable, "-I", str(STOCK_CHECK), str(base), str(adapter), str(folder / name)]
    check = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=folder)
    assert check.returncode == 0, check.stderr
    found = json.loads(check.stdout.splitlines()[-1])
    assert found["adapter_minus_merged"] <= LOGITS_ATOL < 20 * LOGITS_ATOL < found["adapter_minus_base"]


@pytest.mark.parametrize("method", JOBS)
def test_a_job_its_adapter_its_merges_and_its_continuation(method: str, tmp_path: Path) -> None:
    family, sections = JOBS[method]
    base = build_base(family, tmp_path / "base")
    answer = finished(tmp_path, base, "job", **sections)
    job, result = open_job(tmp_path / "job"), answer["result"]
    assert result["after"]["loss"] < result["before"]["loss"]
    trained = {entry.name: entry.trainable_parameters for entry in job.plan().classes}
    again = 0 if method == "dora" else sum(trained.values()) - trained.get("router", 0)
    assert result["adapter"]["parameters"] == sum(trained.values()) + again
    merge = studio("merge", tmp_path / "job", "--out", tmp_path / "auto", "--json")
    assert merge.returncode == 0, merge.stdout + merge.stderr
    losses = json.loads(merge.stdout)["into"]["losses"]
    assert losses["quantized"] == pytest.approx(result["after"]["loss"], rel=1e-2)  # of other held-out examples

    adapter = tmp_path / "job" / "adapter"
    if method != "dora":  # the compact form is for experts
        convert = studio("convert", adapter, tmp_path / "compact", "--to", "compact")
        assert convert.returncode == 0, convert.stderr
        adapter = tmp_path / "compact"
    kept = {name: value for name, value in sections.items() if name == "router"}
    further = {"adapter": {"start_from": str(adapter)}, "training": {"max_steps": 4, "learning_rate": 1e-3}, **kept}
    gone_on = finished(tmp_path, base, "further", **further)["result"]
    assert gone_on["start"]["loss"] == pytest.approx(result["after"]["loss"], rel=1e-4)
    assert gone_on["after"]["loss"] < gone_on["start"]["loss"]
    assert gone_on["change_from_start"]["loss"]["value"] == gone_on["after"]["loss"] - gone_on["start"]["loss"]
    assert set(gone_on["generations"][0]) == {"prompt", "reference", "base", "start", "tuned"}
    alone = json.loads(studio("evaluate", tmp_path / "further", "--examples", "8", "--json").stdout)  # without PEFT
    for found in (result, gone_on):  # the base is the base, whatever the adapter begins with
        assert found["before"]["metrics"] == alone["before"]["metrics"]
    routed, again = (load_file(tmp_path / name / "profile.safetensors") for name in ("job", "further"))
    assert all(torch.equal(routed[name], again[name]) for name in routed)  # "use" in the pictures: of the base, too
    assert alone["after"]["loss"] == pytest.approx(gone_on["after"]["loss"], rel=1e-4)
    assert gone_on["adapter"]["parameters"] == result["adapter"]["parameters"]
    record = json.loads((tmp_path / "further" / "adapter" / "placement.json").read_text())
    assert record["rule"] == "start_from" and record["method"]["start"] == sections["adapter"].get("init", "zero")
    stock_agrees(tmp_path, base, tmp_path / "further" / "adapter", "further-original")


def test_an_adapter_that_cannot_go_on_here_is_refused_before_any_work(tmp_path: Path) -> None:
    base = build_base("llama4_text", tmp_path / "base")
    finished(tmp_path, base, "job", adapter={"init": "loftq"}, training={"max_steps": 1}, data={"eval": None})
    other = build_base("qwen3_moe", tmp_path / "other")
    job = str(tmp_path / "job")
    for sections, words in (
        ({"model": {"base": str(other)}}, "another model, or the same one changed since"),
        ({"router": {"mode": "full"}}, "set router.mode to frozen"),
        ({"model": {"base": str(base), "quantization": "int8"}}, "set model.quantization: nf4"),
        ({"adapter": {"start_from": str(base)}}, "holds no adapter_config.json and weights beside it"),
        ({"adapter": {"start_from": job, "rslora": True}}, "start_from takes the method of the adapter"),
    ):
        whole = {
            "model": {"base": str(base)},
            "adapter": {"start_from": job},
            "output": {"dir": str(tmp_path / "next")},
        }
        whole |= sections
        run = studio("plan", write_recipe(tmp_path / "recipe.yaml", **whole))
        said = " ".join((run.stdout + run.stderr).replace("│", " ").split())
        assert run.returncode == 1 and words in said, said
