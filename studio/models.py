"""Where a base model lies, and what this machine computes with. No torch at import."""

from __future__ import annotations

import os
from pathlib import Path

from adapters.packed_cache import default_cache_dir
from studio.base import EMBEDDED_DIR
from studio.errors import CheckpointError, StudioError

CACHED_BASE_BYTES = 500_000_000
"""Bases smaller than this are quantised again for every job: it takes a second or two."""


def resolve_base(base: str) -> Path:
    """The local directory of a recipe's `model.base`: "embedded", a directory, or a hub id already downloaded.

    Nothing is downloaded here: fetching hundreds of gigabytes is a step that the user takes.

    Raises:
        StudioError: the directory does not exist, or the hub model is not in the local cache.
    """
    if base == "embedded":
        return EMBEDDED_DIR
    path = Path(base).expanduser()
    if path.is_dir():
        return path
    if base.count("/") != 1 or base.startswith((".", "/", "~")):
        raise StudioError(
            f"base model {base!r}: no such directory; allowed: embedded, a directory, or a hub id org/name"
        )
    return _cached(base)


def _cached(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except HFValidationError as error:
        raise StudioError(f"base model {hub_id!r}: {error}") from None
    except LocalEntryNotFoundError as error:
        raise StudioError(
            f"base model {hub_id!r} is neither a directory here ({Path(hub_id).absolute()}) nor a hub model on this "
            f"machine. If it is a hub id, download it first: hf download {hub_id} --exclude '*.bin' '*.pt' '*.pth'. "
            "If a job is meant, studio jobs lists those in runs/"
        ) from error


def check_tokenizer(directory: Path) -> None:
    """Refuses a base without a fast tokenizer. Without a chat template it has its family's default (chat_template.py).

    Raises:
        CheckpointError
    """
    if not (directory / "tokenizer.json").is_file():
        raise CheckpointError(directory, ["tokenizer.json is missing; expected the model's fast tokenizer"])


def packed_cache(quantization: str, base_bytes: int) -> Path | None:
    """Where a base of this size is kept for the next job: in the user's cache; nowhere if small or not quantised."""
    if quantization == "none" or base_bytes < CACHED_BASE_BYTES:
        return None
    return default_cache_dir()


def has_gpu() -> bool:
    """Whether an NVIDIA GPU is visible, asked of the device files so that torch need not be loaded."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*"))


def compute_dtype(dtype: str) -> str:
    """The recipe's `model.dtype` with "auto" settled: bfloat16 on a GPU, float32 without one."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if has_gpu() else "float32"
