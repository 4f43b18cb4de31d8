"""Which tensor classes and which experts get adapters, and of what rank. Plain data, no torch.

A rank of 0 means no adapter: no parameters, no optimizer state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adapters.errors import TargetError


@dataclass(frozen=True)
class Placement:
    """LoRA ranks (Hu et al., 2021, arXiv 2106.09685) per tensor class, and per layer and expert for routed experts.

    Attributes:
        attention, shared_expert, dense_mlp, router: rank for every module of the class.
        routed: one tuple of E ranks for each MoE layer, in the order of the layers; () for no routed adapters.
        alpha: LoRA alpha. The scale is alpha / rank, for routed experts alpha / the largest rank in `routed`, because
            PEFT's file has one scale for a whole stack.
        router_full: the routers' weights are trained fully; `router` is 0 then. See adapters/lora.py.
    """

    attention: int = 0
    shared_expert: int = 0
    dense_mlp: int = 0
    router: int = 0
    routed: tuple[tuple[int, ...], ...] = ()
    alpha: float = 16.0
    router_full: bool = False

    @property
    def routed_rank(self) -> int:
        """The largest rank of any routed expert, 0 when none is adapted."""
        return max((rank for layer in self.routed for rank in layer), default=0)

    def class_ranks(self) -> dict[str, int]:
        """Rank by tensor class, routed experts by their largest."""
        return {
            "attention": self.attention,
            "shared_expert": self.shared_expert,
            "dense_mlp": self.dense_mlp,
            "routed_experts": self.routed_rank,
            "router": self.router,
        }


def same_experts_everywhere(
    rank: int, moe_layers: int, experts: int, chosen: Sequence[int] | None = None
) -> tuple[tuple[int, ...], ...]:
    """Ranks for `Placement.routed`: `rank` for the `chosen` experts (None: all) of every MoE layer.

    Raises:
        TargetError: the model has no routed experts, or a chosen one does not exist.
    """
    if rank == 0:
        return ()
    if not moe_layers or not experts:
        raise TargetError("routed experts were given a rank, but this model has no routed experts; set the rank to 0")
    wanted = range(experts) if chosen is None else chosen
    unknown = [expert for expert in wanted if not 0 <= expert < experts]
    if unknown or not wanted:
        raise TargetError(f"routed experts {unknown or '[]'} do not exist; this model has experts 0 to {experts - 1}")
    layer = tuple(rank if expert in set(wanted) else 0 for expert in range(experts))
    return (layer,) * moe_layers
