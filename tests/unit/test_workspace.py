"""What the plan counts for the experts that are computed together, against the sizes by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapters.layouts import MoeShape
from adapters.workspace import LEAN_ROWS, LEAN_ROWS_FUSED, WORKSPACE_BYTES
from studio.activations import Pass
from studio.memory import Held, _group, _workspace
from studio.shapes import published_shape

SHAPE = MoeShape(layer=0, experts=128, hidden=2048, width=768)
GPU = Pass(4, 1024, 2, True, 0, 0, 0, 0, True)
NF4 = Held(0, 0, True, False, False)
DENSE = replace(NF4, quantized=False)


def test_a_gpu_computes_as_many_experts_together_as_the_workspace_holds() -> None:
    rows, together = _group(SHAPE, 8, NF4, GPU)
    assert together == WORKSPACE_BYTES // (2 * 2 * 2048 * 768) == 42
    assert rows >= 4096 * 8 * 42 / 128
    assert _group(SHAPE, 8, DENSE, GPU) == (4096 * 8, 128)


@pytest.mark.parametrize(("run", "limit"), [(GPU, LEAN_ROWS_FUSED), (replace(GPU, on_gpu=False), LEAN_ROWS)])
def test_lean_bounds_the_rows(run: Pass, limit: int) -> None:
    assert _group(SHAPE, 8, DENSE, replace(run, keep_gate_up=False))[0] == limit


def test_a_cpu_computes_one_expert_at_a_time() -> None:
    assert _group(SHAPE, 8, NF4, replace(GPU, on_gpu=False, dtype_bytes=4))[1] == 1


def test_what_is_dequantised_is_one_experts_gate_and_up() -> None:
    scout = published_shape("llama4-scout").base()
    run = replace(GPU, on_gpu=False, dtype_bytes=4)
    assert _workspace(scout, NF4, run) - _workspace(scout, DENSE, run) == 4 * 2 * 5120 * 8192
