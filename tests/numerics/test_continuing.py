"""An adapter trained further: put back as it was saved, by us or by stock PEFT; and several adapters on one base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from adapters.adapter_files import WEIGHTS
from adapters.compact import to_compact
from adapters.continuing import load_adapter, placement_of
from adapters.errors import AdapterFileError, TargetError
from adapters.lora import attach
from adapters.peft_files import save_adapter
from adapters.placement import Method, Placement
from tests.numerics.conftest import EXPERTS, Tiny, load_plain, randomise, save
from tests.numerics.test_expert_lora import UNEVEN, placement_for

FAMILIES = [Tiny("llama4_text", 64, 32, 1), Tiny("qwen3_moe", 64, 32, 2), Tiny("deepseek_v3", 64, 32, 2)]
OTHER = ((2, 2, 0, 0, 0, 1), (0, 0, 0, 3, 3, 0))


def trained(base: Path, placement: Placement, seed: int = 1) -> PeftModel:
    model = attach(load_plain(base), placement)
    randomise(model, std=0.1, seed=seed)
    return model


def step(model: PeftModel, ids: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.eval()


@pytest.mark.parametrize("form", ["peft", "compact"])
@pytest.mark.parametrize("tiny", FAMILIES, ids=str)
def test_what_was_saved_goes_on_and_stock_peft_loads_the_result(
    tiny: Tiny, form: str, tmp_path: Path, ids: torch.Tensor
) -> None:
    base, placed = save(tiny, tmp_path), placement_for(tiny)
    model = trained(base, placed)
    save_adapter(model, placed, tmp_path / "peft", base_name="base", base=base)
    if form == "compact":
        to_compact(tmp_path / "peft", tmp_path / "compact")
    again = attach(load_plain(base), placed)
    load_adapter(again, placed, tmp_path / form)
    for (name, mine), theirs in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    step(model, ids)
    step(again, ids)
    with torch.no_grad():
        want = model(ids).logits
        assert torch.equal(again(ids).logits, want)
        save_adapter(again, placed, tmp_path / "result", base_name="base", base=base)
        stock = PeftModel.from_pretrained(tiny.model_class.from_pretrained(base), tmp_path / "result")
        torch.testing.assert_close(stock(ids).logits, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("tiny", FAMILIES, ids=str)
def test_ranks_are_read_from_files_alone(tiny: Tiny, tmp_path: Path) -> None:
    base, placed = save(tiny, tmp_path), placement_for(tiny)
    save_adapter(trained(base, placed), placed, tmp_path / "peft", base_name="base", base=base)
    to_compact(tmp_path / "peft", tmp_path / "compact")
    assert placement_of(tmp_path / "peft", tiny.layout) == placed
    assert placement_of(tmp_path / "compact", tiny.layout) == placed


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_stock_peft_goes_on(rslora: bool, tmp_path: Path, ids: torch.Tensor) -> None:
    tiny = Tiny("qwen3_moe", 64, 32, 2)
    base = save(tiny, tmp_path)
    config = LoraConfig(
        r=3,
        lora_alpha=7,
        use_rslora=rslora,
        target_modules=list(tiny.layout.attention),
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    stock = get_peft_model(tiny.model_class.from_pretrained(base), config).eval()
    randomise(stock, std=0.1)
    stock.save_pretrained(tmp_path / "stock")
    placed = placement_of(tmp_path / "stock", tiny.layout)
    assert placed == Placement(attention=3, routed=((3,) * EXPERTS,) * 2, alpha=7, method=Method(rslora=rslora))
    model = attach(load_plain(base), placed)
    load_adapter(model, placed, tmp_path / "stock")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, stock(ids).logits, rtol=0, atol=2e-5)


def test_a_placement_that_is_not_the_adapters_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    tiny = FAMILIES[0]
    base, placed = save(tiny, tmp_path), placement_for(tiny)
    save_adapter(trained(base, placed), placed, tmp_path / "adapter", base_name="base", base=base)
    for other, message in (
        (placement_for(tiny, OTHER), r"experts \[0, 2, 3, 4, 5\] have a larger rank in the file"),
        (placement_for(tiny, router=0), "router.weight is adapted in the file, and not by this placement"),
        (Placement(attention=8, dense_mlp=2, alpha=12.0), "feed_forward.gate_proj.weight has no factors"),
        (
            Placement(attention=4, shared_expert=4, router=2, routed=UNEVEN, alpha=12.0),
            r"q_proj.weight: A is \(8, 64\)",
        ),
    ):
        model = attach(load_plain(base), other)
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(AdapterFileError, match=message):
            load_adapter(model, other, tmp_path / "adapter")
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def names_of(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    return {key: p.detach().clone() for key, p in model.named_parameters() if f".{name}." in key}


@pytest.mark.parametrize("tiny", FAMILIES, ids=str)
def test_two_adapters_on_one_base(tiny: Tiny, tmp_path: Path, ids: torch.Tensor) -> None:
    base, first = save(tiny, tmp_path), placement_for(tiny)
    router = 0 if tiny.family == "qwen3_moe" else 1
    second = Placement(attention=2, router=router, routed=OTHER, alpha=3.0, method=Method(rslora=True))
    alone = [trained(base, placed, seed) for seed, placed in enumerate((first, second))]
    for number, (model, placed) in enumerate(zip(alone, (first, second), strict=True)):
        save_adapter(model, placed, tmp_path / str(number), base_name="base", base=base)
    both = attach(attach(load_plain(base), first, "one"), second, "two")
    load_adapter(both, first, tmp_path / "0", "one")
    load_adapter(both, second, tmp_path / "1", "two")
    both.eval()
    with torch.no_grad():
        for name, model in zip(("one", "two", "one"), (alone[0], alone[1], alone[0]), strict=True):
            both.set_adapter(name)
            assert torch.equal(both(ids).logits, model.eval()(ids).logits)
            with both.disable_adapter():
                assert torch.equal(both(ids).logits, load_plain(base)(ids).logits)
    both.set_adapter("two")
    kept, moved = names_of(both, "one"), names_of(both, "two")
    step(both, ids)
    assert all(torch.equal(kept[key], value) for key, value in names_of(both, "one").items()) and kept
    assert all(not torch.equal(moved[key], value) for key, value in names_of(both, "two").items() if "lora_B" in key)
    step(alone[1], ids)
    save_adapter(both, second, tmp_path / "two", base_name="base", base=base, name="two")
    save_adapter(alone[1], second, tmp_path / "alone", base_name="base", base=base)
    mine, alones = (load_file(tmp_path / name / WEIGHTS) for name in ("two", "alone"))
    assert mine.keys() == alones.keys() and all(torch.equal(mine[key], alones[key]) for key in mine)


def test_trl_makes_its_reference_of_an_adapter_on_experts(tmp_path: Path, ids: torch.Tensor) -> None:
    """As its DPO trainer does: add_adapter("ref", …), then every `.default.` copied to `.ref.`."""
    tiny = FAMILIES[0]
    base, placed = save(tiny, tmp_path), placement_for(tiny)
    model: Any = trained(base, placed).eval()
    with torch.no_grad():
        want = model(ids).logits
        model.add_adapter("ref", model.peft_config["default"])
        for name, parameter in list(model.named_parameters()):
            if ".default." in name:
                model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
        model.set_adapter("ref")
        assert torch.equal(model(ids).logits, want)


def test_names_of_adapters(tmp_path: Path) -> None:
    tiny = FAMILIES[0]
    model = attach(load_plain(save(tiny, tmp_path)), placement_for(tiny))
    for name in ("default", "a.b", ""):
        with pytest.raises(TargetError, match="a name without dots"):
            attach(model, placement_for(tiny), name)
