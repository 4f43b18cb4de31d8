"""What the routers of a model do in its forward passes, for every family alike.

    with watch_routing(model, layout) as seen:
        model(...)                       one `Routing` a MoE layer is appended to `seen`; the caller clears it
    watch_routing(model, layout, base=True)     and what each router without its adapter says of the same input
    count_routing(seen, kept, sources)   ─▶ Counts, what a router profile is summed from

Dimension legend: T tokens (rows x length), K experts a token (top-k), E experts, L MoE layers, S data sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from adapters.errors import LayoutError
from adapters.layouts import LAYER, ExpertLayout
from adapters.routed import moe_blocks


@dataclass(frozen=True)
class Routing:
    """One MoE layer's routing in one forward pass, with its autograd graph where there is one.

    Attributes:
        layer: number of the decoder layer.
        logits: (T, E) of the router, before softmax or sigmoid, and before selection biases.
        experts: (T, K) ids of the chosen experts. weights: (T, K) what their outputs (or inputs) are multiplied by.
        base_logits: (T, E) of the same router without its adapter on the same hidden states, without a graph; None
            where they were not asked for.
    """

    layer: int
    logits: Tensor
    experts: Tensor
    weights: Tensor
    base_logits: Tensor | None = None


@contextmanager
def watch_routing(model: nn.Module, layout: ExpertLayout, *, base: bool = False) -> Iterator[list[Routing]]:
    """Yields a list that each forward pass extends, layer after layer. Nothing else about the model changes.

    Args:
        model: with `RoutedExperts`, adapters or not. Under gradient checkpointing the backward pass runs the layers
            again, and they are appended again: leave the context before the backward pass.
        base: fill `Routing.base_logits`, for one more router product a layer.

    Raises:
        LayoutError: the model has no MoE layer.
    """
    seen: list[Routing] = []
    handles: list[Any] = []
    blocks = list(moe_blocks(model, layout))
    if not blocks:
        raise LayoutError(f"this {layout.model_type} model has no MoE layer whose routing could be watched")
    for name, block in blocks:
        handles += _watch(int(LAYER.findall(f"{name}.")[-1]), block, layout, seen, base)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _watch(layer: int, block: nn.Module, layout: ExpertLayout, seen: list[Routing], base: bool) -> list[Any]:
    last: list[tuple[Tensor, Tensor | None]] = []

    def on_router(router: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        last[:] = [(_logits(output, layout), _base_logits(router, args, layout) if base else None)]

    def on_experts(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        _, experts, weights = args
        logits, base_logits = last.pop()
        seen.append(Routing(layer, logits, experts.flatten(0, -2), weights.flatten(0, -2), base_logits))

    router = block.get_submodule(layout.router)
    return [
        router.register_forward_hook(on_router),
        block.get_submodule(layout.experts).register_forward_pre_hook(on_experts),
    ]


def _logits(output: Any, layout: ExpertLayout) -> Tensor:
    logits: Tensor = output if isinstance(output, Tensor) else output[layout.router_logits]
    return logits.flatten(0, -2)


def _base_logits(router: nn.Module, args: tuple[Tensor, ...], layout: ExpertLayout) -> Tensor:
    """In evaluation mode: routers that sample while training (Phi-MoE) would draw other random numbers than stock's."""
    stock: Any = router.get_base_layer() if isinstance(router, LoraLayer) else router
    training = stock.training
    stock.eval()
    try:
        with torch.no_grad():
            return _logits(stock(*args), layout)
    finally:
        stock.train(training)


@dataclass(frozen=True)
class Counts:
    """Sums over tokens.

    Attributes:
        routed: (S, L, E) int64, tokens routed to each expert. gate: (S, L, E) float64, their routing weights.
        together: (L, E, E) int64, tokens that chose both experts; the diagonal is `routed` over all sources. None where
            pairs were not asked for.
        tokens: (S,) int64.
    """

    routed: Tensor
    gate: Tensor
    together: Tensor | None
    tokens: Tensor

    def __add__(self, other: Counts) -> Counts:
        both = zip(vars(self).values(), vars(other).values(), strict=True)
        return Counts(*(None if a is None else a + b for a, b in both))  # type: ignore[arg-type]


def count_routing(
    seen: Sequence[Routing], kept: Tensor, sources: Tensor, source_count: int = 1, pairs: bool = True
) -> Counts:
    """Sums of one forward pass.

    Args:
        seen: one a MoE layer.
        kept: (T,) bool, False for padding.
        sources: (T,) int64, the data source of each token, below `source_count`.
        pairs: count which experts are chosen together, too.
    """
    own = sources[kept]
    layers = [_layer_counts(routing, kept, own, source_count) for routing in seen]
    routed, gate = (torch.stack(parts).transpose(0, 1).cpu() for parts in zip(*layers, strict=True))
    together = torch.stack([_together(routing, kept) for routing in seen]).cpu() if pairs else None
    return Counts(routed, gate, together, torch.bincount(own, minlength=source_count).cpu())


def _layer_counts(routing: Routing, kept: Tensor, sources: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(S, E) tokens, (S, E) weights."""
    experts, weights = routing.experts[kept].detach(), routing.weights[kept].detach().double()
    total = routing.logits.shape[1]
    place = (sources.unsqueeze(1) * total + experts).flatten()
    routed = torch.bincount(place, minlength=count * total).view(count, total)
    return routed, torch.bincount(place, weights.flatten(), minlength=count * total).view(count, total)


def _together(routing: Routing, kept: Tensor) -> Tensor:
    """(E, E) tokens that chose both experts."""
    experts, total = routing.experts[kept].detach(), routing.logits.shape[1]
    if experts.shape[1] == 1:
        return torch.bincount(experts.flatten(), minlength=total).diag()
    chosen = torch.zeros(len(experts), total, device=experts.device).scatter_(1, experts, 1.0)
    return (chosen.t() @ chosen).round().long()
