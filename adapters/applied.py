"""A finished adapter on a loaded base, for inference: switched on and off, never merged.

    applied = AppliedAdapter(model, adapter_dir)       with applied: …        the base outside the block

Linears get the product added to what they give, of a DoRA scaled by its magnitudes; routers, which are small and never
quantised, have it in their weight meanwhile; routed experts compute it on their own tokens, as in training. The base
may be held in any quantisation. A LoftQ adapter adds to a quantised base what was trained, and to the original weights
what its file holds (adapters/starts.py).

Dimension legend: E experts, r rank, R = E · r.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapters.adapter_files import AdapterFile, ExpertFactors, LinearFactors, read_adapter, without_start
from adapters.errors import AdapterFileError
from adapters.layouts import PROJECTIONS, layout_for
from adapters.lora_products import LoraRanks
from adapters.quantized_linear import dense_weight
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
        if sidecar is not None and sidecar.start == "loftq" and sidecar.held_quantized:
            found = without_start(found, layout)  # which the quantised base has lost
        modules = dict(model.named_modules())
        linear = {layout.model_key(key) or key: found.linear[key] for key in found.linear}
        names = {name: name.removesuffix(".weight") for name in linear}
        missing = [name for name, module in names.items() if module not in modules]
        stacks = _stacks(found)
        missing += [name for name in stacks if not isinstance(modules.get(name), RoutedExperts)]
        if missing:
            raise AdapterFileError(f"{directory} is for another base: this one has no {', '.join(sorted(missing)[:5])}")
        routers = tuple(f".{module}" for module in layout.class_modules("router"))
        self._linears, self._routers = list[tuple[nn.Module, _Added]](), list[tuple[nn.Module, Tensor, Tensor]]()
        for name, factors in linear.items():
            module = modules[names[name]]
            if names[name].endswith(routers):
                self._routers.append((module, *_weights(module, factors)))
            else:
                self._linears.append((module, _Added(module, factors)))
        self._experts = []
        for name, parts in stacks.items():
            experts = modules[name]
            assert isinstance(experts, RoutedExperts)
            self._experts.append((experts, _loras(experts, parts, model.device)))
        self._hooks: list[Any] = []
        self._on = False

    def __enter__(self) -> None:
        self._on = True
        for module, added in self._linears:
            self._hooks.append(module.register_forward_hook(added))
        for router, _, changed in self._routers:
            cast(Tensor, router.weight).data = changed
        for experts, loras in self._experts:
            object.__setattr__(experts, "forward", partial(type(experts).forward, experts, loras=[loras]))

    def __exit__(self, *_: object) -> None:
        self._on = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for router, before, _changed in self._routers:
            cast(Tensor, router.weight).data = before
        for experts, _loras in self._experts:
            object.__delattr__(experts, "forward")

    @contextmanager
    def off(self) -> Iterator[None]:
        """The base, inside the `with` block or outside: what PEFT calls `disable_adapter`."""
        if not self._on:
            yield
            return
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


def _stacks(found: AdapterFile) -> dict[str, dict[str, ExpertFactors]]:
    """By module of routed experts: the factors of its projections."""
    stacks: dict[str, dict[str, ExpertFactors]] = {}
    for key in found.experts:
        module, _, projection = key.rpartition(".")
        stacks.setdefault(module, {})[projection] = found.experts[key]
    return stacks


def _weights(router: nn.Module, factors: LinearFactors) -> tuple[Tensor, Tensor]:
    """A router's weight (E, H) as it is, and with the adapter."""
    before = cast(Tensor, router.weight).data
    return before, (before.float() + factors.delta().to(before.device)).to(before.dtype)


class _Added:
    """A forward hook that makes what a linear layer gives that of the layer with its adapter."""

    def __init__(self, module: nn.Module, factors: LinearFactors):
        device = next(module.parameters()).device
        self.a, self.b = factors.A.float().to(device), (factors.scale * factors.B.float()).to(device)
        self.share: Tensor | None = None
        if factors.magnitude is not None:  # m / ‖W + scale · B A‖ of each row, (out,)
            norm = torch.addmm(dense_weight(module), self.b, self.a).norm(dim=1)
            self.share = factors.magnitude.float().to(device) / norm

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        change = inputs[0].float() @ self.a.t() @ self.b.t()
        if self.share is not None:
            bias = cast(Tensor | None, module.bias)
            plain = output.float() if bias is None else output.float() - bias.float()
            change = (self.share - 1) * plain + self.share * change
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
