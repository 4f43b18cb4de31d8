"""The chat template that an adapter brings along: it was trained with that one. No torch at import."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = "chat_template.jinja"


def own_template(adapter: Path | None) -> Path | None:
    """The template beside an adapter, which then stands for the base's; None where there is none."""
    file = adapter / TEMPLATE if adapter else None
    return file if file and file.is_file() else None


def copy_template(adapter: Path | None, directory: Path) -> None:
    """Puts the adapter's own template into a directory that is being written, in place of the base's."""
    if file := own_template(adapter):
        shutil.copyfile(file, directory / TEMPLATE)


def load_tokenizer(base: Path, adapter: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory in stock transformers, with the adapter's own template if it has one."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    if file := own_template(adapter):
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    return tokenizer
