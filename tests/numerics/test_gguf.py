"""GGUF files: llama.cpp's own types, bytes and metadata; and llama.cpp says what the trained model says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from safetensors.torch import save_file

from adapters.checkpoint import read_config, read_index
from adapters.errors import CheckpointError, ExportError
from adapters.export import EXPORTERS, Options, Source
from adapters.export.gguf import gguf_file, write_gguf
from adapters.export.importance import write_importance
from adapters.layouts import layout_for, moe_shapes
from adapters.loading import load_base
from adapters.lora import attach
from adapters.peft_files import save_adapter
from adapters.placement import Placement, same_experts_everywhere
from adapters.verify import Check, Evidence
from adapters.verify.behaviour import SAME
from adapters.verify.fresh import ask_stock
from adapters.verify.gguf_files import BOS, ENDS, IDS, TEMPLATE, WHOLE, check_run, check_vocabulary
from adapters.verify.gguf_weights import GgufWeights
from adapters.verify.llama_cpp import run_llama_cpp
from adapters.verify.tokenizer import NASTY
from adapters.verify.weights import TARGETED, audit
from tests.numerics.conftest import randomise
from tests.numerics.gguf_facts import QUANTS, REFERENCE, WITH_IMPORTANCE, importance_of, metadata, tensors, types
from tests.numerics.gguf_models import LLAMA3, MODELS, bpe_tokenizer, save_tokenizer

PROMPTS = ("Please refund the order 1234's\n\n ok Ü printing on the ticket.", "  12 the printer   on fire! ß don't")
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
    write_gguf(source, out, Options(**options))
    return gguf_file(out)


@pytest.mark.parametrize("name", MODELS)
def test_every_type_has_llama_cpps_own_bytes(name: str, bases: Path, tmp_path: Path) -> None:
    source, expected = Source(bases / name, None, name), reference()[name]
    plain = written(source, tmp_path / "plain", quant="F32")
    assert tensors(plain) == expected["tensors"]
    for quant in QUANTS:
        file = written(source, tmp_path / "out", quant=quant)
        assert types(file) == expected["types"][quant], quant


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
    return {name: train(bases / name, root / name) for name in MODELS}


def train(base: Path, out: Path) -> tuple[Source, Evidence]:
    index, config = read_index(base), read_config(base)
    shapes = moe_shapes(layout_for(config, index), index, config)
    routed = same_experts_everywhere(2, len(shapes), shapes[0].experts, [1, 2]) if shapes else ()
    placement = Placement(attention=2, alpha=4, routed=routed)
    model = attach(load_base(base, quantize="none"), placement).eval()
    randomise(model, std=0.1)
    save_adapter(model, placement, out / "adapter", base_name="base")
    (answer,) = ask_stock("stock_tokenizer.py", {"directories": [base], "strings": PROMPTS, "conversations": []})
    save_file(logits_of(model, answer["ids"]), out / "logits.safetensors")
    return Source(base, out / "adapter", base.name), Evidence(answer["ids"], PROMPTS, out / "logits.safetensors")


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
