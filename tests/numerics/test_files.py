"""Adapter and merged files in stock transformers and stock PEFT: the same logits as ours, every expert changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from adapters.adapter_files import WEIGHTS, ExpertFactors, from_peft, read_adapter, to_peft
from adapters.checkpoint import read_index
from adapters.errors import AdapterFileError, OutputExistsError
from adapters.layouts import LAYOUTS
from adapters.loading import load_base
from adapters.lora import attach, target_suffixes
from adapters.merge import merge_adapter
from adapters.peft_files import save_adapter
from adapters.placement import Placement, same_experts_everywhere
from adapters.tensor_files import read_tensor
from tests.numerics.conftest import EXPERTS, Tiny, randomise, save
from tests.numerics.test_expert_lora import UNEVEN, placement_for

LOGITS_ATOL = 2e-5  # float32, logits of magnitude 1: another order of summation; the faults guarded against give > 1e-3
ALL = same_experts_everywhere(4, 2, EXPERTS)
SOME = same_experts_everywhere(3, 2, EXPERTS, [1, 3, 4])


def trained(directory: Path, placement: Placement, out: Path) -> PeftModel:
    model = attach(load_base(directory, quantize="none"), placement).eval()
    randomise(model)
    save_adapter(model, placement, out, base_name="base")
    return model


@pytest.mark.parametrize("routed", [ALL, SOME, UNEVEN], ids=["all", "some", "uneven"])
def test_stock_peft_gives_the_same_logits(
    tiny: Tiny, saved: Path, tmp_path: Path, ids: torch.Tensor, routed: tuple[tuple[int, ...], ...]
) -> None:
    ours = trained(saved, placement_for(tiny, routed), tmp_path / "adapter")
    base = tiny.model_class.from_pretrained(saved).eval()
    with torch.no_grad():
        plain = base(ids).logits
        stock = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        torch.testing.assert_close(stock(ids).logits, ours(ids).logits, rtol=0, atol=LOGITS_ATOL)
        assert (stock(ids).logits - plain).abs().max() > 1e-2


@pytest.mark.parametrize(
    "placement",
    [Placement(routed=ALL, alpha=6), Placement(attention=3, alpha=5), Placement(router=2, alpha=9)],
    ids=["experts only", "attention only", "router only"],
)
def test_one_class_alone_round_trips(square: Tiny, tmp_path: Path, ids: torch.Tensor, placement: Placement) -> None:
    directory = save(square, tmp_path)
    ours = trained(directory, placement, tmp_path / "adapter")
    with torch.no_grad():
        base = square.model_class.from_pretrained(directory)
        stock = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        torch.testing.assert_close(stock(ids).logits, ours(ids).logits, rtol=0, atol=LOGITS_ATOL)
        merge_adapter(directory, tmp_path / "adapter", tmp_path / "merged")
        merged = square.model_class.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(ids).logits, ours(ids).logits, rtol=0, atol=LOGITS_ATOL)


def test_merged_model_equals_adapter_on_base_and_every_adapted_expert_changed(
    tiny: Tiny, saved: Path, tmp_path: Path, ids: torch.Tensor
) -> None:
    trained(saved, placement_for(tiny, SOME), tmp_path / "adapter")
    report = merge_adapter(saved, tmp_path / "adapter", tmp_path / "merged")
    with torch.no_grad():
        base = tiny.model_class.from_pretrained(saved)
        merged = tiny.model_class.from_pretrained(tmp_path / "merged").eval()
        changed = expert_changes(base, merged)
        stock = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        torch.testing.assert_close(merged(ids).logits, stock(ids).logits, rtol=0, atol=LOGITS_ATOL)
    assert changed and all((amount > 1e-3) == (expert in (1, 3, 4)) for (_, expert), amount in changed.items()), changed
    assert report.tensors == len(read_index(saved))


def expert_changes(base: torch.nn.Module, merged: torch.nn.Module) -> dict[tuple[str, int], float]:
    """Largest change of each expert's matrix, by (stack, expert)."""
    after = dict(merged.named_parameters())
    return {
        (name, expert): (after[name][expert] - parameter[expert]).abs().max().item()
        for name, parameter in base.named_parameters()
        if parameter.ndim == 3
        for expert in range(len(parameter))
    }


