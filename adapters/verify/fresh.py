"""Questions put to a fresh process: a module of ours, or a script that imports the consumer's library and not ours.

The question is a JSON file, and so is the answer; large arrays go through safetensors files that the question names.
How far it is, a process says through a pipe: `tell_parent`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from adapters.errors import ExportError

SHOWN_LINES = 12
HERE = Path(__file__).parent
PIPE = "STUDIO_PROGRESS_PIPE"
"""The variable that names the descriptor of the pipe."""

Progress = Callable[[int, int], None]

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


def ask_module(
    module: str, question: Mapping[str, Any], timeout_seconds: float | None = None, progress: Progress | None = None
) -> Any:
    """The answer of `python -m module QUESTION ANSWER`. Whatever ends this call ends that process.

    Args:
        progress: called with what the module says by `tell_parent`.

    Raises:
        FreshProcessError: with the last lines that the process wrote.
    """
    return _ask([sys.executable, "-m", module], question, timeout_seconds, progress)


def ask_stock(script: str, question: Mapping[str, Any], timeout_seconds: float | None = None) -> Any:
    """The answer of a script in this folder, run apart from the studio: `python -I script QUESTION ANSWER`.

    Raises:
        FreshProcessError: with the last lines that the process wrote.
    """
    return _ask([sys.executable, "-I", str(HERE / script)], question, timeout_seconds)


def tell_parent(done: int, total: int) -> None:
    """In a process that was asked: says how far it is to the one that asks; elsewhere nothing."""
    if PIPE in os.environ:
        os.write(int(os.environ[PIPE]), b"%d %d\n" % (done, total))


def _ask(
    command: Sequence[str],
    question: Mapping[str, Any],
    timeout_seconds: float | None,
    progress: Progress | None = None,
) -> Any:
    with tempfile.TemporaryDirectory(prefix="studio-verify-") as folder:
        asked, answered, said = (Path(folder) / name for name in ("question.json", "answer.json", "said.txt"))
        asked.write_text(json.dumps(question, default=str), encoding="utf-8")
        with said.open("wb") as output:
            try:
                code = _run([*command, str(asked), str(answered)], output, timeout_seconds, progress)
            except subprocess.TimeoutExpired:
                raise FreshProcessError(_failure(command, f"took over {timeout_seconds:.0f} s", said)) from None
        if code or not answered.is_file():
            message = _failure(command, _ending(code), said)
            raise FreshProcessError(
                message, code == -signal.SIGKILL or any(words in message for words in OUT_OF_MEMORY)
            )
        return json.loads(answered.read_text(encoding="utf-8"))


def _run(command: Sequence[str], output: BinaryIO, timeout_seconds: float | None, progress: Progress | None) -> int:
    """Its exit code; the process is gone when this returns, and when it raises."""
    here, there = os.pipe()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", PIPE: str(there)}
    with os.fdopen(here, "rb") as lines:
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(there,),
            )
        finally:
            os.close(there)
        return _followed(child, lines, timeout_seconds, progress)


def _followed(
    child: subprocess.Popen[bytes], lines: BinaryIO, timeout_seconds: float | None, progress: Progress | None
) -> int:
    late = threading.Event()
    timer = threading.Timer(timeout_seconds or 0, _end, (child, late))
    if timeout_seconds is not None:
        timer.start()
    try:
        for line in lines:  # to the end of the pipe, which is that of the process
            if progress:
                done, total = map(int, line.split())
                progress(done, total)
        code = child.wait()
    finally:
        timer.cancel()
        child.kill()
        child.wait()
    if late.is_set():
        raise subprocess.TimeoutExpired(child.args, timeout_seconds or 0)
    return code


def _end(child: subprocess.Popen[bytes], late: threading.Event) -> None:
    late.set()
    child.kill()


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    killed = ", most often for want of memory" if code == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name} ({code}{killed})"


def _failure(command: Sequence[str], what: str, said: Path) -> str:
    lines = said.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]
    return "\n".join([f"{Path(command[-1]).name} {what}", *(f"  {line}" for line in lines)])
