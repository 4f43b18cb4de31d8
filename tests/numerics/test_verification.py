"""Verification of merged models: right ones pass, and each known fault is planted and seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapters import merged
from adapters.errors import AdapterFileError
from adapters.export import EXPORTERS, Options, Source
from adapters.loading import load_base
from adapters.lora import attach
from adapters.peft_files import save_adapter
from adapters.placement import Placement
from adapters.sidecar import Sidecar, write_sidecar
from adapters.verify import Check, Evidence, model_files, run, tokenizer, weights
from adapters.verify.behaviour import APART, LIMITS, SAME, check_behaviour, divergence
from adapters.verify.peft_reading import PeftReading, first_match
from adapters.verify.reference import reference_logits
from tests.e2e.conftest import build_base
from tests.numerics.conftest import EACH, EXPERTS, MOE_LAYERS, MULTIMODAL, Tiny, randomise, save
from tests.numerics.test_expert_lora import placement_for

LAYERS, COUNT, RANK = 2, 4, 4
PROMPTS = [[0, *range(20 + i, 420 + i, 13)] for i in range(3)]
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Exported:
    """A base with a tokenizer, an adapter, the evidence of the two, and a right export in float32."""

    family: str
    source: Source
    evidence: Evidence
    out: Path

    def copy(self, target: Path) -> Path:
        return Path(shutil.copytree(self.out, target))

    def checked(self, directory: Path, options: Options = Options(dtype="float32")) -> dict[str, Check]:  # noqa: B008
        """All that can be told of the files, and behaviour with the model loaded by stock transformers right here."""
        checks = [model_files.check_whole(directory)]
        if checks[0].status == "passed":
            before, after = (model_files.read_index(path) for path in (self.source.base, directory))
            checks.append(model_files.check_names(before, after, options.dtype))
            checks.append(model_files.check_config(directory, self.source.base, options.dtype))
            checks += weights.audit(self.source, weights.FileReader(directory), dtype=options.dtype)
            checks += check_behaviour(self.evidence, logits_of(directory), LIMITS[options.dtype or "bfloat16"], "stock")
        return {check.name: check for check in checks}


def logits_of(directory: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return {f"export.{i}": model(torch.tensor([ids])).logits[0] for i, ids in enumerate(PROMPTS)}


def failed(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.status == "failed"}


def build_exported(family: str, folder: Path) -> Exported:
    base = build_base(family, folder / "base")
    placement = Placement(attention=3, router=2, routed=((RANK, 0, 2, RANK),) * LAYERS, alpha=2)
    train(base, placement, folder / "adapter")
    source = Source(base, folder / "adapter", "tiny")
    save_file(reference_logits(source, PROMPTS), folder / "logits.safetensors")
    write(source, folder / "out", "float32")
    return Exported(family, source, Evidence(PROMPTS, (), folder / "logits.safetensors"), folder / "out")


@pytest.fixture(scope="module", params=["llama4_text", "qwen3_moe"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return build_exported(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """One family is enough for what does not depend on it."""
    return build_exported("llama4_text", tmp_path_factory.mktemp("one"))


def train(base: Path, placement: Placement, out: Path, seed: int = 3) -> None:
    model = attach(load_base(base, quantize="none"), placement).eval()
    randomise(model, seed, std=0.1)
    save_adapter(model, placement, out, base_name="base")


def write(source: Source, out: Path, dtype: str | None) -> Path:
    out.mkdir()
    EXPORTERS["safetensors"].write(source, out, Options(dtype=dtype))
    return out


def test_how_much_of_the_weights_is_compared_is_told(one: Exported) -> None:
    told: list[tuple[int, int]] = []
    evidence = Evidence((), (), None, "not asked for")
    options = Options(dtype="float32")
    run._checked(one.out, "safetensors", one.source, evidence, options, lambda *now: told.append(now))
    sizes = [info.size_bytes for info in model_files.read_index(one.source.base).values()]
    assert told == [(sum(sizes[:number]), sum(sizes)) for number in range(len(sizes))]


def test_a_right_merge_passes_every_check(exported: Exported) -> None:
    checks = exported.checked(exported.out)
    assert not failed(checks), [checks[name].detail for name in failed(checks)]
    assert checks[SAME].measured["kl_mean"] < 1e-8
    assert checks[APART].measured["kl_trained_from_base"] > 1e-2
    targeted = checks[weights.TARGETED].measured
    assert targeted["targeted"] > targeted["changed"] > 0, "experts without an adapter are targeted, and not changed"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_merges_pass_within_their_own_limits(exported: Exported, tmp_path: Path, dtype: str) -> None:
    checks = exported.checked(write(exported.source, tmp_path / "out", dtype), Options(dtype=dtype))
    assert not failed(checks), [checks[name].detail for name in failed(checks)]
    assert 1e-8 < checks[SAME].measured["kl_mean"] < LIMITS[dtype].kl / 3


# -------------------------------------------------------------------- planted faults

Tensors = dict[str, Tensor]


def experts_of(tensors: Tensors, layer: int, projection: str) -> list[str]:
    """The keys of a layer's expert tensors of one projection, in either layout of the files."""
    return [k for k in tensors if f".layers.{layer}." in k and ".experts." in k and f"{projection}_proj" in k]


