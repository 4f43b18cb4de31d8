"""How far training moved each routed expert: the Frobenius norm of its adapter's product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adapters.layouts import LAYER, PROJECTIONS
from adapters.lora import ExpertLora


def expert_delta_norms(model: nn.Module, adapter_name: str = "default") -> dict[str, list[Any]]:
    """‖scale · B A‖ of each expert (Frobenius): {"layers": [numbers], "gate_up_proj": [[by expert] by layer],
    "down_proj": the same}; 0 for an expert without an adapter.

    No product is formed: ‖B A‖² is the sum over (Bᵀ B) ∘ (A Aᵀ), rank by rank.
    """
    layers = {int(LAYER.findall(f"{name}.")[-1]): m for name, m in model.named_modules() if isinstance(m, ExpertLora)}
    norms = {name: [_norms(layer, name, adapter_name) for layer in layers.values()] for name in PROJECTIONS}
    return {"layers": list(layers), **norms}


def _norms(layer: ExpertLora, projection: str, adapter_name: str) -> list[float]:
    ranks, scale = list(layer.ranks[adapter_name]), layer.scaling[adapter_name]
    by_expert = [factor.detach().double().split(ranks) for factor in layer.factors(adapter_name, projection)]
    if (began := layer.start(adapter_name, projection)) is not None:  # what was trained is the difference to it
        first = [factor.double().split(ranks) for factor in (began[0], -began[1])]
        by_expert = [[torch.cat(two) for two in zip(*both, strict=True)] for both in zip(by_expert, first, strict=True)]
    return [scale * _norm(a, b) for a, b in zip(*by_expert, strict=True)]


def _norm(a: Tensor, b: Tensor) -> float:
    """‖bᵀ a‖ of a (r, in) and b (r, out)."""
    return float(((a @ a.t()) * (b @ b.t())).sum().clamp(min=0).sqrt())
