"""Every family against stock transformers and stock PEFT, on a checkpoint in its own published form.

What is measured: logits, and the gradients of the inputs, of every base tensor and of every adapter tensor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Mxfp4Config, PreTrainedModel

from adapters.checkpoint import read_config, read_index
from adapters.errors import CheckpointError
from adapters.layouts import LAYOUTS, layout_for
from adapters.loading import check_quantized, load_base
from adapters.lora import attach
from adapters.merge import merge_adapter
from adapters.peft_files import adapter_tensors, save_adapter
from adapters.placement import Placement, same_experts_everywhere
from adapters.quantized import QuantizedStack
from adapters.routed import use_routed_experts
from adapters.tensor_files import read_tensor
from tests.numerics.conftest import (
    EACH,
    EXPERTS,
    MOE_LAYERS,
    MULTIMODAL,
    OTHER,
    Tiny,
    four_bit_values,
    load_plain,
    randomise,
    save,
)

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
        return Placement(attention=3, dense_mlp=5, alpha=5)
    return Placement(
        attention=3,
        shared_expert=4 if layout.shared_expert else 0,
        dense_mlp=5 if tiny.has_dense_layers else 0,
        router=2,
        routed=same_experts_everywhere(4, MOE_LAYERS, EXPERTS),
        alpha=7,
    )


EXTRA = {
    "qwen3_next": "mtp.layers.0.mlp.experts.0.up_proj.weight",
    "qwen3_5_moe": "mtp.layers.0.mlp.experts.gate_up_proj",
    "deepseek_v3": "model.layers.61.mlp.experts.0.up_proj.weight",
    "glm4_moe": "model.layers.46.eh_proj.weight",
    "ernie4_5_moe": "model.mtp_block.0.mlp.up_proj.weight",
}
"""Multi-token prediction, which stock passes over: published beside the language model, not loaded, kept by merges."""


STACKED = [tiny for tiny in OTHER if tiny.layout.checkpoint == "stacked"]
"""Both shapes where the files hold stacks: a square one shows no wrong axis by its size."""


@pytest.fixture(scope="module", params=EACH + STACKED + MULTIMODAL, ids=str)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp(request.param.family)
    found = Trained(request.param, save(request.param, folder), folder / "adapter")
    if request.param.family in EXTRA:
        weights = load_file(found.base / "model.safetensors")
        weights[EXTRA[request.param.family]] = torch.randn(5, 3)
        save_file(weights, found.base / "model.safetensors", metadata={"format": "pt"})
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
    """Equal within `atol`, or within `atol` of the tensor's largest value where that is above 1."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name],
            value,
            rtol=0,
            atol=atol * max(1.0, value.abs().max().item()),
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("dtype", ATOL, ids=str)
@pytest.mark.parametrize("tiny", EACH + OTHER, ids=str)
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
    theirs = dict(trained.stock().merge_and_unload().named_parameters())
    for name, parameter in merged.named_parameters():
        assert torch.equal(parameter, theirs[name]), name  # bit for bit
    merge_adapter(trained.base, trained.adapter, tmp_path / "rounded", dtype=torch.bfloat16)
    for name, parameter in stock_model(tmp_path / "rounded", dtype=torch.bfloat16).named_parameters():
        kept = name.endswith("e_score_correction_bias")  # as stock keeps it; some routers are held in float32 even so
        rounded = theirs[name] if kept else theirs[name].bfloat16().to(parameter.dtype)
        assert torch.equal(parameter, rounded), name
    with torch.no_grad():
        merged, adapted = merged.double(), adapted.double()  # what is left is the rounding of the files to float32
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0, atol=5e-5)
        assert (merged(ids).logits - trained.stock(adapter=False).double()(ids).logits).abs().max() > 1e-2
    before, after = read_index(trained.base), read_index(tmp_path / "merged")
    assert {k: (v.dtype, v.shape) for k, v in before.items()} == {k: (v.dtype, v.shape) for k, v in after.items()}
    assert (tmp_path / "merged" / "config.json").read_bytes() == (trained.base / "config.json").read_bytes()
    changed = {k for k in before if not torch.equal(read_tensor(before[k]), read_tensor(after[k]))}
    assert changed == adapted_keys(trained.base) and report.changed == len(changed)


def adapted_keys(base: Path) -> set[str]:
    index = read_index(base)
    layout = layout_for(read_config(base), index)
    return {key for key in index if layout.model_key(key) and layout.takes_lora(key)}


