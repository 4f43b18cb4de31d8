"""Says whether two model directories are the same model, without reading hundreds of gigabytes. No torch.

fingerprint(directory) ─▶ {"weights", "config", "tokenizer", "chat_template"}      a sha256 of each
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from adapters.checkpoint import TensorInfo, read_index, read_json_object

SAMPLED_BYTES = 4096
"""Read from the middle of each matrix, and of each expert's in a stack. Training or merging changes values all over a
matrix."""

PARTS = ("weights", "config", "tokenizer", "chat_template")


def fingerprint(directory: Path) -> dict[str, str]:
    """A sha256 of each part of a model: of the weights by samples of every tensor, of the rest whole.

    Raises:
        CheckpointError: the weights cannot be read.
    """
    return {
        "weights": sha256(*_samples(read_index(directory))),
        "config": sha256(_bytes(directory / "config.json")),
        "tokenizer": sha256(_bytes(directory / "tokenizer.json")),
        "chat_template": sha256(_template(directory)),
    }


def sha256(*parts: bytes) -> str:
    """Of the parts, each behind its length, so that moving a byte from one to the next changes it."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()


def file_sha256(path: Path) -> str:
    """Of a file of any size, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _template(directory: Path) -> bytes:
    """The chat template, in a file of its own or in the tokenizer's config."""
    if (directory / "chat_template.jinja").is_file():
        return _bytes(directory / "chat_template.jinja")
    config = directory / "tokenizer_config.json"
    found = read_json_object(config).get("chat_template") if config.is_file() else None
    return (found if isinstance(found, str) else json.dumps(found)).encode() if found else b""


def _samples(index: Mapping[str, TensorInfo]) -> Iterator[bytes]:
    """In the order of the tensors' names: another cut into files is the same model."""
    with ExitStack() as stack:
        opened: dict[Path, int] = {}
        for name, info in sorted(index.items()):
            if info.file not in opened:
                opened[info.file] = stack.enter_context(info.file.open("rb")).fileno()
            yield f"{name} {info.dtype} {info.shape}".encode()
            parts = info.shape[0] if len(info.shape) > 2 else 1  # every expert of a stack
            size = info.size_bytes // max(1, parts)
            length = min(SAMPLED_BYTES, size)
            for part in range(parts):
                yield os.pread(opened[info.file], length, info.start + part * size + (size - length) // 2)
