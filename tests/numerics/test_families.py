"""Every family against stock transformers and stock PEFT, on a checkpoint in its own published form.

What is measured: logits, and the gradients of the inputs, of every base tensor and of every adapter tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapters.checkpoint import read_index
from adapters.layouts import layout_for
from adapters.loading import check_quantized, load_base
from adapters.lora import attach
from adapters.merge import merge_adapter
from adapters.peft_files import adapter_tensors, save_adapter
from adapters.placement import Placement, same_experts_everywhere
from adapters.quantized import QuantizedStack
from adapters.routed import use_routed_experts
from tests.numerics.conftest import EACH, EXPERTS, MOE_LAYERS, Tiny, load_plain, randomise, save

ATOL = {torch.float64: 1e-12, torch.float32: 1e-5}


@dataclass(frozen=True)
class Trained:
    """A family's checkpoint and an adapter on every class that it has, written by us."""

    tiny: Tiny
    base: Path
    adapter: Path

    def stock(self, adapter: bool = True, **options: Any) -> Any:
        model = stock_model(self.base, **options)
        return PeftModel.from_pretrained(model, str(self.adapter), is_trainable=True).eval() if adapter else model


def stock_model(directory: Path, **options: Any) -> PreTrainedModel:
    """Stock's own loading, and its plain loop over the experts where it has several implementations."""
    model = AutoModelForCausalLM.from_pretrained(directory, **options).eval()
    if model.config.model_type != "llama4_text":
        model.set_experts_implementation("eager")
    return model


def placement(tiny: Tiny) -> Placement:
    layout = tiny.layout
    if not layout.has_experts:
        return Placement(attention=3, alpha=5)
    return Placement(
        attention=3,
        shared_expert=4 if layout.shared_expert else 0,
        router=2,
        routed=same_experts_everywhere(4, MOE_LAYERS, EXPERTS),
        alpha=7,
    )


@pytest.fixture(scope="module", params=EACH, ids=lambda tiny: tiny.family)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp(request.param.family)
    found = Trained(request.param, save(request.param, folder), folder / "adapter")
    model = ours(found)
    save_adapter(model, placement(found.tiny), found.adapter, base_name="base")
    return found


def ours(trained: Trained) -> PeftModel:
    model = attach(load_plain(trained.base), placement(trained.tiny)).eval()
    randomise(model, std=0.07)
    return model


def outcome(model: Any, ids: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Logits and input gradient of one step; parameters keep their gradients."""
    torch.manual_seed(5)
    inputs = torch.randn(*ids.shape, model.config.hidden_size, dtype=torch.float32).to(dtype).requires_grad_()
    output = model(inputs_embeds=inputs, labels=ids)
    output.loss.backward()
    return {"logits": output.logits.detach(), "inputs": inputs.grad}


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", ATOL, ids=str)
@pytest.mark.parametrize("tiny", EACH, ids=lambda tiny: tiny.family)
def test_output_and_every_base_gradient_equal_stock(tiny: Tiny, dtype: torch.dtype, ids: Tensor) -> None:
    model = tiny.build().to(dtype)
    if tiny.family != "llama4_text":
        model.set_experts_implementation("eager")

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        found = outcome(model, ids, dtype)
        return {**{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, **found}

    stock = run()
    use_routed_experts(model)
    if tiny.layout.has_experts:
        block = f".{tiny.layout.block}."
        for part in (f"{tiny.layout.experts}.gate_up_proj", f"{tiny.layout.experts}.down_proj", tiny.layout.router):
            assert sum(f"{block}{part}" in name for name in stock) >= MOE_LAYERS, part
    compare(run(), stock, ATOL[dtype])


@pytest.mark.parametrize("dtype", ATOL, ids=str)
def test_stock_peft_gives_our_logits_and_gradients(trained: Trained, dtype: torch.dtype, ids: Tensor) -> None:
    mine, stock = ours(trained).to(dtype), trained.stock().to(dtype)
    found, wanted = (outcome(model, ids, dtype) for model in (mine, stock))
    compare(found, wanted, ATOL[dtype])
    for parameter in mine.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.grad
    gradients = {n.removesuffix(".default.weight"): p.grad for n, p in stock.named_parameters() if p.requires_grad}
    layout = layout_for(mine.config.model_type)
    compare({n.removesuffix(".weight"): g for n, g in adapter_tensors(mine, layout).items()}, gradients, ATOL[dtype])


def test_merge_equals_stock_pefts_merge_in_the_bases_own_files(trained: Trained, tmp_path: Path, ids: Tensor) -> None:
    report = merge_adapter(trained.base, trained.adapter, tmp_path / "merged")
    merged = stock_model(tmp_path / "merged")
    adapted = trained.stock()
    compare(dict(merged.named_parameters()), dict(trained.stock().merge_and_unload().named_parameters()), 1e-6)
    with torch.no_grad():
        merged, adapted = merged.double(), adapted.double()  # what is left is the rounding of the files to float32
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0, atol=2e-5)
        assert (merged(ids).logits - trained.stock(adapter=False).double()(ids).logits).abs().max() > 1e-2
    before, after = read_index(trained.base), read_index(tmp_path / "merged")
    assert {k: (v.dtype, v.shape) for k, v in before.items()} == {k: (v.dtype, v.shape) for k, v in after.items()}
    assert (tmp_path / "merged" / "config.json").read_bytes() == (trained.base / "config.json").read_bytes()
    layout = layout_for(trained.tiny.family)
    assert report.changed == sum(
        layout.takes_lora(key) for key in before if layout.tensor_class(key) not in ("dense_mlp", "embeddings")
    )


def test_4_bit_logits_equal_stock_on_the_dequantised_weights(trained: Trained, ids: Tensor) -> None:
    import bitsandbytes.functional as bnb

    quantized, stock = load_base(trained.base), trained.stock(adapter=False)
    check_quantized(quantized)
    seen = set()
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            held = getattr(quantized.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
            if isinstance(held, QuantizedStack):
                parameter.copy_(torch.stack([held.dequantize(e, torch.float32) for e in range(EXPERTS)]))
            elif held.dtype == torch.uint8:
                parameter.copy_(bnb.dequantize_4bit(held.data, held.quant_state))
            else:
                continue
            seen.add(trained.tiny.layout.tensor_class(name))
        torch.testing.assert_close(quantized(ids).logits, stock(ids).logits, rtol=0, atol=1e-5)
    assert "attention" in seen and ("routed_experts" in seen) == trained.tiny.layout.has_experts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_model_keeps_the_dtypes_of_stocks(trained: Trained, dtype: torch.dtype) -> None:
    """Some routing corrections and norms stay in float32 there."""
    stock = trained.stock(adapter=False, dtype=dtype).state_dict()
    loaded = load_plain(trained.base, dtype=dtype).state_dict()
    assert {n: t.dtype for n, t in loaded.items()} == {n: t.dtype for n, t in stock.items()}
