"""The format "gguf", written in a process of its own with limits: ggml aborts where something is wrong in it, and takes
its process with it.

    write_gguf ──▶ python -m adapters.export.gguf_child QUESTION ANSWER ──▶ the file; facts, or the error, as the answer

The process ends with the one that asked, however that ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from adapters.checkpoint import read_index
from adapters.errors import ExportError, StudioError
from adapters.export import Options, Progress, Source
from adapters.export.gguf import make_gguf
from adapters.export.gguf_tensors import plan_tensors
from adapters.export.importance import importance_file
from adapters.verify.checker import options_from, source_from
from adapters.verify.fresh import FreshProcessError, ask_module, tell_parent

PROGRAM_BYTES, CORE_BYTES = 2 * 2**30, 16 * 2**20
"""Memory of its own that Python, torch, the adapter's factors and small buffers may take, and the stacks of a core's
threads; of the whole, about 0.4 GB is ever touched."""
COPIES = 24
"""How often the largest piece of the base may stand in memory: read, in float32, merged, dequantised, cut to rows."""
SECONDS, SECONDS_A_GB = 600.0, 600.0
"""About 15 times what Q4_K_M took for 20.5 GB on two busy cores."""
WRITER = "adapters.export.gguf_child"
DIES_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


def write_gguf(source: Source, directory: Path, options: Options, progress: Progress | None = None) -> dict[str, Any]:
    """Writes `NAME-QUANT.gguf` into the empty `directory`.

    Args:
        options: `quant` (a name in `gguf_types.QUANTS`) and `importance` (an importance matrix, or examples).
        progress: called with bytes of the base.

    Returns:
        As `adapters.export.gguf.make_gguf`.

    Raises:
        ExportError: llama.cpp cannot run this model or tokenizer, a tool is missing, the disk is too small, or the
            process aborted, was killed, or went over its limits of memory or time.
        CheckpointError: a merged value is not finite.
    """
    limits = {"memory_bytes": _memory_bytes(source), "parent": os.getpid()}
    seconds = SECONDS + SECONDS_A_GB * sum(info.size_bytes for info in read_index(source.base).values()) / 1e9
    given = importance_file(options.importance, source) if options.importance else nullcontext(None)
    with given as importance:
        asked = asdict(replace(options, importance=importance))
        question = {"source": asdict(source), "directory": directory, "options": asked, **limits}
        try:
            answer = ask_module(WRITER, question, seconds, progress)
        except FreshProcessError as error:
            raise ExportError(
                f"no GGUF was written: the process that quantises with ggml failed (its limits: "
                f"{limits['memory_bytes'] / 1e9:.1f} GB of memory, {seconds:.0f} s); try another --quant.\n{error}"
            ) from None
    return _facts(answer)


def _memory_bytes(source: Source) -> int:
    """The limit for this model: it does not grow with its layers or experts, but with the largest matrix."""
    largest = max(piece.size_bytes for piece in plan_tensors(source.open()).pieces)
    return PROGRAM_BYTES + CORE_BYTES * (os.cpu_count() or 1) + COPIES * largest


def _facts(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What the process answered.

    Raises:
        StudioError: the one that it ended with, as it was.
    """
    if "error" not in answer:
        return dict(answer["facts"])
    kinds = {kind.__name__: kind for kind in (*StudioError.__subclasses__(), *ExportError.__subclasses__())}
    kind = kinds.get(answer["error"], ExportError)
    error = kind.__new__(kind, answer["message"])
    error.__dict__.update(answer["attributes"])
    raise error


# -------------------------------------------------------------------- in the process


def answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """{"facts"} of the file written, or {"error", "message", "attributes"}."""
    source, options = source_from(question["source"]), options_from(question["options"])
    try:
        return {"facts": make_gguf(source, Path(question["directory"]), options, tell_parent)}
    except StudioError as error:
        return {"error": type(error).__name__, "message": str(error), "attributes": vars(error)}


def limit(memory_bytes: int, parent: int) -> None:
    """No more memory of its own than that, no core file, no debugger at an abort, and no life after `parent`."""
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["GGML_NO_BACKTRACE"] = "1"
    ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the process that asked is gone")


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    limit(given["memory_bytes"], given["parent"])
    Path(sys.argv[2]).write_text(json.dumps(answer(given)), encoding="utf-8")
