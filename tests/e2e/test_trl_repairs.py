"""Each repair in studio/trainers/llama4.py is still needed: these fail once TRL works without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

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
