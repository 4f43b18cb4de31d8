"""The compact form: there and back without loss, what stock PEFT computes from it, and what it takes on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapters.adapter_files import CONFIG, WEIGHTS, read_adapter
from adapters.compact import COMPACT_WEIGHTS, to_compact, to_standard
from adapters.errors import AdapterFileError, OutputExistsError
from adapters.layouts import LAYOUTS
from adapters.loading import load_base
from adapters.lora import attach, target_suffixes
from adapters.peft_files import save_adapter
from adapters.placement import Placement
from tests.numerics.conftest import EXPERTS, Tiny, randomise, save
from tests.numerics.test_expert_lora import UNEVEN, placement_for

LOGITS_ATOL = 2e-5
LAYER_WITHOUT = ((4, 0, 1, 0, 0, 3), (0,) * EXPERTS)


def trained(directory: Path, placement: Placement, out: Path) -> PeftModel:
    model = attach(load_base(directory, quantize="none"), placement).eval()
    randomise(model)
    save_adapter(model, placement, out, base_name="base")
    return model


def facts(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


def same_files(one: Path, other: Path) -> None:
    """Bit for bit, negative zeros included, and every other file."""
    before, after = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert before.keys() == after.keys() and facts(one / WEIGHTS) == facts(other / WEIGHTS)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.shape == after[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    assert (one / CONFIG).read_bytes() == (other / CONFIG).read_bytes()


@pytest.mark.parametrize("routed", [UNEVEN, LAYER_WITHOUT], ids=["uneven", "a layer without"])
def test_there_and_back_and_stock_peft_gives_the_same_logits(
    tiny: Tiny, saved: Path, tmp_path: Path, ids: torch.Tensor, routed: tuple[tuple[int, ...], ...]
) -> None:
    ours = trained(saved, placement_for(tiny, routed), tmp_path / "adapter")
    (tmp_path / "adapter" / "placement.json").write_text("{}")
    to_compact(tmp_path / "adapter", tmp_path / "compact")
    assert not (tmp_path / "compact" / WEIGHTS).exists() and (tmp_path / "compact" / "placement.json").exists()
    to_standard(tmp_path / "compact", tmp_path / "again")
    same_files(tmp_path / "adapter", tmp_path / "again")
    base = tiny.model_class.from_pretrained(saved).eval()
    with torch.no_grad():
        plain = base(ids).logits
        stock = PeftModel.from_pretrained(base, str(tmp_path / "again")).eval()
        torch.testing.assert_close(stock(ids).logits, ours(ids).logits, rtol=0, atol=LOGITS_ATOL)
        assert (stock(ids).logits - plain).abs().max() > 1e-2


def test_an_expert_takes_what_its_own_rank_takes(tiny: Tiny, saved: Path, tmp_path: Path) -> None:
    model = trained(saved, Placement(routed=UNEVEN), tmp_path / "adapter")
    report = to_compact(tmp_path / "adapter", tmp_path / "compact")
    compact = load_file(tmp_path / "compact" / COMPACT_WEIGHTS)
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(tensor.numel() for tensor in compact.values()) == parameters
    assert parameters == sum(map(sum, UNEVEN)) * (2 * tiny.hidden + 3 * tiny.width)
    assert report["experts"] == 2 * sum(rank > 0 for layer in UNEVEN for rank in layer)
    assert report["bytes"] == (tmp_path / "compact" / COMPACT_WEIGHTS).stat().st_size < report["bytes_before"]
    stacks = json.loads(facts(tmp_path / "compact" / COMPACT_WEIGHTS)["compact_adapter"])["stacks"]
    assert sorted(tuple(stack["ranks"]) for stack in stacks.values()) == sorted([*UNEVEN, *UNEVEN])


def test_an_adapter_of_stock_peft_and_in_half_precision(square: Tiny, tmp_path: Path) -> None:
    layout = LAYOUTS[square.family]
    targets = {
        "target_modules": list(layout.class_modules("attention")),
        "target_parameters": list(target_suffixes(layout, "routed_experts")),
    }
    stock = get_peft_model(square.build(), LoraConfig(r=3, lora_alpha=7, **targets))
    randomise(stock)
    stock.bfloat16().save_pretrained(tmp_path / "adapter")
    to_compact(tmp_path / "adapter", tmp_path / "compact")
    to_standard(tmp_path / "compact", tmp_path / "again")
    same_files(tmp_path / "adapter", tmp_path / "again")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_zeros_anywhere_come_back(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whole rows of zeros at the end, in the middle, in one factor alone; and negative zeros."""
    folder = tmp_path_factory.mktemp("adapter")
    experts, rank = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    values = st.sampled_from([0.0, 0.0, -0.0, 1.5, -2.0])

    def drawn(*shape: int) -> torch.Tensor:
        count = int(torch.Size(shape).numel())
        return torch.tensor(data.draw(st.lists(values, min_size=count, max_size=count))).view(shape)

    name = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_{}.weight"
    tensors = {name.format("A"): drawn(experts * rank, 2), name.format("B"): drawn(3, rank * experts)}
    (folder / "a").mkdir()
    save_file(tensors, folder / "a" / WEIGHTS, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 1, "target_parameters": ["mlp.experts.gate_up_proj"]}
    config["target_parameters"].append("mlp.experts.down_proj")  # type: ignore[attr-defined]
    (folder / "a" / CONFIG).write_text(json.dumps(config))
    to_compact(folder / "a", folder / "b")
    to_standard(folder / "b", folder / "c")
    same_files(folder / "a", folder / "c")


