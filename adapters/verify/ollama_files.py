"""Holds an Ollama folder against the model's own chat template and EOS tokens. Ollama itself is not run."""

from __future__ import annotations

from pathlib import Path

from adapters.checkpoint import read_json_object, text_config
from adapters.export.ollama import (
    CONVERSATIONS,
    MODELFILE,
    Render,
    adds_bos,
    chat_template,
    conversation,
    find_joints,
    read_modelfile,
)
from adapters.verify import Check
from adapters.verify.go_template import render

TEMPLATE, STOPS = "Ollama template", "Ollama stop strings"


def check_modelfile(base: Path, folder: Path, adapter: Path | None = None) -> list[Check]:
    """The template, evaluated, must give what the chat template gives; the stop strings must be the EOS tokens."""
    said = read_modelfile((folder / MODELFILE).read_text(encoding="utf-8"))
    from_file = _check_from(folder, said)
    if from_file.status == "failed":
        return [from_file]
    return [from_file, _check_template(chat_template(base, adapter), folder, said), _check_stops(base, said)]


def _check_from(folder: Path, said: dict[str, list[str]]) -> Check:
    files = said.get("FROM", [])
    there = len(files) == 1 and (folder / files[0]).is_file()
    detail = f"FROM names {', '.join(files) or 'nothing'}" + ("" if there else ", which is not in the folder")
    return Check("Ollama FROM", "passed" if there else "failed", detail)


def _check_template(template: tuple[Render | None, str], folder: Path, said: dict[str, list[str]]) -> Check:
    jinja, bos = template
    if "TEMPLATE" not in said:
        wanted = jinja is not None and find_joints(jinja) is not None
        detail = "the Modelfile has no template: the model's cannot be said in Ollama's language"
        return Check(TEMPLATE, "failed" if wanted else "not run", detail)
    assert jinja is not None
    left_out = bos if adds_bos(folder / said["FROM"][0]) else ""  # Ollama puts it there itself
    differ = []
    tried = [roles for roles in CONVERSATIONS if "system" not in roles or ("", "system") in (find_joints(jinja) or {})]
    for roles in tried:
        messages = conversation(roles)
        if render(said["TEMPLATE"][0], messages) != jinja(messages, True).removeprefix(left_out):
            differ.append(", ".join(roles))
    if differ:
        return Check(TEMPLATE, "failed", f"it differs from the chat template for the roles {'; '.join(differ)}")
    detail = f"gives the text of the chat template for {len(tried)} conversations (evaluated here; Ollama was not run)"
    return Check(TEMPLATE, "passed", detail, {"conversations": len(tried)})


def _check_stops(base: Path, said: dict[str, list[str]]) -> Check:
    """What stock transformers writes for every id at which the model's own files or its tokenizer end an answer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    ids: set[int | None] = {tokenizer.eos_token_id}
    for file in ("config.json", "generation_config.json"):
        found = text_config(read_json_object(base / file)).get("eos_token_id") if (base / file).is_file() else None
        ids |= set(found) if isinstance(found, list) else {found}
    have = said.get("stop", [])
    wanted = [str(tokenizer.decode([number])) for number in sorted(number for number in ids if number is not None)]
    same = bool(wanted) and sorted(have) == sorted(wanted)
    detail = f"stops at {', '.join(have) or 'nothing'}; the model's EOS tokens: {', '.join(wanted) or 'none'}"
    return Check(STOPS, "passed" if same else "failed", detail)