def transposed_delta(merged: Tensors, base: Tensors, adapter: Path) -> None:
    """down_proj of every expert is square: nothing but the values tells its axes apart."""
    for layer in range(LAYERS):
        for key in experts_of(merged, layer, "down"):
            merged[key] = base[key] + (merged[key] - base[key]).transpose(-1, -2)


def dropped_layer(merged: Tensors, base: Tensors, adapter: Path) -> None:
    for key in merged:
        if ".layers.1." in key and ".experts." in key:
            merged[key] = base[key].clone()


def dropped_expert(merged: Tensors, base: Tensors, adapter: Path) -> None:
    for projection in ("gate_up", "gate", "up", "down"):
        keys = experts_of(merged, 0, projection)
        if len(keys) == 1:  # one stack
            merged[keys[0]][3] = base[keys[0]][3]
        elif keys:
            merged[keys[3]] = base[keys[3]].clone()


def twice(merged: Tensors, base: Tensors, adapter: Path) -> None:
    for layer in range(LAYERS):
        for key in experts_of(merged, layer, "down"):
            merged[key] = 2 * merged[key] - base[key]


FAULTS: dict[str, Callable[[Tensors, Tensors, Path], None]] = {
    "orientation": transposed_delta,
    "dropped layer": dropped_layer,
    "dropped expert": dropped_expert,
    "scale": twice,
}


def audited(exported: Exported, directory: Path) -> dict[str, Check]:
    found = weights.audit(exported.source, weights.FileReader(directory), dtype="float32")
    return {check.name: check for check in found}


