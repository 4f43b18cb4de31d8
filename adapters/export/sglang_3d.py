"""The form "sglang-3d": stacks as three-dimensional tensors, as SGLang takes them beside its per-expert form.

`srt/lora/mem_pool.py` (a key with "experts" and three dimensions) and `srt/lora/lora.py` (`normalize_gate_up_proj`):
`experts.gate_up_proj` and `experts.down_proj`, lora_A (E, r, in), lora_B (E, out, r), gate before up for every family:
where a kernel wants them to alternate, SGLang does it (`srt/lora/layers.py`, `_uses_interleaved_gate_up`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.export import Options, Progress, Source
from adapters.export.engine_forms import Form, experts_module, write_form
from adapters.export.parts_file import Laid, pair
from adapters.factors import Part, halves
from adapters.layouts import ExpertLayout


def _lay(part: Part, rank: int, layout: ExpertLayout) -> list[Laid]:
    experts, fused = len(part.ranks), part.name.endswith(".gate_up_proj")

    def gate_first(b: Tensor) -> Tensor:
        return torch.cat(halves(b, layout), dim=1) if fused else b

    return pair(
        f"{experts_module(part.name, layout)}.{part.name.rpartition('.')[2]}",
        rank,
        ((experts, rank, part.inputs), lambda a: a),
        ((experts, part.outputs, rank), gate_first),
    )


SGLANG_3D = Form(
    name="sglang-3d",
    lay=_lay,
    orientation="lora_A (r, in), lora_B (out, r) of each expert",
    packing="lora_A (E, r, in), lora_B (E, out, r); all of gate before all of up",
    made_for=("sglang",),
    ignored_by=("transformers", "peft", "vllm", "llama.cpp"),
    routers=False,
)


def write_sglang_3d(
    source: Source, directory: Path, options: Options, progress: Progress | None = None
) -> dict[str, Any]:
    """The format "sglang-3d"."""
    return write_form(SGLANG_3D, source, directory, options, progress)
