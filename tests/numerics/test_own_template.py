"""A chat template that an adapter brings along goes into everything that is made of it, and is held against it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFReader
from transformers import AutoTokenizer

from adapters.combine import Settings, combine
from adapters.export import EXPORTERS, Options, Source
from adapters.export.gguf import gguf_file
from adapters.export.ollama import MODELFILE, read_modelfile, write_modelfile
from adapters.lora import attach
from adapters.merge import merge_adapter
from adapters.peft_files import save_adapter
from adapters.placement import Placement, same_experts_everywhere
from adapters.verify import Evidence
from adapters.verify.ollama_files import check_modelfile
from adapters.verify.run import make_evidence
from tests.numerics.conftest import load_plain, randomise
from tests.numerics.gguf_models import MODELS

OWN = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}<|turn|>{% endfor %}"
ASKING = OWN + "{% if add_generation_prompt %}<assistant> {% endif %}"
FILE = "chat_template.jinja"
OFFLINE = Evidence((), (), None, "not asked")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A base as published without a chat template, and an adapter that was trained with one."""
    folder = tmp_path_factory.mktemp("own")
    base = MODELS["llama4"].save(folder / "base")
    (base / FILE).unlink()
    adapted(base, folder / "adapter", 3)
    return Source(base, folder / "adapter", "tiny")


def adapted(base: Path, out: Path, seed: int) -> Path:
    placed = Placement(attention=2, routed=same_experts_everywhere(2, 2, 8, [1, 2]), alpha=4.0)
    model = attach(load_plain(base), placed)
    randomise(model, seed, std=0.05)
    save_adapter(model, placed, out, base_name="base", base=base)
    (out / FILE).write_text(ASKING)
    return out


def text_of(directory: Path) -> str:
    return str(AutoTokenizer.from_pretrained(directory).chat_template)


def in_gguf(directory: Path) -> str:
    return str(GGUFReader(gguf_file(directory)).get_field("tokenizer.chat_template").contents())


MODEL_FORMATS: dict[str, Callable[[Path], str]] = {
    "safetensors": text_of,
    "bnb-4bit": text_of,
    "fp8": text_of,
    "gguf": in_gguf,
}


@pytest.mark.parametrize("name", MODEL_FORMATS)
def test_a_merged_model_has_it_and_the_check_misses_it(name: str, source: Source, tmp_path: Path) -> None:
    options, form = Options(quant="F32" if name == "gguf" else None), EXPORTERS[name]

    def status(out: Path) -> str:
        return {check.name: check.status for check in form.check(out, source, OFFLINE, options)}[
            "tokenizer: chat template"
        ]

    out = tmp_path / "out"
    out.mkdir()
    form.write(source, out, options)
    assert MODEL_FORMATS[name](out) == ASKING and status(out) == "passed"
    plain = tmp_path / "plain"
    plain.mkdir()
    form.write(Source(source.base, None, "tiny"), plain, options)
    if name == "gguf":
        assert GGUFReader(gguf_file(plain)).get_field("tokenizer.chat_template") is None
        assert status(plain) == "failed", "the base as it is has no template"
    else:
        assert not (plain / FILE).exists()
        (out / FILE).unlink()
        assert status(out) == "failed"


def failures(name: str, out: Path, source: Source) -> set[str]:
    checks = EXPORTERS[name].check(out, source, OFFLINE, Options())
    return {check.name for check in checks if check.status == "failed"}


@pytest.mark.parametrize("name", [form.name for form in EXPORTERS.values() if form.kind == "adapter"])
def test_an_adapter_form_has_it_and_the_check_misses_it(name: str, source: Source, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    EXPORTERS[name].write(source, out, Options())
    assert (out / FILE).read_text() == ASKING
    before = failures(name, out, source)
    (out / FILE).write_text(ASKING + " ")
    after = failures(name, out, source)
    assert before == set() and len(after) == 1, (before, after)


def test_the_merge_command_has_it_and_a_bases_own_gives_way(source: Source, tmp_path: Path) -> None:
    merge_adapter(source.base, source.adapter, tmp_path / "out")
    assert text_of(tmp_path / "out") == ASKING
    base = MODELS["llama4"].save(tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "inside"}))
    merge_adapter(base, adapted(base, tmp_path / "adapter", 4), tmp_path / "over")
    assert text_of(base) != text_of(tmp_path / "over") == ASKING


def test_ollama_is_told_the_adapters_turns(source: Source, tmp_path: Path) -> None:
    EXPORTERS["gguf"].write(source, tmp_path, Options(quant="F32"))
    write_modelfile(source.base, tmp_path, gguf_file(tmp_path).name, source.adapter)
    assert "<assistant> " in read_modelfile((tmp_path / MODELFILE).read_text())["TEMPLATE"][0]
    assert {check.status for check in check_modelfile(source.base, tmp_path, source.adapter)} == {"passed"}
    write_modelfile(source.base, tmp_path, gguf_file(tmp_path).name)
    assert "failed" in {check.status for check in check_modelfile(source.base, tmp_path, source.adapter)}


def test_the_evidence_is_asked_in_the_adapters_words(source: Source, tmp_path: Path) -> None:
    asked = ({"role": "user", "content": "the ticket"}, {"role": "assistant", "content": "12"})
    evidence = make_evidence(source, [asked], tmp_path)
    assert "<user> the ticket<|turn|>" in evidence.texts[0]


def test_a_combination_has_the_first_one_and_says_where_others_differ(source: Source, tmp_path: Path) -> None:
    assert source.adapter is not None
    second = adapted(source.base, tmp_path / "second", 5)
    adapters = [source.adapter, second]
    settings = Settings("sum", (0.5, 0.5))
    assert combine(source.base, adapters, tmp_path / "same", settings, base_name="b")["warnings"] == []
    (second / FILE).write_text(OWN)
    found = combine(source.base, adapters, tmp_path / "other", settings, base_name="b")
    assert str(second) in found["warnings"][0] and "chat template" in found["warnings"][0]
    assert (tmp_path / "other" / FILE).read_text() == ASKING