def test_large_matrices_are_compared_in_parts(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = audited(exported, exported.out)
    monkeypatch.setattr(weights, "PART_VALUES", 300)
    parts = audited(exported, exported.out)
    assert not failed(parts) and {n: c.detail for n, c in parts.items()} == {n: c.detail for n, c in whole.items()}
    directory = exported.copy(tmp_path / "out")
    base = {key: tensor.float() for key, tensor in load_file(exported.source.base / WEIGHTS).items()}
    change_tensors(directory, lambda merged: dropped_expert(merged, base, directory))
    change_tensors(directory, lambda tensors: tensors["model.embed_tokens.weight"][-1].mul_(1.01))
    checks = audited(exported, directory)
    assert failed(checks) == {weights.TARGETED, weights.UNTOUCHED}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_merge_is_caught_by_its_weights_and_by_what_it_says(
    exported: Exported, tmp_path: Path, fault: str
) -> None:
    directory = exported.copy(tmp_path / "out")
    base = {key: tensor.float() for key, tensor in load_file(exported.source.base / WEIGHTS).items()}
    change_tensors(directory, lambda merged: FAULTS[fault](merged, base, directory))
    checks = exported.checked(directory)
    assert failed(checks) == {weights.TARGETED, SAME}, checks
    assert checks[SAME].measured["kl_mean"] > 100 * LIMITS["float32"].kl


def change_tensors(directory: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, directory / WEIGHTS, metadata={"format": "pt"})


def test_scrambled_packing_is_caught(exported: Exported, tmp_path: Path) -> None:
    """Columns of lora_B taken for expert-major, as others have shipped it."""
    adapter = Path(shutil.copytree(exported.source.adapter or "", tmp_path / "adapter"))
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in [k for k in tensors if ".experts." in k and "lora_B" in k]:
        tensors[key] = tensors[key].reshape(-1, RANK, COUNT).transpose(1, 2).reshape(tensors[key].shape).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    wrong = write(Source(exported.source.base, adapter, "tiny"), tmp_path / "out", "float32")
    assert failed(exported.checked(wrong)) == {weights.TARGETED, SAME}


def test_a_merge_into_the_quantised_base_is_held_against_that_base(exported: Exported, tmp_path: Path) -> None:
    held = {"quantization": "nf4", "int8_experts": [], "double_quant": True, "dtype": "float32"}
    source = Source(exported.source.base, exported.source.adapter, "tiny", held)
    save_file(reference_logits(source, PROMPTS), tmp_path / "logits.safetensors")
    other = Exported(exported.family, source, Evidence(PROMPTS, (), tmp_path / "logits.safetensors"), tmp_path / "out")
    checks = other.checked(write(source, other.out, "float32"))
    assert not failed(checks), [checks[name].detail for name in failed(checks)]
    assert checks[SAME].measured["kl_mean"] < 1e-8
    into_originals = other.checked(exported.out)  # the certificate of such a merge says how far it lies from training
    assert {SAME, weights.TARGETED} <= failed(into_originals), "merged into the wrong base"


@pytest.mark.parametrize("int8", [[], [0, 2]])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_that_training_dequantised_to_16_bit_is_the_reference_too(
    exported: Exported, tmp_path: Path, kind: str, int8: list[int]
) -> None:
    """As jobs on a GPU hold it. A right float32 merge of just those values says what the reference says."""
    held = {"quantization": kind, "int8_experts": int8, "double_quant": True, "dtype": "bfloat16"}
    source = Source(exported.source.base, exported.source.adapter, "tiny", held)
    save_file(reference_logits(source, PROMPTS), tmp_path / "logits.safetensors")
    other = Exported(exported.family, source, Evidence(PROMPTS, (), tmp_path / "logits.safetensors"), tmp_path / "out")
    checks = other.checked(write(source, other.out, "float32"))
    assert not failed(checks), [checks[name].detail for name in failed(checks)]
    assert checks[SAME].measured["kl_mean"] < 1e-8


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_lost_delta_is_seen_on_the_quantised_base_too(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """The merge's own product is broken: whoever asks the merge what is right would find it so."""
    held = {"quantization": "nf4", "int8_experts": [], "double_quant": True, "dtype": "float32"}
    source = Source(exported.source.base, exported.source.adapter, "tiny", held)
    right = merged._product
    monkeypatch.setattr(merged, "_product", lambda *how, **also: right(*how, **also) * share)
    directory = write(source, tmp_path / "out", "float32")
    found = weights.audit(source, weights.FileReader(directory), dtype="float32")
    assert failed({check.name: check for check in found}) == {weights.TARGETED}


def test_the_distance_from_what_training_held_is_told(exported: Exported, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(exported.source.adapter or "", tmp_path / "adapter"))
    held = {"quantization": "nf4", "int8_experts": [], "double_quant": True, "dtype": "float32"}
    write_sidecar(adapter, Sidecar("peft", "base", None, held, "0.21.2", exported.family, {}))
    source = Source(exported.source.base, adapter, "tiny")
    save_file(reference_logits(source, PROMPTS), tmp_path / "logits.safetensors")
    evidence = Evidence(PROMPTS, (), tmp_path / "logits.safetensors")
    same = check_behaviour(evidence, logits_of(exported.out), LIMITS["float32"], "stock")[0]
    assert same.status == "passed" and same.measured["kl_mean"] < 1e-8, "its own base is what it is held against"
    assert same.measured["kl_from_quantised_base_of_training"] > 1e-4 and "quantised base" in same.detail


@pytest.mark.parametrize("shrunk", [400, 20_000])
@pytest.mark.parametrize("fault", ["dropped expert", "dropped layer", "orientation"])
def test_a_delta_smaller_than_the_rounding_is_still_missed(
    exported: Exported, tmp_path: Path, fault: str, shrunk: int
) -> None:
    """In bfloat16, a delta of less than a thousandth of the weights: it shows in the values that it tips."""
    adapter = Path(shutil.copytree(exported.source.adapter or "", tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] / shrunk}))
    source = Source(exported.source.base, adapter, "tiny")
    exact = load_file(write(source, tmp_path / "exact", "float32") / WEIGHTS)
    directory = write(source, tmp_path / "out", None)
    read = weights.FileReader
    right = {check.name: check for check in weights.audit(source, read(directory))}
    assert not failed(right) and right[weights.TARGETED].measured["eaten"] < 4, "small matrices alone"
    base = {key: tensor.float() for key, tensor in load_file(source.base / WEIGHTS).items()}
    change = max(float((exact[k] - base[k]).norm() / base[k].norm()) for k in base if ".experts." in k)
    assert change < 1e-3, "the test would not be about rounding"
    FAULTS[fault](exact, base, directory)
    save_file({k: t.bfloat16().contiguous() for k, t in exact.items()}, directory / WEIGHTS, metadata={"format": "pt"})
    assert failed({check.name: check for check in weights.audit(source, read(directory))}) == {weights.TARGETED}


