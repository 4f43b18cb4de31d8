"""GGUF LoRAs: read back by llama.cpp's rules, and laid over an F32 base in llama.cpp itself."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import save_file

from adapters.errors import ExportError
from adapters.export import EXPORTERS, Options, Source
from adapters.export.gguf import gguf_file
from adapters.lora import attach
from adapters.peft_files import save_adapter
from adapters.placement import Placement
from adapters.sidecar import read_sidecar
from adapters.verify import Check, Evidence
from tests.numerics.conftest import load_plain, randomise
from tests.numerics.gguf_models import MODELS

SAME, APART = "behaviour: as the trained model", "behaviour: apart from the base"
LORA = EXPORTERS["gguf-lora"]


@dataclass(frozen=True)
class Trained:
    source: Source
    evidence: Evidence

    @property
    def offline(self) -> Evidence:
        return replace(self.evidence, logits=None, why_none="not asked")

    def written(self, folder: Path, options: Options | None = None) -> Path:
        out = folder / "lora"
        out.mkdir()
        LORA.write(self.source, out, options or Options())
        return out


def trained(name: str, folder: Path, routers: bool = True, attention: bool = True) -> Trained:
    """A tiny model of the family, every class of it adapted, experts with ranks of their own."""
    base = MODELS[name].save(folder / "base")
    model = load_plain(base)
    layers = [module for module in model.modules() if hasattr(module, "gate_up_proj")]
    experts = len(layers[0].gate_up_proj) if layers else 0
    placed = Placement(
        attention=3 if attention else 0,
        dense_mlp=0 if experts and name != "deepseek_v3" else 2,
        shared_expert=2 if name in ("llama4", "deepseek_v3") else 0,
        router=2 if experts and routers else 0,
        routed=tuple(tuple((layer + expert) % 4 for expert in range(experts)) for layer in range(len(layers))),
        alpha=7.0,
    )
    adapted = attach(model, placed).eval()
    randomise(adapted, std=0.05)
    save_adapter(adapted, placed, folder / "adapter", base_name="org/base", base=base)
    prompts = [[1, 5, 40, 99, 7, 230, 31, 64], [3, 250, 12, 12, 90]]
    found = {}
    with torch.no_grad():
        for number, prompt in enumerate(prompts):
            found[f"tuned.{number}"] = adapted(input_ids=torch.tensor([prompt])).logits[0].clone()
            with adapted.disable_adapter():
                found[f"base.{number}"] = adapted(input_ids=torch.tensor([prompt])).logits[0].clone()
    save_file(found, folder / "evidence.safetensors")
    return Trained(Source(base, folder / "adapter", "tiny one"), Evidence(prompts, (), folder / "evidence.safetensors"))


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if check.status == "failed"}


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_says_with_the_lora_what_the_trained_model_says(name: str, tmp_path: Path) -> None:
    made = trained(name, tmp_path, attention=name != "deepseek_v3")
    out = made.written(tmp_path)
    checks = {check.name: check for check in LORA.check(out, made.source, made.evidence, Options())}
    assert {check.status for check in checks.values()} == {"passed"}, checks
    limit = 1e-7 if name == "gpt_oss" else 1e-9  # llama.cpp rounds the bounds of YaRN's ramp
    assert checks[SAME].measured["kl_mean"] < limit and APART in checks
    assert [file.name for file in sorted(out.iterdir())] == ["studio_adapter.json", "tiny-one-lora.gguf"]
    sidecar = read_sidecar(out)
    assert sidecar is not None and (sidecar.format, sidecar.made_for) == ("gguf-lora", ("llama.cpp",))


@pytest.mark.parametrize("short", ["time", "room"])
def test_too_little_time_or_room_says_nothing_against_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: str
) -> None:
    made = trained("qwen3_moe", tmp_path)
    out = made.written(tmp_path)
    if short == "time":
        monkeypatch.setattr("adapters.verify.llama_cpp.SECONDS", 0.01)
        monkeypatch.setattr("adapters.verify.llama_cpp.SECONDS_A_GB", 0.0)
    else:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr("adapters.verify.memory.shutil.disk_usage", lambda path: usage)
        monkeypatch.setattr("adapters.verify.gguf_lora.write_gguf", lambda *_: pytest.fail("there is no room for it"))
    checks = LORA.check(out, made.source, made.evidence, Options())
    assert failed(checks) == set()
    words = "within" if short == "time" else "TMPDIR"
    assert {words in check.detail for check in checks if check.status == "not run"} == {True}


def test_half_precision(tmp_path: Path) -> None:
    made = trained("qwen3_moe", tmp_path)
    out = made.written(tmp_path, Options(dtype="float16"))
    assert failed(LORA.check(out, made.source, made.offline, Options(dtype="float16"))) == set()
    assert "adapter: the change of every matrix" in failed(LORA.check(out, made.source, made.offline, Options()))
    with pytest.raises(ExportError, match="dtype 'bfloat16': a GGUF LoRA is written as float32, float16"):
        LORA.write(made.source, tmp_path / "adapter", Options(dtype="bfloat16"))


def test_what_llama_cpp_would_leave_out_is_refused(tmp_path: Path) -> None:
    made = trained("deepseek_v3", tmp_path)
    with pytest.raises(ExportError, match="takes no LoRA of these matrices of deepseek2") as error:
        made.written(tmp_path)
    assert "q_a_proj" in str(error.value) and "o_proj" not in str(error.value) and "format gguf" in str(error.value)


FAULTS = ("swapped experts", "rows of queries", "one expert lost", "scale")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen_in_the_file_and_in_llama_cpp(tmp_path: Path, fault: str) -> None:
    made = trained("mixtral", tmp_path)
    out = made.written(tmp_path)
    plant(gguf_file(out), fault)
    found = failed(LORA.check(out, made.source, made.evidence, Options()))
    assert {"adapter: the change of every matrix", SAME} <= found


def plant(file: Path, fault: str) -> None:
    reader = GGUFReader(file, "r+")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    gate, query = tensors["blk.0.ffn_gate_exps.weight.lora_b"], tensors["blk.0.attn_q.weight.lora_b"]
    if fault == "swapped experts":
        gate[[1, 2]] = gate[[2, 1]]
    elif fault == "rows of queries":  # as Llama's were before llama.cpp's order
        by_head = query.reshape(4, -1, 2, query.shape[1])
        query[:] = np.swapaxes(by_head, 1, 2).reshape(query.shape)
    elif fault == "one expert lost":
        tensors["blk.1.ffn_down_exps.weight.lora_b"][2] = 0
    else:
        for name, data in tensors.items():
            if name.endswith(".lora_b"):
                data *= 2
    reader.data.flush()


def test_what_is_no_lora_is_seen(tmp_path: Path) -> None:
    made = trained("qwen3", tmp_path)
    out = made.written(tmp_path)
    file = gguf_file(out)
    content = bytearray(file.read_bytes())
    place = content.index(b"adapter.type") + len(b"adapter.type") + 4 + 8
    assert content[place : place + 4] == b"lora"
    content[place : place + 4] = b"rola"
    file.write_bytes(content)
    assert failed(LORA.check(out, made.source, made.evidence, Options())) == {"file: metadata", "loads in llama.cpp"}
    file.write_bytes(b"GGUF")
    assert failed(LORA.check(out, made.source, made.offline, Options())) == {"file: metadata"}
