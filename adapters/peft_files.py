"""The standard PEFT adapter directory, written. What is written here, stock PEFT loads on the stock base.

One canonical form stands between memory and files: per layer and projection `ExpertFactors`, A (E, r, in) and
B (E, out, r), whatever the family. How the file differs from it is said in adapters/adapter_files.py, which reads it.

A stack has one rank in the file: experts with a smaller rank, or none, are filled with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

from adapters.adapter_files import CONFIG as CONFIG
from adapters.adapter_files import WEIGHTS as WEIGHTS
from adapters.adapter_files import ExpertFactors, to_peft
from adapters.errors import AdapterFileError, listed
from adapters.fingerprint import fingerprint
from adapters.layouts import PROJECTIONS, ExpertLayout, layout_for
from adapters.lora import ExpertLora, expert_count, lora_linears, lora_targets, target_suffixes
from adapters.placement import LINEAR, Placement
from adapters.sidecar import FORMS, Sidecar, write_sidecar
from adapters.starts import Began
from adapters.tensor_files import new_directory


def expert_factors(module: ExpertLora, projection: str, adapter_name: str = "default") -> ExpertFactors:
    """What a layer's adapter adds to the base, zero-filled to the largest rank of the adapter; to twice that where the
    adapter began with factors that are taken off again: they come second, with their B negative."""
    pairs = [module.factors(adapter_name, projection)]
    if (began := module.start(adapter_name, projection)) is not None:
        pairs.append((began[0], -began[1]))
    filled = [_by_expert(module, adapter_name, *pair) for pair in pairs]
    a, b = torch.cat([a for a, _ in filled], 1), torch.cat([b for _, b in filled], 2)
    return ExpertFactors(a, b, module.scaling[adapter_name])


def _by_expert(module: ExpertLora, adapter_name: str, flat_a: Tensor, flat_b: Tensor) -> tuple[Tensor, Tensor]:
    """A (E, r, in) and B (E, out, r) from (R, in) and (R, out)."""
    ranks, rank = module.ranks[adapter_name], module.r[adapter_name]
    a = flat_a.new_zeros(len(ranks), rank, flat_a.shape[1])
    b = flat_b.new_zeros(len(ranks), flat_b.shape[1], rank)
    pieces = zip(ranks, flat_a.detach().split(list(ranks)), flat_b.detach().split(list(ranks)), strict=True)
    for expert, (own, piece_a, piece_b) in enumerate(pieces):
        a[expert, :own] = piece_a
        b[expert, :, :own] = piece_b.t()
    return a, b


def save_adapter(
    model: PeftModel,
    placement: Placement,
    out: Path,
    *,
    base_name: str,
    base: Path | None = None,
    held: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    name: str = "default",
) -> dict[str, int]:
    """Writes one adapter of `model` as a standard PEFT directory, whole or not at all.

    Args:
        placement: what the model was attached with.
        base_name: recorded as `base_model_name_or_path`.
        base, held: the base's directory and how it is held, for the `Sidecar`, by which a later merge knows the base.
        name: of the adapter in the model.

    Returns:
        {"tensors": ..., "parameters": ..., "bytes": ...} of the weights written.

    Raises:
        AdapterFileError: a value is NaN or infinite; nothing is written.
        OutputExistsError: `out` exists.
    """
    layout = layout_for(model.config.model_type)
    tensors = {name: tensor.float() for name, tensor in adapter_tensors(model, layout, name).items()}
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise AdapterFileError(listed("the adapter holds NaN or infinity and was not written", broken))
    with new_directory(out, overwrite) as directory:
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt", "peft_version": peft.__version__})
        experts = expert_count(model, layout)
        standard_config(layout, placement, base_name, experts).save_pretrained(str(directory))
        write_sidecar(directory, peft_sidecar(layout, experts, base_name, base, held, placement.method.start))
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return {"tensors": len(tensors), "parameters": parameters, "bytes": (out / WEIGHTS).stat().st_size}


def peft_sidecar(
    layout: ExpertLayout,
    experts: int,
    base_name: str,
    base: Path | None,
    held: Mapping[str, Any] | None,
    start: str = "zero",
) -> Sidecar:
    """What stands beside the standard form, whose experts lie as PEFT's own `target_parameters` has them."""
    side = "lora_A on the output side, lora_B on the input side" if layout.peft_swaps else "lora_A on the input side"
    return Sidecar(
        format="peft",
        base_name=base_name,
        base=fingerprint(base) if base else None,
        held=held,
        peft_version=peft.__version__,
        model_type=layout.model_type,
        experts={"count": experts, "orientation": side, "packing": FORMS["peft"]["packing"]},
        made_for=FORMS["peft"]["made_for"],
        ignored_by=FORMS["peft"]["ignored_by"],
        start=start,
    )


