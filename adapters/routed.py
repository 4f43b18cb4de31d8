"""Routed experts: tokens sorted by expert, and only the routed (token, expert) pairs computed.

Stock Llama 4 in transformers sends every token through every expert and multiplies by sigmoid(-inf) = 0. The experts
have no bias, so dropping those pairs changes neither the output nor any gradient, and the cost follows the active
experts alone.

    use_routed_experts(model)   swaps the experts of each MoE block for `RoutedExperts`, in place, same parameter names
    RoutedExperts               the experts of one layer: dense stacks, or 4-bit ones (adapters/quantized.py)

Dimension legend: T tokens, K experts a token (top-k), P = T·K pairs, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from adapters.errors import LayoutError
from adapters.layouts import ExpertLayout, layout_for
from adapters.quantized import QuantizedStack

PROJECTIONS = ("gate_up_proj", "down_proj")

Stack = nn.Parameter | QuantizedStack
Project = Callable[[int, Tensor], Tensor]


class ExpertDelta(Protocol):
    """What an adapter adds: (projection, expert, its inputs (P_e, in)) → (P_e, out), or None for no adapter there."""

    def __call__(self, projection: str, expert: int, x: Tensor) -> Tensor | None: ...


class RoutedExperts(nn.Module):
    """The routed experts of one layer, gate and up fused (gate first), no bias.

    Args:
        layout: the family: axis order, and where the routing weight goes.
        gate_up_proj: (E, H, 2I) or (E, 2I, H) by `layout.stack_order`.
        down_proj: (E, I, H) or (E, H, I).
        act_fn: the gate's activation.
    """

    def __init__(self, layout: ExpertLayout, gate_up_proj: Stack, down_proj: Stack, act_fn: nn.Module):
        super().__init__()
        self.layout = layout
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.act_fn = act_fn
        self.num_experts = gate_up_proj.shape[0]

    def forward(
        self, hidden_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor, delta: ExpertDelta | None = None
    ) -> Tensor:
        """Sum over each token's experts.

        Args:
            hidden_TH: (T, H) floating point.
            experts_TK: (T, K) integer ids of the experts of each token.
            weights_TK: (T, K) routing weights.
            delta: an adapter's additive part, asked per projection and expert.

        Returns:
            (T, H), dtype of `hidden_TH`.
        """
        order_P = experts_TK.reshape(-1).argsort(stable=True)
        token_P = order_P.div(experts_TK.shape[1], rounding_mode="floor")
        counts_E = torch.bincount(experts_TK.reshape(-1), minlength=self.num_experts).tolist()
        weight_P1 = weights_TK.reshape(-1)[order_P].unsqueeze(-1).to(hidden_TH.dtype)

        x_PH = hidden_TH[token_P]
        if self.layout.weight_on == "input":
            x_PH = x_PH * weight_P1
        gate_up, down = (self._projection(name, delta) for name in PROJECTIONS)
        outputs = [self._expert(e, x, gate_up, down) for e, x in _by_expert(x_PH, counts_E)]
        y_PH = torch.cat(outputs) if outputs else x_PH
        if self.layout.weight_on == "output":
            y_PH = y_PH * weight_P1
        return torch.zeros_like(hidden_TH).index_add(0, token_P, y_PH.to(hidden_TH.dtype))

    def _expert(self, expert: int, x: Tensor, gate_up: Project, down: Project) -> Tensor:
        gate, up = gate_up(expert, x).chunk(2, dim=-1)
        return down(expert, self.act_fn(gate) * up)

    def _projection(self, name: str, delta: ExpertDelta | None) -> Project:
        base = _base_projection(getattr(self, name), transposed=self.layout.stack_order == "out_in")
        if delta is None:
            return base

        def project(expert: int, x: Tensor) -> Tensor:
            extra = delta(name, expert, x)
            return base(expert, x) if extra is None else base(expert, x) + extra

        return project


def _base_projection(stack: Stack, transposed: bool) -> Project:
    if isinstance(stack, QuantizedStack):
        return lambda expert, x: stack.matmul(expert, x, transposed)
    # unbound once: indexing stack[e] would make a gradient the size of the whole stack for each expert
    matrices = [matrix.t() for matrix in stack.unbind(0)] if transposed else stack.unbind(0)
    return lambda expert, x: x @ matrices[expert]


def _by_expert(x_PH: Tensor, counts_E: list[int]) -> Iterator[tuple[int, Tensor]]:
    for expert, x in enumerate(x_PH.split(counts_E)):
        if len(x):
            yield expert, x


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


def use_routed_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Swaps the experts of every MoE block of a stock model for `RoutedExperts`, in place; returns the model.

    Parameter names and values stay: `state_dict`, `save_pretrained` and optimizers made afterwards see no change.

    Raises:
        LayoutError: unknown family, or no MoE block found.
    """
    config = model.config
    layout = layout_for(config.model_type)
    blocks = list(moe_blocks(model, layout))
    if not blocks:
        raise LayoutError(f"no {layout.block}.{layout.experts} found in this {config.model_type} model")
    for _, block in blocks:
        stock = getattr(block, layout.experts)
        replace_experts(block, layout, stock.gate_up_proj, stock.down_proj, ACT2FN[config.hidden_act])
    return model


def replace_experts(
    block: nn.Module, layout: ExpertLayout, gate_up_proj: Stack, down_proj: Stack, act_fn: nn.Module
) -> None:
    """Puts `RoutedExperts` on these stacks into an MoE block, and makes the block hand them the routing."""
    setattr(block, layout.experts, RoutedExperts(layout, gate_up_proj, down_proj, act_fn))
    if layout.model_type in BLOCKS:
        block.__class__ = BLOCKS[layout.model_type]
