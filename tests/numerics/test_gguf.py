"""GGUF files: llama.cpp's own types, bytes and metadata; and llama.cpp says what the trained model says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from safetensors.torch import load_file, save_file

from adapters.checkpoint import read_config, read_index
from adapters.errors import CheckpointError, ExportError
from adapters.export import EXPORTERS, Options, Source
from adapters.export.gguf import gguf_file, make_gguf
from adapters.export.gguf_types import Mixture, tensor_types
from adapters.export.importance import write_importance
from adapters.layouts import layout_for, moe_shapes
from adapters.loading import load_base
from adapters.lora import attach
from adapters.peft_files import save_adapter
from adapters.placement import Placement, same_experts_everywhere
from adapters.verify import Check, Evidence
from adapters.verify.behaviour import APART, SAME
from adapters.verify.fresh import ask_stock
from adapters.verify.gguf_files import (
    BOS,
    ENDS,
    IDS,
    TEMPLATE,
    WHOLE,
    approximated,
    check_metadata,
    check_run,
    compare_vocabulary,
)
from adapters.verify.gguf_weights import GgufWeights
from adapters.verify.llama_cpp import run_llama_cpp
from adapters.verify.tokenizer import CONVERSATIONS, NASTY
from adapters.verify.weights import TARGETED, UNTOUCHED, audit
from tests.numerics.conftest import randomise
from tests.numerics.gguf_facts import (
    DEEP,
    QUANTS,
    REFERENCE,
    WITH_IMPORTANCE,
    counted,
    importance_of,
    metadata,
    tensors,
    types,
)
from tests.numerics.gguf_models import LLAMA3, MODELS, bpe_tokenizer, save_tokenizer

PROMPTS = ("Please refund the order 1234's\n\n ok Ü printing on the ticket.", "  12 the printer   on fire! ß don't")
EVERY_TYPE = ("llama4", "olmoe", "llama")
"""8 experts; rows that no block of 256 fits; a dense model whose rows no block of 32 fits either."""
DELIBERATE = {"general.name", "tokenizer.ggml.eot_token_id"}
"""Keys that the converter leaves out or derives from the folder's name."""
ALSO = {
    # the converter has one score for all, by which llama.cpp would merge from the left, and no spaces' setting
    "mixtral": {"tokenizer.ggml.scores", "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.token_type"},
    # and, where config.json has lost scoring_func, softmax for DeepSeek-V3's sigmoid
    "deepseek_v3": {"deepseek2.expert_gating_func"},
}


@cache
def reference() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(REFERENCE.read_text())
    return found


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bases")
    for name, model in MODELS.items():
        model.save(root / name)
    return root


def written(source: Source, out: Path, **options: Any) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    make_gguf(source, out, Options(**options))
    return gguf_file(out)


@pytest.mark.parametrize("name", MODELS)
def test_every_type_has_llama_cpps_own_bytes(name: str, bases: Path, tmp_path: Path) -> None:
    source, expected = Source(bases / name, None, name), reference()[name]
    plain = written(source, tmp_path / "plain", quant="F32")
    assert tensors(plain) == expected["tensors"]
    for quant in QUANTS if name in EVERY_TYPE else ("BF16", "Q8_0", "Q4_K_M"):
        file = written(source, tmp_path / "out", quant=quant)
        assert types(file) == expected["types"][quant], quant


@pytest.mark.parametrize("name", DEEP)
def test_types_of_deep_models_are_llama_cpps(name: str) -> None:
    deep, expected = DEEP[name], reference()["deep"][name]
    for quant, found in expected.items():
        kind, _, importance = quant.partition(" ")
        seventy = deep.layers == 80
        mixture = Mixture(kind, deep.experts, deep.heads_per_key, deep.layers, deep.tied, bool(importance), seventy)
        types_of = tensor_types(deep.shapes(), mixture)
        assert counted(" ".join(types_of[tensor] for tensor in sorted(types_of))) == found, quant


