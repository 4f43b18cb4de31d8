"""Routed experts: tokens sorted by expert, and only the routed (token, expert) pairs computed.

Stock Llama 4 in transformers sends every token through every expert and multiplies by sigmoid(-inf) = 0. The experts
have no bias, so dropping those pairs changes neither the output nor any gradient, and the cost follows the active
experts alone.

    use_routed_experts(model)            swaps the experts of each MoE block for `RoutedExperts`, in place, same names
    RoutedExperts                        the experts of one layer: dense stacks, or quantised ones (quantized.py)
    set_expert_path(model, "lean")       what they keep for the backward; the mathematics is in expert_math.py

Dimension legend: T tokens, K experts a token (top-k), E experts, H hidden size, I expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from adapters.dropout import draw_seed
from adapters.errors import LayoutError
from adapters.expert_math import Layer, Projection, RoutedFunction, Stack, clamped_swiglu
from adapters.layouts import ExpertLayout, layout_for
from adapters.lora_products import Lora, LoraRanks
from adapters.quantized import QuantizedStack
from adapters.workspace import fused_experts, lean_rows

ExpertPath = Literal["fast", "lean"]
EXPERT_PATHS: tuple[ExpertPath, ...] = ("fast", "lean")


class RoutedExperts(nn.Module):
    """The routed experts of one layer, gate and up fused.

    Args:
        layout: the family: axis order, and where the routing weight goes.
        gate_up_proj: (E, H, 2I) or (E, 2I, H) by `layout.stack_order`.
        down_proj: (E, I, H) or (E, H, I).
        act_fn: the gate's activation.
        gate_up_proj_bias: (E, 2I) or None. down_proj_bias: (E, H) or None.
        gate: for families with a gating of their own, (P, 2I) → (P, I); None for act_fn(gate) · up.

    Attributes:
        lean: keep nothing but hidden states and routing for the backward, and compute the rest again.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        gate_up_proj: nn.Parameter | QuantizedStack,
        down_proj: nn.Parameter | QuantizedStack,
        act_fn: nn.Module,
        gate_up_proj_bias: nn.Parameter | None = None,
        down_proj_bias: nn.Parameter | None = None,
        gate: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.layout = layout
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.gate_up_proj_bias = gate_up_proj_bias
        self.down_proj_bias = down_proj_bias
        self.act_fn = act_fn
        self.gate = gate
        self.num_experts = gate_up_proj.shape[0]
        self.lean = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        hidden_TH: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        loras: Sequence[tuple[LoraRanks, Sequence[Tensor]]] = (),
    ) -> Tensor:
        """Sum over each token's experts.

        Args:
            hidden_TH: (T, H) floating point.
            experts_TK: (T, K) integer ids of the experts of each token.
            weights_TK: (T, K) routing weights.
            loras: each adapter's ranks and its factors: gate_up A (R, H), B (R, 2I), down A (R, I), B (R, H).

        Returns:
            (T, H), dtype of `hidden_TH`. Under autocast the arithmetic is in its dtype.
        """
        device = hidden_TH.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TH.dtype
        specs = tuple(ranks for ranks, _ in loras)
        seed = draw_seed() if any(spec.dropout for spec in specs) else 0
        build = partial(self._layer, specs, seed, dtype, self._row_limit())
        stacks = [None if isinstance(s, QuantizedStack) else s for s in (self.gate_up_proj, self.down_proj)]
        tensors = [*stacks, self.gate_up_proj_bias, self.down_proj_bias, *(t for _, four in loras for t in four)]
        keep = torch.is_grad_enabled() and not self.lean
        with torch.autocast(device, enabled=False):
            output: Tensor = RoutedFunction.apply(build, keep, hidden_TH, weights_TK, experts_TK, *tensors)
        return output

    def _row_limit(self) -> int:
        return lean_rows(fused=self.gate_up_proj.device.type != "cpu") if self.lean else 0

    def _layer(
        self, ranks: tuple[LoraRanks, ...], seed: int, dtype: torch.dtype, row_limit: int, tensors: Sequence[Any]
    ) -> Layer:
        gate_up, down, gate_up_bias, down_bias, *factors = tensors
        transposed = self.layout.stack_order == "out_in"
        loras = [
            tuple(Lora(spec, factors[at := 4 * i + first], factors[at + 1], seed + at) for i, spec in enumerate(ranks))
            for first in (0, 2)
        ]
        return Layer(
            gate_up=Projection(self._stack("gate_up_proj", gate_up), gate_up_bias, transposed, loras[0]),
            down=Projection(self._stack("down_proj", down), down_bias, transposed, loras[1]),
            gate=self.gate,
            act_fn=self.act_fn,
            weight_on=self.layout.weight_on,
            fused_experts=self.fused_experts(dtype),
            row_limit=row_limit,
            dtype=dtype,
        )

    def _stack(self, name: str, dense: Tensor | None) -> Stack:
        return getattr(self, name) if dense is None else dense

    def fused_experts(self, dtype: torch.dtype) -> int:
        """Experts that one grouped matmul serves: on CUDA in bfloat16 as many as the workspace holds, else 0."""
        stack = self.gate_up_proj
        if stack.device.type != "cuda" or dtype != torch.bfloat16:
            return 0
        return fused_experts(self.num_experts, int(stack.shape[1] * stack.shape[2]), isinstance(stack, QuantizedStack))