def test_a_delta_that_rounding_eats_for_the_most_part_is_no_fault(exported: Exported, tmp_path: Path) -> None:
    """The values of the base lie on bfloat16's grid, so rounding does not average out: most of a tiny delta is gone."""
    adapter = Path(shutil.copytree(exported.source.adapter or "", tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    for number, shrink in enumerate((300, 3000, 100_000)):
        (adapter / "adapter_config.json").write_text(
            json.dumps({**config, "lora_alpha": config["lora_alpha"] / shrink})
        )
        source = Source(exported.source.base, adapter, "tiny")
        out = write(source, tmp_path / str(number), None)
        checks = {check.name: check for check in weights.audit(source, weights.FileReader(out))}
        assert not failed(checks), [checks[name].detail for name in failed(checks)]
    assert checks[weights.TARGETED].measured["eaten"] > 0 and "hidden by it" in checks[weights.TARGETED].detail


@pytest.mark.parametrize("dtype", [None, "float32"], ids=["by bytes", "by value"])
def test_what_nobody_targets_must_stay_the_bases_and_be_finite(
    exported: Exported, tmp_path: Path, dtype: str | None
) -> None:
    directory = write(exported.source, tmp_path / "out", dtype)
    audit = partial(weights.audit, exported.source, dtype=dtype)
    assert not failed({check.name: check for check in audit(weights.FileReader(directory))})
    change_tensors(directory, lambda tensors: tensors["model.norm.weight"][5].mul_(1.01))
    checks = {check.name: check for check in audit(weights.FileReader(directory))}
    assert failed(checks) == {weights.UNTOUCHED} and "model.norm.weight" in checks[weights.UNTOUCHED].detail
    change_tensors(directory, lambda tensors: tensors["model.embed_tokens.weight"][3].fill_(float("inf")))
    checks = {check.name: check for check in audit(weights.FileReader(directory))}
    assert weights.FINITE in failed(checks) and "model.embed_tokens.weight" in checks[weights.FINITE].detail


def test_a_targeted_value_that_is_not_finite_is_caught(exported: Exported, tmp_path: Path) -> None:
    directory = exported.copy(tmp_path / "out")
    change_tensors(directory, lambda tensors: tensors["model.layers.0.self_attn.q_proj.weight"][3].fill_(float("nan")))
    assert weights.FINITE in failed(exported.checked(directory))


COARSE = weights.Rounding(relative=0.04, ulp=None, exact=False)
"""Of values of 4 significant bits, as fp8 has them."""


def coarse(directory: Path) -> weights.Read:
    """The export as it would be read back from files of 8-bit values with a scale for each tensor."""
    plain = weights.FileReader(directory)

    def read(key: str, expert: int | None) -> Tensor:
        tensor = plain(key, expert).float()
        scale = tensor.abs().max() / 448
        return (tensor / scale).to(torch.float8_e4m3fn).float() * scale

    return read


@pytest.mark.parametrize("fault", [None, "orientation", "dropped layer", "dropped expert", "another base"])
def test_weights_that_lie_quantised_are_held_against_the_exact_ones(
    exported: Exported, tmp_path: Path, fault: str | None
) -> None:
    """A tenth of the delta is below the error of 8 bits: what is lost shows along the delta alone."""
    adapter = Path(shutil.copytree(exported.source.adapter or "", tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] / 10}))
    source = Source(exported.source.base, adapter, "tiny")
    directory = write(source, tmp_path / "out", "float32")
    base = {key: tensor.float() for key, tensor in load_file(source.base / WEIGHTS).items()}
    if fault in FAULTS:
        change_tensors(directory, lambda merged: FAULTS[fault](merged, base, directory))
    elif fault:
        change_tensors(directory, lambda merged: merged["model.embed_tokens.weight"].add_(0.01))
    checks = {check.name: check for check in weights.audit(source, coarse(directory), lambda _: COARSE)}
    assert failed(checks) == (
        {weights.UNTOUCHED} if fault == "another base" else {weights.TARGETED} if fault else set()
    )


