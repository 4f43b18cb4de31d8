"""A reward model's job directory as a reward: its scores against stock transformers and stock PEFT."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from adapters.applied import AppliedAdapter
from adapters.fingerprint import file_sha256
from adapters.loading import load_base
from adapters.lora import attach
from adapters.peft_files import save_adapter
from studio.data import read_examples
from studio.encoding import template
from studio.errors import RewardError
from studio.job_files import read_json_lines
from studio.jobs import Job, create_job, open_job
from studio.merging import merge
from studio.methods import REWARD_HEAD
from studio.placing import placement_record, plan_placement
from studio.plan import make_plan, recipe_base
from studio.recipe_training import RewardSettings
from studio.reward_model import RewardModel, add_reward_head, save_reward_head
from studio.rewards import REWARDS, Attempt
from studio.rewards.model import check_reward_model, load_scorer
from studio.score_head import WRITTEN
from tests.e2e.conftest import TICKETS, build_base, studio, write_recipe
from tests.e2e.test_online import recipe_for

EXAMPLES = read_examples(TICKETS / "tickets-eval.jsonl")[:20]


def reward_job(base: Path, folder: Path, models: list[Any] | None = None, **sections: Any) -> Job:
    """The directory of a finished job, with an adapter and a head whose weights are not those they began with.

    The model that was trained is put into `models`.
    """
    recipe = recipe_for(base, folder, **{"model": {"quantization": "none"}, **sections})
    shapes = recipe_base(recipe)
    placement = plan_placement(recipe, shapes)
    job, lock = create_job(recipe, make_plan(recipe), placement_record(recipe, shapes, placement, None))
    os.close(lock)
    model = attach(load_base(base, quantize=recipe.model.quantization, dtype=torch.float32), placement, base=base)
    add_reward_head(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape), alpha=0.1) if "magnitude" in name else parameter.normal_(
                    std=0.1
                )
    held = (
        None if recipe.model.quantization == "none" else {"quantization": recipe.model.quantization, "dtype": "float32"}
    )
    save_adapter(model, placement, job.path / "adapter", base_name=str(base), base=base, held=held)
    save_reward_head(model, job.path / "adapter")
    if models is not None:
        models.append(model.eval())
    return job


@pytest.mark.parametrize("family", ["llama4_text", "qwen3_moe"])
def test_scores_equal_those_of_stock_peft_and_the_head(family: str, tmp_path: Path) -> None:
    base = build_base(family, tmp_path / family)
    job = reward_job(base, tmp_path)
    settings = RewardSettings(function="reward_model", job=job.path)
    check_reward_model(settings)
    attempts = [Attempt(f"{row.completion[0].content} {'and ' * n}", row) for n, row in enumerate(EXAMPLES)]
    found = REWARDS["reward_model"].build(settings)(attempts)
    texts = [(attempt.prompt, attempt.completion) for attempt in attempts]
    assert found == pytest.approx(stock_scores(base, job, texts), abs=2e-4)
    assert len({round(value, 3) for value in found}) > 10
    assert load_scorer(job.path) is load_scorer(job.path)


def stock_scores(base: Path, job: Job, texts: list[tuple[str, str]]) -> list[float]:
    """Of (prompt, answer) pairs: the head on the last hidden state of stock transformers and stock PEFT."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), job.path / "adapter"
    )
    weight = load_file(job.path / "adapter" / REWARD_HEAD)["weight"][0]
    values = []
    for prompt, answer in texts:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        ids = torch.tensor([tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)])
        with torch.no_grad():
            hidden = stock(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
        values.append(float(weight @ hidden))
    return values


@pytest.mark.parametrize("family", ["llama4_text", "qwen3_moe"])
def test_a_merged_reward_model_scores_as_its_adapter_does(family: str, tmp_path: Path) -> None:
    base = build_base(family, tmp_path / family)
    job, out = reward_job(base, tmp_path), tmp_path / "merged"
    merged = merge(job.path, out, dtype="float32")
    assert merged["head"] == {"class": None if family == "llama4_text" else "Qwen3MoeForSequenceClassification"}
    assert {check["status"] for check in merged["checks"]} <= {"passed", "not run"} and merged["checks"][-1][
        "name"
    ] == WRITTEN
    assert merged["sha256"] == {file.name: file_sha256(file) for file in sorted(out.iterdir())}
    settings = RewardSettings(function="reward_model", job=out)
    check_reward_model(settings)
    texts = [(row.prompt[-1].content, f"{row.completion[0].content} {'and ' * n}") for n, row in enumerate(EXAMPLES)]
    attempts = [Attempt(text, row) for (_, text), row in zip(texts, EXAMPLES, strict=True)]
    wanted = stock_scores(base, job, texts)
    plain, beside, whole = (make_plan(recipe_for(base, tmp_path / "next", rewards=rewards)).memory for rewards in (
        [{"function": "regex", "pattern": "a"}],
        [{"function": "reward_model", "job": str(job.path)}],
        [{"function": "reward_model", "job": str(out)}],
    ))  # fmt: skip
    assert beside.reward_models_bytes > job.plan().bytes > plain.reward_models_bytes == 0
    assert whole.reward_models_bytes == pytest.approx(job.plan().bytes, rel=0.01)  # float32 both, and the head
    assert REWARDS["reward_model"].build(settings)(attempts) == pytest.approx(wanted, abs=2e-4)
    if family == "llama4_text":
        return
    tokenizer = AutoTokenizer.from_pretrained(out)
    turns = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in texts]
    batch = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt", padding=True)
    stock = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32)
    assert stock.config.num_labels == 1 and stock.config.id2label == {0: "reward"}
    with torch.no_grad():
        assert stock(**batch).logits[:, 0].tolist() == pytest.approx(wanted, abs=2e-4)


