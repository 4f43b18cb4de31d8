"""The formats fp8 and bnb-4bit: every value against PEFT's own merge, loaded by stock where stock reads them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.errors import ExportError
from adapters.export import EXPORTERS, Options, Source
from adapters.export.bnb_4bit import Bnb4Bit
from adapters.export.fp8 import Fp8
from adapters.export.quantized_files import Encoding, Matrix, check_values
from adapters.loading import load_base
from adapters.lora import attach
from adapters.peft_files import save_adapter
from adapters.placement import Placement, same_experts_everywhere
from adapters.verify import Check, Evidence
from adapters.verify.reference import reference_logits
from adapters.verify.weights import TARGETED
from studio.base import EMBEDDED_DIR
from studio.data import read_examples
from tests.e2e.conftest import TICKETS, build_base
from tests.numerics.conftest import EXPERTS, Tiny, randomise, save

FP8, BNB = "fp8", "bnb-4bit"


@dataclass(frozen=True)
class Trained:
    source: Source
    merged: dict[str, Tensor]
    """By stock PEFT, in float32: names of the model."""


@pytest.fixture(scope="module", params=["llama4_text", "qwen3_moe"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp(request.param)
    base = build_base(request.param, folder / "base")
    placement = Placement(attention=3, router=2, routed=((4, 0, 2, 4),) * 2, alpha=4)
    model = attach(load_base(base, quantize="none"), placement)
    randomise(model, std=0.1)
    save_adapter(model, placement, folder / "adapter", base_name="base", base=base)
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(folder / "adapter")
    )
    return Trained(Source(base, folder / "adapter", "tiny"), dict(stock.merge_and_unload().named_parameters()))


def write(trained: Trained, form: str, out: Path) -> dict[str, Any]:
    out.mkdir()
    return EXPORTERS[form].write(trained.source, out, Options())


def values(trained: Trained, form: str, out: Path) -> dict[str, Check]:
    """The checks that take no process of their own."""
    encoding = {FP8: Fp8, BNB: Bnb4Bit}[form](trained.source.open())
    return {found.name: found for found in check_values(encoding, out, trained.source)}


def failures(checks: dict[str, Check]) -> dict[str, str]:
    return {name: found.detail for name, found in checks.items() if found.status == "failed"}


def evidence(trained: Trained, folder: Path) -> Evidence:
    """On what the base was trained for."""
    tokenizer = AutoTokenizer.from_pretrained(trained.source.base)
    rows = [example.as_row() for example in read_examples(TICKETS / "tickets-eval.jsonl")[:3]]
    turns = [[*row["prompt"], *row["completion"]] for row in rows]
    prompts = [tokenizer.apply_chat_template(each, tokenize=True, return_dict=False) for each in turns]
    save_file(reference_logits(trained.source, prompts), folder / "logits.safetensors")
    return Evidence(prompts, (), folder / "logits.safetensors")


@pytest.mark.parametrize("form", [FP8, BNB])
def test_it_is_right_and_stock_transformers_agrees_with_the_trained_model(form: str, tmp_path: Path) -> None:
    """On a base that was trained: the choices of a random one are too close to survive 4 bits."""
    placement = Placement(attention=3, routed=same_experts_everywhere(4, 4, 16))
    model = attach(load_base(EMBEDDED_DIR, quantize="none"), placement)
    randomise(model, std=0.06)
    save_adapter(model, placement, tmp_path / "adapter", base_name="embedded", base=EMBEDDED_DIR)
    trained = Trained(Source(EMBEDDED_DIR, tmp_path / "adapter", "tiny"), {})
    reports: list[tuple[int, int]] = []
    (tmp_path / "out").mkdir()
    EXPORTERS[form].write(trained.source, tmp_path / "out", Options(), lambda *done: reports.append(done))
    assert reports[-1][0] == reports[-1][1]
    found = EXPORTERS[form].check(tmp_path / "out", trained.source, evidence(trained, tmp_path), Options())
    checks = {check.name: check for check in found}
    assert not failures(checks), failures(checks)
    not_run = [name for name, found in checks.items() if found.status == "not run"]
    assert not_run == (["loads in its engine"] if form == FP8 else [])
    assert (
        checks["behaviour: as the trained model"].measured["kl_mean"]
        < checks["behaviour: apart from the base"].measured["kl_trained_from_base"] / 2
    )
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o644}


def test_fp8_experts_are_matrices_of_their_own_each_channel_with_its_scale(trained: Trained, tmp_path: Path) -> None:
    write(trained, FP8, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    block = "feed_forward" if "llama" in trained.source.base.parent.name else "mlp"
    for layer in range(2):
        place = f"model.layers.{layer}.{block}.experts"
        gate_up, down = (trained.merged[f"{place}.{name}"].detach() for name in ("gate_up_proj", "down_proj"))
        if block == "feed_forward":  # (E, in, out)
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        for expert in range(4):
            wanted = dict(zip(("gate", "up", "down"), (*gate_up[expert].chunk(2), down[expert]), strict=True))
            for name, matrix in wanted.items():
                weight = tensors[f"{place}.{expert}.{name}_proj.weight"]
                scale = tensors[f"{place}.{expert}.{name}_proj.weight_scale"]
                assert weight.dtype == torch.float8_e4m3fn and scale.shape == (len(weight), 1)
                found = weight.float() * scale
                assert (found - matrix).abs().max() <= matrix.abs().max() * 2**-4 * 1.001
                torch.testing.assert_close(found.abs().amax(1), matrix.abs().amax(1), rtol=1e-6, atol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    left = {name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16}
    assert set(config["ignore"]) == {name for name in left if "norm" not in name}
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "float-quantized"


def test_bnb_holds_the_bytes_that_bitsandbytes_makes_of_the_float32_merge(trained: Trained, tmp_path: Path) -> None:
    facts = write(trained, BNB, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(linears) == sum(name.endswith("__nf4") for name in tensors) >= 8
    for name, module in linears.items():
        matrix = merged_matrix(trained, name)
        wanted, state = bnb.quantize_4bit(matrix, compress_statistics=True, quant_type="nf4")
        assert torch.equal(tensors[f"{name}.weight"], wanted)
        state.dtype = module.weight.quant_state.dtype
        assert state.dtype == torch.bfloat16
        assert torch.equal(
            bnb.dequantize_4bit(module.weight.data, module.weight.quant_state), bnb.dequantize_4bit(wanted, state)
        )
    sequential = any("experts." in name for name in linears)
    assert sequential == ("llama" in str(trained.source.base)) and (facts["share_in_4_bit"] > 0.3) == sequential


def merged_matrix(trained: Trained, module: str) -> Tensor:
    """Its weight in stock PEFT's merge; of one expert of Llama 4, by hand from the stack (E, in, out)."""
    if f"{module}.weight" in trained.merged:
        return trained.merged[f"{module}.weight"].detach()
    place, expert, part = module.rsplit(".", 2)
    stack = trained.merged[f"{place}.{'down_proj' if part == 'down_proj' else 'gate_up_proj'}"].detach()
    matrix, width = stack[int(expert)].t(), stack.shape[2] // 2
    rows = {"gate_proj": slice(width), "up_proj": slice(width, None), "down_proj": slice(None)}[part]
    return matrix[rows].contiguous()