@pytest.mark.parametrize("carried", [0.55, 0.9, 1.0, 1.1, 1.45])
def test_a_part_of_the_change_is_not_the_change(exported: Exported, carried: float) -> None:
    """With a delta of the size of a real one, 8 bits tell a tenth of it."""
    trained = exported.source.open()
    plain = weights.FileReader(exported.out)

    def read(key: str, expert: int | None) -> Tensor:
        delta = trained.delta(key, expert)
        tensor = plain(key, expert).float()
        tensor = tensor if delta is None else tensor + (carried - 1) * delta
        scale = tensor.abs().amax(-1, keepdim=True) / 127
        return (tensor / scale).round() * scale

    fine = weights.Rounding(0.02, None, exact=False)
    checks = {check.name: check for check in weights.audit(exported.source, read, lambda _: fine)}
    assert failed(checks) == (set() if carried == 1 else {weights.TARGETED}), checks[weights.TARGETED].detail


@pytest.mark.parametrize("lost", [False, True])
def test_changes_that_rounding_hides_one_by_one_show_together(exported: Exported, tmp_path: Path, lost: bool) -> None:
    adapter = Path(shutil.copytree(exported.source.adapter or "", tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] / 90}))
    source = Source(exported.source.base, adapter, "tiny")
    directory = write(replace(source, adapter=None) if lost else source, tmp_path / "out", "float32")
    read = weights.FileReader(directory)

    def rounded(key: str, expert: int | None) -> Tensor:
        tensor = read(key, expert).float()
        scale = tensor.abs().amax(-1, keepdim=True) / 127
        return (tensor / scale).round() * scale

    fine = weights.Rounding(0.02, None, exact=False)
    checks = {check.name: check for check in weights.audit(source, rounded, lambda _: fine)}
    found = checks[weights.TARGETED]
    assert found.measured["eaten"] and not found.measured["changed"], "none can be judged alone"
    assert failed(checks) == ({weights.TARGETED} if lost else set()), found.detail
    assert ("all together" in found.detail) == lost


def test_a_lost_or_renamed_tensor_is_caught(exported: Exported, tmp_path: Path) -> None:
    directory = exported.copy(tmp_path / "out")
    change_tensors(directory, lambda tensors: tensors.update(other=tensors.pop("model.norm.weight")))
    before, after = (model_files.read_index(path) for path in (exported.source.base, directory))
    check = model_files.check_names(before, after, "float32")
    assert check.status == "failed" and "model.norm.weight is missing" in check.detail and "other" in check.detail


