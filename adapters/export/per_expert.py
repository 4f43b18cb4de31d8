"""The form "per-expert": two-dimensional factors of every expert, under the names of per-expert checkpoints.

vLLM's default for MoE (`vllm/lora/lora_weights.py`, `PackedLoRALayerWeights.pack_moe`: gate, down and up of *every*
expert of a layer, of one rank) and SGLang's (`srt/lora/mem_pool.py`, keys with `experts.<number>.`).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from adapters.export import Options, Progress, Source
from adapters.export.engine_forms import Form, expert_module, write_form
from adapters.export.parts_file import Laid, pair
from adapters.factors import Part, halves
from adapters.layouts import ExpertLayout


def _lay(part: Part, rank: int, layout: ExpertLayout) -> list[Laid]:
    laid: list[Laid] = []
    whole = part.name.endswith(".down_proj")
    for expert in range(len(part.ranks)):
        for number, name in enumerate(("down",) if whole else ("gate", "up")):
            rows = part.outputs if whole else part.outputs // 2
            laid += pair(
                expert_module(part.name, expert, name, layout),
                rank,
                ((rank, part.inputs), partial(_row, expert=expert)),
                ((rows, rank), partial(_half, expert=expert, number=None if whole else number, layout=layout)),
            )
    return laid


def _row(a: Tensor, expert: int) -> Tensor:
    return a[expert]


def _half(b: Tensor, expert: int, number: int | None, layout: ExpertLayout) -> Tensor:
    return b[expert] if number is None else halves(b, layout)[number][expert]


PER_EXPERT = Form(
    name="per-expert",
    lay=_lay,
    orientation="lora_A (r, in), lora_B (out, r)",
    packing="one pair for gate, up and down of each expert",
    made_for=("vllm", "sglang"),
    ignored_by=("transformers", "peft", "llama.cpp"),
)


def write_per_expert(
    source: Source, directory: Path, options: Options, progress: Progress | None = None
) -> dict[str, Any]:
    """The format "per-expert"."""
    return write_form(PER_EXPERT, source, directory, options, progress)
