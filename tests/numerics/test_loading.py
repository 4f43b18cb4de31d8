"""Streaming load: the same model as stock's, and bad checkpoints refused with everything that is wrong in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import filling
from adapters.errors import CheckpointError, LayoutError
from adapters.loading import load_base
from adapters.quantized import QuantizedStack
from adapters.routed import use_routed_experts
from tests.numerics.conftest import Tiny, four_bit_values, save


def test_streamed_logits_equal_the_in_memory_models_exactly(tiny: Tiny, saved: Path, ids: torch.Tensor) -> None:
    stock = tiny.model_class.from_pretrained(saved).eval()
    with torch.no_grad():
        streamed = load_base(saved, quantize="none")(ids).logits
        torch.testing.assert_close(streamed, stock(ids).logits, rtol=0, atol=1e-5)
        assert torch.equal(streamed, use_routed_experts(stock)(ids).logits)


def test_sharded_checkpoint_loads_the_same(square: Tiny, tmp_path: Path, ids: torch.Tensor) -> None:
    whole = save(square, tmp_path)
    square.build().save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    with torch.no_grad():
        pair = [load_base(path)(ids).logits for path in (whole, tmp_path / "shards")]
    assert torch.equal(*pair)


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8", "none"])
def test_pieces_of_any_length_fill_the_same(
    square: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: str
) -> None:
    directory = save(square, tmp_path)
    whole = load_base(directory, quantize=quantize).state_dict()
    for length in (64, 192, 1000):  # pieces that end within gate_proj, within up_proj, and across both
        monkeypatch.setattr(filling, "CHUNK", length)
        pieces = load_base(directory, quantize=quantize).state_dict()
        assert whole.keys() == pieces.keys()
        for name, tensor in whole.items():
            assert torch.equal(tensor, pieces[name]), (length, name)


@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8", "none"])
def test_parts_of_an_expert_in_different_dtypes_load_as_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: str
) -> None:
    directory = save(Tiny("qwen3_moe", 64, 32, 2), tmp_path)
    parts = {"gate_proj": torch.float16, "up_proj": torch.bfloat16}

    def round_parts(tensors: dict[str, torch.Tensor], keep: bool) -> None:
        for name, tensor in tensors.items():
            if dtype := parts.get(name.split(".")[-2]):
                tensors[name] = tensor.to(dtype) if keep else tensor.to(dtype).float()

    rewrite(directory, lambda tensors: round_parts(tensors, keep=False))
    expected = load_base(directory, quantize=quantize).state_dict()
    rewrite(directory, lambda tensors: round_parts(tensors, keep=True))
    monkeypatch.setattr(filling, "CHUNK", 192)  # pieces of one part, and across both
    found = load_base(directory, quantize=quantize).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("double_quant", [False, True])
def test_4_bit_logits_equal_stock_on_the_dequantised_weights(
    square: Tiny, tmp_path: Path, ids: torch.Tensor, double_quant: bool
) -> None:
    directory = save(square, tmp_path)
    ours = load_base(directory, double_quant=double_quant)
    stock = square.model_class.from_pretrained(directory).eval()
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            module = ours.get_submodule(name.rpartition(".")[0])
            held = getattr(module, name.rpartition(".")[2])
            if isinstance(held, QuantizedStack):
                parameter.copy_(torch.stack([held.dequantize(e) for e in range(held.experts)]))
            elif held.dtype == torch.uint8:
                parameter.copy_(four_bit_values(held))
        torch.testing.assert_close(ours(ids).logits, stock(ids).logits, rtol=0, atol=2e-6)


def test_gradients_reach_the_first_layer_after_an_evaluation(square: Tiny, tmp_path: Path, ids: torch.Tensor) -> None:
    """bitsandbytes repacks 4-bit linears at the first evaluation on some CPUs, into a form without a backward."""
    model = load_base(save(square, tmp_path))
    with torch.inference_mode():
        model.eval()(ids)
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    model.train()(inputs_embeds=inputs, labels=ids).loss.backward()
    assert inputs.grad is not None and inputs.grad.abs().sum() > 0


def rewrite(directory: Path, change) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_missing_experts_are_all_named(tmp_path: Path) -> None:
    qwen = save(Tiny("qwen3_moe", 64, 32, 2), tmp_path)
    gone = [f"model.layers.{n}.mlp.experts.{e}.up_proj.weight" for n, e in ((1, 2), (3, 5))]
    rewrite(qwen, lambda tensors: [tensors.pop(name) for name in gone])
    with pytest.raises(CheckpointError) as error:
        load_base(qwen)
    assert all(f"{name} is missing" in str(error.value) for name in gone)


def test_missing_expert_stack_is_refused(tmp_path: Path) -> None:
    llama = save(Tiny("llama4_text", 64, 32, 1), tmp_path)
    rewrite(llama, lambda tensors: tensors.pop("model.layers.1.feed_forward.experts.down_proj"))
    with pytest.raises(CheckpointError, match=r"experts\.down_proj is missing"):
        load_base(llama)


def test_wrong_shape_and_stray_tensor_are_reported_together(square: Tiny, tmp_path: Path) -> None:
    directory = save(square, tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = torch.ones(5)
        tensors["model.layers.0.self_attn.extra_norm.weight"] = torch.ones(3)

    rewrite(directory, change)
    with pytest.raises(CheckpointError) as error:
        load_base(directory)
    assert "model.norm.weight has shape (5,)" in str(error.value)
    assert "extra_norm.weight is not a tensor of this model" in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused_by_name(square: Tiny, tmp_path: Path, value: float) -> None:
    directory = save(square, tmp_path)
    key = next(k for k in load_file(directory / "model.safetensors") if "experts" in k and "down_proj" in k)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key].view(-1)[3] = value
        tensors["model.norm.weight"][0] = value

    rewrite(directory, change)
    with pytest.raises(CheckpointError) as error:
        load_base(directory)
    assert "holds NaN or infinity" in str(error.value) and "model.norm.weight" in str(error.value)
    assert len(error.value.problems) == 2


def test_truncated_file_is_refused_before_reading(square: Tiny, tmp_path: Path) -> None:
    directory = save(square, tmp_path)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        load_base(directory)


def test_missing_shard_is_named(square: Tiny, tmp_path: Path) -> None:
    square.build().save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    (tmp_path / "shards" / "model-00002-of-00005.safetensors").unlink(missing_ok=True)
    removed = sorted((tmp_path / "shards").glob("*.safetensors"))[-1]
    removed.unlink()
    with pytest.raises(CheckpointError, match=removed.name):
        load_base(tmp_path / "shards")


def test_pickles_are_refused(square: Tiny, tmp_path: Path) -> None:
    directory = save(square, tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickles can run code"):
        load_base(directory)


def test_unknown_family_says_where_to_add_it(square: Tiny, tmp_path: Path) -> None:
    directory = save(square, tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "dbrx"}))
    with pytest.raises(LayoutError, match=r"'dbrx' is not supported.*adapters/layouts.py"):
        load_base(directory)


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path, ignore_errors=True)
    tmp_path.mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_base(tmp_path)
