"""Questions put to a fresh process: a module of ours, or a script that imports the consumer's library and not ours.

The question is a JSON file, and so is the answer; large arrays go through safetensors files that the question names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters.errors import ExportError

SHOWN_LINES = 12
HERE = Path(__file__).parent


OUT_OF_MEMORY = ("MemoryError", "can't allocate memory", "Cannot allocate memory")
"""What Python, torch and the system write when memory is short."""


class FreshProcessError(ExportError):
    """The other process gave no answer: it ended with an error, was killed, or took too long.

    Attributes:
        for_memory: the system killed it, or it said itself that memory was short.
    """

    def __init__(self, message: str, for_memory: bool = False):
        super().__init__(message)
        self.for_memory = for_memory


def ask_module(module: str, question: Mapping[str, Any], timeout_seconds: float | None = None) -> Any:
    """The answer of `python -m module QUESTION ANSWER`.

    Raises:
        FreshProcessError: with the last lines that the process wrote.
    """
    return _ask([sys.executable, "-m", module], question, timeout_seconds)


def ask_stock(script: str, question: Mapping[str, Any], timeout_seconds: float | None = None) -> Any:
    """The answer of a script in this folder, run apart from the studio: `python -I script QUESTION ANSWER`.

    Raises:
        FreshProcessError: with the last lines that the process wrote.
    """
    return _ask([sys.executable, "-I", str(HERE / script)], question, timeout_seconds)


def _ask(command: Sequence[str], question: Mapping[str, Any], timeout_seconds: float | None) -> Any:
    with tempfile.TemporaryDirectory(prefix="studio-verify-") as folder:
        asked, answered, said = (Path(folder) / name for name in ("question.json", "answer.json", "said.txt"))
        asked.write_text(json.dumps(question, default=str), encoding="utf-8")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with said.open("wb") as output:
            try:
                ended = subprocess.run(
                    [*command, str(asked), str(answered)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    timeout=timeout_seconds,
                )
            except subprocess.TimeoutExpired:
                raise FreshProcessError(_failure(command, f"took over {timeout_seconds:.0f} s", said)) from None
        if ended.returncode or not answered.is_file():
            message = _failure(command, f"ended with code {ended.returncode}", said)
            short = ended.returncode == -9 or any(words in message for words in OUT_OF_MEMORY)
            raise FreshProcessError(message, short)
        return json.loads(answered.read_text(encoding="utf-8"))


def _failure(command: Sequence[str], what: str, said: Path) -> str:
    lines = said.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]
    killed = " (-9: most often for want of memory)" if what.endswith("-9") else ""
    return "\n".join([f"{Path(command[-1]).name} {what}{killed}", *(f"  {line}" for line in lines)])
