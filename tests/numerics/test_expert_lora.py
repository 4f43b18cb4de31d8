"""Expert LoRA against the slow obvious loop and against stock PEFT; placement errors; a real PeftModel throughout."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from peft import PeftModel

from adapters.errors import StudioError, TargetError
from adapters.layouts import PROJECTIONS
from adapters.loading import load_base
from adapters.lora import ExpertLora, attach
from adapters.peft_files import expert_factors
from adapters.placement import Placement, same_experts_everywhere
from adapters.routed import RoutedExperts, set_expert_path
from tests.numerics.conftest import EXPERTS, Tiny, randomise, save

UNEVEN = ((4, 0, 1, 4, 2, 3), (0, 5, 0, 0, 1, 2))


def placement_for(tiny: Tiny, routed: tuple[tuple[int, ...], ...] = UNEVEN, router: int = 2) -> Placement:
    shared = 4 if tiny.layout.shared_expert else 0
    return Placement(attention=8, shared_expert=shared, router=router, routed=routed, alpha=12.0)


def test_forward_and_gradients_equal_a_plain_loop_over_experts(tiny: Tiny, saved: Path) -> None:
    model = attach(load_base(saved, quantize="none"), placement_for(tiny)).double()
    randomise(model)
    layers = [m for m in model.modules() if isinstance(m, ExpertLora)]
    for layer, ranks in zip(layers, UNEVEN, strict=True):
        assert layer.ranks["default"] == ranks
        tokens = torch.randn(11, tiny.hidden, dtype=torch.float64, requires_grad=True)
        chosen = torch.stack([torch.randperm(EXPERTS)[: tiny.top_k] for _ in range(11)])
        weights = torch.rand(11, tiny.top_k, dtype=torch.float64, requires_grad=True)
        direction = torch.randn(11, tiny.hidden, dtype=torch.float64)
        wanted = [tokens, weights, *(p for p in layer.parameters() if p.requires_grad)]
        ours = layer(tokens, chosen, weights)
        slow = plain_loop(layer, tokens, chosen, weights)
        torch.testing.assert_close(ours, slow, rtol=0, atol=1e-12)
        pairs = zip(
            torch.autograd.grad((ours * direction).sum(), wanted, retain_graph=True),
            torch.autograd.grad((slow * direction).sum(), wanted),
            strict=True,
        )
        for mine, theirs in pairs:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def plain_loop(layer: ExpertLora, tokens: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Token by token, with W + scale · B A materialised for its expert."""
    base = layer.get_base_layer()
    swapped = base.layout.stack_order == "in_out"

    def matrix(projection: str, expert: int) -> torch.Tensor:
        ranks = layer.ranks["default"]
        start = sum(ranks[:expert])
        a, b = (f[start : start + ranks[expert]] for f in layer.factors("default", projection))
        weight = getattr(base, projection)[expert]
        return (weight.t() if swapped else weight) + 12.0 / 5 * (b.t() @ a)

    rows = []
    for t, token in enumerate(tokens):
        total = torch.zeros_like(token)
        for k, expert in enumerate(chosen[t].tolist()):
            x = token * weights[t, k] if base.layout.weight_on == "input" else token
            gate, up = (matrix("gate_up_proj", expert) @ x).chunk(2)
            y = matrix("down_proj", expert) @ (torch.nn.functional.silu(gate) * up)
            total = total + (y if base.layout.weight_on == "input" else y * weights[t, k])
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_autocast_stays_close_to_float32(square: Tiny, tmp_path: Path, hidden_dtype: torch.dtype) -> None:
    """As on a GPU: 4-bit experts, float32 adapters, bfloat16 arithmetic. bfloat16 has 8 bits of mantissa."""
    model = attach(load_base(save(square, tmp_path)), placement_for(square))
    randomise(model)
    layer = next(m for m in model.modules() if isinstance(m, ExpertLora))
    tokens = torch.randn(11, square.hidden)
    chosen = torch.stack([torch.randperm(EXPERTS)[: square.top_k] for _ in range(11)])
    weights = torch.rand(11, square.top_k)
    trained = [p for p in layer.parameters() if p.requires_grad]

    def run(x: torch.Tensor) -> list[torch.Tensor]:
        x = x.clone().requires_grad_()
        output = layer(x, chosen, weights.to(x.dtype))
        assert output.dtype == x.dtype
        return [output.detach(), *torch.autograd.grad(output.float().square().sum(), [x, *trained])]

    exact = run(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        rough = run(tokens.to(hidden_dtype))
    for a, b in zip(rough, exact, strict=True):
        assert (a.float() - b).norm() <= 0.05 * b.norm()


def test_fresh_adapter_changes_nothing_and_disable_adapter_is_the_base(
    square: Tiny, tmp_path: Path, ids: torch.Tensor
) -> None:
    directory = save(square, tmp_path)
    with torch.no_grad():
        base = load_base(directory)(ids).logits
        model = attach(load_base(directory), placement_for(square)).eval()
        assert isinstance(model, PeftModel)
        assert torch.equal(model(ids).logits, base)
        randomise(model)
        assert (model(ids).logits - base).abs().max() > 1e-2
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, base)


