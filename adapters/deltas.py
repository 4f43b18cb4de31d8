"""How far training moved each routed expert: the Frobenius norm of its adapter's product."""

from __future__ import annotations

from torch import Tensor, nn

from adapters.lora import ExpertLora
from adapters.routed import PROJECTIONS


def expert_delta_norms(model: nn.Module, adapter_name: str = "default") -> dict[str, list[list[float]]]:
    """‖scale · B A‖ of each expert (Frobenius), by projection: layer by layer, expert by expert; 0 without an adapter.

    No product is formed: ‖B A‖² is the sum over (Bᵀ B) ∘ (A Aᵀ), rank by rank.
    """
    layers = [module for module in model.modules() if isinstance(module, ExpertLora)]
    return {name: [_norms(layer, name, adapter_name) for layer in layers] for name in PROJECTIONS}


def _norms(layer: ExpertLora, projection: str, adapter_name: str) -> list[float]:
    ranks, scale = layer.ranks[adapter_name], layer.scaling[adapter_name]
    flat_a, flat_b = (factor.detach().double() for factor in layer.factors(adapter_name, projection))
    pairs = zip(flat_a.split(list(ranks)), flat_b.split(list(ranks)), strict=True)
    return [scale * _norm(a, b) for a, b in pairs]


def _norm(a: Tensor, b: Tensor) -> float:
    """‖bᵀ a‖ of a (r, in) and b (r, out)."""
    return float(((a @ a.t()) * (b @ b.t())).sum().clamp(min=0).sqrt())
