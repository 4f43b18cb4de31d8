"""A finished adapter on a loaded base, for inference: switched on and off, never merged.

    applied = AppliedAdapter(model, adapter_dir)       with applied: …        the base outside the block

Linears get the product added to what they give; routed experts compute it on their own tokens, as in training. The
base may be held in any quantisation.

Dimension legend: E experts, r rank, R = E · r.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapters.adapter_files import AdapterFile, ExpertFactors, LinearFactors, read_adapter, without_start
from adapters.errors import AdapterFileError
from adapters.layouts import PROJECTIONS, layout_for
from adapters.lora_products import LoraRanks
from adapters.routed import RoutedExperts
from adapters.sidecar import read_sidecar


class AppliedAdapter:
    """The adapter in `directory` on `model`: on inside a `with` block, off outside.

    Args:
        model: the base as training held it.

    Raises:
        AdapterFileError: it cannot be read, is a DoRA, or names modules that this model does not have.
    """

    def __init__(self, model: PreTrainedModel, directory: Path):
        layout = layout_for(model.config.model_type)
        found, sidecar = read_adapter(directory, layout), read_sidecar(directory)
        if any(factors.magnitude is not None for factors in found.linear.values()):
            raise AdapterFileError(
                f"{directory} is a DoRA, which scales the weights themselves and is not applied beside them; measure "
                "the merged model (studio merge)"
            )
        if sidecar is not None and sidecar.start == "loftq" and sidecar.held_quantized:
            found = without_start(found, layout)  # which the quantised base has lost
        modules = dict(model.named_modules())
        linear = {layout.model_key(key) or key: factors for key, factors in found.linear.items()}
        names = {name: name.removesuffix(".weight") for name in linear}
        missing = [name for name, module in names.items() if module not in modules]
        stacks = _stacks(found)
        missing += [name for name in stacks if not isinstance(modules.get(name), RoutedExperts)]
        if missing:
            raise AdapterFileError(f"{directory} is for another base: this one has no {', '.join(sorted(missing)[:5])}")
        self._linears = [(modules[names[name]], factors) for name, factors in linear.items()]
        self._experts = []
        for name, parts in stacks.items():
            experts = modules[name]
            assert isinstance(experts, RoutedExperts)
            self._experts.append((experts, _loras(experts, parts, model.device)))
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        for module, factors in self._linears:
            self._hooks.append(module.register_forward_hook(partial(_added, _placed(factors, module))))
        for experts, loras in self._experts:
            object.__setattr__(experts, "forward", partial(type(experts).forward, experts, loras=[loras]))

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for experts, _loras in self._experts:
            object.__delattr__(experts, "forward")


def _stacks(found: AdapterFile) -> dict[str, dict[str, ExpertFactors]]:
    """By module of routed experts: the factors of its projections."""
    stacks: dict[str, dict[str, ExpertFactors]] = {}
    for key in found.experts:
        module, _, projection = key.rpartition(".")
        stacks.setdefault(module, {})[projection] = found.experts[key]
    return stacks


def _placed(factors: LinearFactors, module: nn.Module) -> LinearFactors:
    device = next(module.parameters()).device
    return LinearFactors(factors.A.float().to(device), factors.B.float().to(device), factors.scale)


def _added(factors: LinearFactors, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    change = factors.scale * (inputs[0].float() @ factors.A.t() @ factors.B.t())
    return output + change.to(output.dtype)


def _loras(
    experts: RoutedExperts, parts: dict[str, ExpertFactors], device: torch.device
) -> tuple[LoraRanks, list[Tensor]]:
    """The factors as the engine takes them: A (R, in) and scaled Bᵀ (R, out) of both projections, of one rank."""
    rank = max(factors.A.shape[1] for factors in parts.values())
    tensors: list[Tensor] = []
    for projection in PROJECTIONS:
        sides = _sides(parts[projection]) if projection in parts else _zeros(experts, projection)
        padded = (nn.functional.pad(side.float(), (0, 0, 0, rank - side.shape[1])) for side in sides)
        tensors += [side.flatten(0, 1).contiguous().to(device) for side in padded]
    return LoraRanks((rank,) * experts.num_experts, 1.0), tensors


def _sides(factors: ExpertFactors) -> tuple[Tensor, Tensor]:
    return factors.A, factors.scale * factors.B.transpose(1, 2)


def _zeros(experts: RoutedExperts, projection: str) -> tuple[Tensor, Tensor]:
    _, rows, columns = getattr(experts, projection).shape
    inputs, outputs = (columns, rows) if experts.layout.stack_order == "out_in" else (rows, columns)
    return tuple(torch.zeros(experts.num_experts, 1, size) for size in (inputs, outputs))  # type: ignore[return-value]
