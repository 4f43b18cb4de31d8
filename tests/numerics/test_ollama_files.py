"""Ollama's Modelfile says what the model's chat template says, for the shapes of template that the families have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFWriter

from adapters.errors import ExportError
from adapters.export.ollama import (
    CONVERSATIONS,
    MODELFILE,
    chat_template,
    conversation,
    find_joints,
    go_template,
    read_modelfile,
    stop_strings,
    write_modelfile,
)
from adapters.verify.go_template import render
from adapters.verify.ollama_files import check_modelfile
from studio.base import EMBEDDED_DIR

LLAMA4 = (EMBEDDED_DIR / "chat_template.jinja").read_text()
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[INST] {{ m.content }}\n\n"
    "{% elif m.role == 'user' %}{% if loop.previtem is not defined or loop.previtem.role != 'system' %}[INST] "
    "{% endif %}{{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}"
    "{% elif m.role == 'user' %}User: {{ m.content }}\n{% else %}Bot: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Bot:{% endif %}"
)
BRACES = "{% for m in messages %}{{ '{{' }}{{ m.role }}{{ '}}' }}{{ m.content }}{% endfor %}{{ '{{a}}' }}"
REASONING = (  # the last answer is written otherwise than the earlier ones
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.index > messages|length - 2 %}"
    "<think></think>{% endif %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
DATED = LLAMA4 + "{{ strftime_now('%d') if false }}"


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A base with a chat template, and a folder with a GGUF file (its metadata alone) and that base's Modelfile."""

    def make(template: str, adds_bos: bool = True, **generation: object) -> tuple[Path, Path]:
        base, folder = tmp_path / "base", tmp_path / "out"
        shutil.copytree(EMBEDDED_DIR, base, ignore=shutil.ignore_patterns("*.safetensors"))
        (base / "chat_template.jinja").write_text(template)
        config = json.loads((base / "generation_config.json").read_text())
        (base / "generation_config.json").write_text(json.dumps({**config, **generation}))
        folder.mkdir()
        writer = GGUFWriter(folder / "m.gguf", "llama")
        writer.add_add_bos_token(adds_bos)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_modelfile(base, folder, "m.gguf")
        return base, folder

    return make


def statuses(base: Path, folder: Path) -> dict[str, str]:
    return {check.name: check.status for check in check_modelfile(base, folder)}


@pytest.mark.parametrize(
    "template", [LLAMA4, CHATML, INST, NO_SYSTEM, BRACES], ids=["llama4", "chatml", "inst", "no-system", "braces"]
)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_template_gives_what_the_chat_template_gives(
    export: Callable[..., tuple[Path, Path]], template: str, adds_bos: bool
) -> None:
    base, folder = export(template, adds_bos)
    said = read_modelfile((folder / MODELFILE).read_text())
    jinja, bos = chat_template(base)
    assert jinja is not None
    for roles in CONVERSATIONS:
        if template == NO_SYSTEM and "system" in roles:
            continue
        messages = [{**m, "content": m["content"] + ' {{ "x" }} "quoted"\nline'} for m in conversation(roles)]
        assert render(said["TEMPLATE"][0], messages) == jinja(messages, True).removeprefix(bos if adds_bos else "")
    assert set(statuses(base, folder).values()) == {"passed"}


@pytest.mark.parametrize("template", [REASONING, DATED], ids=["reasoning", "dated"])
def test_a_template_that_says_more_gets_no_template_line_and_no_passed_check(
    export: Callable[..., tuple[Path, Path]], template: str
) -> None:
    base, folder = export(template)
    text = (folder / MODELFILE).read_text()
    assert 'TEMPLATE "' not in text and text.count("# No TEMPLATE") == 1
    assert statuses(base, folder)["Ollama template"] == "not run"