def transposed(tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name] = tensors[name].t().contiguous() if tensors[name].shape[1] > 1 else tensors[name].flip(0)


def dropped_scale(tensors: dict[str, Tensor]) -> None:
    tensors.pop(next(name for name in tensors if name.endswith(("weight_scale", ".absmax"))))


def two_experts_swapped(tensors: dict[str, Tensor]) -> None:
    stack = next((name for name in tensors if name.endswith("experts.down_proj")), None)
    if stack:
        tensors[stack] = tensors[stack][[3, 1, 2, 0]]
        return
    first, last = (next(n for n in tensors if n.endswith(f"experts.{e}.down_proj.weight")) for e in (0, 3))
    tensors[first], tensors[last] = tensors[last], tensors[first]


def a_stranger(tensors: dict[str, Tensor]) -> None:
    tensors["model.stranger"] = torch.ones(2)


@pytest.mark.parametrize(
    "fault", [transposed, dropped_scale, two_experts_swapped, a_stranger], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("form", [FP8, BNB])
def test_planted_faults_are_seen(trained: Trained, form: str, tmp_path: Path, fault: Any) -> None:
    write(trained, form, tmp_path / "out")
    assert not failures(values(trained, form, tmp_path / "out"))
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    fault(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    wanted = "weights: names, shapes and dtypes" if fault in (dropped_scale, a_stranger) else TARGETED
    assert wanted in failures(values(trained, form, tmp_path / "out"))


def gate_and_up_swapped(fp8: Any, key: str) -> list[Matrix]:
    right = Encoding.matrices(fp8, key)
    names = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    cut = [(matrix, *matrix.name.rpartition(".")[::2]) for matrix in right]
    return [replace(matrix, name=f"{place}.{names.get(part, part)}") for matrix, place, part in cut]


def names_of_another_form(fp8: Any, key: str) -> list[Matrix]:
    return [
        replace(matrix, name=matrix.name.replace(".experts.", ".expert.")) for matrix in Encoding.matrices(fp8, key)
    ]


@pytest.mark.parametrize("fault", [gate_and_up_swapped, names_of_another_form], ids=lambda f: f.__name__)
def test_a_fault_of_the_fp8_writer_is_seen_by_its_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: Any
) -> None:
    """In the writer itself, so that its own reader would undo it."""
    base = save(Tiny("llama4_text", 64, 64), tmp_path)
    found = Trained(Source(base, None, "tiny"), {})
    monkeypatch.setattr(Fp8, "matrices", fault)
    write(found, FP8, tmp_path / "out")
    assert failures(values(found, FP8, tmp_path / "out"))


@pytest.mark.parametrize("fault", ["nothing ignored", "one too many", "strategy"])
def test_an_fp8_config_that_says_otherwise_than_the_files_is_seen(tmp_path: Path, fault: str) -> None:
    base = save(Tiny("qwen3_moe", 64, 64), tmp_path)
    found = Trained(Source(base, None, "tiny"), {})
    write(found, FP8, tmp_path / "out")
    assert not failures(values(found, FP8, tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantized = config["quantization_config"]
    if fault == "nothing ignored":
        quantized["ignore"] = []
    elif fault == "one too many":
        quantized["ignore"].append("model.layers.1.self_attn.q_proj")
    else:
        quantized["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert "weights: quantised as config.json says" in failures(values(found, FP8, tmp_path / "out"))


@pytest.mark.parametrize("lost", [False, True])
def test_a_base_of_nf4s_own_values_may_take_small_changes_back(trained: Trained, tmp_path: Path, lost: bool) -> None:
    """What training held in nf4 lies on the grid to which it is rounded again; a delta must still be there."""
    held = {"quantization": "nf4", "int8_experts": [], "double_quant": True, "dtype": "float32"}
    source = replace(trained.source, held=held)
    write(replace(trained, source=replace(source, adapter=None) if lost else source), BNB, tmp_path / "out")
    found = failures(values(replace(trained, source=source), BNB, tmp_path / "out"))
    assert set(found) == ({TARGETED} if lost else set()), found


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen3_5_moe_text", "glm4_moe", "qwen3"])
@pytest.mark.parametrize("form", [FP8, BNB])
def test_other_families(family: str, form: str, tmp_path: Path) -> None:
    tiny = Tiny(family, 64, 64)
    base = save(tiny, tmp_path)
    routed = same_experts_everywhere(4, 2, EXPERTS) if tiny.layout.has_experts else ()
    placement = Placement(attention=3, routed=routed)
    model = attach(load_base(base, quantize="none"), placement)
    randomise(model, std=0.05)
    save_adapter(model, placement, tmp_path / "adapter", base_name="base")
    found = Trained(Source(base, tmp_path / "adapter", "tiny"), {})
    write(found, form, tmp_path / "out")
    assert not failures(values(found, form, tmp_path / "out"))
    if form == BNB:
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_values_read_back_are_not_written_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save(Tiny("qwen3", 64, 64), tmp_path)
    source, out = Source(base, None, "tiny"), tmp_path / "out"
    out.mkdir()
    EXPORTERS[FP8].write(source, out, Options())
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("adapters.verify.memory.shutil.disk_usage", lambda path: usage)
    checks = EXPORTERS[FP8].check(out, source, Evidence([[1, 2]], (), tmp_path / "none"), Options())
    behaviour = [check for check in checks if check.name.startswith("behaviour")]
    assert behaviour and all(check.status == "not run" and "TMPDIR" in check.detail for check in behaviour)


def test_fp8_is_refused_where_no_engine_knows_the_experts(tmp_path: Path) -> None:
    base = save(Tiny("gpt_oss", 64, 64), tmp_path)
    with pytest.raises(ExportError, match="documents their names for gpt_oss"):
        EXPORTERS[FP8].write(Source(base, None, "tiny"), tmp_path, Options())
