"""Dropout of adapters: on experts against the slow loop with the same mask; the mask; on linears; off in evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from adapters.dropout import draw_seed, keep_mask
from adapters.lora import ExpertLora, attach, lora_linears
from adapters.placement import Method
from adapters.routed import set_expert_path
from tests.numerics.conftest import EXPERTS, Tiny, load_plain, randomise, save
from tests.numerics.test_expert_lora import placement_for

TOKENS, SHARE = 40, 0.3
FAMILIES = [Tiny("llama4_text", 64, 32, 1), Tiny("qwen3_moe", 64, 32, 2)]


@pytest.mark.parametrize("path", ["fast", "lean"])
@pytest.mark.parametrize("tiny", FAMILIES, ids=str)
def test_forward_and_gradients_equal_the_slow_loop_with_the_same_mask(
    tiny: Tiny, path: Literal["fast", "lean"], tmp_path: Path
) -> None:
    placed = replace(placement_for(tiny), method=Method(dropout=SHARE))
    model = attach(load_plain(save(tiny, tmp_path)), placed).double().train()
    randomise(model)
    set_expert_path(model, path)
    layer = next(module for module in model.modules() if isinstance(module, ExpertLora))
    tokens = torch.randn(TOKENS, tiny.hidden, dtype=torch.float64, requires_grad=True)
    chosen = torch.stack([torch.randperm(EXPERTS)[: tiny.top_k] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, tiny.top_k, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(TOKENS, tiny.hidden, dtype=torch.float64)
    wanted = [tokens, weights, *(p for p in layer.parameters() if p.requires_grad)]
    torch.manual_seed(11)
    seed = draw_seed()
    torch.manual_seed(11)
    ours, slow = layer(tokens, chosen, weights), slow_loop(layer, tokens, chosen, weights, seed)
    torch.testing.assert_close(ours, slow, rtol=0, atol=1e-12)
    found, right = (torch.autograd.grad((y * direction).sum(), wanted) for y in (ours, slow))
    for mine, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    plain = layer.eval()(tokens, chosen, weights)
    assert (plain - ours).abs().max() > 1e-2
    assert torch.equal(plain, layer(tokens, chosen, weights))


def slow_loop(layer: ExpertLora, tokens: Tensor, chosen: Tensor, weights: Tensor, seed: int) -> Tensor:
    base, ranks, rows = layer.get_base_layer(), layer.ranks["default"], []
    swapped, pairs = base.layout.stack_order == "in_out", torch.arange(chosen.numel())

    def through(projection: str, expert: int, x: Tensor, pair: int, seed: int) -> Tensor:
        start = sum(ranks[:expert])
        a, b = (f[start : start + ranks[expert]] for f in layer.factors("default", projection))
        weight = getattr(base, projection)[expert]
        kept = x * keep_mask(seed, pairs, len(x), SHARE, torch.float64)[pair]
        return (weight.t() if swapped else weight) @ x + 12.0 / 5 * b.t() @ (a @ kept)

    for t, token in enumerate(tokens):
        total = torch.zeros_like(token)
        for k, expert in enumerate(chosen[t].tolist()):
            pair, on_input = t * chosen.shape[1] + k, base.layout.weight_on == "input"
            x = token * weights[t, k] if on_input else token
            gate, up = through("gate_up_proj", expert, x, pair, seed).chunk(2)
            y = through("down_proj", expert, nn.functional.silu(gate) * up, pair, seed + 2)
            total = total + (y if on_input else y * weights[t, k])
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_the_mask_is_even_and_without_pattern(share: float) -> None:
    mask = keep_mask(1234, torch.arange(2000), 512, share, torch.float32)
    kept = mask.ne(0).double()
    assert mask[mask.ne(0)].unique().tolist() == pytest.approx([1 / (1 - share)])
    deviation = (share * (1 - share)) ** 0.5
    assert abs(kept.mean() - (1 - share)) < 5 * deviation / kept.numel() ** 0.5
    for axis in (0, 1):
        means = (kept.mean(axis) - (1 - share)) / (deviation / kept.shape[axis] ** 0.5)
        assert means.abs().max() < 5.5 and 0.85 < means.std() < 1.15
    rows = (kept - kept.mean()) / deviation
    neighbours = [(rows[1:] * rows[:-1]).mean(), (rows[:, 1:] * rows[:, :-1]).mean(), (rows[::2] * rows[1::2]).mean()]
    other = keep_mask(1235, torch.arange(2000), 512, share, torch.float32).ne(0).double() - (1 - share)
    assert max(abs(float(c)) for c in (*neighbours, (rows * other / deviation).mean())) < 6e-3
    part = keep_mask(1234, torch.tensor([7, 1999, 3]), 512, share, torch.float32)
    assert torch.equal(part, mask[[7, 1999, 3]])


def test_linears_drop_routers_do_not_and_evaluation_is_whole(tmp_path: Path, ids: Tensor) -> None:
    tiny = FAMILIES[0]
    base, placed = save(tiny, tmp_path), placement_for(tiny)
    models = [attach(load_plain(base), replace(placed, method=Method(dropout=p))) for p in (0.0, SHARE)]
    for model in models:
        randomise(model)
    with torch.no_grad():
        assert torch.equal(models[0].eval()(ids).logits, models[1].eval()(ids).logits)
        torch.manual_seed(0)
        first, second = (models[1].train()(ids).logits for _ in range(2))
        assert not torch.equal(first, second)
        torch.manual_seed(0)
        assert torch.equal(models[1](ids).logits, first)
    for path, module in lora_linears(models[1], "default"):
        dropout = module.lora_dropout["default"]
        assert isinstance(dropout, nn.Identity) if path.endswith("router") else dropout.p == SHARE


def test_gradient_checkpointing_drops_the_same(tmp_path: Path, ids: Tensor) -> None:
    tiny = FAMILIES[1]
    placed = replace(placement_for(tiny, router=0), method=Method(dropout=SHARE))
    model = attach(load_plain(save(tiny, tmp_path)), placed).train()
    randomise(model)

    def gradients() -> list[Tensor]:
        torch.manual_seed(4)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for mine, right in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-7)
