"""DoRA on linear layers against stock PEFT and its formula: training, files, merges, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from adapters.continuing import load_adapter, placement_of
from adapters.errors import AdapterFileError, TargetError
from adapters.factors import parts_of
from adapters.loading import load_base
from adapters.lora import attach, lora_linears
from adapters.merge import merge_adapter
from adapters.merged import MergedWeights
from adapters.peft_files import save_adapter
from adapters.placement import Method, Placement
from adapters.quantized_linear import dense_weight
from adapters.routed import use_routed_experts
from adapters.verify.peft_reading import PeftReading
from adapters.verify.reference import put_on
from tests.numerics.conftest import EXPERTS, Tiny, load_plain, randomise, save
from tests.numerics.test_merge_into import HELD, options

DORA = Method(dora=True)
LLAMA4, UNEVEN = Tiny("llama4_text", 64, 64, 1), Tiny("llama4_text", 72, 40, 1)
SHARED = Placement(attention=4, shared_expert=3, alpha=8.0, method=DORA)


def test_training_is_that_of_stock_peft(tmp_path: Path, ids: Tensor) -> None:
    tiny = Tiny("gpt_oss", 64, 32, 2)  # its attention has biases
    base = save(tiny, tmp_path)
    config = LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=list(tiny.layout.attention))
    stock = get_peft_model(use_routed_experts(tiny.model_class.from_pretrained(base)), config).double()
    ours = attach(load_plain(base), Placement(attention=4, alpha=8, method=DORA)).double()
    for (_, mine), (_, theirs) in zip(lora_linears(ours, "default"), lora_linears(stock, "default"), strict=True):
        for side in ("lora_A", "lora_B"):
            getattr(mine, side)["default"].weight.data.copy_(getattr(theirs, side)["default"].weight)
    results: list[list[Tensor]] = []
    for model in (stock, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        results.append([model(ids).logits, *(named[name] for name in sorted(named))])
    assert len(results[0]) == len(results[1]) == 1 + 3 * 2 * 4
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)  # ours are float32 norms


@pytest.mark.parametrize("held", ["nf4", "int8", None])
@pytest.mark.parametrize("tiny", [LLAMA4, UNEVEN], ids=str)
def test_begins_as_the_base_and_files_and_merges_give_what_training_had(
    tiny: Tiny, held: str | None, tmp_path: Path, ids: Tensor
) -> None:
    base = save(tiny, tmp_path)
    how: dict[str, Any] = options(HELD[held]) if held else {"quantize": "none"}
    model = attach(load_base(base, **how), SHARED).eval()
    adapter, kept = tmp_path / "adapter", HELD[held] if held else None
    with torch.no_grad():
        fresh = load_base(base, **how)(ids).logits
        torch.testing.assert_close(model(ids).logits, fresh, rtol=0, atol=2e-5)
        magnitudes = [m.lora_magnitude_vector["default"].weight for _, m in lora_linears(model, "default")]
        randomise(model, std=0.1)
        for (_, module), begun in zip(lora_linears(model, "default"), magnitudes, strict=True):
            norms = dense_weight(module.get_base_layer()).norm(dim=1)
            begun.data.copy_(norms * (1 + 0.3 * torch.randn(len(norms))))
        trained = model(ids).logits
        assert (trained - fresh).abs().max() > 0.1
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, fresh)
        save_adapter(model, SHARED, adapter, base_name="base", base=base, held=kept)
        merge_adapter(base, adapter, tmp_path / "merged", held=kept)
        torch.testing.assert_close(load_plain(tmp_path / "merged")(ids).logits, trained, rtol=0, atol=3e-4)
        reference = load_base(base, **how)
        put_on(reference, PeftReading(adapter, base), tiny.layout)
        torch.testing.assert_close(reference(ids).logits, trained, rtol=0, atol=3e-4)
        if held:
            merge_adapter(base, adapter, tmp_path / "original")
        stock = PeftModel.from_pretrained(tiny.model_class.from_pretrained(base), adapter)(ids).logits
        original = load_plain(tmp_path / ("original" if held else "merged"))(ids).logits
        torch.testing.assert_close(original, stock, rtol=0, atol=2e-4)
        again = attach(load_base(base, **how), SHARED).eval()
        again(ids)  # a norm is remembered, and must not be used for other factors
        load_adapter(again, SHARED, adapter)
        assert torch.equal(again(ids).logits, trained)
        for each in (model, again):
            for _, module in lora_linears(each, "default"):
                module.lora_B["default"].weight.mul_(2)
        torch.testing.assert_close(again(ids).logits, model.train()(ids).logits, rtol=0, atol=1e-6)
    assert placement_of(adapter, tiny.layout) == SHARED


def test_a_further_adapter_of_the_same_config_is_ours_too(tmp_path: Path, ids: Tensor) -> None:
    model: Any = attach(load_base(save(UNEVEN, tmp_path)), SHARED).eval()
    randomise(model, std=0.1)
    with torch.no_grad():
        want = model(ids).logits
        model.add_adapter("ref", model.peft_config["default"])
        for name, parameter in list(model.named_parameters()):
            if ".default." in name:
                model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
        model.set_adapter("ref")
        assert torch.equal(model(ids).logits, want)


def test_dropout_is_on_the_factors_alone(tmp_path: Path, ids: Tensor) -> None:
    placed = replace(SHARED, method=replace(DORA, dropout=0.4))
    model = attach(load_plain(save(LLAMA4, tmp_path)), placed).train()
    with torch.no_grad():  # B is 0: nothing of the adapter depends on what is dropped
        torch.testing.assert_close(model(ids).logits, load_plain(tmp_path / "base")(ids).logits, rtol=0, atol=2e-5)
    randomise(model, std=0.1)
    assert not torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("placed", "family", "message"),
    [
        (replace(SHARED, routed=((4,) * EXPERTS,) * 2), "llama4_text", "no DoRA on stacks of experts"),
        (replace(SHARED, router=2), "llama4_text", "no DoRA beside adapted routers"),
        (replace(SHARED, router_full=True), "llama4_text", "no DoRA beside adapted routers"),
        (SHARED, "deepseek_v3", "by the name of their parameter alone"),
        (replace(SHARED, method=Method(dora=True, start="pissa")), "llama4_text", "which no magnitude fits"),
    ],
)
def test_what_stock_peft_could_not_load_is_refused(
    placed: Placement, family: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(TargetError, match=message):
        attach(load_plain(save(Tiny(family, 64, 32, 2), tmp_path)), placed)


def test_stock_peft_refuses_what_is_refused_here(tmp_path: Path) -> None:
    """Where this goes red, DoRA beside experts and routers has come within reach."""
    base = save(Tiny("qwen3_moe", 64, 32, 2), tmp_path)
    for target in ("mlp.experts.down_proj", "mlp.gate.weight"):
        config = LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], target_parameters=[target])
        with pytest.raises(ValueError, match="does not work with use_dora=True"):
            get_peft_model(LLAMA4.model_class.from_pretrained(base), config)


def test_other_forms_and_combining_refuse_it(tmp_path: Path) -> None:
    base = save(LLAMA4, tmp_path)
    save_adapter(attach(load_plain(base), SHARED), SHARED, tmp_path / "adapter", base_name="base", base=base)
    read = MergedWeights(base, tmp_path / "adapter").adapter
    assert read is not None
    with pytest.raises(AdapterFileError, match="its change is no product of two thin factors"):
        parts_of(read)


def test_the_norm_that_an_evaluation_left_serves_a_backward(tmp_path: Path, ids: Tensor) -> None:
    model = attach(load_plain(save(LLAMA4, tmp_path)), Placement(attention=4, method=DORA)).eval()
    randomise(model, std=0.1)
    with torch.inference_mode():
        before = model(ids).logits.clone()
    logits = model(ids).logits
    torch.testing.assert_close(logits, before, rtol=0, atol=0)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