def test_an_adapter_made_by_stock_peft_merges_like_pefts_own_merge(
    tiny: Tiny, saved: Path, tmp_path: Path, ids: torch.Tensor
) -> None:
    layout = LAYOUTS[tiny.family]
    config = LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=list(layout.class_modules("attention")),
        target_parameters=list(target_suffixes(layout, "routed_experts")),
    )
    stock = get_peft_model(tiny.model_class.from_pretrained(saved), config)
    randomise(stock)
    stock.save_pretrained(tmp_path / "adapter")
    merge_adapter(saved, tmp_path / "adapter", tmp_path / "merged")
    with torch.no_grad():
        theirs = stock.merge_and_unload().eval()
        ours = tiny.model_class.from_pretrained(tmp_path / "merged").eval()
        for name, parameter in theirs.named_parameters():
            torch.testing.assert_close(dict(ours.named_parameters())[name], parameter, rtol=0, atol=1e-6)


dims = st.sampled_from([2, 3, 4, 6])


@settings(max_examples=40, deadline=None)
@given(experts=dims, rank=dims, inputs=dims, outputs=dims, family=st.sampled_from(sorted(LAYOUTS)))
def test_peft_form_and_canonical_form_are_inverse(
    experts: int, rank: int, inputs: int, outputs: int, family: str
) -> None:
    factors = ExpertFactors(torch.randn(experts, rank, inputs), torch.randn(experts, outputs, rank), 0.5)
    lora_a, lora_b = to_peft(factors, LAYOUTS[family])
    again = from_peft(lora_a, lora_b, rank, 0.5, LAYOUTS[family])
    assert torch.equal(again.A, factors.A) and torch.equal(again.B, factors.B)


def test_scrambled_columns_of_lora_b_change_the_logits(square: Tiny, tmp_path: Path, ids: torch.Tensor) -> None:
    """Expert-major instead of rank-major columns: the mistake that others have shipped must not go unseen."""
    directory = save(square, tmp_path)
    ours = trained(directory, Placement(routed=ALL), tmp_path / "adapter")
    file = tmp_path / "adapter" / WEIGHTS
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensors[name] = (
                tensor.reshape(len(tensor), 4, EXPERTS).transpose(1, 2).reshape(len(tensor), -1).contiguous()
            )
    save_file(tensors, file, metadata={"format": "pt"})
    with torch.no_grad():
        stock = PeftModel.from_pretrained(square.model_class.from_pretrained(directory), str(file.parent)).eval()
        assert (stock(ids).logits - ours(ids).logits).abs().max() > 1e-3


def test_shards_names_and_dtypes_stay_the_bases(square: Tiny, tmp_path: Path) -> None:
    base = tmp_path / "base"
    square.build().bfloat16().save_pretrained(base, max_shard_size="40KB")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    trained(base, placement_for(square, SOME), tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    before, after = read_index(base), read_index(tmp_path / "merged")
    assert {k: (v.file.name, v.dtype, v.shape) for k, v in before.items()} == {
        k: (v.file.name, v.dtype, v.shape) for k, v in after.items()
    }
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert square.model_class.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_merge_computes_in_float32_before_it_rounds(square: Tiny, tmp_path: Path) -> None:
    base = tmp_path / "base"
    square.build().bfloat16().save_pretrained(base)
    trained(base, Placement(attention=4), tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    adapter = read_adapter(tmp_path / "adapter", LAYOUTS[square.family])
    merged, index = read_index(tmp_path / "merged"), read_index(base)
    for key, factors in adapter.linear.items():
        exact = read_tensor(index[key]).float() + factors.scale * (factors.B @ factors.A)
        assert torch.equal(read_tensor(merged[key]), exact.bfloat16()), key


def test_an_adapter_for_another_base_is_refused_whole(tmp_path: Path) -> None:
    one, other = (
        save(Tiny("llama4_text", 64, 32, 1), tmp_path / "a"),
        save(Tiny("llama4_text", 32, 96, 1), tmp_path / "b"),
    )
    trained(one, Placement(attention=2, routed=ALL), tmp_path / "adapter")
    with pytest.raises(AdapterFileError, match="does not fit this base") as error:
        merge_adapter(other, tmp_path / "adapter", tmp_path / "merged")
    assert "experts.gate_up_proj" in str(error.value) and "self_attn.q_proj" in str(error.value)
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".merged*"))


