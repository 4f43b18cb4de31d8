"""GGUF files run in llama.cpp, in a process of its own with limits of memory and time.

    run_llama_cpp(model, prompts, texts=…) ─▶ LlamaCppRun      logits after every token, greedy text, token ids of texts

llama.cpp comes from the package xllamacpp, whose one shared library holds it whole.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.errors import ExportError
from adapters.export import TOOLS

PROGRAM = Path(__file__).with_name("run_llama_cpp.py")
SPARE_BYTES = 6 * 2**30
"""Address space beside twice the model: Python, the library, keys and values, logits."""

SECONDS, SECONDS_A_GB = 600.0, 600.0


class LlamaCppTimeout(ExportError):
    """llama.cpp was not given the time it needs: the file is neither right nor wrong."""


@dataclass(frozen=True)
class LlamaCppRun:
    """What llama.cpp made of one file.

    Attributes:
        version: of llama.cpp.
        facts: bos, eos, eot, pad (ids, -1 where there is none), add_bos, add_eos, vocab_size, end_of_generation (ids),
            chat_template (text or None).
        logits: of each prompt (T, V) float32, after each of its tokens.
        tokens: ids of each text, special tokens in the text recognised, none added. tokens_with_special: with those
            that the file says are added (BOS).
        greedy, greedy_texts: ids, and text, of the likeliest continuation of each prompt.
    """

    version: str
    facts: dict[str, Any]
    logits: list[Tensor]
    tokens: list[list[int]]
    tokens_with_special: list[list[int]]
    greedy: list[list[int]]
    greedy_texts: list[str]


def llama_cpp_library() -> Path:
    """The shared library of llama.cpp inside xllamacpp; nothing is loaded.

    Raises:
        ExportError: it is not installed.
    """
    found = importlib.util.find_spec("xllamacpp")
    places = (found.submodule_search_locations if found else None) or []
    for file in (file for place in places for file in sorted(Path(place).glob("xllamacpp*.so"))):
        return file
    raise ExportError(f"GGUF needs llama.cpp, from the package xllamacpp, which is not installed; add it by: {TOOLS}")


def cores() -> int:
    """Threads to run with: as many as OMP_NUM_THREADS says, else as this process has cores."""
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(said) if said.isdecimal() and int(said) else len(os.sched_getaffinity(0))


def run_llama_cpp(
    model: Path,
    prompts: Sequence[Sequence[int]] = (),
    lora: Path | None = None,
    *,
    lora_scale: float = 1.0,
    texts: Sequence[str] = (),
    greedy_tokens: int = 0,
    threads: int | None = None,
    timeout_seconds: float | None = None,
) -> LlamaCppRun:
    """Loads `model` in llama.cpp and asks it for logits, text and token ids.

    Args:
        model: a GGUF file.
        prompts: token ids, special tokens included; without any, only the vocabulary is loaded.
        lora: a GGUF LoRA laid over the model with `lora_scale`.
        texts: to be tokenised.
        greedy_tokens: how many tokens to add to each prompt.
        threads: None takes OMP_NUM_THREADS, else every core there is.
        timeout_seconds: None gives ten minutes, and ten more for each GB of the model.

    Raises:
        LlamaCppTimeout: it did not end in time, which says nothing of the file.
        ExportError: xllamacpp is missing, or llama.cpp refused the file, crashed, or ran out of memory.
    """
    library = llama_cpp_library()
    size = model.stat().st_size
    with tempfile.TemporaryDirectory(prefix="llama-cpp-") as place:
        question = {
            "out": place,
            "prompts": [list(prompt) for prompt in prompts],
            "texts": list(texts),
            "greedy_tokens": greedy_tokens,
            "threads": threads or cores(),
            "lora": str(lora) if lora else None,
            "lora_scale": lora_scale,
            "memory_bytes": 2 * size + SPARE_BYTES,
        }
        _run(library, model, question, timeout_seconds or SECONDS + SECONDS_A_GB * size / 1e9)
        answers = json.loads((Path(place) / "answers.json").read_text(encoding="utf-8"))
        logits = _logits(Path(place) / "logits.f32", prompts, answers["facts"]["vocab_size"])
    return LlamaCppRun(logits=logits, **answers)


def _run(library: Path, model: Path, question: dict[str, Any], timeout_seconds: float) -> None:
    command = [sys.executable, "-I", str(PROGRAM), str(library), str(model)]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(question).encode(),
            capture_output=True,
            timeout=timeout_seconds,
            env={**os.environ, "OMP_NUM_THREADS": str(question["threads"])},
        )
    except subprocess.TimeoutExpired:
        raise LlamaCppTimeout(f"llama.cpp did not finish {model.name} within {timeout_seconds:.0f} s") from None
    if done.returncode:
        raise ExportError(f"llama.cpp failed on {model.name} ({_ending(done.returncode)}): {_told(done.stderr)}")


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _told(stderr: bytes) -> str:
    """The lines that name an error, else the last ones."""
    lines = [line.strip() for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    named = [line for line in lines if "error" in line.lower() or "assert" in line.lower() or "failed" in line.lower()]
    return " | ".join(named[:3] + lines[-2:]) or "it said nothing"


def _logits(file: Path, prompts: Sequence[Sequence[int]], vocab_size: int) -> list[Tensor]:
    lengths = [len(prompt) for prompt in prompts]
    if not sum(lengths):
        return []
    values = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float32).view(-1, vocab_size)
    return list(values.split(lengths))