@pytest.mark.parametrize("name", ["llama4", "llama"])
def test_an_importance_matrix_gives_llama_cpps_bytes(name: str, bases: Path, tmp_path: Path) -> None:
    source, file = Source(bases / name, None, name), tmp_path / "importance.gguf"
    given = importance_of(written(source, tmp_path / "plain", quant="F32"))
    write_importance(
        file, {k: 4 * v for k, v in given.items()}, {k: torch.full((len(v),), 4) for k, v in given.items()}, 4
    )
    for quant in WITH_IMPORTANCE:
        found = written(source, tmp_path / "out", quant=quant, importance=file)
        assert types(found) == reference()[name]["types"][f"{quant} importance"], quant


@pytest.mark.parametrize("name", MODELS)
def test_metadata_is_the_converters(name: str, bases: Path, tmp_path: Path) -> None:
    found = metadata(written(Source(bases / name, None, "a name"), tmp_path / "out", quant="F32"))
    left_out = DELIBERATE | ALSO.get(name, set())
    expected = reference()[name]["metadata"]
    assert {k: v for k, v in found.items() if k not in left_out} == {
        k: v for k, v in expected.items() if k not in left_out
    }
    assert found["general.name"] == "a name"


@pytest.fixture(scope="module")
def trained(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Source, Evidence]]:
    """Every model with an adapter on attention and experts, and what the studio's engine says."""
    root = tmp_path_factory.mktemp("trained")
    question = {"directories": [bases / name for name in MODELS], "strings": PROMPTS, "conversations": []}
    answers = ask_stock("stock_tokenizer.py", question)
    return {name: train(bases / name, root / name, found["ids"]) for name, found in zip(MODELS, answers, strict=True)}


def train(base: Path, out: Path, prompts: list[list[int]]) -> tuple[Source, Evidence]:
    index, config = read_index(base), read_config(base)
    shapes = moe_shapes(layout_for(config, index), index, config)
    routed = same_experts_everywhere(2, len(shapes), shapes[0].experts, [1, 2]) if shapes else ()
    placement = Placement(attention=2, alpha=4, routed=routed)
    model = attach(load_base(base, quantize="none"), placement).eval()
    randomise(model, std=0.1)
    save_adapter(model, placement, out / "adapter", base_name="base")
    save_file(logits_of(model, prompts), out / "logits.safetensors")
    return Source(base, out / "adapter", base.name), Evidence(prompts, PROMPTS, out / "logits.safetensors")


def logits_of(model: PeftModel, prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    found = {}
    with torch.no_grad():
        for number, ids in enumerate(prompts):
            found[f"tuned.{number}"] = model(torch.tensor([ids])).logits[0].float()
            with model.disable_adapter():
                found[f"base.{number}"] = model(torch.tensor([ids])).logits[0].float()
    return found


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if check.status == "failed"}


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_says_what_the_trained_model_says(
    name: str, trained: dict[str, tuple[Source, Evidence]], tmp_path: Path
) -> None:
    source, evidence = trained[name]
    file = written(source, tmp_path / "out", quant="F32")
    checks = [*check_run(file, source, evidence, "F32"), *weight_checks(file, source)]
    assert not failed(checks), checks
    same = next(check for check in checks if check.name == SAME)
    assert same.measured["kl_mean"] < (1e-5 if name == "gpt_oss" else 1e-9) < 1e-4 < moved(checks)
    assert same.measured["top1"] == 1


def weight_checks(file: Path, source: Source) -> list[Check]:
    read_back = GgufWeights(file, source.base)
    return audit(source, read_back.read, read_back.rounding, "float32")


def moved(checks: list[Check]) -> float:
    return next(c.measured["kl_trained_from_base"] for c in checks if "kl_trained_from_base" in c.measured)