def test_only_adapters_train_and_rank_zero_has_no_parameters(square: Tiny, tmp_path: Path) -> None:
    model = attach(load_base(save(square, tmp_path)), placement_for(square, router=0))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and all(".lora_" in name for name in trainable)
    assert not any("router" in name or ".gate." in name for name in trainable)
    for layer, ranks in zip((m for m in model.modules() if isinstance(m, ExpertLora)), UNEVEN, strict=True):
        for projection in PROJECTIONS:
            a, b = layer.factors("default", projection)
            assert len(a) == len(b) == sum(ranks)
            factors = expert_factors(layer, projection)
            assert all((factors.delta(e) == 0).all() for e in range(EXPERTS) if not ranks[e])


def test_4_bit_training_moves_every_adapter_class(square: Tiny, tmp_path: Path, ids: torch.Tensor) -> None:
    routed = same_experts_everywhere(4, 2, EXPERTS)
    model = attach(load_base(save(square, tmp_path)), placement_for(square, routed)).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = dict(model.named_parameters())
    for part in ("self_attn", "experts.lora_gate_up_B", "experts.lora_down_B"):
        assert any(part in n and not torch.equal(after[n], before[n]) for n in before), part


def test_an_expert_of_rank_0_has_no_parameter_and_no_optimizer_state(
    square: Tiny, tmp_path: Path, ids: torch.Tensor
) -> None:
    """Unequal ranks, and a layer with none: what AdamW holds is two moments for each parameter of a real rank."""
    ranks = ((0, 3, 0, 1, 0, 0), (0,) * EXPERTS)
    model = attach(load_base(save(square, tmp_path)), Placement(routed=ranks)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(map(sum, ranks)) * (2 * square.hidden + 3 * square.width)
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):  # B is zero at first, so A moves in the second step
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert sum(m.numel() for m in moments) == 2 * sum(p.numel() for p in trained)
    assert all(not torch.equal(p, was) for p, was in zip(trained, before, strict=True) if p.numel())


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (Placement(attention=4, shared_expert=4), "no tensor of class shared_expert"),
        (Placement(), "every rank is 0"),
        (Placement(routed=((1,) * EXPERTS,)), "ranks for experts"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error(placement: Placement, message: str, tmp_path: Path) -> None:
    model = load_base(save(Tiny("qwen3_moe", 64, 32, 2), tmp_path))
    with pytest.raises(TargetError, match=message):
        attach(model, placement)


@pytest.mark.parametrize("chosen", [[6], [-1, 2], []])
def test_an_expert_that_does_not_exist_is_an_error(chosen: list[int]) -> None:
    with pytest.raises(TargetError, match="this model has experts 0 to 5"):
        same_experts_everywhere(4, 2, EXPERTS, chosen)


def test_peft_merge_is_refused_and_not_silently_skipped(square: Tiny, tmp_path: Path) -> None:
    model = attach(load_base(save(square, tmp_path)), Placement(routed=UNEVEN))
    with pytest.raises(StudioError, match="studio merge"):
        model.merge_and_unload()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("path", ["fast", "lean"])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("ranks", [UNEVEN, ((8,) * EXPERTS, (8,) * EXPERTS)], ids=["uneven", "even"])
def test_one_grouped_matmul_equals_one_matmul_an_expert(
    square: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    tolerance: float,
    path: Literal["fast", "lean"],
    quantize: str,
    ranks: tuple[tuple[int, ...], ...],
) -> None:
    """The way of the GPU, taken on the CPU: several experts at a time, in groups of four."""
    base = load_base(save(square, tmp_path), quantize=quantize, dtype=dtype)
    model = attach(base, placement_for(square, ranks))
    randomise(model)
    set_expert_path(model, path)
    layer = next(m for m in model.modules() if isinstance(m, ExpertLora))
    tokens = torch.randn(13, square.hidden, dtype=dtype)
    chosen = torch.stack([torch.randperm(EXPERTS - 1)[: square.top_k] for _ in range(13)])  # the last one is idle
    weights = torch.rand(13, square.top_k).to(dtype)
    trained = [p for p in layer.parameters() if p.requires_grad]

    def run() -> list[torch.Tensor]:
        x, w = tokens.clone().requires_grad_(), weights.clone().requires_grad_()
        output = layer(x, chosen, w)
        return [output.detach(), *torch.autograd.grad(output.float().square().sum(), [x, w, *trained])]

    apart = run()
    monkeypatch.setattr(RoutedExperts, "fused_experts", lambda *_: 4)
    for together, alone in zip(run(), apart, strict=True):
        assert (together - alone).float().norm() <= tolerance * alone.float().norm()


@pytest.mark.parametrize("frozen", ["_A", "_B"])
def test_one_factor_alone_can_be_trained(square: Tiny, tmp_path: Path, frozen: str) -> None:
    """LoRA-FA (Zhang et al., 2023, arXiv 2308.03303) freezes A."""
    model = attach(load_base(save(square, tmp_path), quantize="none"), placement_for(square))
    randomise(model)
    layer = next(m for m in model.modules() if isinstance(m, ExpertLora))
    tokens, weights = torch.randn(17, square.hidden), torch.rand(17, square.top_k)
    chosen = torch.stack([torch.randperm(EXPERTS)[: square.top_k] for _ in range(17)])

    def gradients() -> dict[str, torch.Tensor]:
        named = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(layer(tokens, chosen, weights).square().sum(), list(named.values()))
        return dict(zip(named, found, strict=True))

    both = gradients()
    for name, parameter in layer.named_parameters():
        if f"{frozen}." in name:
            parameter.requires_grad = False
    alone = gradients()
    assert 0 < len(alone) < len(both)
    for name, gradient in alone.items():
        assert gradient.any() and torch.equal(gradient, both[name])


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("fused", [0, 4])
def test_lean_parts_of_an_experts_rows_add_up_to_the_fast_path(
    square: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: int, quantize: str
) -> None:
    model = attach(load_base(save(square, tmp_path), quantize=quantize), placement_for(square))
    randomise(model)
    layer = next(m for m in model.modules() if isinstance(m, ExpertLora))
    monkeypatch.setattr(RoutedExperts, "fused_experts", lambda *_: fused)
    monkeypatch.setattr("adapters.workspace.LEAN_ROWS", 3)
    tokens = torch.randn(17, square.hidden)
    chosen = torch.stack([torch.randperm(3)[: square.top_k] * 2 for _ in range(17)])  # experts 0, 2 and 4
    weights = torch.rand(17, square.top_k)
    trained = [p for p in layer.parameters() if p.requires_grad]

    def run(path: Literal["fast", "lean"]) -> list[torch.Tensor]:
        set_expert_path(model, path)
        x, w = tokens.clone().requires_grad_(), weights.clone().requires_grad_()
        output = layer(x, chosen, w)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), [x, w, *trained])]

    for lean, fast in zip(run("lean"), run("fast"), strict=True):
        assert (lean - fast).norm() <= 1e-5 * fast.norm()
