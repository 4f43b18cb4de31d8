"""Every adapter form, of every family: written, read back by its consumer's rules, and caught when it is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.adapter_files import COMPACT_WEIGHTS, CONFIG, WEIGHTS
from adapters.compact import to_compact, to_standard
from adapters.errors import AdapterFileError, ExportError
from adapters.export import EXPORTERS, Options, Source
from adapters.export.consumers import STACKED_IN_VLLM
from adapters.lora import attach
from adapters.peft_files import save_adapter
from adapters.placement import Placement
from adapters.sidecar import read_sidecar
from adapters.verify import Check, Evidence
from tests.numerics.conftest import EACH, MULTIMODAL, VOCAB, Tiny, load_plain, randomise, save
from tests.numerics.test_expert_lora import UNEVEN
from tests.numerics.test_families import stock_model

ENGINES = ("per-expert", "vllm-3d", "sglang-3d")
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Made:
    tiny: Tiny
    source: Source
    evidence: Evidence

    @property
    def offline(self) -> Made:
        """Without what has to be run."""
        return replace(self, evidence=Evidence((), (), None, "not asked"))

    def written(self, form: str, folder: Path, options: Options | None = None) -> Path:
        out = folder / form
        out.mkdir()
        EXPORTERS[form].write(self.source, out, options or Options())
        return out

    def checks(self, form: str, out: Path, options: Options | None = None) -> list[Check]:
        return EXPORTERS[form].check(out, self.source, self.evidence, options or Options())


def made(tiny: Tiny, folder: Path, placed: Placement | None = None) -> Made:
    base = save(tiny, folder)
    layout = tiny.layout
    shared = 3 if layout.shared_expert else 0
    placed = placed or Placement(
        attention=5,
        shared_expert=shared,
        dense_mlp=2 if not layout.has_experts else 0,
        routed=UNEVEN if layout.has_experts else (),
        alpha=12.0,
    )
    model = attach(load_plain(base), placed).eval()
    randomise(model, std=0.07)
    save_adapter(model, placed, folder / "adapter", base_name="base", base=base)
    ids = torch.randint(3, VOCAB, (2, 13), generator=torch.Generator().manual_seed(7))
    found = {}
    with torch.no_grad():
        for number, row in enumerate(ids):
            found[f"tuned.{number}"] = model(row[None]).logits[0].clone()
            with model.disable_adapter():
                found[f"base.{number}"] = model(row[None]).logits[0].clone()
    save_file(found, folder / "evidence.safetensors")
    evidence = Evidence(ids.tolist(), (), folder / "evidence.safetensors")
    return Made(tiny, Source(base, folder / "adapter", "tiny"), evidence)


@pytest.fixture(scope="module", params=[*EACH, *MULTIMODAL], ids=str)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(request.param, tmp_path_factory.mktemp(request.param.family))


@pytest.fixture(scope="module", params=["llama4_text", "gpt_oss", "qwen3_moe"])
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(Tiny(request.param, 64, 32), tmp_path_factory.mktemp(request.param))


def statuses(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.status for check in checks}


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if check.status == "failed"}


@pytest.mark.parametrize("form", ENGINES)
def test_an_engines_form_is_the_trained_adapter(family: Made, tmp_path: Path, form: str) -> None:
    checks = family.offline.checks(form, family.written(form, tmp_path))
    assert failed(checks) == set(), checks
    same = next(check for check in checks if "largest_difference" in check.measured)
    layout = family.tiny.layout
    assert same.measured["matrices"] > (24 if layout.has_experts else 7)
    engines = {"per-expert": {"vLLM", "SGLang"}, "vllm-3d": {"vLLM"}, "sglang-3d": {"SGLang"}}[form]
    assert {f"behaviour in {engine}" for engine in engines} <= {c.name for c in checks if c.status == "not run"}
    sidecar = read_sidecar(tmp_path / form)
    assert sidecar is not None and sidecar.experts["count"] == (6 if layout.has_experts else 0)
    if form == "per-expert":
        assert ("vllm" in sidecar.made_for) == (layout.model_type not in STACKED_IN_VLLM)
        known = layout.peft_fuses and not layout.shared_expert
        assert ("peft" in sidecar.made_for) == known == ("peft" not in sidecar.ignored_by)


@pytest.mark.parametrize("form", [*ENGINES, "peft"])
def test_no_path_of_this_machine_is_published(tmp_path: Path, form: str) -> None:
    found = made(Tiny("qwen3_moe", 64, 32), tmp_path)
    assert found.source.adapter is not None
    for name, field in (("adapter_config.json", "base_model_name_or_path"), ("studio_adapter.json", "base_name")):
        file = found.source.adapter / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {field: str(found.source.base)}))
    out = found.written(form, tmp_path)
    texts = [file.read_text() for file in out.glob("*.json")]
    assert texts and not [text for text in texts if str(tmp_path) in text]
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == found.source.base.name


def test_stock_peft_runs_the_standard_form_as_the_trained_model(one: Made, tmp_path: Path) -> None:
    found = statuses(one.checks("peft", one.written("peft", tmp_path)))
    assert set(found.values()) == {"passed"} and "behaviour: as the trained model" in found


def test_the_compact_form_is_the_trained_adapter(one: Made, tmp_path: Path) -> None:
    out = one.written("compact", tmp_path)
    assert (out / COMPACT_WEIGHTS).is_file() and not (out / WEIGHTS).exists()
    assert failed(one.offline.checks("compact", out)) == set()
    tensors = load_file(out / COMPACT_WEIGHTS)
    key = next(key for key in sorted(tensors) if _stack(key) and ".lora_B." in key)
    tensors[key][0] += 0.01
    with safe_open(out / COMPACT_WEIGHTS, "pt") as file:
        facts = file.metadata()
    save_file(tensors, out / COMPACT_WEIGHTS, metadata=facts)
    assert failed(one.offline.checks("compact", out)) == {"adapter: the change of every matrix"}


def test_stock_peft_reads_the_per_expert_form_where_it_knows_the_names(tmp_path: Path) -> None:
    """A consumer that is there: the same file that vLLM and SGLang get, run and compared."""
    found = made(Tiny("deepseek_v3", 64, 32), tmp_path, Placement(attention=5, routed=UNEVEN, alpha=12.0))
    checks = statuses(found.checks("per-expert", found.written("per-expert", tmp_path)))
    assert checks["behaviour: as the trained model"] == checks["loads in stock PEFT"] == "passed"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("form", ["peft", *ENGINES])
def test_half_precision_is_within_its_limit(one: Made, tmp_path: Path, form: str, dtype: str) -> None:
    options = Options(dtype=dtype)
    out = one.written(form, tmp_path, options)
    assert {tensor.dtype for tensor in load_file(out / WEIGHTS).values()} == {getattr(torch, dtype)}
    assert failed(one.offline.checks(form, out, options)) == set()
    assert "adapter: the change of every matrix" in failed(one.offline.checks(form, out)), "too coarse for float32"


# -------------------------------------------------------------------- faults


def change(out: Path, fault: Callable[[Tensors], None]) -> None:
    tensors = load_file(out / WEIGHTS)
    fault(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, out / WEIGHTS)


def experts_of(tensors: Tensors, end: str) -> str:
    return next(key for key in sorted(tensors) if ".experts" in key and key.endswith(end))


def swap_two_experts(tensors: Tensors) -> None:
    """Expert 0 and expert 3, both of which have an adapter in the first layer."""
    for key in [key for key in tensors if ".experts" in key]:
        if ".experts.0." in key:
            other = key.replace(".experts.0.", ".experts.3.")
            tensors[key], tensors[other] = tensors[other], tensors[key]
        elif tensors[key].ndim == 3:
            tensors[key] = tensors[key][[3, 1, 2, 0, 4, 5]]
        elif ".lora_A." in key and ".experts." + "0" not in key and _stack(key):
            tensors[key] = tensors[key].view(6, -1, tensors[key].shape[1])[[3, 1, 2, 0, 4, 5]].flatten(0, 1)
        elif _stack(key):
            tensors[key] = tensors[key].view(tensors[key].shape[0], -1, 6)[..., [3, 1, 2, 0, 4, 5]].flatten(1)


def _stack(key: str) -> bool:
    return ".experts.lora_" in key or ".experts.base_layer.lora_" in key


def expert_major_b(tensors: Tensors) -> None:
    """The wrong packing that has been shipped before: columns of lora_B by expert instead of by rank."""
    for key in [key for key in tensors if _stack(key) and ".lora_B." in key]:
        b = tensors[key].view(tensors[key].shape[0], -1, 6)
        tensors[key] = b.transpose(1, 2).flatten(1)


def gate_for_up(tensors: Tensors) -> None:
    for key in [key for key in tensors if ".experts" in key and ".lora_B." in key]:
        if ".gate_proj." in key:
            other = key.replace(".gate_proj.", ".up_proj.")
            tensors[key], tensors[other] = tensors[other], tensors[key]
        elif ".base_layer." in key or ".gate_up_proj." in key:
            axis = tensors[key].ndim - 2
            tensors[key] = tensors[key].roll(tensors[key].shape[axis] // 2, axis)


def alternating_for_halves(tensors: Tensors) -> None:
    for key in [k for k in tensors if ".lora_B." in k and (".base_layer." in k or ".gate_up_proj." in k)]:
        axis = tensors[key].ndim - 2
        half = tensors[key].shape[axis] // 2
        order = torch.stack([torch.arange(half), torch.arange(half) + half], 1).flatten()
        tensors[key] = tensors[key].index_select(axis, order)


def drop_a_layer(tensors: Tensors) -> None:
    layer = experts_of(tensors, ".lora_A.weight").split(".layers.")[1].split(".")[0]
    for key in [key for key in tensors if f".layers.{layer}." in key and ".experts" in key]:
        del tensors[key]


def drop_an_expert(tensors: Tensors) -> None:
    """Expert 0 of the first layer gets nothing."""
    for key in [key for key in sorted(tensors) if ".lora_B." in key and ".experts" in key][:3]:
        if tensors[key].ndim == 3:
            tensors[key][0] = 0
        elif _stack(key):
            tensors[key].view(tensors[key].shape[0], -1, 6)[..., 0] = 0
        else:
            tensors[key].zero_()


def lose_an_attention_matrix(tensors: Tensors) -> None:
    for key in [key for key in tensors if "layers.0.self_attn.o_proj" in key]:
        del tensors[key]


def double_the_scale(tensors: Tensors) -> None:
    for key in [key for key in tensors if ".lora_B." in key]:
        tensors[key] = tensors[key] * 2


def add_a_stray(tensors: Tensors) -> None:
    tensors["base_model.model.model.layers.0.self_attn.extra_proj.lora_A.weight"] = torch.ones(2, 2)
    tensors["base_model.model.model.layers.0.self_attn.extra_proj.lora_B.weight"] = torch.ones(2, 2)


FAULTS = (
    swap_two_experts,
    gate_for_up,
    drop_a_layer,
    drop_an_expert,
    lose_an_attention_matrix,
    double_the_scale,
    add_a_stray,
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("form", ["peft", *ENGINES])
def test_a_fault_is_seen(one: Made, tmp_path: Path, form: str, fault: Callable[[Tensors], None]) -> None:
    out = one.written(form, tmp_path)
    change(out, fault)
    found = one.offline.checks(form, out) if form != "peft" else _peft_checks(one.offline, out)
    assert failed(found) & {"adapter: the change of every matrix", "adapter: every factor used"}, found


def _peft_checks(one: Made, out: Path) -> list[Check]:
    """A file that PEFT's rules cannot place is refused as a whole, which the checking process reports."""
    try:
        return one.checks("peft", out)
    except AdapterFileError as error:
        return [Check("adapter: every factor used", "failed", str(error))]