@pytest.mark.parametrize("method", [{"init": "loftq"}, {"init": "pissa"}, {"dora": True, "routed_experts_rank": 0}])
def test_a_reward_model_scores_as_in_training_whatever_its_adapter_is(method: dict[str, Any], tmp_path: Path) -> None:
    base = build_base("llama4_text", tmp_path / "llama4_text")
    rule = {"placement": {"rule": "shared"}} if "dora" in method else {}
    models: list[Any] = []
    job = reward_job(base, tmp_path, models, model={"quantization": "nf4"}, adapter=method, **rule)
    tokenizer = AutoTokenizer.from_pretrained(base)
    attempts = [Attempt(row.completion[0].content, row) for row in EXAMPLES[:4]]
    wanted = []
    for row in EXAMPLES[:4]:
        ids = torch.tensor([template(tokenizer, row, row.turns, add_generation_prompt=False)])
        with torch.no_grad():
            wanted.append(float(RewardModel(models[0])(ids, torch.ones_like(ids)).logits))
    found = REWARDS["reward_model"].build(RewardSettings(function="reward_model", job=job.path))(attempts)
    assert found == pytest.approx(wanted, abs=2e-3)
    fresh, adapter = load_base(base, quantize="nf4", dtype=torch.float32), job.path / "adapter"
    with torch.no_grad(), AppliedAdapter(fresh, adapter):  # as `studio evaluate` has it
        torch.testing.assert_close(fresh(ids).logits, models[0](ids).logits, atol=2e-3, rtol=1e-3)


def test_what_a_killed_merge_left_of_a_head_is_no_part_of_the_next(tmp_path: Path) -> None:
    base = build_base("qwen3_moe", tmp_path / "qwen3_moe")
    job, out, left = reward_job(base, tmp_path), tmp_path / "merged", tmp_path / ".merged.partial"
    whole = merge(job.path, out, dtype="float32")
    out.rename(left)  # killed after the head was written and before the folder had its name
    assert merge(job.path, out, dtype="float32")["sha256"] == whole["sha256"]


def test_a_head_where_conversations_end_with_the_padding_is_read_by_transformers_one_at_a_time(tmp_path: Path) -> None:
    base = build_base("qwen3_moe", tmp_path / "qwen3_moe")
    tokenizer = AutoTokenizer.from_pretrained(base)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    last = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)[-1]
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(last)
    tokenizer.save_pretrained(base)
    job = reward_job(base, tmp_path)
    merge(job.path, tmp_path / "merged", dtype="float32")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = tokenizer.apply_chat_template(turns, tokenize=True, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        assert stock(ids).logits[0].tolist() == pytest.approx(stock_scores(base, job, [("a", "b")]), abs=2e-4)
        with pytest.raises(ValueError, match="batch sizes > 1"):
            stock(ids.repeat(2, 1))


def test_a_reward_job_is_the_reward_of_a_grpo_job_on_prompts_alone(tmp_path: Path) -> None:
    base = build_base("llama4_text", tmp_path / "llama4_text")
    common: dict[str, Any] = {"model": {"base": str(base), "quantization": "none"}, "router": {"watch": False}}
    pairs = {"train": str(TICKETS / "ticket-pairs-train.jsonl"), "eval": None}
    training = {"method": "reward", "max_steps": 2, "batch_size": 4}
    ranked = write_recipe(
        tmp_path / "r.yaml", **common, data=pairs, training=training, output={"dir": str(tmp_path / "r")}
    )
    run = studio("run", ranked)
    assert run.returncode == 0, run.stdout + run.stderr
    asked = [{"prompt": row.prompt[-1].content} for row in EXAMPLES]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    recipe = yaml.safe_load(
        write_recipe(
            tmp_path / "g.yaml",
            **common,
            data={name: str(tmp_path / "prompts.jsonl") for name in ("train", "eval")},
            training={"method": "grpo", "max_steps": 2},
            sampling={"completions": 4, "max_new_tokens": 8},
            output={"dir": str(tmp_path / "g")},
        ).read_text()
    )
    recipe["rewards"] = [{"function": "reward_model", "job": str(tmp_path / "r")}]
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(recipe))
    run = studio("run", tmp_path / "g.yaml", "--json")
    assert run.returncode == 0, run.stdout + run.stderr
    samples = read_json_lines(tmp_path / "g" / "samples.jsonl")
    texts = [(sample["prompt"], sample["completion"]) for sample in samples]
    assert len(samples) == 2 * 4
    wanted = stock_scores(base, open_job(tmp_path / "r"), texts)
    assert [sample["reward"] for sample in samples] == pytest.approx(wanted, abs=2e-4)
    after = json.loads(run.stdout)["result"]["after"]
    assert after["loss"] is None and set(after["metrics"]) == {"reward", "reward/reward_model"}


def test_what_is_no_reward_model_is_refused_before_any_work(tmp_path: Path) -> None:
    base = build_base("qwen3_moe", tmp_path / "qwen3_moe")
    job = reward_job(base, tmp_path)
    (job.path / "adapter" / REWARD_HEAD).unlink()
    with pytest.raises(RewardError, match=r"holds no reward_head\.safetensors"):
        check_reward_model(RewardSettings(function="reward_model", job=job.path))
    with pytest.raises(RewardError, match="reward_model"):
        check_reward_model(RewardSettings(function="reward_model", job=tmp_path / "none"))
