"""Losses on the routing against slow loops and against transformers' own; their way into every family's router."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from adapters.lora import attach
from adapters.placement import Placement
from adapters.routed import use_routed_experts
from adapters.router_losses import Scoring, distillation_loss, load_balance_loss, routing_kl, z_loss
from adapters.routing import Routing, watch_routing
from tests.numerics.conftest import EACH, EXPERTS, MOE_LAYERS, Tiny, randomise

MOE = [tiny for tiny in EACH if tiny.layout.has_experts]
T, K = 13, 2
LOSSES = {
    "load_balance": load_balance_loss,
    "z": lambda seen, kept, _: z_loss(seen, kept),
    "distill": distillation_loss,
}


def some_routings(top_k: int = K) -> tuple[list[Routing], Tensor]:
    generator = torch.Generator().manual_seed(3)

    def layer(number: int) -> Routing:
        logits, base = (3 * torch.randn(T, EXPERTS, dtype=torch.float64, generator=generator) for _ in range(2))
        return Routing(number, logits, logits.topk(top_k).indices, torch.rand(T, top_k), base)

    return [layer(1), layer(3)], torch.rand(T, generator=generator) > 0.3


def slow_probs(logits: list[float], scoring: Scoring) -> list[float]:
    scores = [math.exp(x) if scoring == "softmax" else 1 / (1 + math.exp(-x)) for x in logits]
    return [score / sum(scores) for score in scores]


def slow_losses(seen: list[Routing], kept: Tensor, scoring: Scoring) -> dict[str, float]:
    """Token by token and expert by expert, in Python's floats."""
    tokens = [t for t in range(T) if kept[t]]
    sums = dict.fromkeys(LOSSES, 0.0)
    for routing in seen:
        probs = {t: slow_probs(routing.logits[t].tolist(), scoring) for t in tokens}
        base = {t: slow_probs(routing.base_logits[t].tolist(), scoring) for t in tokens}
        for expert in range(EXPERTS):
            chosen = sum(routing.experts[t].tolist().count(expert) for t in tokens) / len(tokens)
            wanted = sum(probs[t][expert] for t in tokens) / len(tokens)
            sums["load_balance"] += EXPERTS * chosen * wanted / routing.experts.shape[1]
        for t in tokens:
            sums["z"] += math.log(sum(map(math.exp, routing.logits[t].tolist()))) ** 2 / len(tokens)
            divergence = sum(p * math.log(p / q) for p, q in zip(base[t], probs[t], strict=True))
            sums["distill"] += divergence / len(tokens)
    return {name: value / len(seen) for name, value in sums.items()}


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_equals_a_slow_loop(name: str, scoring: Scoring) -> None:
    seen, kept = some_routings()
    assert not kept.all()
    found = LOSSES[name](seen, kept, scoring)
    assert found.item() == pytest.approx(slow_losses(seen, kept, scoring)[name], rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_rounds_no_loss(name: str) -> None:
    seen, kept = some_routings()
    exact = LOSSES[name](seen, kept, "softmax").item()
    single = [replace(r, logits=r.logits.float(), base_logits=r.base_logits.float()) for r in seen]
    with torch.autocast("cpu", torch.bfloat16):
        assert LOSSES[name](single, kept, "softmax").item() == pytest.approx(exact, rel=1e-5)


def test_load_balance_is_transformers_own_by_layer_divided_by_k() -> None:
    """transformers sums f over the K choices, so it is K times as large, and pools the layers before the product."""
    seen, kept = some_routings()
    theirs = [load_balancing_loss_func((r.logits,), EXPERTS, K, kept[None].long()) for r in seen]
    assert load_balance_loss(seen, kept, "softmax").item() == pytest.approx(sum(theirs).item() / K / 2, rel=1e-6)
    assert load_balance_loss(seen[:1], kept, "softmax").item() == pytest.approx(theirs[0].item() / K, rel=1e-6)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_even_use_costs_1_and_collapse_costs_the_number_of_experts(scoring: Scoring) -> None:
    sure = torch.eye(EXPERTS) * 60 - 30
    even = Routing(0, sure, torch.arange(EXPERTS)[:, None], torch.ones(EXPERTS, 1))
    one = Routing(0, sure[[2] * EXPERTS], torch.full((EXPERTS, 1), 2), torch.ones(EXPERTS, 1))
    kept = torch.ones(EXPERTS, dtype=torch.bool)
    assert load_balance_loss([even], kept, scoring).item() == pytest.approx(1)
    assert load_balance_loss([one], kept, scoring).item() == pytest.approx(EXPERTS)


def test_kl_is_0_for_the_same_routing_and_finite_where_a_probability_vanishes() -> None:
    seen, _ = some_routings()
    assert routing_kl(seen[0].logits, seen[0].logits, "sigmoid").abs().max() < 1e-15
    for scoring in ("softmax", "sigmoid"):
        assert torch.isfinite(routing_kl(torch.tensor([200.0, -200]), torch.tensor([-200.0, 200]), scoring))


def adapted(tiny: Tiny, placement: Placement) -> torch.nn.Module:
    model = attach(use_routed_experts(tiny.build()), placement)
    randomise(model, std=0.07)
    return model


@pytest.mark.parametrize("placement", [Placement(router=2), Placement(router_full=True)], ids=["lora", "full"])
@pytest.mark.parametrize("tiny", MOE, ids=str)
def test_every_familys_router_gets_a_gradient_from_each_loss(tiny: Tiny, placement: Placement, ids: Tensor) -> None:
    model = adapted(tiny, placement).train()
    kept = torch.arange(ids.numel()) % 5 > 0
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == MOE_LAYERS * (1 if placement.router_full else 2)
    with watch_routing(model, tiny.layout, base=True) as seen:
        model(input_ids=ids)
    for name, loss in LOSSES.items():
        gradients = torch.autograd.grad(loss(seen, kept, tiny.layout.scoring), trained.values(), retain_graph=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            assert gradient.any() and torch.isfinite(gradient).all(), (name, parameter)


@pytest.mark.parametrize("tiny", MOE, ids=str)
def test_the_same_gradients_under_checkpointing(tiny: Tiny, ids: Tensor) -> None:
    """The backward pass runs the layers again; the losses hang on what the first run left."""
    model = adapted(tiny, Placement(attention=2, router=2)).double().train()
    kept = torch.ones(ids.numel(), dtype=torch.bool)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        with watch_routing(model, tiny.layout, base=True) as seen:
            loss = model(input_ids=ids, labels=ids).loss
        assert len(seen) == MOE_LAYERS
        for extra in LOSSES.values():
            loss = loss + extra(seen, kept, tiny.layout.scoring)
        loss.backward()
        assert len(seen) == MOE_LAYERS  # nothing was appended: the hooks were gone
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("tiny", MOE, ids=str)
def test_base_logits_are_the_frozen_routers_on_the_same_hidden_states(tiny: Tiny, ids: Tensor) -> None:
    """And asking for them changes nothing, also where the router draws random numbers in training."""
    model = adapted(tiny, Placement(attention=2, router=2)).train()
    inputs: list[Tensor] = []
    routers = [m for name, m in model.named_modules() if name.endswith(f".{tiny.layout.router}")]
    assert len(routers) == MOE_LAYERS
    for router in routers:
        router.register_forward_hook(lambda _m, args, _out: inputs.append(args[0].detach().flatten(0, -2).clone()))
    outputs, drawn = [], []
    for base in (False, True):
        torch.manual_seed(1)
        with watch_routing(model, tiny.layout, base=base) as seen:
            outputs.append(model(input_ids=ids).logits)
        drawn.append(torch.get_rng_state())
    assert torch.equal(*outputs) and torch.equal(*drawn)
    for routing, router, x in zip(seen, routers, inputs[MOE_LAYERS:], strict=True):
        stock = router.get_base_layer()
        expected = torch.nn.functional.linear(x.float(), stock.weight, getattr(stock, "bias", None))
        torch.testing.assert_close(routing.base_logits, expected, rtol=0, atol=1e-5)
        assert not routing.base_logits.requires_grad
        assert (routing.base_logits - routing.logits).abs().max() > 1e-3
        assert router.training and stock.training


@pytest.mark.parametrize("tiny", MOE, ids=str)
def test_the_layouts_scoring_gives_stocks_weights(tiny: Tiny, ids: Tensor) -> None:
    """Weights of a token's experts stand to each other as their scores do, renormalised and scaled or not."""
    model = use_routed_experts(tiny.build())
    with watch_routing(model, tiny.layout) as seen, torch.no_grad():
        model(input_ids=ids)
    for routing in seen:
        score = routing.logits.exp() if tiny.layout.scoring == "softmax" else routing.logits.sigmoid()
        wanted, found = score.gather(1, routing.experts), routing.weights
        if tiny.family == "llama4_text":
            torch.testing.assert_close(found, wanted)
        elif tiny.family == "phimoe":
            assert tiny.layout.scoring == "softmax"
            torch.testing.assert_close(found, sparsemixer_weights(routing.logits, routing.experts))
        else:
            torch.testing.assert_close(found[:, 0] * wanted[:, 1], found[:, 1] * wanted[:, 0], rtol=1e-4, atol=1e-6)


def sparsemixer_weights(logits: Tensor, experts: Tensor, jitter: float = 0.01) -> Tensor:
    """Phi-MoE (arXiv 2409.12136): each choice's softmax over the logits that are near the largest one left."""
    rows = []
    for row, chosen in zip(logits, experts.tolist(), strict=True):
        left, weights = row.clone(), []
        for expert in chosen:
            top = left.max()
            near = (top - row) / row.abs().clamp(min=top) <= 2 * jitter
            weights.append(left.masked_fill(~near, float("-inf")).softmax(-1)[expert])
            left[expert] = float("-inf")
        rows.append(torch.stack(weights))
    return torch.stack(rows)