@pytest.mark.parametrize("form", ["peft", "vllm-3d"])
def test_the_wrong_packing_of_lora_b_is_seen(one: Made, tmp_path: Path, form: str) -> None:
    out = one.written(form, tmp_path)
    change(out, expert_major_b)
    run = form == "peft" and one.tiny.family == "llama4_text"
    found = failed(one.checks(form, out) if run else one.offline.checks(form, out))
    assert "adapter: the change of every matrix" in found
    assert ("behaviour: as the trained model" in found) == run


@pytest.mark.parametrize("form", ["vllm-3d", "sglang-3d"])
def test_gate_and_up_alternating_where_they_do_not_belong_is_seen(one: Made, tmp_path: Path, form: str) -> None:
    out = one.written(form, tmp_path)
    change(out, alternating_for_halves)
    assert "adapter: the change of every matrix" in failed(one.offline.checks(form, out))


def test_the_orientation_of_pefts_file_in_vllm_is_seen_for_llama_4(one: Made, tmp_path: Path) -> None:
    """PEFT's own file of Llama 4 has the sides the other way; of the other families it is what vLLM takes."""
    peft, vllm = one.written("peft", tmp_path), one.written("vllm-3d", tmp_path)
    rank = json.loads((vllm / CONFIG).read_text())["r"]
    stacks = {k: t for k, t in load_file(peft / WEIGHTS).items() if _stack(k)}
    widened = {key: _to_rank(key, tensor, rank) for key, tensor in stacks.items()}
    change(vllm, lambda tensors: tensors.update(widened))
    seen = "adapter: the change of every matrix" in failed(one.offline.checks("vllm-3d", vllm))
    assert seen == (one.tiny.family == "llama4_text")


