"""How much of a layer's experts is worked on at one time: the limits that the engine keeps and the plan counts with.

No torch at import.
"""

from __future__ import annotations

CPU_GROUP_ROWS = 128
"""On a CPU: experts are added to a group until it has this many rows."""

LEAN_ROWS = 96
LEAN_ROWS_FUSED = 4096
"""Lean: most rows of a group, so that the workspace stays small even where all tokens go to one expert."""

WORKSPACE_BYTES = 256 * 2**20
"""On CUDA in bfloat16: how much of a quantised stack is dequantised at one time, counted by gate_up matrices."""


def fused_experts(experts: int, gate_up_values: int, quantized: bool) -> int:
    """Experts that one grouped matmul in bfloat16 serves.

    Args:
        experts: of the layer. gate_up_values: of one expert's gate_up matrix.
    """
    if not quantized:
        return experts
    return min(experts, max(1, WORKSPACE_BYTES // (2 * gate_up_values)))


def lean_rows(fused: bool) -> int:
    """Most rows of a group on the lean path."""
    return LEAN_ROWS_FUSED if fused else LEAN_ROWS