class RoutedLlama4Moe(Llama4TextMoe):
    """Llama 4's MoE block with token dispatch. Returns ((T, H), router logits (T, E)) like stock."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        hidden_TH = hidden_states.reshape(-1, self.hidden_dim)
        scores_TE, logits_TE = self.router(hidden_TH)
        experts_TK = logits_TE.topk(self.top_k, dim=1).indices
        routed_TH = self.experts(hidden_TH, experts_TK, scores_TE.gather(1, experts_TK))
        return self.shared_expert(hidden_TH) + routed_TH, logits_TE


BLOCKS: dict[str, type[nn.Module]] = {"llama4_text": RoutedLlama4Moe}
"""Blocks whose stock forward does not hand the routing to the experts. The other families' blocks stay as they are."""


def moe_blocks(model: nn.Module, layout: ExpertLayout) -> Iterator[tuple[str, nn.Module]]:
    """(name, block) of each decoder layer that has routed experts."""
    for name, module in model.named_modules():
        if name.endswith(f".{layout.block}") and hasattr(module, layout.experts):
            yield name, module


def set_expert_path(model: nn.Module, path: ExpertPath) -> None:
    """Chooses what every `RoutedExperts` of the model keeps for the backward: "fast" or "lean" (expert_math.py)."""
    if path not in EXPERT_PATHS:
        raise LayoutError(f"expert path {path!r}; allowed: {', '.join(EXPERT_PATHS)}")
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            module.lean = path == "lean"


def use_routed_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Swaps the experts of every MoE block of a stock model for `RoutedExperts`, in place; returns the model.

    Parameter names and values stay: `state_dict`, `save_pretrained` and optimizers made afterwards see no change.

    Raises:
        LayoutError: unknown family, or no MoE block found.
    """
    layout = layout_for(model.config.model_type)
    blocks = list(moe_blocks(model, layout))
    if layout.has_experts and not blocks:
        raise LayoutError(f"no {layout.block}.{layout.experts} found in this {model.config.model_type} model")
    for _, block in blocks:
        stock = getattr(block, layout.experts)
        replace_experts(block, layout, stock, stock.gate_up_proj, stock.down_proj)
    return model


def replace_experts(
    block: nn.Module,
    layout: ExpertLayout,
    stock: Any,
    gate_up_proj: nn.Parameter | QuantizedStack,
    down_proj: nn.Parameter | QuantizedStack,
) -> None:
    """Puts `RoutedExperts` on these stacks into an MoE block, and makes the block hand them the routing.

    Args:
        stock: the block's own experts: activation, gating and biases are taken from it.
    """
    gate = None
    if layout.interleaved:
        gate = partial(clamped_swiglu, alpha=stock.alpha, limit=stock.limit)
    act_fn = getattr(stock, "act_fn", None) or ACT2FN["silu"]
    biases = getattr(stock, "gate_up_proj_bias", None), getattr(stock, "down_proj_bias", None)
    setattr(block, layout.experts, RoutedExperts(layout, gate_up_proj, down_proj, act_fn, *biases, gate))
    if layout.model_type in BLOCKS:
        block.__class__ = BLOCKS[layout.model_type]
