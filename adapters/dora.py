"""DoRA on linear layers (Liu et al., 2024, arXiv 2402.09353): m · (W + scale · B A) / ‖W + scale · B A‖, row by row.

    use_dora(model, name)       puts it on the linear layers of an adapter that was just attached; m begins as ‖W‖

The norm counts as a constant in the backward (the paper's section 4.3). PEFT has this too, and its files are these; but
its weight of a 4-bit layer whose rows end inside a block is another on a CPU, it reads none in int8, and each of its
forwards multiplies B and A by way of an identity matrix. Dropout is on what A is given alone, where PEFT drops the
magnitude's part as well.

Dimension legend: r rank, in and out the sides of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from adapters.lora import lora_linears
from adapters.quantized_linear import dense_weight


def use_dora(model: PeftModel, name: str) -> None:
    """Makes the linear layers of the adapter `name` DoRA, and those of any that PEFT adds from the same config."""
    for _, module in lora_linears(model, name):
        cast(Any, module).resolve_lora_variant = resolve(cast(Any, module).resolve_lora_variant)
        module.lora_variant[name] = Dora()
        Dora.init(module, name)
        module.set_adapter(module.active_adapters)


def resolve(others: Callable[..., LoraVariant | None]) -> Callable[..., LoraVariant | None]:
    """What a layer asks for the variant of a further adapter."""

    def variant(*, config: Any, **rest: Any) -> LoraVariant | None:
        return Dora() if config.use_dora else others(config=config, **rest)

    return variant


class Dora(LoraVariant):
    """PEFT's hook into a linear layer's forward."""

    def __init__(self) -> None:
        self._known: tuple[Tensor, Tensor, Tensor] | None = None

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **_: Any) -> None:
        """The magnitude m (out,), a parameter: the norms of W's rows, B being 0."""
        if "lora_magnitude_vector" not in module.adapter_layer_names:
            cast(Any, module).adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        held = DoraLinearLayer(fan_in_fan_out=False)
        held.weight = nn.Parameter(dense_weight(module.get_base_layer()).norm(dim=1))
        module.lora_magnitude_vector[adapter_name] = held

    def forward(  # type: ignore[override]  # PEFT's are static; this one remembers the norm
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        scale, base = module.scaling[active_adapter], module.get_base_layer()
        norm = self._norm(module, base, a.weight, b.weight, scale)
        factor = (module.lora_magnitude_vector[active_adapter].weight / norm).to(result.dtype)
        plain = result if base.bias is None else result - base.bias.to(result.dtype)
        return result + (factor - 1) * plain + factor * scale * b(a(module.lora_dropout[active_adapter](x)))

    def _norm(self, module: nn.Module, base: nn.Module, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """(out,) ‖W + scale · B A‖ of each row; where nothing is trained, known from the last time if A and B are."""
        # outside inference mode, since what it makes could not be remembered for a forward that has a backward
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            if not module.training and (known := self._known) and torch.equal(known[0], a) and torch.equal(known[1], b):
                return known[2]
            norm = torch.addmm(dense_weight(base), b.float(), a.float(), alpha=scale).norm(dim=1)
            self._known = None if module.training else (a.clone(), b.clone(), norm)
            return norm
