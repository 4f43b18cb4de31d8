"""Losses on the routing itself, the same definitions for every family, from what `watch_routing` has seen.

    load_balance_loss     1 when every expert is used and wanted alike, up to E / K when K experts take all tokens
    z_loss                keeps router logits small
    distillation_loss     holds the router to what the base's would say of the same hidden states
    routing_kl            per token, between any two routings

transformers computes a load-balance loss for some families, with definitions that differ in the sum over the top-k and
pools all layers into one; Llama 4 and DeepSeek have none. Here each layer's own loss is taken, then the mean of layers.

What the router "wants" is its distribution over all experts: the softmax of its logits, or, where the family scores by
a sigmoid, the sigmoids normalised to sum 1, as DeepSeek-V3's complementary balance loss has it (arXiv 2412.19437,
section 2.1.2, equations 17 to 20). Corrections that are added for the selection alone are no part of it.

Dimension legend: T tokens (rows x length), K experts a token (top-k), E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from adapters.routing import Routing

Scoring = Literal["softmax", "sigmoid"]


def routing_log_probs(logits: Tensor, scoring: Scoring) -> Tensor:
    """(..., E): log of the router's distribution over all experts, at least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.log_softmax(logits if scoring == "softmax" else F.logsigmoid(logits), dim=-1)


def load_balance_loss(seen: Sequence[Routing], kept: Tensor, scoring: Scoring) -> Tensor:
    """E · Σ_e f_e · P_e, mean over layers (Switch Transformer, arXiv 2101.03961, section 2.2, equations 4 to 6).

    f_e is the share of the routed (token, expert) pairs that expert e really got, group limits and selection
    corrections included; it has no gradient. P_e is the mean over the tokens of the router's probability.

    Args:
        seen: one a MoE layer, of one forward pass. kept: (T,) bool, False for padding.

    Returns:
        Scalar.
    """
    return torch.stack([_balance(routing, kept, scoring) for routing in seen]).mean()


def _balance(routing: Routing, kept: Tensor, scoring: Scoring) -> Tensor:
    probs = routing_log_probs(routing.logits, scoring).exp()
    weight = kept.to(probs.dtype)
    used = probs.new_zeros(probs.shape[1])
    used.index_add_(0, routing.experts.flatten(), weight.repeat_interleave(routing.experts.shape[1]))
    wanted = (weight[:, None] * probs).sum(0) / weight.sum().clamp(min=1)  # no matmul: autocast would round it
    return probs.shape[1] * (used / used.sum().clamp(min=1) * wanted).sum()


def z_loss(seen: Sequence[Routing], kept: Tensor) -> Tensor:
    """Mean over tokens and layers of logsumexp(logits)² (ST-MoE, arXiv 2202.08906, section 3.3, equation 5).

    Args, returns: as `load_balance_loss`.
    """
    layers = [torch.logsumexp(r.logits.to(torch.promote_types(r.logits.dtype, torch.float32)), -1) ** 2 for r in seen]
    return torch.stack([_mean(layer, kept) for layer in layers]).mean()


def distillation_loss(seen: Sequence[Routing], kept: Tensor, scoring: Scoring) -> Tensor:
    """Mean over tokens and layers of KL(base router || router), both on the hidden states that the router got.

    The hidden states are those of the tuned model, with every adapter before the layer: the loss says what the
    router's own adapter changed. What the drift of the hidden states changes is in `routing_kl` against the base
    model's routing. The base's side has no gradient.

    Args:
        seen: with `base_logits` (`watch_routing(..., base=True)`). kept: (T,) bool, False for padding.
    """
    layers = [routing_kl(_base(routing), routing.logits, scoring) for routing in seen]
    return torch.stack([_mean(layer, kept) for layer in layers]).mean()


def routing_kl(base_logits: Tensor, logits: Tensor, scoring: Scoring) -> Tensor:
    """(...): KL(base || other) in nats of each token's distribution over the experts, logits (..., E)."""
    base, other = routing_log_probs(base_logits, scoring), routing_log_probs(logits, scoring)
    return (base.exp() * (base - other)).sum(-1)


def _base(routing: Routing) -> Tensor:
    assert routing.base_logits is not None, "distillation needs watch_routing(..., base=True)"
    return routing.base_logits


def _mean(values_T: Tensor, kept: Tensor) -> Tensor:
    weight = kept.to(values_T.dtype)
    return (values_T * weight).sum() / weight.sum().clamp(min=1)