@pytest.fixture(scope="module")
def llama4(trained: dict[str, tuple[Source, Evidence]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(trained["llama4"][0], tmp_path_factory.mktemp("whole"), quant="F32")


def checks_of(file: Path, source: Source, evidence: Evidence | None = None) -> list[Check]:
    no_run = Evidence([], why_none="not asked")
    return EXPORTERS["gguf"].check(file.parent, source, evidence or no_run, Options(quant="F32"))


def damaged(file: Path, out: Path) -> Path:
    out.mkdir()
    return Path(shutil.copy(file, out / file.name))


def test_a_right_file_passes_every_check(
    llama4: Path, trained: dict[str, tuple[Source, Evidence]], tmp_path: Path
) -> None:
    checks = checks_of(llama4, *trained["llama4"])
    assert {check.status for check in checks} == {"passed"}, [c for c in checks if c.status != "passed"]
    assert {check.status for check in checks_of(llama4, trained["llama4"][0])} == {"passed", "not run"}


def test_a_truncated_file_is_caught(llama4: Path, trained: dict[str, tuple[Source, Evidence]], tmp_path: Path) -> None:
    file = damaged(llama4, tmp_path / "cut")
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 4096)
    assert failed(checks_of(file, trained["llama4"][0])) == {WHOLE}


@pytest.mark.parametrize(
    ("file", "text", "licence"),
    [
        ("LICENSE", "LLAMA 4 COMMUNITY LICENSE AGREEMENT\n", "other"),
        ("README.md", "---\nlanguage: [en]\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("LICENSE", "Copyright someone", None),
    ],
)
def test_the_licence_is_read_again_and_not_asked_of_the_writer(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str, licence: str | None
) -> None:
    base = edited(bases, "qwen3", tmp_path)
    (base / file).write_text(text)
    source = Source(base, None, "x")
    right = check_metadata(GgufWeights(written(source, tmp_path / "out", quant="F32"), base), source, "F32")
    assert right.status == "passed" and right.measured["general.license"] == licence
    monkeypatch.setattr("adapters.export.gguf_metadata.licence_of", lambda _: {"license": "mit"})
    wrong = check_metadata(GgufWeights(written(source, tmp_path / "out", quant="F32"), base), source, "F32")
    assert wrong.status == "failed" and "general.license" in wrong.detail


def test_a_lost_adapter_is_caught(trained: dict[str, tuple[Source, Evidence]], tmp_path: Path) -> None:
    source, evidence = trained["mixtral"]
    for quant in ("F32", "Q4_K_M", "Q2_K"):
        file = written(replace(source, adapter=None), tmp_path / quant, quant=quant)
        read_back = GgufWeights(file, source.base)
        assert TARGETED in failed(audit(source, read_back.read, read_back.rounding)), quant
        assert quant != "F32" or SAME in failed(check_run(file, source, evidence, quant))


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M", "Q2_K"])
@pytest.mark.parametrize("name", ["llama4", "mixtral"])
def test_an_export_that_is_the_base_is_never_apart_from_it(
    name: str, quant: str, trained: dict[str, tuple[Source, Evidence]], tmp_path: Path
) -> None:
    source, evidence = trained[name]
    status = {}
    for adapter in (source.adapter, None):
        file = written(replace(source, adapter=adapter), tmp_path / "out", quant=quant)
        found = next(c for c in check_run(file, source, evidence, quant) if c.name == APART)
        status[adapter is None] = found.status
    assert status[True] in ("failed", "not run") and (quant != "Q8_0" or status[True] == "failed")
    assert status[False] in ("passed", "not run") and (quant == "Q2_K" or status[False] == "passed")


@pytest.mark.parametrize("quant", ["BF16", "F16", "Q8_0", "Q4_K_M", "Q2_K"])
@pytest.mark.parametrize("name", ["llama4", "mixtral", "deepseek_v3", "gpt_oss"])
def test_right_files_of_every_kind_of_type_pass_the_audit(
    name: str, quant: str, trained: dict[str, tuple[Source, Evidence]], tmp_path: Path
) -> None:
    source = trained[name][0]
    read_back = GgufWeights(written(source, tmp_path / "out", quant=quant), source.base)
    checks = audit(source, read_back.read, read_back.rounding)
    assert not failed(checks), [check.detail for check in checks if check.status == "failed"]


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q2_K"])
@pytest.mark.parametrize(("tensor", "factor"), [("blk.0.attn_norm.weight", 1.01), ("blk.1.ffn_gate_inp.weight", 1.1)])
def test_what_lies_unquantised_in_a_quantised_file_is_held_to_its_own_type(
    quant: str, tensor: str, factor: float, trained: dict[str, tuple[Source, Evidence]], tmp_path: Path
) -> None:
    source = trained["llama4"][0]
    file = written(source, tmp_path / "out", quant=quant)
    found = next(each for each in GGUFReader(file, "r+").tensors if each.name == tensor)
    assert found.tensor_type.name == "F32"
    found.data[:] = found.data * np.float32(factor)
    del found
    read_back = GgufWeights(file, source.base)
    assert failed(audit(source, read_back.read, read_back.rounding)) == {UNTOUCHED}


@pytest.mark.parametrize("fault", ["gate and up swapped", "one expert lost", "transposed"])
def test_wrong_packing_is_caught(
    fault: str, llama4: Path, trained: dict[str, tuple[Source, Evidence]], tmp_path: Path
) -> None:
    source, evidence = trained["llama4"]
    file = damaged(llama4, tmp_path / "packed")
    tensors_of = {tensor.name: tensor for tensor in GGUFReader(file, "r+").tensors}
    gate, up = (tensors_of[f"blk.1.ffn_{part}_exps.weight"].data for part in ("gate", "up"))
    if fault == "gate and up swapped":
        gate[:], up[:] = up.copy(), gate.copy()
    elif fault == "one expert lost":
        gate[1] = 0
    else:
        gate[:] = gate.transpose(0, 2, 1).copy()
    gate.base.flush() if hasattr(gate.base, "flush") else None
    assert TARGETED in failed(weight_checks(file, source))
    assert SAME in failed(check_run(file, source, evidence, "F32"))


def changed_text(file: Path, key: str, old: bytes, new: bytes) -> None:
    """Replaces bytes of the same length behind a key of the metadata."""
    data = bytearray(file.read_bytes())
    start = data.index(old, data.index(key.encode()))
    assert len(old) == len(new)
    data[start : start + len(old)] = new
    file.write_bytes(data)


def changed_number(file: Path, key: str, value: int) -> None:
    field = GGUFReader(file, "r+").fields[key]
    field.parts[-1][0] = value


def test_faults_of_the_tokenizer_are_caught(trained: dict[str, tuple[Source, Evidence]], tmp_path: Path) -> None:
    source = trained["llama"][0]
    plain = written(source, tmp_path / "plain", quant="Q8_0")
    (stock,) = ask_stock(
        "stock_tokenizer.py", {"directories": [source.base], "strings": NASTY, "conversations": CONVERSATIONS}
    )
    assert not failed(compare_vocabulary(plain, source, stock))
    faults = {
        TEMPLATE: lambda file: changed_text(file, "tokenizer.chat_template", b"role", b"rule"),
        ENDS: lambda file: changed_number(file, "tokenizer.ggml.eos_token_id", 7),
        BOS: lambda file: changed_number(file, "tokenizer.ggml.add_bos_token", 0),
        IDS: lambda file: changed_text(file, "tokenizer.ggml.pre", b"smaug-bpe", b"command-r"),
    }
    for name, plant in faults.items():
        file = damaged(plain, tmp_path / name.replace(":", ""))
        plant(file)
        assert name in failed(compare_vocabulary(file, source, stock)), name


def test_every_tokenizer_gives_its_own_ids(bases: Path, tmp_path: Path) -> None:
    texts = [*NASTY, *PROMPTS, "the printer's refund: tin ores in the orders"]
    question = {"directories": [bases / name for name in MODELS], "strings": texts, "conversations": []}
    for name, stock in zip(MODELS, ask_stock("stock_tokenizer.py", question), strict=True):
        file = written(Source(bases / name, None, name), tmp_path / "out", quant="Q8_0")
        pairs = zip(texts, stock["ids"], run_llama_cpp(file, texts=texts).tokens_with_special, strict=True)
        wrong = [text for text, ours, theirs in pairs if ours != theirs]
        # llama.cpp composes no accents (NFC), which Qwen2's tokenizer does
        assert wrong == [text for text in NASTY if approximated(text) and "combining" in text] * (name == "qwen2"), name


def test_llama_cpp_that_aborts_is_an_error_of_ours(llama4: Path, tmp_path: Path) -> None:
    file = damaged(llama4, tmp_path / "other")
    changed_text(file, "general.architecture", b"llama4", b"llamaX")
    with pytest.raises(ExportError, match=r"llama\.cpp failed on .*unknown model architecture"):
        run_llama_cpp(file, [[1, 2]])
    with pytest.raises(ExportError, match="did not finish"):
        run_llama_cpp(llama4, [[1, 2]], timeout_seconds=0.01)


def refused(base: Path, tmp_path: Path, **options: Any) -> str:
    with pytest.raises((ExportError, CheckpointError)) as error:
        written(Source(base, None, "x"), tmp_path / "out", **options)
    return str(error.value)


def edited(bases: Path, name: str, tmp_path: Path, **config: Any) -> Path:
    base = tmp_path / name
    shutil.copytree(bases / name, base, dirs_exist_ok=True)
    found = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**found, **config}))
    return base


