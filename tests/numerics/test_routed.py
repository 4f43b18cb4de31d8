"""Routed experts against stock transformers: the same output and gradients, and no unrouted pair computed."""

from __future__ import annotations

import torch

from adapters.layouts import LAYOUTS
from adapters.routed import RoutedExperts, use_routed_experts
from tests.numerics.conftest import Tiny


def test_output_and_every_gradient_equal_stock_in_float64(tiny: Tiny, ids: torch.Tensor) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model = tiny.build()
        if tiny.family != "llama4_text":
            model.set_experts_implementation("eager")
        embedded = model.get_input_embeddings()(ids).detach()

        def run() -> dict[str, torch.Tensor]:
            model.zero_grad()
            inputs = embedded.clone().requires_grad_()
            output = model(inputs_embeds=inputs, labels=ids)
            output.loss.backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            return {**grads, "logits": output.logits.detach(), "input": inputs.grad}

        stock = run()
        use_routed_experts(model)
        ours = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert stock.keys() == ours.keys()
    assert any("router" in name or "gate.weight" in name for name in stock)
    for name, value in stock.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_only_routed_pairs_reach_an_expert() -> None:
    layout = LAYOUTS["llama4_text"]
    rows = 0

    class Counting(torch.nn.SiLU):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal rows
            rows += len(x)
            return super().forward(x)

    stacks = torch.randn(5, 8, 12), torch.randn(5, 6, 8)
    for stack in stacks:
        stack[[1, 2]] = torch.nan  # whoever touches an expert without tokens gets NaN
    experts = RoutedExperts(layout, *(torch.nn.Parameter(stack) for stack in stacks), Counting())
    chosen = torch.tensor([[0], [3], [3], [0], [3], [4]])
    assert experts(torch.randn(6, 8), chosen, torch.ones(6, 1)).isfinite().all()
    assert rows == 6


def test_no_tokens_at_all() -> None:
    stacks = (torch.nn.Parameter(torch.randn(5, 8, 12)), torch.nn.Parameter(torch.randn(5, 6, 8)))
    experts = RoutedExperts(LAYOUTS["llama4_text"], *stacks, torch.nn.SiLU())
    assert experts(torch.empty(0, 8), torch.empty(0, 1, dtype=torch.long), torch.empty(0, 1)).shape == (0, 8)
