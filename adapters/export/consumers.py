"""The programs that an export is made for: which formats each reads, what else it wants in the folder, its one command.

CONSUMERS["ollama"].command(Place(...)) ─▶ "cd … && ollama create … && ollama run …"      no torch at import

The commands are those of the programs' own documentation: vLLM "LoRA Adapters", SGLang "LoRA Serving", TGI's README,
llama.cpp's server README, Ollama's docs/modelfile.md, LM Studio's "Import Models".
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.verify import Check

if TYPE_CHECKING:
    from adapters.export import Source

PUBLISHER = "moe-studio"
"""The first of the two folders that LM Studio finds a model in."""

RUN = "run.py"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank."""

STACKED_IN_VLLM = ("gpt_oss", "qwen3_5_moe", "qwen3_5_moe_text")
"""Families whose class in vLLM is `is_3d_moe_weight` (`vllm/model_executor/models/gpt_oss.py`, `qwen3_5.py`): their
adapters come as stacks, and it takes no per-expert names. Other families take stacks only where that is switched on."""

TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class Place:
    """What a command names.

    Attributes:
        folder: the exported folder, as the command is to say it.
        name: the model's.
        base: the base model of an adapter. rank: the largest rank in it.
        gguf: the GGUF file in the folder.
        mixed: stacks for a family that vLLM has by expert.
    """

    folder: str
    name: str
    base: str = "BASE"
    rank: int = 0
    gguf: str = "model.gguf"
    mixed: bool = False

    @property
    def quoted(self) -> str:
        return shlex.quote(self.folder)

    def inside(self, name: str) -> str:
        return shlex.quote(f"{self.folder}/{name}")


@dataclass(frozen=True)
class Consumer:
    """One program.

    Attributes:
        formats: names in `adapters.export.EXPORTERS`, the default first.
        command: how it is run, from the folder.
        note: what to know before, in one sentence.
        folder: where the format's files lie in the exported folder; {name} is the model's.
        finish: writes what the program wants beside the format's files; it gets the source, the folder and the name.
        check: holds that against the model.
    """

    name: str
    title: str
    formats: tuple[str, ...]
    command: Callable[[Place], str]
    note: str
    folder: str = ""
    finish: Callable[[Source, Path, str], None] | None = None
    check: Callable[[Source, Path], list[Check]] | None = None

    def inside(self, out: Path, name: str) -> Path:
        """The folder of the format's own files."""
        return out / self.folder.format(name=name)


# -------------------------------------------------------------------- what lies beside the weights


def _add_run_model(source: Source, folder: Path, name: str) -> None:
    shutil.copyfile(Path(__file__).with_name("run_model.py"), folder / RUN)


def _add_run_adapter(source: Source, folder: Path, name: str) -> None:
    _add_tokenizer(source, folder, name)
    shutil.copyfile(Path(__file__).with_name("run_adapter.py"), folder / RUN)


def _add_tokenizer(source: Source, folder: Path, name: str) -> None:
    """An adapter goes with the tokenizer and the chat template that it was trained with."""
    for file in TOKENIZER:
        if (source.base / file).is_file() and not (folder / file).exists():
            shutil.copyfile(source.base / file, folder / file)


def _add_modelfile(source: Source, folder: Path, name: str) -> None:
    from adapters.export.ollama import write_modelfile

    write_modelfile(source.base, folder, gguf_in(folder).name, source.adapter)


def _check_modelfile(source: Source, folder: Path) -> list[Check]:
    from adapters.verify.ollama_files import check_modelfile

    return [*check_modelfile(source.base, folder, source.adapter), *_not_run("Ollama", "llama.cpp")(source, folder)]


def _not_run(program: str, library: str) -> Callable[[Source, Path], list[Check]]:
    """Says of a program that this machine does not run what loaded the same files in its place."""

    def check(source: Source, folder: Path) -> list[Check]:
        what = f"what {library} found"
        if _read_back(folder):
            what = f"what {library} found, which ran the values read back from these files and not the files,"
        detail = f"{program} is not run on this machine: {what} stands for it as far as that goes"
        return [Check(f"behaviour in {program}", "not run", detail)]

    return check


def _read_back(folder: Path) -> bool:
    """Whether the files are of the form that stock transformers was given as plain values (fp8)."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return config.get("quantization_config", {}).get("quant_method") == "compressed-tensors"


def gguf_in(folder: Path) -> Path:
    """The one GGUF file in a folder, or in a folder below it."""
    found = sorted(folder.rglob("*.gguf"))
    assert len(found) == 1, found
    return found[0]


# -------------------------------------------------------------------- commands


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def _run_adapter(place: Place) -> str:
    """The script finds by itself only a base that has its name on the hub."""
    found = HUB_ID.fullmatch(place.base) and not Path(place.base).is_dir()
    return f'python {place.inside(RUN)} "your question"' + ("" if found else f" --base {shlex.quote(place.base)}")


def _vllm_adapter(place: Place) -> str:
    rank = next((rank for rank in VLLM_RANKS if rank >= place.rank), place.rank)
    module, mixed = f"{place.name}={place.folder}", ""
    if place.mixed:  # without both, vLLM would put the factors into the wrong buffers and say nothing
        module = json.dumps({"name": place.name, "path": place.folder, "is_3d_lora_weight": True})
        mixed = "--enable-mixed-moe-lora-format "
    return (
        f"vllm serve {shlex.quote(place.base)} --enable-lora {mixed}--max-lora-rank {rank} "
        f"--lora-modules {shlex.quote(module)}"
    )


def mixed_in_vllm(form: str, model_type: str) -> bool:
    """Whether vLLM has to be told that this form's experts are stacks: see STACKED_IN_VLLM."""
    return form == "vllm-3d" and model_type not in STACKED_IN_VLLM