@pytest.mark.parametrize("cut", [1, 1000], ids=["a byte", "more"])
def test_a_truncated_file_is_caught(exported: Exported, tmp_path: Path, cut: int) -> None:
    directory = exported.copy(tmp_path / "out")
    size = (directory / WEIGHTS).stat().st_size
    with (directory / WEIGHTS).open("r+b") as file:
        file.truncate(size - cut)
    assert failed(exported.checked(directory)) == {model_files.WHOLE}
    with (directory / WEIGHTS).open("r+b") as file:
        file.truncate(size + cut)
    assert failed(exported.checked(directory)) == {model_files.WHOLE}


def test_a_lost_shard_and_a_stray_one_are_caught(square: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    square.build().save_pretrained(out, max_shard_size="100KB")
    assert model_files.check_whole(out).status == "passed"
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2
    shutil.copy(shards[0], out / "old.safetensors")
    assert "old.safetensors" in model_files.check_whole(out).detail
    (out / "old.safetensors").unlink()
    shards[1].unlink()
    check = model_files.check_whole(out)
    assert check.status == "failed" and shards[1].name in check.detail


@pytest.mark.parametrize(
    ("field", "value"),
    [("tie_word_embeddings", True), ("rms_norm_eps", 1e-2), ("num_experts_per_tok", 3), ("dtype", "float16")],
)
def test_a_field_of_the_config_that_changes_is_caught(
    exported: Exported, tmp_path: Path, field: str, value: Any
) -> None:
    directory = exported.copy(tmp_path / "out")
    change_json(directory / "config.json", **{field: value})
    check = model_files.check_config(directory, exported.source.base, "float32")
    assert check.status == "failed" and field in check.detail


def test_a_tie_flag_is_caught_where_the_model_is_loaded_too(one: Exported, tmp_path: Path) -> None:
    """Stock transformers keeps a head that it finds in the files; other programs take the embedding in its place."""
    directory = one.copy(tmp_path / "out")
    change_json(directory / "config.json", tie_word_embeddings=True)
    found = model_files.check_in_transformers(directory, one.source, one.evidence, LIMITS["float32"])
    checks = {check.name: check for check in found}
    assert failed(checks) == {model_files.TIED}, checks


def change_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


# -------------------------------------------------------------------- tokenizer


def tokenizer_checks(exported: Exported, directory: Path) -> dict[str, Check]:
    return {check.name: check for check in tokenizer.check_tokenizer(directory, exported.source)}


def test_the_bases_own_tokenizer_passes(one: Exported) -> None:
    assert not failed(tokenizer_checks(one, one.out))


def test_a_lost_template_is_caught(one: Exported, tmp_path: Path) -> None:
    directory = one.copy(tmp_path / "out")
    (directory / "chat_template.jinja").unlink()
    checks = tokenizer_checks(one, directory)
    assert tokenizer.TEMPLATE in failed(checks) and "lost" in checks[tokenizer.TEMPLATE].detail


def test_a_template_with_one_other_byte_is_caught(one: Exported, tmp_path: Path) -> None:
    directory = one.copy(tmp_path / "out")
    with (directory / "chat_template.jinja").open("a") as file:
        file.write(" ")
    assert tokenizer.TEMPLATE in failed(tokenizer_checks(one, directory))


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("config.json", "eos_token_id", 7),
        ("generation_config.json", "eos_token_id", [1]),
        ("tokenizer_config.json", "eos_token", "<|eom|>"),
    ],
    ids=["config", "generation config", "tokenizer"],
)
def test_a_wrong_end_of_sequence_is_caught(one: Exported, tmp_path: Path, file: str, field: str, value: Any) -> None:
    directory = one.copy(tmp_path / "out")
    if not (directory / file).exists():
        (directory / file).write_text("{}")
    change_json(directory / file, **{field: value})
    check = tokenizer_checks(one, directory)[tokenizer.ENDS]
    assert check.status == "failed" and file.removesuffix("_config.json").removesuffix(".json") in check.detail


