"""A process started as `adapters.export.gguf_child` is, which then does what FAULT says."""

import json
import os
import sys
import time
from pathlib import Path

import torch

from adapters.export.ggml import prepare, quantize
from adapters.export.gguf_child import limit


def abort(memory_bytes: int) -> None:
    prepare("IQ2_XXS")
    quantize(torch.ones(1, 256), "IQ2_XXS")  # GGML_ASSERT: this type wants an importance matrix


def take_memory(memory_bytes: int) -> None:
    torch.zeros(memory_bytes, dtype=torch.uint8)


def hang(memory_bytes: int) -> None:
    time.sleep(600)


FAULTS = {"abort": abort, "memory": take_memory, "time": hang}

if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    limit(given["memory_bytes"], given["parent"])
    FAULTS[os.environ["FAULT"]](given["memory_bytes"])