def test_what_cannot_be_converted_is_refused_and_nothing_is_written(square: Tiny, tmp_path: Path) -> None:
    directory, adapter = save(square, tmp_path), tmp_path / "adapter"
    trained(directory, Placement(routed=UNEVEN), adapter)
    to_compact(adapter, tmp_path / "compact")
    with pytest.raises(AdapterFileError, match=f"has no {COMPACT_WEIGHTS}: expected an adapter in the compact form"):
        to_standard(adapter, tmp_path / "out")
    with pytest.raises(AdapterFileError, match=f"has no {WEIGHTS}: expected a standard PEFT adapter"):
        to_compact(tmp_path / "compact", tmp_path / "out")
    with pytest.raises(AdapterFileError, match="studio convert ADAPTER OUT --to peft"):
        read_adapter(tmp_path / "compact", LAYOUTS[square.family])
    trained(directory, Placement(attention=2), tmp_path / "attention")
    with pytest.raises(AdapterFileError, match="adapts no routed experts"):
        to_compact(tmp_path / "attention", tmp_path / "out")
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, "r": 7}))
    with pytest.raises(AdapterFileError, match="not of rank 7"):
        to_compact(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record: record | {"version": 9}, "version 9"),
        (lambda record: {"version": 1}, "stacks"),
        (lambda record: None, "compact_adapter"),
        (lambda record: _with_ranks(record, [9] * EXPERTS), "rows do not fit"),
        (lambda record: _with_ranks(record, [1] * EXPERTS), "rows do not fit"),
    ],
)
def test_a_torn_compact_file_is_refused(square: Tiny, tmp_path: Path, change: object, said: str) -> None:
    trained(save(square, tmp_path), Placement(routed=UNEVEN), tmp_path / "adapter")
    to_compact(tmp_path / "adapter", tmp_path / "compact")
    file = tmp_path / "compact" / COMPACT_WEIGHTS
    record = change(json.loads(facts(file)["compact_adapter"]))  # type: ignore[operator]
    save_file(load_file(file), file, metadata={"compact_adapter": json.dumps(record)} if record else {})
    with pytest.raises(AdapterFileError, match=said):
        to_standard(tmp_path / "compact", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _with_ranks(record: dict[str, dict[str, dict[str, object]]], ranks: list[int]) -> dict[str, object]:
    stacks = {name: {**stack, "ranks": ranks} for name, stack in record["stacks"].items()}
    return {**record, "stacks": stacks}


def test_overwrite_replaces_adapters_alone_and_never_what_is_read(square: Tiny, tmp_path: Path) -> None:
    adapter, precious = tmp_path / "adapter", tmp_path / "precious"
    trained(save(square, tmp_path), Placement(routed=UNEVEN), adapter)
    to_compact(adapter, tmp_path / "out")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        to_compact(adapter, tmp_path / "out")
    to_compact(adapter, tmp_path / "out", overwrite=True)
    precious.mkdir()
    (precious / "thesis.txt").write_text("keep")
    for out in (precious, adapter, tmp_path):
        with pytest.raises(OutputExistsError):
            to_compact(adapter, out, overwrite=True)
    assert (precious / "thesis.txt").exists() and (adapter / WEIGHTS).exists()
