"""A router trained fully: what is trained, and its file in stock PEFT and in a merge, family by family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from adapters.checkpoint import read_index
from adapters.compact import to_compact, to_standard
from adapters.errors import TargetError
from adapters.layouts import layout_for
from adapters.lora import attach
from adapters.merge import merge_adapter
from adapters.peft_files import WEIGHTS, save_adapter
from adapters.placement import Placement, same_experts_everywhere
from adapters.routed import use_routed_experts
from adapters.tensor_files import read_tensor
from tests.numerics.conftest import EACH, EXPERTS, MOE_LAYERS, Tiny, load_plain, randomise, save
from tests.numerics.test_families import stock_model

ALONE = Placement(router_full=True, alpha=7)
JOINED = Placement(attention=8, router_full=True, routed=same_experts_everywhere(4, MOE_LAYERS, EXPERTS), alpha=7)
FAMILIES = (
    "llama4_text",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    "granitemoe",
    "phimoe",
    "minimax_m2",
    "hunyuan_v1_moe",
)
SOME = [tiny for tiny in EACH if tiny.family in FAMILIES]


def router_weights(model: torch.nn.Module, tiny: Tiny) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if f".{tiny.layout.router}." in name and p.requires_grad}


@pytest.mark.parametrize("placement", [ALONE, JOINED], ids=["alone", "joined"])
@pytest.mark.parametrize("tiny", SOME, ids=str)
def test_stock_peft_and_the_merge_give_our_logits(
    tiny: Tiny, placement: Placement, tmp_path: Path, ids: Tensor
) -> None:
    base = save(tiny, tmp_path)
    model = attach(load_plain(base), placement).eval()
    randomise(model, std=0.1)
    save_adapter(model, placement, tmp_path / "adapter", base_name="base")
    stock = PeftModel.from_pretrained(stock_model(base), str(tmp_path / "adapter")).eval()
    report = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    with torch.no_grad():
        found = model(ids).logits
        assert (found - stock_model(base)(ids).logits).abs().max() > 1e-2
        torch.testing.assert_close(stock(ids).logits, found, rtol=0, atol=5e-5)
        torch.testing.assert_close(stock_model(tmp_path / "merged")(ids).logits, found, rtol=0, atol=5e-5)
    if placement is ALONE:
        assert report.changed == MOE_LAYERS


@pytest.mark.parametrize("tiny", SOME, ids=str)
def test_the_merged_router_is_the_weight_plus_what_was_trained_to_the_bit(tiny: Tiny, tmp_path: Path) -> None:
    base = save(tiny, tmp_path)
    model = attach(load_plain(base), JOINED)
    randomise(model, std=0.1)
    save_adapter(model, JOINED, tmp_path / "adapter", base_name="base")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    before, after = read_index(base), read_index(tmp_path / "merged")
    layout = layout_for(tiny.family, before)
    trained = router_weights(model, tiny)
    assert len(trained) == MOE_LAYERS
    for name, delta in trained.items():
        weight = name.removeprefix("base_model.model.").replace("lora_A.default.", "")
        key = layout.checkpoint_key(weight)
        assert torch.equal(read_tensor(after[key]), read_tensor(before[key]) + delta)
    untrained = [k for k in before if layout.tensor_class(k) == "router" and not layout.takes_lora(k)]
    assert all(torch.equal(read_tensor(before[k]), read_tensor(after[k])) for k in untrained)
    assert untrained or tiny.family not in ("gpt_oss", "deepseek_v3")  # a bias, a correction


@pytest.mark.parametrize("tiny", SOME[:3], ids=str)
def test_training_moves_the_routers_weight_alone_and_the_base_comes_back(tiny: Tiny, ids: Tensor) -> None:
    """As a fully trained weight would be moved: the same gradient, also after adapters were off and on again."""
    stock = use_routed_experts(tiny.build())
    model = attach(use_routed_experts(tiny.build()), ALONE)
    with torch.no_grad():
        before = stock(ids).logits
        assert torch.equal(model(ids).logits, before)
    with model.disable_adapter():
        pass
    trained = router_weights(model, tiny)
    assert [p.shape for p in trained.values()] == [(EXPERTS, tiny.hidden)] * MOE_LAYERS
    assert len(trained) == sum(p.requires_grad for p in model.parameters())
    model(input_ids=ids, labels=ids).loss.backward()
    stock(input_ids=ids, labels=ids).loss.backward()
    for name, delta in trained.items():
        weight = name.removeprefix("base_model.model.").replace("lora_A.default.", "")
        torch.testing.assert_close(delta.grad, stock.get_parameter(weight).grad, rtol=0, atol=1e-6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    optimizer.step()
    with torch.no_grad():
        assert (model(ids).logits - before).abs().max() > 1e-3
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, before)


def test_a_checkpoint_brings_it_back_and_the_file_holds_the_identity(tmp_path: Path) -> None:
    tiny = SOME[0]
    base = save(tiny, tmp_path)
    model = attach(load_plain(base), JOINED)
    randomise(model)
    model.save_pretrained(tmp_path / "checkpoint")
    again = attach(load_plain(base), JOINED)
    again.load_adapter(str(tmp_path / "checkpoint"), "default", is_trainable=True)
    found, wanted = (dict(m.named_parameters()) for m in (again, model))
    assert all(
        torch.equal(found[name], p) and found[name].requires_grad == p.requires_grad for name, p in wanted.items()
    )
    save_adapter(model, JOINED, tmp_path / "adapter", base_name="base")
    to_compact(tmp_path / "adapter", tmp_path / "compact")
    to_standard(tmp_path / "compact", tmp_path / "again")
    written, again = (load_file(tmp_path / name / WEIGHTS) for name in ("adapter", "again"))
    assert written.keys() == again.keys() and all(torch.equal(again[name], t) for name, t in written.items())
    identities = [t for n, t in written.items() if "router.lora_B" in n]
    assert len(identities) == MOE_LAYERS and all(torch.equal(t, torch.eye(EXPERTS)) for t in identities)


def test_a_dense_model_has_no_router_to_train() -> None:
    with pytest.raises(TargetError, match="no tensor of class router in this llama model"):
        attach(Tiny("llama", 64, 96).build(), Placement(attention=2, router_full=True))