def _to_rank(key: str, tensor: Tensor, rank: int) -> Tensor:
    """A stack's factor filled up to a larger rank."""
    if ".lora_A." in key:
        by_expert = tensor.view(6, -1, tensor.shape[1])
        return torch.nn.functional.pad(by_expert, (0, 0, 0, rank - by_expert.shape[1])).flatten(0, 1)
    by_rank = tensor.view(tensor.shape[0], -1, 6)
    return torch.nn.functional.pad(by_rank, (0, 0, 0, rank - by_rank.shape[1])).flatten(1)


@pytest.mark.parametrize(
    ("entry", "check"),
    [
        ({"lora_alpha": 3}, "adapter: the change of every matrix"),
        ({"r": 2, "lora_alpha": 2}, "adapter: one rank, every expert"),
    ],
)
def test_another_rank_or_alpha_than_the_engines_read_is_seen(
    one: Made, tmp_path: Path, entry: dict[str, int], check: str
) -> None:
    out = one.written("per-expert", tmp_path)
    config = json.loads((out / CONFIG).read_text())
    (out / CONFIG).write_text(json.dumps({**config, **entry}))
    assert check in failed(one.offline.checks("per-expert", out))


def test_a_sidecar_of_another_base_is_seen(one: Made, tmp_path: Path) -> None:
    out = one.written("sglang-3d", tmp_path)
    stated = json.loads((out / "studio_adapter.json").read_text())
    stated["base"]["weights"] = "0" * 64
    (out / "studio_adapter.json").write_text(json.dumps(stated))
    assert failed(one.offline.checks("sglang-3d", out)) == {"adapter: the sidecar"}


