"""What the forms for serving engines have in common: names of the files, one rank, scale 1, a config, a sidecar.

vLLM (`vllm/lora/peft_helper.py`, `lora_weights.py`) and SGLang (`srt/lora/lora.py`, `mem_pool.py`) read one rank and
one alpha and pass over `rank_pattern` and `alpha_pattern`, so the scale is folded into B; SGLang copies each factor
into a buffer of exactly that rank, so every tensor is filled with zeros to the largest. Sources as of autumn 2026.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft

from adapters.adapter_files import CONFIG, WEIGHTS
from adapters.errors import ExportError, listed
from adapters.export import Options, Progress, Source
from adapters.export.consumers import STACKED_IN_VLLM
from adapters.export.parts_file import Laid, factor_dtype, plain, write_parts
from adapters.factors import Part, both_projections, expert_count, is_router, opened, parts_of, without_change
from adapters.fingerprint import fingerprint
from adapters.layouts import ExpertLayout
from adapters.merged import MergedWeights
from adapters.sidecar import Sidecar, read_sidecar, write_sidecar

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))
"""Matrices that SGLang makes one of (`LoRAAdapter.normalize_…`): of an adapter it wants all of a group, or none."""

IN_FILES = {"granitemoe": ("w1", "w3", "w2")}
"""What vLLM calls the parts of an expert where the published files hold stacks under names of their own
(`vllm/model_executor/models/granitemoe.py` gives them Mixtral's)."""


@dataclass(frozen=True)
class Form:
    """One form: its name, how a stack of experts is laid in it, and what its sidecar says.

    Attributes:
        lay: (stack, rank, layout) → the tensors of the file.
        routers: whether an engine that it is for takes adapters of routers.
    """

    name: str
    lay: Callable[[Part, int, ExpertLayout], list[Laid]]
    orientation: str
    packing: str
    made_for: tuple[str, ...]
    ignored_by: tuple[str, ...]
    routers: bool = True


def write_form(
    form: Form, source: Source, directory: Path, options: Options, progress: Progress | None = None
) -> dict[str, Any]:
    """adapter_model.safetensors, adapter_config.json and the sidecar of one form.

    Returns:
        {"tensors", "parameters", "bytes", "rank", "made_for"}.

    Raises:
        ExportError: the form cannot hold the adapter.
    """
    merged = source.open()
    adapter = opened(merged)
    parts = complete(parts_of(adapter), merged)
    routers = [part.name for part in parts if is_router(part, merged.layout)]
    if routers and not form.routers:
        what = f"{' and '.join(form.made_for)} would leave out the adapters of routers"
        raise ExportError(listed(f"{what}; export the merged model instead (format safetensors)", routers, most=3))
    rank = max(part.rank for part in parts)
    lay = partial(_lay, form=form, rank=rank, layout=merged.layout)
    facts = write_parts(directory / WEIGHTS, parts, lay, factor_dtype(options.dtype), progress)
    name = source.public_base
    _write_config(directory / CONFIG, parts, rank, name)
    sidecar = _sidecar(form, source, merged, name, parts)
    write_sidecar(directory, sidecar)
    return {**facts, "rank": rank, "made_for": list(sidecar.made_for)}


def _lay(part: Part, form: Form, rank: int, layout: ExpertLayout) -> list[Laid]:
    if part.stacked:
        return form.lay(part, rank, layout)
    return plain(layout.checkpoint_key(part.name).removesuffix(".weight"), part, rank)


def complete(parts: list[Part], merged: MergedWeights) -> list[Part]:
    """The parts by name, and one that adds nothing for each tensor that is missing of a pair or a group (TOGETHER)."""
    found = {part.name: part for part in both_projections(parts, merged.layout)}
    for part in [part for part in found.values() if not part.stacked]:
        module, _, last = part.name.removesuffix(".weight").rpartition(".")
        for other in next((group for group in TOGETHER if last in group), ()):
            name = f"{module}.{other}.weight"
            info = merged.index.get(merged.layout.checkpoint_key(name))
            if name not in found and info is not None:
                found[name] = without_change(name, False, 1, *info.shape)
    return [found[name] for name in sorted(found)]


def expert_module(stack: str, expert: int, part: str, layout: ExpertLayout) -> str:
    """What per-expert files call the part gate, up or down of one expert: `….mlp.experts.3.gate_proj`."""
    names = dict(zip(("gate", "up", "down"), IN_FILES.get(layout.model_type, layout.parts), strict=True))
    prefix = stack.rpartition(".")[0]
    return layout.checkpoint_key(f"{prefix}.{expert}.{names[part]}.weight").removesuffix(".weight")


def experts_module(stack: str, layout: ExpertLayout) -> str:
    """What per-expert files call the module that holds the experts: `….mlp.experts`."""
    return expert_module(stack, 0, "gate", layout).rpartition(".")[0].rpartition(".")[0]


def _write_config(file: Path, parts: list[Part], rank: int, base_name: str) -> None:
    linear = {part.name.removesuffix(".weight").rpartition(".")[2] for part in parts if not part.stacked}
    experts = {"gate_proj", "up_proj", "down_proj"} if any(part.stacked for part in parts) else set()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "peft_version": peft.__version__,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(linear | experts),
    }
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _sidecar(form: Form, source: Source, merged: MergedWeights, base_name: str, parts: list[Part]) -> Sidecar:
    before = read_sidecar(source.adapter) if source.adapter else None
    made_for = tuple(name for name in form.made_for if name not in (left_out := _left_out(form, parts, merged.layout)))
    if form.name == "per-expert" and _known_to_peft(parts, merged.layout):
        made_for += ("transformers", "peft")
    return Sidecar(
        format=form.name,
        base_name=base_name,
        base=fingerprint(source.base),
        held=before.held_elsewhere if before else None,
        peft_version=peft.__version__,
        model_type=merged.layout.model_type,
        experts={"count": expert_count(merged), "orientation": form.orientation, "packing": form.packing},
        made_for=made_for,
        ignored_by=tuple(name for name in (*form.ignored_by, *left_out) if name not in made_for),
    )


def _left_out(form: Form, parts: list[Part], layout: ExpertLayout) -> list[str]:
    """Engines that the form is for, and that would not take all of this adapter."""
    found = []
    if form.name == "per-expert" and layout.model_type in STACKED_IN_VLLM:
        found.append("vllm")
    if any(is_router(part, layout) for part in parts):
        found.append("sglang")
    return found


def _known_to_peft(parts: list[Part], layout: ExpertLayout) -> bool:
    """PEFT reads the expert names of transformers 4 as stacks, but then misses a shared expert of the same names."""
    linear = [part.name.removesuffix(".weight") for part in parts if not part.stacked]
    return layout.peft_fuses and not any(name.endswith(layout.mlp) for name in linear)
