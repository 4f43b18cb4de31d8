"""Routed experts, quantised stacks and training on a GPU: against the loop in float64 on the CPU, and bitsandbytes."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor, nn

from adapters.loading import load_base
from adapters.lora import ExpertLora, attach
from adapters.placement import Placement, same_experts_everywhere
from adapters.quantized import QuantizedStack
from adapters.routed import RoutedExperts, set_expert_path
from tests.numerics.conftest import EXPERTS, MOE_LAYERS, Tiny, randomise, save
from tests.numerics.slow_experts import FAMILIES, HELD, NEVER, check, make_layer, spread

TINY = [Tiny("llama4_text", 64, 32, 1), Tiny("qwen3_moe", 64, 64, 2), Tiny("gpt_oss", 64, 32, 2)]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.04}
RANKS = ((8, 8, 8, 8, 8), (2, 0, 3, 1, 8))


@pytest.mark.parametrize("lean", [False, True], ids=["fast", "lean"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_with_lora_equal_the_slow_loop(
    device: str, family: str, held: str, dtype: torch.dtype, lean: bool
) -> None:
    """In bfloat16 the experts go through one grouped matmul; sizes of whole 16 bytes, square, doubled and odd."""
    for hidden, width in ((64, 32), (64, 64), (33, 17)):
        for ranks in RANKS:
            layer = make_layer(family, 5, hidden, width, ranks, held, lean, dtype, limit=NEVER, device=device)
            check(layer, spread(40, 2, 5), dtype, TOLERANCE[dtype])
            check(layer, spread(9, 2, 3) + 1, dtype, TOLERANCE[dtype])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_token_and_one_token(device: str, family: str) -> None:
    for dtype, tolerance in TOLERANCE.items():
        layer = make_layer(family, 4, 64, 32, dtype=dtype, limit=NEVER, device=device)
        for tokens in (0, 1):
            check(layer, spread(tokens, 2, 4), dtype, 2 * tolerance)  # one token averages no rounding out


def test_bfloat16_groups_are_as_large_as_the_workspace_allows(cuda: str) -> None:
    plain, packed = (make_layer("qwen3_moe", 5, 64, 32, held=held, device=cuda).experts for held in ("plain", "nf4"))
    assert plain.fused_experts(torch.bfloat16) == 5
    assert packed.fused_experts(torch.bfloat16) >= 5
    assert plain.fused_experts(torch.float32) == packed.fused_experts(torch.float32) == 0


@pytest.mark.parametrize("lean", [False, True], ids=["fast", "lean"])
def test_quantised_experts_larger_than_the_workspace(device: str, lean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters.workspace.WORKSPACE_BYTES", 2 * 2 * 64 * 64)  # two experts' gate_up in bfloat16
    layer = make_layer("qwen3_moe", 5, 64, 32, held="nf4", lean=lean, dtype=torch.bfloat16, device=device)
    check(layer, spread(40, 2, 5), torch.bfloat16, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bit_bytes_and_values_are_those_of_bitsandbytes(
    device: str, kind: str, double_quant: bool, source: torch.dtype
) -> None:
    matrices = torch.randn(3, 96, 256, generator=torch.Generator().manual_seed(1)).to(device, source)
    stack = QuantizedStack(3, 96, 256, kind, double_quant=double_quant, device=device)
    for expert, matrix in enumerate(matrices):
        stack.write(expert, matrix)
    held = stack.held[kind]
    for expert, matrix in enumerate(matrices):
        packed, state = bnb.quantize_4bit(matrix, compress_statistics=double_quant, quant_type=kind)
        assert torch.equal(held.packed[expert], packed.flatten())
        assert torch.equal(held.absmax[expert], state.absmax.flatten())
        if double_quant:
            assert torch.equal(held.absmax_scale[expert], state.state2.absmax)
            assert torch.equal(held.absmax_offset[expert], state.offset)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            state.dtype = dtype
            right = bnb.dequantize_4bit(packed, state)
            assert torch.equal(stack.dequantize(expert, dtype), right)
            assert torch.equal(stack.dequantize_many([0, 1, 2], dtype)[expert], right)


def test_int8_bytes_and_values_are_those_of_bitsandbytes(device: str) -> None:
    matrix = torch.randn(70, 96, generator=torch.Generator().manual_seed(1)).to(device, torch.float16)
    stack = QuantizedStack(1, 70, 96, "int8", device=device)
    stack.write(0, matrix)
    values, absmax, _ = bnb.int8_vectorwise_quant(matrix.clone())
    assert torch.equal(stack.held["int8"].absmax[0], absmax)
    assert torch.equal(stack.held["int8"].values[0], values)
    assert torch.equal(stack.dequantize(0), bnb.int8_vectorwise_dequant(values, absmax))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_stack_quantised_on_the_cpu_reads_the_same_on_the_gpu(device: str, kind: str) -> None:
    stack = QuantizedStack(2, 96, 256, kind)
    for expert in range(2):
        stack.write(expert, torch.randn(96, 256, generator=torch.Generator().manual_seed(expert)))
    before = stack.dequantize_many([0, 1])
    torch.testing.assert_close(stack.to(device).dequantize_many([0, 1]).cpu(), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tiny", TINY, ids=str)
def test_an_adapted_model_gives_the_cpus_logits_and_gradients(
    device: str, tiny: Tiny, ids: Tensor, tmp_path: Path
) -> None:
    directory = save(tiny, tmp_path)

    def run(where: str) -> dict[str, Tensor]:
        model = adapted(directory, quantize="none", device=where)
        model.load_state_dict(values, strict=False)
        output = model(input_ids=ids.to(where), labels=ids.to(where))
        output.loss.backward()
        gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
        return {"logits": output.logits.detach().cpu(), **gradients}

    values = {n: p.detach().cpu() for n, p in adapted(directory, quantize="none").named_parameters() if p.requires_grad}
    found, wanted = run(device), run("cpu")
    assert found.keys() == wanted.keys() and len(wanted) > MOE_LAYERS * 4
    for name, right in wanted.items():
        assert (found[name] - right).norm() <= 1e-4 * right.norm(), name


def adapted(directory: Path, **options: object) -> nn.Module:
    model = load_base(directory, **options)
    model = attach(model, Placement(attention=4, routed=same_experts_everywhere(4, MOE_LAYERS, EXPERTS), alpha=8))
    randomise(model)
    return model


@pytest.mark.parametrize("path", ["fast", "lean"])
@pytest.mark.parametrize("quantize", ["nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize("tiny", TINY, ids=str)
def test_two_steps_move_every_adapter(
    device: str, tiny: Tiny, quantize: str, path: str, ids: Tensor, tmp_path: Path
) -> None:
    model = adapted(save(tiny, tmp_path), quantize=quantize, dtype=torch.bfloat16, device=device).train()
    set_expert_path(model, path)
    assert all(p.device.type == device for p in model.parameters())
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = ids.to(device)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
    after = dict(model.named_parameters())
    assert before and all(not torch.equal(after[name], value) for name, value in before.items())
    assert sum(isinstance(m, ExpertLora) for m in model.modules()) == MOE_LAYERS


def test_the_lean_path_keeps_nothing_per_pair(cuda: str) -> None:
    """After the forward: the fast path holds gate_up (P, 2I) of every pair, the lean one hidden states and routing."""
    tokens, top_k, hidden, width = 2048, 2, 256, 512
    held = {}
    for lean in (False, True):
        layer = make_layer("qwen3_moe", 8, hidden, width, (8,) * 8, "nf4", lean, torch.bfloat16, device=cuda)
        held[lean] = bytes_held_after_the_forward(layer.experts, layer, tokens, top_k, hidden)
    gate_up = tokens * top_k * 2 * width * 2
    routing = tokens * top_k * (8 + 8 + 2)
    assert gate_up <= held[False] <= gate_up + 2 * tokens * hidden * 2 + 4 * routing
    assert held[True] <= 2 * tokens * hidden * 2 + 4 * routing


def bytes_held_after_the_forward(module: RoutedExperts, layer: object, tokens: int, top_k: int, hidden: int) -> int:
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    chosen, weights = spread(tokens, top_k, module.num_experts).cuda(), torch.rand(tokens, top_k, device="cuda")
    before = torch.cuda.memory_allocated()
    output = layer(x, chosen, weights.bfloat16())  # type: ignore[operator]
    held = torch.cuda.memory_allocated() - before
    assert output.requires_grad
    return held