def _sglang_adapter(place: Place) -> str:
    return (
        f"python -m sglang.launch_server --model-path {shlex.quote(place.base)} --enable-lora "
        f"--max-lora-rank {place.rank} --lora-paths {shlex.quote(f'{place.name}={place.folder}')}"
    )


def _tgi(place: Place) -> str:
    return (
        f'docker run --gpus all --shm-size 1g -p 8080:80 -v "$(realpath {place.quoted})":/model '
        "ghcr.io/huggingface/text-generation-inference:3.3.4 --model-id /model"
    )


def _ollama(place: Place) -> str:
    tag = re.sub(r"[^a-z0-9._-]+", "-", place.name.lower()).strip("-._")
    return f"cd {place.quoted} && ollama create {tag} -f Modelfile && ollama run {tag}"


CONSUMERS: dict[str, Consumer] = {
    found.name: found
    for found in (
        Consumer(
            "transformers",
            "transformers",
            ("safetensors", "bnb-4bit", "fp8"),
            lambda place: f'python {place.inside(RUN)} "your question"',
            "A plain model directory, with a script that asks it.",
            finish=_add_run_model,
        ),
        Consumer(
            "peft",
            "PEFT (adapter)",
            ("peft",),
            _run_adapter,
            "The adapter alone, for the base that it was trained on.",
            finish=_add_run_adapter,
        ),
        Consumer(
            "vllm",
            "vLLM",
            ("safetensors", "fp8", "bnb-4bit"),
            lambda place: f"vllm serve {place.quoted} --served-model-name {shlex.quote(place.name)}",
            "Merged: nothing is added to a request.",
            check=_not_run("vLLM", "stock transformers"),
        ),
        Consumer(
            "vllm-adapter",
            "vLLM (adapter)",
            ("per-expert", "vllm-3d"),
            _vllm_adapter,
            "Many adapters on one base; the experts' factors as vLLM reads them.",
            finish=_add_tokenizer,
        ),
        Consumer(
            "sglang",
            "SGLang",
            ("safetensors", "fp8"),
            lambda place: (
                f"python -m sglang.launch_server --model-path {place.quoted} "
                f"--served-model-name {shlex.quote(place.name)}"
            ),
            "Merged: nothing is added to a request.",
            check=_not_run("SGLang", "stock transformers"),
        ),
        Consumer(
            "sglang-adapter",
            "SGLang (adapter)",
            ("per-expert", "sglang-3d"),
            _sglang_adapter,
            "Many adapters on one base; the experts' factors as SGLang reads them.",
            finish=_add_tokenizer,
        ),
        Consumer(
            "tgi",
            "Text Generation Inference",
            ("safetensors",),
            _tgi,
            "Merged; TGI loads no adapters on experts.",
            check=_not_run("TGI", "stock transformers"),
        ),
        Consumer(
            "llama.cpp",
            "llama.cpp",
            ("gguf",),
            lambda place: f"llama-server -m {place.inside(place.gguf)} --jinja",
            "One GGUF file, with its own chat template.",
        ),
        Consumer(
            "llama.cpp-adapter",
            "llama.cpp (adapter)",
            ("gguf-lora",),
            lambda place: f"llama-server -m BASE.gguf --lora {place.inside(place.gguf)} --jinja",
            "The adapter as GGUF, for a GGUF of the base.",
        ),
        Consumer(
            "ollama",
            "Ollama",
            ("gguf",),
            _ollama,
            "A GGUF file and its Modelfile: template, stop strings, context.",
            finish=_add_modelfile,
            check=_check_modelfile,
        ),
        Consumer(
            "lm-studio",
            "LM Studio",
            ("gguf",),
            lambda place: f"mkdir -p ~/.lmstudio/models && cp -r {place.inside(PUBLISHER)} ~/.lmstudio/models/",
            "A GGUF file in the two folders in which LM Studio looks for it.",
            folder=PUBLISHER + "/{name}",
            check=_not_run("LM Studio", "llama.cpp"),
        ),
    )
}


def consumers_of(formats: Sequence[str]) -> list[Consumer]:
    """Those that read one of these formats."""
    return [found for found in CONSUMERS.values() if set(found.formats) & set(formats)]
