"""A reward model's job directory as a reward: its scores against stock transformers and stock PEFT."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.loading import load_base
from adapters.lora import attach
from adapters.peft_files import save_adapter
from studio.data import read_examples
from studio.encoding import template
from studio.errors import RewardError
from studio.jobs import Job, create_job
from studio.methods import REWARD_HEAD
from studio.placing import plan_placement
from studio.plan import make_plan, recipe_base
from studio.recipe_training import RewardSettings
from studio.reward_model import RewardModel, add_reward_head, save_reward_head
from studio.rewards import REWARDS, Attempt
from studio.rewards.model import check_reward_model, load_scorer
from tests.e2e.conftest import TICKETS, build_base
from tests.e2e.test_online import recipe_for

EXAMPLES = read_examples(TICKETS / "tickets-eval.jsonl")[:20]


def reward_job(base: Path, folder: Path, init: str = "zero") -> tuple[Job, Any]:
    """The directory of a finished job, with an adapter and a head whose weights are not those they began with; and its
    model. With a start that is not zero on a base in nf4."""
    quantization = "none" if init == "zero" else "nf4"
    adapter = {"attention_rank": 2, "shared_expert_rank": 0, "routed_experts_rank": 2, "init": init}
    recipe = recipe_for(base, folder, model={"quantization": quantization}, adapter=adapter)
    job, lock = create_job(recipe, make_plan(recipe), {})
    os.close(lock)
    placement = plan_placement(recipe, recipe_base(recipe))
    model = attach(load_base(base, quantize=quantization, dtype=torch.float32), placement, base=base)
    add_reward_head(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    held = recipe.model.model_dump(mode="json", exclude={"base"}) | {"dtype": "float32"} if init != "zero" else None
    save_adapter(model, placement, job.path / "adapter", base_name=str(base), base=base, held=held)
    save_reward_head(model, job.path / "adapter")
    return job, model


@pytest.mark.parametrize("family", ["llama4_text", "qwen3_moe"])
def test_scores_equal_those_of_stock_peft_and_the_head(family: str, tmp_path: Path) -> None:
    base = build_base(family, tmp_path / family)
    job, _ = reward_job(base, tmp_path)
    settings = RewardSettings(function="reward_model", job=job.path)
    check_reward_model(settings)
    attempts = [Attempt(f"{row.completion[0].content} {'and ' * n}", row) for n, row in enumerate(EXAMPLES)]
    found = REWARDS["reward_model"].build(settings)(attempts)
    tokenizer = AutoTokenizer.from_pretrained(base)
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), job.path / "adapter"
    )
    weight = load_file(job.path / "adapter" / REWARD_HEAD)["weight"][0]
    for value, attempt in zip(found, attempts, strict=True):
        turns = [{"role": "user", "content": attempt.prompt}, {"role": "assistant", "content": attempt.completion}]
        ids = torch.tensor([tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)])
        with torch.no_grad():
            hidden = stock(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
        assert value == pytest.approx(float(weight @ hidden), abs=2e-4)
    assert len({round(value, 3) for value in found}) > 10
    assert load_scorer(job.path) is load_scorer(job.path)


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_scores_equal_those_of_the_model_as_it_was_trained(init: str, tmp_path: Path) -> None:
    base = build_base("qwen3_moe", tmp_path / "qwen3_moe")
    job, trained = reward_job(base, tmp_path, init)
    tokenizer = AutoTokenizer.from_pretrained(base)
    found, scoring = load_scorer(job.path)(EXAMPLES), RewardModel(trained).eval()
    for value, row in zip(found, EXAMPLES, strict=True):
        ids = torch.tensor([template(tokenizer, row, row.turns, add_generation_prompt=False)])
        with torch.no_grad():
            assert value == pytest.approx(float(scoring(ids, torch.ones_like(ids)).logits), abs=2e-4)
    assert len({round(value, 3) for value in found}) > 10


def test_what_is_no_reward_model_is_refused_before_any_work(tmp_path: Path) -> None:
    base = build_base("qwen3_moe", tmp_path / "qwen3_moe")
    job, _ = reward_job(base, tmp_path)
    (job.path / "adapter" / REWARD_HEAD).unlink()
    with pytest.raises(RewardError, match=r"holds no reward_head\.safetensors"):
        check_reward_model(RewardSettings(function="reward_model", job=job.path))
    with pytest.raises(RewardError, match="reward_model"):
        check_reward_model(RewardSettings(function="reward_model", job=tmp_path / "none"))
