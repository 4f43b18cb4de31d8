"""The form "vllm-3d": stacks in one pair each, as vLLM takes them for models whose checkpoints hold stacks.

`vllm/lora/model_manager.py` (`_stack_moe_lora_weights`, `_convert_3d_to_2d_moe_lora`): `experts.base_layer` is
gate_up_proj and `experts` down_proj, lora_A (E·r, in) expert-major, lora_B (out, r·E) rank-major. The sides are those
of a linear layer for every family, where PEFT's own file of Llama 4 has them the other way. gpt_oss keeps gate and up
alternating; other families have gate before up. Both projections must be there.

Taken as it is by vLLM's classes with `is_3d_moe_weight`; by others with --enable-mixed-moe-lora-format and
`is_3d_lora_weight: true` in the request, without which vLLM reads it wrongly and says nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapters.export import Options, Progress, Source
from adapters.export.consumers import mixed_in_vllm
from adapters.export.engine_forms import Form, experts_module, write_form
from adapters.export.parts_file import Laid, pair
from adapters.factors import Part
from adapters.layouts import ExpertLayout


def _lay(part: Part, rank: int, layout: ExpertLayout) -> list[Laid]:
    module, experts = experts_module(part.name, layout), len(part.ranks)
    return pair(
        f"{module}.base_layer" if part.name.endswith(".gate_up_proj") else module,
        rank,
        ((experts * rank, part.inputs), lambda a: a.reshape(experts * rank, -1)),
        ((part.outputs, rank * experts), lambda b: b.permute(1, 2, 0).reshape(part.outputs, -1)),
    )


VLLM_3D = Form(
    name="vllm-3d",
    lay=_lay,
    orientation="lora_A on the input side, lora_B on the output side",
    packing="lora_A (E·r, in) expert-major; lora_B (out, r·E) rank-major; gate and up fused",
    made_for=("vllm",),
    ignored_by=("transformers", "peft", "sglang", "llama.cpp"),
)


def write_vllm_3d(
    source: Source, directory: Path, options: Options, progress: Progress | None = None
) -> dict[str, Any]:
    """The format "vllm-3d".

    Returns:
        As `write_form`, and "mixed_format": whether vLLM needs --enable-mixed-moe-lora-format.
    """
    facts = write_form(VLLM_3D, source, directory, options, progress)
    return {**facts, "mixed_format": mixed_in_vllm("vllm-3d", source.open().layout.model_type)}
