"""The form "peft": the standard directory that stock PEFT loads on the stock base. Also what combining writes.

Every factor has its scale in B, so rank and alpha are equal everywhere and the scale is 1. A class of tensors has one
rank, in `rank_pattern` where it differs from the largest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from adapters.adapter_files import PREFIX, WEIGHTS, ExpertFactors, to_peft
from adapters.export import Options, Progress, Source
from adapters.export.parts_file import Laid, factor_dtype, plain, write_parts
from adapters.factors import Part, both_projections, expert_count, opened, parts_of, suffix
from adapters.layouts import ExpertLayout
from adapters.merged import MergedWeights
from adapters.peft_files import peft_sidecar
from adapters.sidecar import read_sidecar, write_sidecar


def write_peft(source: Source, directory: Path, options: Options, progress: Progress | None = None) -> dict[str, Any]:
    """The format "peft"."""
    merged = source.open()
    adapter = opened(merged)
    name = source.public_base
    facts = write_standard(directory, parts_of(adapter), merged, name, factor_dtype(options.dtype), progress)
    sidecar = read_sidecar(source.adapter) if source.adapter else None
    held = sidecar.held_elsewhere if sidecar else None
    write_sidecar(directory, peft_sidecar(merged.layout, expert_count(merged), name, source.base, held))
    return facts


def write_standard(
    directory: Path,
    parts: Sequence[Part],
    merged: MergedWeights,
    base_name: str,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """adapter_model.safetensors and adapter_config.json of `parts`; the sidecar is the caller's.

    Returns:
        {"tensors", "parameters", "bytes", "rank"}: of the file, and the largest rank.
    """
    layout = merged.layout
    parts = sorted(both_projections(parts, layout), key=lambda part: part.name)
    ranks: dict[str, int] = {}
    for part in parts:
        ranks[suffix(part.name, layout)] = max(part.rank, ranks.get(suffix(part.name, layout), 0))
    facts = write_parts(
        directory / WEIGHTS, parts, lambda part: _lay(part, ranks[suffix(part.name, layout)], layout), dtype, progress
    )
    _config(parts, ranks, merged, base_name).save_pretrained(str(directory))
    return {**facts, "rank": max(ranks.values())}


def _lay(part: Part, rank: int, layout: ExpertLayout) -> list[Laid]:
    """PEFT's names and packing of one part (`adapters.peft_files` says what is peculiar about them)."""
    if not part.stacked:
        return plain(part.name.removesuffix(".weight"), part, rank)
    module, _, projection = part.name.rpartition(".")
    place = f"{PREFIX}{module}.base_layer" if projection == "gate_up_proj" else f"{PREFIX}{module}"
    first, second = (part.outputs, part.inputs) if layout.peft_swaps else (part.inputs, part.outputs)
    rows = len(part.ranks) * rank

    def packed(a: Tensor, b: Tensor, which: int) -> Tensor:
        return to_peft(ExpertFactors(a, b, 1.0), layout)[which]

    return [
        Laid(f"{place}.lora_A.weight", (rows, first), rank, partial(packed, which=0)),
        Laid(f"{place}.lora_B.weight", (second, rows), rank, partial(packed, which=1)),
    ]


def _config(parts: Sequence[Part], ranks: Mapping[str, int], merged: MergedWeights, base_name: str) -> LoraConfig:
    """Targets by their suffix, or by name where a layer of the base is left out; scale 1 everywhere."""
    layout, largest = merged.layout, max(ranks.values())
    modules, parameters, pattern = [], [], {}
    for short, rank in ranks.items():
        like = [part for part in parts if suffix(part.name, layout) == short]
        names = (
            [short] if len(like) == _in_base(short, merged) else [part.name.removesuffix(".weight") for part in like]
        )
        if like[0].stacked:
            parameters += names
        elif _by_parameter(short, layout):
            parameters += [f"{name}.weight" for name in names]
            short = f"{short}.weight"
        else:
            modules += names
        if rank != largest:
            pattern[short] = rank
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        inference_mode=True,
        r=largest,
        lora_alpha=largest,
        lora_dropout=0.0,
        target_modules=modules,
        target_parameters=parameters or None,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
    )


def _by_parameter(short: str, layout: ExpertLayout) -> bool:
    """Whether PEFT is given the weight instead of the module: routers are no linear modules, others it would rename."""
    return short in layout.class_modules("router") or (layout.peft_fuses and short.endswith(layout.mlp))


def _in_base(short: str, merged: MergedWeights) -> int:
    """How many tensors of the base the suffix names."""
    names = {merged.layout.model_key(key) for key in merged.index}
    return sum(name is not None and name.removesuffix(".weight").endswith(f".{short}") for name in names)