def standard_config(layout: ExpertLayout, placement: Placement, base_name: str, experts: int) -> LoraConfig:
    """The `LoraConfig` with which stock PEFT loads the file that `adapter_tensors` makes; `experts` of a layer."""
    targets = lora_targets(layout, in_file(placement), experts)
    if placement.method.doubles and placement.router:  # routers begin at zero
        targets["alpha_pattern"] = dict.fromkeys(target_suffixes(layout, "router"), placement.alpha)
    if layout.peft_fuses:
        _name_by_parameter(targets, (*layout.class_modules("shared_expert"), *layout.class_modules("dense_mlp")))
    if placement.routed_rank:
        targets["target_parameters"] = [
            *(targets["target_parameters"] or []),
            *target_suffixes(layout, "routed_experts"),
        ]
    return LoraConfig(
        task_type="CAUSAL_LM", base_model_name_or_path=base_name, inference_mode=True, lora_dropout=0.0, **targets
    )


def in_file(placement: Placement) -> Placement:
    """The ranks and the alpha that an adapter has in its file: twice those of the training where the start is taken off
    again (adapters/starts.py), the scale being the same."""
    if not (method := placement.method).doubles:
        return placement
    ranks = {name: 2 * getattr(placement, name) for name in LINEAR}
    routed = tuple(tuple(2 * rank for rank in layer) for layer in placement.routed)
    return replace(placement, **ranks, routed=routed, alpha=method.alpha_in_file(placement.alpha))


def _name_by_parameter(targets: dict[str, Any], modules: tuple[str, ...]) -> None:
    """Turns target modules into target parameters: the same files, and a name that PEFT takes as it is."""
    moved = [module for module in targets["target_modules"] if module in modules]
    targets["target_modules"] = [module for module in targets["target_modules"] if module not in moved]
    targets["target_parameters"] = [*(targets["target_parameters"] or []), *(f"{module}.weight" for module in moved)]
    pattern = targets["rank_pattern"]
    targets["rank_pattern"] = {f"{key}.weight" if key in moved else key: rank for key, rank in pattern.items()}


def adapter_tensors(model: PeftModel, layout: ExpertLayout, adapter_name: str = "default") -> dict[str, Tensor]:
    """Every adapter tensor by its name in a standard PEFT file, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, ExpertLora):
            tensors.update(_stack_tensors(name, module, layout, adapter_name))
    for name, linear in lora_linears(model, adapter_name):
        tensors.update(_linear_tensors(name, linear, adapter_name))
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _linear_tensors(name: str, module: LoraLayer, adapter_name: str) -> dict[str, Tensor]:
    a, b = (cast(Tensor, factors[adapter_name].weight).detach() for factors in (module.lora_A, module.lora_B))
    if began := _began(module, adapter_name):
        a, b = torch.cat([a, began.A]), torch.cat([b, -began.B], 1)
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    if adapter_name in module.lora_magnitude_vector:
        magnitude = cast(Tensor, module.lora_magnitude_vector[adapter_name].weight)
        tensors[f"{name}.lora_magnitude_vector"] = magnitude.detach()
    return tensors


def _began(module: LoraLayer, adapter_name: str) -> Began | None:
    held = cast(Any, module).lora_start if hasattr(module, "lora_start") else {}
    return cast(Began, held[adapter_name]) if adapter_name in held else None


def _stack_tensors(name: str, module: ExpertLora, layout: ExpertLayout, adapter_name: str) -> dict[str, Tensor]:
    tensors = {}
    for projection in PROJECTIONS:
        lora_a, lora_b = to_peft(expert_factors(module, projection, adapter_name), layout)
        place = f"{name}.base_layer" if projection == "gate_up_proj" else name
        tensors[f"{place}.lora_A.weight"] = lora_a
        tensors[f"{place}.lora_B.weight"] = lora_b
    return tensors