def test_4_bit_logits_equal_stock_on_the_dequantised_weights(trained: Trained, ids: Tensor) -> None:
    quantized, stock = load_base(trained.base), trained.stock(adapter=False)
    check_quantized(quantized)
    seen = set()
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            held = getattr(quantized.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
            if isinstance(held, QuantizedStack):
                parameter.copy_(torch.stack([held.dequantize(e, torch.float32) for e in range(EXPERTS)]))
            elif held.dtype == torch.uint8:
                parameter.copy_(four_bit_values(held))
            else:
                continue
            seen.add(trained.tiny.layout.tensor_class(name))
        torch.testing.assert_close(quantized(ids).logits, stock(ids).logits, rtol=0, atol=1e-5)
    assert "attention" in seen and ("routed_experts" in seen) == trained.tiny.layout.has_experts


def test_4_bit_training_reaches_every_adapter_and_its_checkpoint_restores_it(
    trained: Trained, tmp_path: Path, ids: Tensor
) -> None:
    model = attach(load_base(trained.base), placement(trained.tiny)).train()
    randomise(model, std=0.07)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model(input_ids=ids, labels=ids).loss.backward()
    adapters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert [name for name, p in adapters.items() if p.grad is None or not p.grad.any()] == []
    model.save_pretrained(tmp_path / "checkpoint")
    again = attach(load_base(trained.base), placement(trained.tiny))
    again.load_adapter(str(tmp_path / "checkpoint"), "default", is_trainable=True)
    compare({n: p for n, p in again.named_parameters() if p.requires_grad}, adapters, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_model_keeps_the_dtypes_of_stocks(trained: Trained, dtype: torch.dtype) -> None:
    """Some routing corrections and norms stay in float32 there."""
    stock = trained.stock(adapter=False, dtype=dtype).state_dict()
    loaded = load_plain(trained.base, dtype=dtype).state_dict()
    assert {n: t.dtype for n, t in loaded.items()} == {n: t.dtype for n, t in stock.items()}


@pytest.mark.parametrize(
    ("family", "modules"),
    [
        ("mixtral", ["q_proj", "w1", "w2", "w3"]),
        ("qwen3_moe", ["q_proj", "gate_proj", "up_proj", "down_proj"]),
        ("granitemoe", ["q_proj", "v_proj"]),
    ],
)
def test_an_adapter_that_stock_peft_targeted_by_old_names_merges_like_its_own(
    family: str, modules: list[str], tmp_path: Path
) -> None:
    """PEFT turns the expert names of transformers 4 into stacks of twice the rank, by patterns."""
    base = save(Tiny(family, 64, 32), tmp_path)
    stock = get_peft_model(stock_model(base), LoraConfig(r=3, lora_alpha=5, target_modules=modules))
    randomise(stock, std=0.07)
    stock.save_pretrained(tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    wanted = dict(stock.merge_and_unload().named_parameters())
    compare(dict(stock_model(tmp_path / "merged").named_parameters()), wanted, 1e-6)


@pytest.mark.parametrize("family", ["mixtral", "phimoe", "granitemoe", "ernie4_5_moe", "qwen3_5_moe"])
def test_a_checkpoint_under_the_models_own_names_loads_and_merges(family: str, tmp_path: Path, ids: Tensor) -> None:
    """As stock writes it when told not to restore the published names."""
    tiny, base = Tiny(family, 64, 32), tmp_path / "base"
    tiny.build().save_pretrained(base, save_original_format=False)
    model = attach(load_plain(base), placement(tiny)).eval()
    randomise(model, std=0.07)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, stock_model(base)(ids).logits, rtol=0, atol=1e-5)
    save_adapter(model, placement(tiny), tmp_path / "adapter", base_name="base")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(stock_model(tmp_path / "merged")(ids).logits, model(ids).logits, rtol=0, atol=1e-4)


def test_the_way_out_of_a_quantised_checkpoint_that_the_error_names_works(tmp_path: Path, ids: Tensor) -> None:
    base, plain = save(Tiny("gpt_oss", 64, 32), tmp_path), tmp_path / "plain"
    weights = load_file(base / "model.safetensors")
    for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, rows, cols = weights.pop(name).shape
        weights[f"{name}_blocks"] = torch.randint(0, 255, (experts, cols, rows // 32, 16), dtype=torch.uint8)
        weights[f"{name}_scales"] = torch.full((experts, cols, rows // 32), 121, dtype=torch.uint8)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(CheckpointError, match="quantised already") as error:
        load_plain(base)
    command = str(error.value).partition("stock transformers: ")[2]
    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "Mxfp4Config": Mxfp4Config, "path": base, "new_path": plain}
    eval(command, names)
    with torch.no_grad():
        found = load_plain(plain)(ids).logits
        torch.testing.assert_close(found, stock_model(plain, dtype=torch.float32)(ids).logits, rtol=0, atol=1e-5)


def test_a_multimodal_model_is_merged_whole_and_in_another_dtype(tmp_path: Path) -> None:
    tiny = MULTIMODAL[0]
    base = save(tiny, tmp_path)
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["dtype"] = "float32"
    (base / "config.json").write_text(json.dumps(config))
    model = attach(load_plain(base), placement(tiny))
    save_adapter(model, placement(tiny), tmp_path / "adapter", base_name="base")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", dtype=torch.bfloat16)
    merged, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    after = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert after["dtype"] == after["text_config"].pop("dtype") == "bfloat16"
    del config["text_config"]["dtype"]
    assert {**after, "dtype": "float32"} == config


def test_a_text_model_taken_out_of_a_multimodal_one_keeps_its_prefix_and_loads(tmp_path: Path, ids: Tensor) -> None:
    whole = save(Tiny("qwen3_5_moe", 64, 32), tmp_path)
    text = stock_model(whole)
    text.save_pretrained(tmp_path / "text")
    assert all(key.startswith(("model.language_model.", "lm_head.")) for key in read_index(tmp_path / "text"))
    with torch.no_grad():
        torch.testing.assert_close(load_plain(tmp_path / "text")(ids).logits, text(ids).logits, rtol=0, atol=1e-5)


def test_peft_reads_old_names_in_the_families_whose_layout_says_so() -> None:
    from peft.utils import transformers_weight_conversion as conversion

    rewritten = {
        name
        for name, pattern in conversion._MODEL_TO_CONVERSION_PATTERN.items()
        if "gate_proj" in conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, {})
    }
    assert {name for name, layout in LAYOUTS.items() if layout.peft_fuses} == rewritten & set(LAYOUTS)
