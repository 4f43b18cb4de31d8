"""Each repair in studio/trainers/ is still needed: these fail once TRL works without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from studio.trainers.llama4 import repair_for_trl
from tests.e2e.conftest import build_base


def sft_steps(base: Path, out: Path, repaired: bool) -> int:
    model = AutoModelForCausalLM.from_pretrained(base)
    if repaired:
        repair_for_trl(model)
    rows = [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}] * 2
    options = {"router_aux_loss_coef": 0.0, "report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False}
    args = SFTConfig(output_dir=str(out), max_steps=1, disable_tqdm=True, dataloader_pin_memory=False, **options)
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return trainer.train().global_step


def test_llama4_still_needs_its_base_model_prefix(tmp_path: Path) -> None:
    base = build_base("llama4_text", tmp_path / "base")
    assert sft_steps(base, tmp_path / "with", repaired=True) == 1
    with pytest.raises(Exception) as error:
        sft_steps(base, tmp_path / "without", repaired=False)
    assert not isinstance(error.value, AssertionError)


@pytest.mark.parametrize(("config", "trainer"), [(DPOConfig, DPOTrainer), (KTOConfig, KTOTrainer)])
def test_trl_still_copies_the_adapter_it_is_given_as_the_reference(tmp_path: Path, config: type, trainer: type) -> None:
    """studio/trainers/reference.py: with a copy, the reference would be the adapter's start, at twice its memory."""
    base = build_base("qwen3_moe", tmp_path / "base")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    options = {"report_to": "none", "use_cpu": True, "bf16": False, "router_aux_loss_coef": 0.0}
    args = config(output_dir=str(tmp_path / "out"), per_device_train_batch_size=2, **options)
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer(model=adapted, args=args, train_dataset=Dataset.from_list([row] * 2), processing_class=tokenizer)
    assert list(adapted.peft_config) == ["default", "ref"]


def test_llama4_still_has_no_class_for_a_reward_model(tmp_path: Path) -> None:
    """studio/reward_model.py: the head of our own."""
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForSequenceClassification.from_pretrained(build_base("llama4_text", tmp_path / "base"))


def test_trl_still_joins_the_rows_of_a_packed_batch_into_one(tmp_path: Path) -> None:
    """studio/trainers/packing.py: its mask grows with the square of batch x length, where ours grows with the batch."""
    base = build_base("qwen3_moe", tmp_path / "base")
    settings = {"per_device_train_batch_size": 2, "max_length": 96, "packing": True, "report_to": "none"}
    rows = Dataset.from_dict({"input_ids": [[5] * 60] * 4, "labels": [[5] * 60] * 4})
    args = SFTConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, router_aux_loss_coef=0.0, **settings)
    theirs = SFTTrainer(model=AutoModelForCausalLM.from_pretrained(base), args=args, train_dataset=rows)
    batch = next(iter(theirs.get_train_dataloader()))
    assert batch["input_ids"].shape == torch.Size([1, 120])


@pytest.mark.parametrize(("trainer", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_llama4_still_needs_it_in_online_training(trainer: Any, config: Any, tmp_path: Path) -> None:
    base = build_base("llama4_text", tmp_path / "base")

    def steps(repaired: bool) -> int:
        model = AutoModelForCausalLM.from_pretrained(base)
        if repaired:
            repair_for_trl(model)
        rows = Dataset.from_list([{"prompt": "a"}] * 2)
        options = {
            "router_aux_loss_coef": 0.0,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
        }
        sizes = {"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 2, "beta": 0.0}
        args = config(output_dir=str(tmp_path / "out"), max_steps=1, disable_tqdm=True, **sizes, **options)
        tokenizer = AutoTokenizer.from_pretrained(base)
        rewards = [lambda completions, **_: [float(len(text)) for text in completions]]
        made = trainer(model=model, reward_funcs=rewards, args=args, train_dataset=rows, processing_class=tokenizer)
        return int(made.train().global_step)

    assert steps(repaired=True) == 1
    with pytest.raises(Exception) as error:
        steps(repaired=False)
    assert not isinstance(error.value, AssertionError)