def test_what_llama_cpp_cannot_run_is_refused(bases: Path, tmp_path: Path) -> None:
    assert "attention_chunk_size is 64" in refused(edited(bases, "llama4", tmp_path, attention_chunk_size=64), tmp_path)
    assert "norm_topk_prob is False" in refused(edited(bases, "qwen3_moe", tmp_path, norm_topk_prob=False), tmp_path)
    assert "heads share them" in refused(edited(bases, "olmoe", tmp_path, num_key_value_heads=2), tmp_path)
    assert "rope_interleave is False" in refused(
        edited(bases, "deepseek_v3", tmp_path, rope_interleave=False), tmp_path
    )
    rotated = edited(bases, "llama4", tmp_path, attention_chunk_size=8192, no_rope_layers=[1, 1, 1, 1])
    assert "no_rope_layers is not every fourth" in refused(rotated, tmp_path)
    assert "'Q4_9' is no GGUF type" in refused(bases / "qwen3", tmp_path, quant="Q4_9")
    base = edited(bases, "qwen3", tmp_path)
    save_tokenizer(bpe_tokenizer(LLAMA3.replace("{1,3}", "{1,2}")), base)
    message = refused(base, tmp_path)
    assert "no pre-tokenizer that splits text as this" in message and "{1,2}" in message and "llama-bpe" in message
    (base / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refused(base, tmp_path)


def test_the_language_model_of_a_multimodal_one_is_the_same_file(bases: Path, tmp_path: Path) -> None:
    """As Llama 4 is published: everything behind a prefix, a vision tower beside it."""
    base = tmp_path / "llama4"
    shutil.copytree(bases / "llama4", base)
    values = {f"language_model.{key}": value for key, value in load_file(base / "model.safetensors").items()}
    save_file({**values, "vision_model.patch.weight": torch.ones(2, 2)}, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({"model_type": "llama4", "text_config": config}))
    file = written(Source(base, None, "llama4"), tmp_path / "out", quant="Q4_K_M")
    assert types(file) == reference()["llama4"]["types"]["Q4_K_M"]
    assert metadata(file)["llama4.block_count"] == 4
    read_back = GgufWeights(file, base)
    assert not failed(audit(Source(base, None, "llama4"), read_back.read, read_back.rounding))


def test_large_matrices_go_in_bands_and_chunks(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.export.gguf.CHUNK_VALUES", 3000)
    monkeypatch.setattr("adapters.export.gguf_tensors.BAND_BYTES", 7 * 1024)
    file = written(Source(bases / "llama4", None, "llama4"), tmp_path / "out", quant="Q6_K")
    assert types(file) == reference()["llama4"]["types"]["Q6_K"]


def test_values_that_are_not_finite_are_refused(bases: Path, tmp_path: Path) -> None:
    base = edited(bases, "qwen3", tmp_path)
    info = read_index(base)["model.layers.1.mlp.up_proj.weight"]
    with info.file.open("r+b") as file:
        file.seek(info.start)
        file.write(b"\x00\x00\xc0\x7f")
    assert "blk.1.ffn_up.weight would hold NaN or infinity" in refused(base, tmp_path)


def test_an_importance_matrix_of_another_model_is_refused(bases: Path, tmp_path: Path) -> None:
    file = tmp_path / "importance.gguf"
    write_importance(file, {"blk.0.ffn_up.weight": torch.ones(1, 8)}, {"blk.0.ffn_up.weight": torch.ones(1)}, 1)
    assert "it is another model's" in refused(bases / "qwen3", tmp_path, importance=file)
    file.write_bytes(b"GGUF, but no more")
    assert "is no importance matrix" in refused(bases / "qwen3", tmp_path, importance=file)