def test_bos_stands_once(export: Callable[..., tuple[Path, Path]]) -> None:
    """Ollama puts it in front where the file says so; the template must not."""
    base, folder = export(LLAMA4)
    assert "<|begin_of_text|>" not in (folder / MODELFILE).read_text()
    text = (folder / MODELFILE).read_text().replace('eq $last "" }}', 'eq $last "" }}<|begin_of_text|>')
    (folder / MODELFILE).write_text(text)
    assert statuses(base, folder)["Ollama template"] == "failed"


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("<|eot|><|header_start|>assistant", "<|header_start|>assistant", "Ollama template"),
        ('if eq .Role "user"', 'if eq .Role "human"', "Ollama template"),
        ('PARAMETER stop "<|eot|>"\n', "", "Ollama stop strings"),
        ("FROM ./m.gguf", "FROM ./other.gguf", "Ollama FROM"),
    ],
)
def test_each_fault_in_the_file_is_seen(
    export: Callable[..., tuple[Path, Path]], old: str, new: str, name: str
) -> None:
    base, folder = export(LLAMA4)
    text = (folder / MODELFILE).read_text()
    assert old in text
    (folder / MODELFILE).write_text(text.replace(old, new))
    assert statuses(base, folder)[name] == "failed"


def test_parameters_come_from_the_models_own_files(export: Callable[..., tuple[Path, Path]]) -> None:
    base, folder = export(LLAMA4, temperature=0.6, top_p=0.9, repetition_penalty=1.1)
    said = read_modelfile((folder / MODELFILE).read_text())
    assert said["stop"] == stop_strings(base) == ["<|end_of_text|>", "<|eot|>"]
    found = {name: said[name] for name in ("num_ctx", "temperature", "top_p", "repeat_penalty")}
    assert found == {"num_ctx": ["8192"], "temperature": ["0.6"], "top_p": ["0.9"], "repeat_penalty": ["1.1"]}


def test_the_tokenizers_own_end_is_a_stop_string_too(export: Callable[..., tuple[Path, Path]]) -> None:
    base, folder = export(LLAMA4)
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|header_end|>"}))
    assert statuses(base, folder)["Ollama stop strings"] == "failed", "written before the tokenizer said so"
    write_modelfile(base, folder, "m.gguf")
    assert "<|header_end|>" in read_modelfile((folder / MODELFILE).read_text())["stop"]
    assert statuses(base, folder)["Ollama stop strings"] == "passed"


def test_a_joint_that_differs_by_place_is_no_joint() -> None:
    def counted(messages: object, answer: bool) -> str:
        return "".join(f"{number}{m['content']}" for number, m in enumerate(messages)) + "?" * answer  # type: ignore

    assert find_joints(counted) is None


# -------------------------------------------------------------------- Go's templates


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ('a {{- "b" -}} c', "abc"),
        (
            '{{ range .Messages }}{{ if eq .Role "user" }}U{{ else if eq .Role "x" }}X{{ else }}E{{ end }}{{ end }}',
            "UE",
        ),
        ('{{ $l := "-" }}{{ range .Messages }}{{ $l }}{{ $l = .Role }}{{ end }}{{ $l }}', "-userassistant"),
        ('{{ if eq "a" "b" }}{{ if eq "a" "a" }}x{{ end }}{{ end }}y', "y"),
    ],
)
def test_the_evaluator_follows_go(template: str, said: str) -> None:
    assert render(template, conversation(("user", "assistant"))) == said


@pytest.mark.parametrize(
    "template",
    [
        "{{ .System }}",
        "{{ range .Tools }}{{ end }}",
        "{{ if .System }}a{{ end }}",
        "{{ end }}",
        "{{ range .Messages }}",
    ],
)
def test_what_the_evaluator_does_not_know_is_refused(template: str) -> None:
    with pytest.raises(ExportError):
        render(template, conversation(("user",)))


def test_braces_of_the_template_are_no_actions() -> None:
    joints = {("", "user"): "{{a}}", ("user", ""): "}}"}
    assert render(go_template(joints, ""), [{"role": "user", "content": "x"}]) == "{{a}}x}}"
