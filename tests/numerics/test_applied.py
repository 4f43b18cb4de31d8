"""An adapter from its file, put on a base without PEFT, gives what the trained model gave, whatever its method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.applied import AppliedAdapter
from adapters.loading import load_base
from adapters.lora import attach
from adapters.peft_files import save_adapter
from adapters.placement import Method, Placement
from tests.numerics.conftest import Tiny, randomise, save
from tests.numerics.test_expert_lora import placement_for
from tests.numerics.test_merge_into import HELD

FAMILIES = [Tiny("llama4_text", 64, 64, 1), Tiny("qwen3_moe", 64, 64, 2), Tiny("deepseek_v3", 64, 64, 2)]


def cases(tiny: Tiny) -> dict[str, Placement]:
    whole = placement_for(tiny, router=2)
    return {
        "router lora": whole,
        "router full": replace(whole, router=0, router_full=True),
        "pissa": replace(whole, method=Method(start="pissa", rslora=True)),
        "loftq": replace(whole, method=Method(start="loftq")),
        "dora": Placement(attention=4, method=Method(dora=True)),
    }


@pytest.mark.parametrize("case", cases(FAMILIES[0]))
@pytest.mark.parametrize("tiny", FAMILIES, ids=str)
def test_the_adapter_of_a_file_is_the_trained_one(tiny: Tiny, case: str, tmp_path: Path, ids: Tensor) -> None:
    base, placement = save(tiny, tmp_path), cases(tiny)[case]

    def held() -> Any:
        return load_base(base, quantize="nf4", dtype=torch.float32).eval()

    trained = attach(held(), placement, base=base).eval()
    shift(trained)
    save_adapter(trained, placement, tmp_path / "adapter", base_name="base", base=base, held=HELD["nf4"])
    model = held()
    applied = AppliedAdapter(model, tmp_path / "adapter")
    with torch.no_grad():
        wanted, before = trained(input_ids=ids).logits, model(input_ids=ids).logits
        with applied:
            torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
            with applied.off():
                assert torch.equal(model(input_ids=ids).logits, before)
            torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(input_ids=ids).logits, before)
    assert (wanted - before).abs().max() > 0.02


def shift(model: Any) -> None:
    """Moves what is trained away from where it began."""
    began = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    randomise(model, std=0.1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in began:
                parameter.add_(began[name])
