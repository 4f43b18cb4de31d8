"""Merging into the base as training held it: the values of the 4-bit model itself, and which of the two is chosen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adapters.errors import CheckpointError, ExportError
from adapters.loading import load_base
from adapters.lora import attach
from adapters.merge import merge_adapter
from adapters.merged import MergedWeights
from adapters.peft_files import save_adapter
from adapters.quantized import QuantizedStack
from adapters.sidecar import Sidecar, write_sidecar
from adapters.verify.memory import available_bytes
from studio import merge_choice
from studio.export_origin import Origin
from studio.merge_choice import choose_into, put_into
from tests.numerics.conftest import EACH, EXPERTS, MULTIMODAL, OTHER, Tiny, load_plain, randomise, save
from tests.numerics.test_families import placement

HELD: dict[str, dict[str, Any]] = {
    "nf4": {"quantization": "nf4", "int8_experts": [], "double_quant": True, "dtype": "float32"},
    "nf4, single": {"quantization": "nf4", "int8_experts": [], "double_quant": False, "dtype": "float32"},
    "fp4 in bfloat16": {"quantization": "fp4", "int8_experts": [], "double_quant": True, "dtype": "bfloat16"},
    "int8": {"quantization": "int8", "int8_experts": [], "double_quant": True, "dtype": "float32"},
    "hot experts in int8": {"quantization": "nf4", "int8_experts": [1, 4], "double_quant": True, "dtype": "float32"},
}


def options(held: dict[str, Any]) -> dict[str, Any]:
    return {
        "quantize": held["quantization"],
        "int8_experts": held["int8_experts"],
        "double_quant": held["double_quant"],
        "dtype": getattr(torch, held["dtype"]),
    }


def held_values(directory: Path, held: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every quantised tensor of the loaded model, dequantised: stacks by the engine, linears by an identity.

    Linears in 4 bit whose rows are no whole blocks are left out: bitsandbytes 0.50 dequantises them wrongly on a CPU.
    """
    model, found = load_base(directory, **options(held)), {}
    dtype = getattr(torch, held["dtype"])
    for name, module in model.named_modules():
        if isinstance(module, QuantizedStack):
            found[name] = torch.stack([module.dequantize(expert, dtype) for expert in range(module.experts)]).float()
        elif isinstance(module, nn.Linear) and not module.weight.dtype.is_floating_point:
            if module.in_features % 64 and held["quantization"] != "int8":
                continue
            bias, module.bias = module.bias, None
            found[f"{name}.weight"] = module(torch.eye(module.in_features, dtype=dtype)).t().float()
            module.bias = bias
    return found


@pytest.mark.parametrize("held", HELD.values(), ids=HELD.keys())
@pytest.mark.parametrize("tiny", [*OTHER[:4], EACH[6]], ids=str)
def test_held_values_are_those_of_the_loaded_model(tiny: Tiny, held: dict[str, Any], tmp_path: Path) -> None:
    compare_held(tiny, held, tmp_path)


@pytest.mark.parametrize("tiny", [*EACH, *MULTIMODAL], ids=str)
def test_held_values_of_every_family(tiny: Tiny, tmp_path: Path) -> None:
    compare_held(tiny, HELD["nf4"], tmp_path)


def compare_held(tiny: Tiny, held: dict[str, Any], tmp_path: Path) -> None:
    base = save(tiny, tmp_path)
    merged, want = MergedWeights(base, None, held), held_values(base, held)
    layout, seen = merged.layout, set()
    for name, value in want.items():
        if value.ndim == 3:
            sources = [layout.sources(name, expert) for expert in range(EXPERTS)]
            found = torch.stack([torch.cat([merged.read(s.key, s.expert) for s in each]) for each in sources])
            seen |= {source.key for each in sources for source in each}
        else:
            found = merged.read(layout.checkpoint_key(name))
            seen.add(layout.checkpoint_key(name))
        torch.testing.assert_close(found, value, rtol=0, atol=1e-6 if held["dtype"] == "float32" else 0)
    computed = {key for key in merged.index if merged.computed(key)}
    assert seen and seen <= computed
    left = {key for key in computed - seen if merged.index[key].shape[-1] % 64 == 0}
    assert not left


@pytest.mark.parametrize("family", ["llama4_text", "qwen3_moe", "gpt_oss", "mixtral", "qwen3"])
def test_merged_into_what_was_held_the_model_is_the_trained_one(family: str, tmp_path: Path, ids: torch.Tensor) -> None:
    tiny = Tiny(family, 64, 64)
    base, held = save(tiny, tmp_path), HELD["nf4"]
    trained = attach(load_base(base, **options(held)), placement(tiny)).eval()
    randomise(trained, std=0.07)
    save_adapter(trained, placement(tiny), tmp_path / "adapter", base_name="base", base=base, held=held)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "held", held=held)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "original")
    filled = load_plain(base)
    put_into(filled, MergedWeights(base, tmp_path / "adapter", held))
    with torch.no_grad():
        want = trained(ids).logits
        torch.testing.assert_close(load_plain(tmp_path / "held")(ids).logits, want, rtol=0, atol=2e-4)
        torch.testing.assert_close(filled(ids).logits, want, rtol=0, atol=2e-4)
        assert (load_plain(tmp_path / "original")(ids).logits - want).abs().max() > 1e-2


def test_what_is_merged_into_is_chosen_only_where_it_can_be(tmp_path: Path) -> None:
    tiny = Tiny("llama4_text", 64, 32, 1)
    base, adapter = save(tiny, tmp_path), tmp_path / "job" / "adapter"
    model = attach(load_plain(base), placement(tiny))
    save_adapter(model, placement(tiny), adapter, base_name="base", base=base, held=HELD["nf4"])
    assert choose_into(adapter, base, "quantized").held == HELD["nf4"]
    assert choose_into(adapter, base, "original").held is None
    chosen = choose_into(adapter, base, "auto")
    assert (chosen.into, chosen.losses) == ("original", None) and "no held-out data" in chosen.why
    sidecar = adapter / "studio_adapter.json"
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "held": None}))
    assert choose_into(adapter, base, "auto").into == "original"
    with pytest.raises(ExportError, match="does not say that it was trained on quantised weights"):
        choose_into(adapter, base, "quantized")


def test_a_base_with_nan_is_refused_when_it_is_quantised(tmp_path: Path) -> None:
    base = save(Tiny("llama4_text", 64, 32, 1), tmp_path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    next(tensor for name, tensor in tensors.items() if name.endswith("experts.down_proj"))[2, 1, 1] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    merged = MergedWeights(base, None, HELD["nf4"])
    key = next(key for key in merged.index if key.endswith("experts.down_proj"))
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        merged.read(key, 2)


def test_the_memory_that_a_control_group_leaves_decides_whether_both_are_measured() -> None:
    assert merge_choice.available_bytes is available_bytes


def test_experts_held_in_int8_alone_are_quantised_for_the_choice_and_for_the_plan(tmp_path: Path) -> None:
    held = {"quantization": "none", "int8_experts": [1], "double_quant": True, "dtype": "float32"}
    sidecar = Sidecar("peft", "tiny", None, held, "0.19.1", "qwen3_moe", {})
    write_sidecar(tmp_path, sidecar)
    assert choose_into(tmp_path, tmp_path, "quantized").held == held
    assert Origin(tmp_path, "tiny", tmp_path, None, sidecar).held == held
    write_sidecar(tmp_path, replace(sidecar, held={**held, "int8_experts": []}))
    assert choose_into(tmp_path, tmp_path, "auto").held is None