def test_another_pre_tokenizer_is_caught(one: Exported, tmp_path: Path) -> None:
    directory = one.copy(tmp_path / "out")
    content = json.loads((directory / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}|\p{L}+|[^\p{N}\p{L}]+"
    (directory / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer.IDS in failed(tokenizer_checks(one, directory))


def test_places_that_name_other_ends_contradict_one_another() -> None:
    agree = {"config.json": [1, 5], "generation_config.json": [1, 5], "tokenizer": 5}
    assert not tokenizer.disagreements(agree, [[5]])
    assert "leaves out the tokenizer's EOS 9" in tokenizer.disagreements({**agree, "tokenizer": 9}, [[5]])[0]
    assert "ends an answer with [3]" in tokenizer.disagreements(agree, [[3]])[0]
    only_config = {"config.json": 5, "generation_config.json": None, "tokenizer": 5}
    assert not tokenizer.disagreements(only_config, [[5], []])


# -------------------------------------------------------------------- the references themselves


@pytest.mark.parametrize("family", [*EACH, *MULTIMODAL], ids=str)
def test_evidence_is_what_stock_peft_says(family: Tiny, tmp_path: Path, ids: Tensor) -> None:
    """The engine with the factors as `PeftReading` gives them, against stock PEFT on the stock model."""
    base = save(family, tmp_path)
    train(base, any_placement(family), tmp_path / "adapter")
    ours = reference_logits(Source(base, tmp_path / "adapter", "tiny"), ids.tolist())
    with torch.no_grad():
        stock = family.model_class.from_pretrained(base).eval()
        plain = stock(ids).logits
        tuned = PeftModel.from_pretrained(stock, str(tmp_path / "adapter")).eval()(ids).logits
    for i in range(len(ids)):
        torch.testing.assert_close(ours[f"base.{i}"], plain[i], rtol=0, atol=2e-5)
        assert float(divergence(tuned[i], ours[f"tuned.{i}"]).mean()) < 1e-9
    assert (tuned - plain).abs().max() > 1e-2


def any_placement(family: Tiny) -> Placement:
    if family.layout.has_experts:
        return placement_for(family, ((3, 0, 3, 1, 3, 2),) * MOE_LAYERS)
    return Placement(attention=3, dense_mlp=2)


@pytest.mark.parametrize("family", [*EACH, *MULTIMODAL], ids=str)
def test_every_family_passes_the_audit(family: Tiny, tmp_path: Path) -> None:
    base = save(family, tmp_path)
    train(base, any_placement(family), tmp_path / "adapter")
    source = Source(base, tmp_path / "adapter", "tiny")
    out = write(source, tmp_path / "out", None)
    checks = {check.name: check for check in weights.audit(source, weights.FileReader(out))}
    assert not failed(checks), [checks[name].detail for name in failed(checks)]
    reading = PeftReading(source.adapter or Path(), base)
    stacks = [pair for pair in reading.pairs.values() if len(pair.shape) == 3]
    assert len(stacks) == (2 * MOE_LAYERS if family.layout.has_experts else 0)
    assert all(pair.shape[0] == EXPERTS for pair in stacks)


def test_peft_before_0_19_1_took_every_stack_for_a_transposed_one(tmp_path: Path) -> None:
    """down_proj is square, so that both readings fit; gate_up_proj is not, and a file that does not fit is refused."""
    base = save(Tiny("qwen3_moe", 64, 64), tmp_path)
    train(base, Placement(routed=((2,) * EXPERTS,) * MOE_LAYERS), tmp_path / "adapter")
    config, file = tmp_path / "adapter" / "adapter_config.json", tmp_path / "adapter" / "adapter_model.safetensors"
    name = "model.layers.1.mlp.experts.down_proj"
    new = PeftReading(tmp_path / "adapter", base)
    now = [new.delta(new.pairs[name], expert) for expert in range(EXPERTS)]
    change_json(config, peft_version="0.18.0")
    with pytest.raises(AdapterFileError, match="PEFT expects"):
        PeftReading(tmp_path / "adapter", base)
    save_file({key: t for key, t in load_file(file).items() if "base_layer" not in key}, file)
    change_json(config, target_parameters=["mlp.experts.down_proj"])
    old = PeftReading(tmp_path / "adapter", base)
    assert old.pairs[name].transposed and not new.pairs[name].transposed
    for expert in range(EXPERTS):
        torch.testing.assert_close(old.delta(old.pairs[name], expert), now[expert].t())


def test_patterns_of_ranks_match_as_pefts_own() -> None:
    patterns = ["q_proj", "layers.1.self_attn.q_proj", r".*\.experts.down_proj", "experts"]
    for name in ("model.layers.1.self_attn.q_proj", "a.qq_proj", "q_proj", "m.experts.down_proj", "m.experts", "other"):
        assert first_match(patterns, name) == get_pattern_key(patterns, name)
        assert first_match(patterns[1:], name) == get_pattern_key(patterns[1:], name)


# -------------------------------------------------------------------- in fresh processes


def test_the_whole_verification_in_fresh_processes(one: Exported) -> None:
    """The other family goes this way in tests/e2e/test_verify.py."""
    checks = run.verify_export(one.out, "safetensors", one.source, options=Options(dtype="float32"))
    by_name = {check.name: check for check in checks}
    assert {check.status for check in checks} == {"passed"}, by_name
    assert by_name[SAME].measured["kl_mean"] < 1e-8 and "stock transformers" in by_name[SAME].detail
    assert by_name[model_files.TIED].status == "passed" and tokenizer.IDS in by_name


def test_a_model_too_large_here_is_never_passed(one: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.verify.memory.available_bytes", lambda: 10_000_000)
    checks = run.verify_export(one.out, "safetensors", one.source, options=Options(dtype="float32"))
    by_name = {check.name: check for check in checks}
    assert by_name[SAME].status == by_name[APART].status == by_name[model_files.LOADED].status == "not run"
    assert "weights verified, behaviour not run" in by_name[SAME].detail and "0.0 GB are free" in by_name[SAME].detail
    assert by_name[weights.TARGETED].status == "passed"


REFERENCE_THAT = """import sys
import adapters.verify.reference as reference
def answer(question): {}
open(sys.argv[2], "w").write(str(answer(None)))
"""


def reference_that(does: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Runs other code where the reference would be asked."""
    (folder / "other.py").write_text(REFERENCE_THAT.format(does))
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{Path(__file__).parents[2]}")
    asked = run.ask_module

    def ask(module: str, *rest: Any, **named: Any) -> Any:
        return asked("other" if module == "adapters.verify.reference" else module, *rest, **named)

    monkeypatch.setattr(run, "ask_module", ask)


def test_a_reference_that_crashes_fails_the_export(
    one: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference_that('raise ValueError("a bug of ours")', monkeypatch, tmp_path)
    checks = run.verify_export(one.out, "safetensors", one.source, options=Options(dtype="float32"))
    by_name = {check.name: check for check in checks}
    assert failed(by_name) == {run.REFERENCE} and "a bug of ours" in by_name[run.REFERENCE].detail
    assert "Traceback" not in by_name[SAME].detail and by_name[weights.TARGETED].status == "passed"


@pytest.mark.parametrize("does", ["import os; os.kill(os.getpid(), 9)", 'raise MemoryError("no room")'])
def test_a_reference_for_which_memory_does_not_suffice_is_not_run(
    one: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str
) -> None:
    reference_that(does, monkeypatch, tmp_path)
    evidence = run.make_evidence(one.source, run.BUILT_IN, tmp_path)
    assert evidence.logits is None and evidence.why_none == "memory did not suffice to run the trained model here"


def test_links_pickles_and_modes_are_caught(exported: Exported, tmp_path: Path) -> None:
    directory = exported.copy(tmp_path / "out")
    (directory / "config.json").chmod(0o600)
    (directory / "link.json").symlink_to("/etc/hostname")
    (directory / "weights.bin").write_bytes(b"\x80")
    check = run.check_plain_files(directory)
    assert check.status == "failed"
    assert all(word in check.detail for word in ("config.json has mode 0600", "link.json", "weights.bin"))
    assert run.check_plain_files(exported.out).status == "passed"
