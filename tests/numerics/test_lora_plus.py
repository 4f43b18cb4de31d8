"""LoRA+ through TRL's trainer, and rsLoRA's scale: against AdamW by hand, and in every file that is written."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from adapters.lora import ExpertLora, attach, lora_linears, set_lora_plus
from adapters.merge import merge_adapter
from adapters.merged import MergedWeights
from adapters.peft_files import save_adapter
from adapters.placement import Method
from studio.base import EMBEDDED_DIR
from studio.trainers.common import StudioTrainer
from studio.trainers.llama4 import repair_for_trl
from tests.numerics.conftest import Tiny, load_plain, randomise, save
from tests.numerics.test_expert_lora import placement_for

RATIO, RATE = 8.0, 1e-2


class _Trainer(StudioTrainer, SFTTrainer):
    pass


@pytest.mark.parametrize("router", ["lora", "full"])
def test_b_is_trained_at_its_own_rate_and_the_scheduler_keeps_the_ratio(router: str, tmp_path: Path) -> None:
    tiny = Tiny("llama4_text", 64, 32, 1)
    placed = replace(placement_for(tiny), router=0, router_full=True) if router == "full" else placement_for(tiny)
    model: Any = attach(load_plain(save(tiny, tmp_path)), placed)
    repair_for_trl(model.get_base_model())
    set_lora_plus(model, RATIO)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings: dict[str, Any] = {"max_steps": 2, "learning_rate": RATE, "lr_scheduler_type": "linear", "use_cpu": True}
    settings |= {"output_dir": str(tmp_path / "out"), "save_strategy": "no", "report_to": "none", "max_grad_norm": 0.0}
    settings |= {"per_device_train_batch_size": 1, "router_aux_loss_coef": 0.0, "bf16": False}
    rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 4)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_DIR)
    trainer = _Trainer(model=model, args=SFTConfig(**settings), train_dataset=rows, processing_class=tokenizer)
    trainer.watch = None
    gradients: list[dict[str, Tensor]] = []
    rates: list[list[float]] = []
    step = trainer.training_step

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        loss = step(*args, **kwargs)
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        return loss

    trainer.training_step = recorded  # type: ignore[method-assign]
    trainer.train()
    assert rates == [pytest.approx([RATE * f, RATE * f, RATE * RATIO * f]) for f in (1.0, 0.5)]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name]), name
            continue
        is_b = any(f".{factor}." in name for factor in ("lora_B", "lora_gate_up_B", "lora_down_B"))
        want, m, v = before[name].double(), 0.0, 0.0
        for number, (seen, factor) in enumerate(zip(gradients, (1.0, 0.5), strict=True), 1):
            g = seen[name].double()
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            move = (m / (1 - 0.9**number)) / ((v / (1 - 0.999**number)).sqrt() + 1e-8)
            want = want - RATE * factor * (RATIO if is_b else 1.0) * move
        torch.testing.assert_close(parameter.double(), want, rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize("tiny", [Tiny("llama4_text", 64, 32, 1), Tiny("qwen3_moe", 64, 32, 2)], ids=str)
@pytest.mark.parametrize("router", ["lora", "full"])
def test_rslora_has_one_scale_in_training_in_stock_peft_and_in_the_merge(
    tiny: Tiny, router: str, tmp_path: Path, ids: Tensor
) -> None:
    placed = replace(placement_for(tiny), method=Method(rslora=True))
    placed = replace(placed, router=0, router_full=True) if router == "full" else placed
    base = save(tiny, tmp_path)
    model = attach(load_plain(base), placed).eval()
    randomise(model, std=0.1)
    for _, module in lora_linears(model, "default"):
        rank = module.r["default"]
        assert module.scaling["default"] == pytest.approx(1.0 if rank == 6 else 12.0 / math.sqrt(rank))
    layer = next(module for module in model.modules() if isinstance(module, ExpertLora))
    assert layer.scaling["default"] == pytest.approx(12.0 / math.sqrt(5))  # 5: the largest rank of any expert
    save_adapter(model, placed, tmp_path / "adapter", base_name="base", base=base)
    read = MergedWeights(base, tmp_path / "adapter").adapter
    assert read is not None and all(f.scale == pytest.approx(12.0 / math.sqrt(5)) for f in read.experts.values())
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    with torch.no_grad():
        want = model(ids).logits
        stock = PeftModel.from_pretrained(tiny.model_class.from_pretrained(base), tmp_path / "adapter")
        torch.testing.assert_close(stock(ids).logits, want, rtol=0, atol=3e-5)
        torch.testing.assert_close(load_plain(tmp_path / "merged")(ids).logits, want, rtol=0, atol=1e-4)