def test_nothing_is_overwritten_and_a_failure_keeps_the_old_output(square: Tiny, tmp_path: Path) -> None:
    directory = save(square, tmp_path)
    trained(directory, Placement(attention=2), tmp_path / "adapter")
    out = tmp_path / "merged"
    shutil.copytree(directory, out)
    (out / "mine.txt").write_text("keep")
    before = sorted(out.iterdir())
    with pytest.raises(OutputExistsError, match="--overwrite"):
        merge_adapter(directory, tmp_path / "adapter", out)

    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_adapter(directory, tmp_path / "adapter", out, overwrite=True, progress=interrupted)
    assert sorted(out.iterdir()) == before and not list(tmp_path.glob(".merged*"))
    merge_adapter(directory, tmp_path / "adapter", out, overwrite=True)
    assert (out / "config.json").exists() and not (out / "mine.txt").exists()


def test_a_nan_adapter_is_never_written(square: Tiny, tmp_path: Path) -> None:
    model = attach(load_base(save(square, tmp_path), quantize="none"), Placement(routed=ALL))
    next(p for n, p in model.named_parameters() if "lora_down_B" in n).data[0, 0] = float("nan")
    with pytest.raises(AdapterFileError, match="NaN or infinity"):
        save_adapter(model, Placement(routed=ALL), tmp_path / "adapter", base_name="base")
    assert not (tmp_path / "adapter").exists()


def test_overwrite_never_replaces_what_is_no_model_or_is_being_read(square: Tiny, tmp_path: Path) -> None:
    directory, adapter = save(square, tmp_path), tmp_path / "job" / "adapter"
    trained(directory, Placement(attention=2), adapter)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("keep")
    for out in (precious, directory, adapter, adapter.parent, tmp_path):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(OutputExistsError):
            merge_adapter(directory, adapter, out, overwrite=True)
        assert sorted(tmp_path.rglob("*")) == before


def test_the_report_counts_adapted_experts_alone(square: Tiny, tmp_path: Path) -> None:
    directory = save(square, tmp_path)
    trained(directory, Placement(routed=SOME), tmp_path / "adapter")
    report = merge_adapter(directory, tmp_path / "adapter", tmp_path / "merged")
    matrices = 2 if square.family == "llama4_text" else 3
    assert report.experts_changed == 2 * 3 * matrices  # layers, experts 1, 3 and 4


@pytest.mark.parametrize(
    "option", [{"fan_in_fan_out": True}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"r": 3}]
)
def test_an_adapter_whose_option_changes_the_mathematics_is_refused(
    square: Tiny, tmp_path: Path, option: dict[str, object]
) -> None:
    directory = save(square, tmp_path)
    trained(directory, Placement(attention=2, routed=ALL), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **option}))
    with pytest.raises(AdapterFileError):
        merge_adapter(directory, tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_torn_adapter_files_are_refused_in_words(square: Tiny, tmp_path: Path, name: str) -> None:
    directory = save(square, tmp_path)
    trained(directory, Placement(attention=2), tmp_path / "adapter")
    file = tmp_path / "adapter" / name
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(AdapterFileError, match=name.partition(".")[0]):
        merge_adapter(directory, tmp_path / "adapter", tmp_path / "merged")