# -------------------------------------------------------------------- what the forms cannot hold, and what they add


def test_sglang_gets_no_adapter_of_a_router_and_the_shared_form_says_so(tmp_path: Path) -> None:
    found = made(Tiny("qwen3_moe", 64, 32), tmp_path, Placement(router=2, routed=UNEVEN))
    with pytest.raises(ExportError, match="sglang would leave out the adapters of routers"):
        found.written("sglang-3d", tmp_path)
    sidecar = read_sidecar(found.written("per-expert", tmp_path))
    assert sidecar is not None
    assert "sglang" in sidecar.ignored_by and "sglang" not in sidecar.made_for and "vllm" in sidecar.made_for


def test_what_an_engine_makes_one_matrix_of_is_there_whole(tmp_path: Path) -> None:
    """SGLang needs v_proj beside q_proj, and both projections of the experts, even where only one was trained."""
    base = save(Tiny("qwen3_moe", 64, 32), tmp_path)
    config = LoraConfig(r=3, lora_alpha=4, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    stock = get_peft_model(stock_model(base), config)
    randomise(stock)
    stock.save_pretrained(tmp_path / "adapter")
    found = Made(Tiny("qwen3_moe", 64, 32), Source(base, tmp_path / "adapter", "tiny"), Evidence((), ()))
    for form in ENGINES:
        out = found.written(form, tmp_path)
        assert failed(found.checks(form, out)) == set()
        keys = load_file(out / WEIGHTS).keys()
        assert any("v_proj" in key for key in keys) and any("k_proj" in key for key in keys)
        assert any("gate" in key or "base_layer" in key for key in keys)


@pytest.mark.parametrize("form", ["compact", *ENGINES])
def test_a_form_for_others_is_no_source(one: Made, tmp_path: Path, form: str) -> None:
    """The stacks of some look like PEFT's own, and would be read wrongly."""
    out = one.written(form, tmp_path)
    said = "studio convert" if form == "compact" else f"is an adapter in the form '{form}', for"
    with pytest.raises(AdapterFileError, match=said):
        replace(one.source, adapter=out).open()


def test_the_sidecar_follows_the_adapter_into_its_other_form(one: Made, tmp_path: Path) -> None:
    assert one.source.adapter is not None
    to_compact(one.source.adapter, tmp_path / "compact")
    compact = read_sidecar(tmp_path / "compact")
    assert compact is not None and (compact.format, compact.made_for) == ("compact", ("moe-studio",))
    to_standard(tmp_path / "compact", tmp_path / "again")
    files = [(folder / "studio_adapter.json").read_bytes() for folder in (one.source.adapter, tmp_path / "again")]
    assert files[0] == files[1]
    replace(one.source, adapter=tmp_path / "again").open()


def test_forms_of_nothing_of_odd_types_and_without_room_are_refused(
    one: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AdapterFileError, match="this form is of an adapter"):
        EXPORTERS["per-expert"].write(replace(one.source, adapter=None), tmp_path, Options())
    with pytest.raises(ExportError, match="dtype 'int8': an adapter is written as float32, bfloat16, float16"):
        EXPORTERS["vllm-3d"].write(one.source, tmp_path, Options(dtype="int8"))
    monkeypatch.setattr("adapters.merge.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    for form in ("peft", *ENGINES):
        with pytest.raises(ExportError, match="GB are to be written"):
            one.written(form, tmp_path)
        assert list((tmp_path / form).iterdir()) == []
    monkeypatch.undo()
    big = load_file(one.source.adapter / WEIGHTS)  # type: ignore[operator]
    key = next(iter(big))
    (tmp_path / "big").mkdir()
    for file in one.source.adapter.iterdir():  # type: ignore[union-attr]
        (tmp_path / "big" / file.name).write_bytes(file.read_bytes())
    save_file({**big, key: torch.full_like(big[key], 1e6)}, tmp_path / "big" / WEIGHTS)
    with pytest.raises(AdapterFileError, match="NaN or infinity as torch"):
        EXPORTERS["peft"].write(replace(one.source, adapter=tmp_path / "big"), tmp_path, Options(dtype="float16"))
