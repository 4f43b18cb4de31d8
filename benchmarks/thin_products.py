"""Products of a few rows, as with many experts and top-1: how fast any kernel at hand reads the experts' matrices.

    python benchmarks/thin_products.py [--quick] [--rows 8] [--json FILE]

128 matrices (2048, 512) float32, far more than the caches hold, each multiplied with its own few rows, forward (x Wᵀ)
and backward (g W): by oneDNN, as the engine does, by torch's default BLAS, by its batched product, by numpy's OpenBLAS.
Beside them a plain sum over the same memory, which is the rate that reading alone reaches. One way after
the other, since the threads of one library still spin when the next begins; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from adapters.products import linear

EXPERTS, OUT, IN = 128, 2048, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 15")
    parser.add_argument("--rows", type=int, default=8, help="rows of each expert")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    options = parser.parse_args()
    measured = measure(options.rows, 3 if options.quick else 15)
    table = Table("way", "median", "least … most", "GB/s", title=f"{EXPERTS} products with {options.rows} rows each")
    for way, seconds in measured.items():
        rate = EXPERTS * OUT * IN * 4 / statistics.median(seconds) / 1e9
        spread = f"{min(seconds) * 1e3:.1f} … {max(seconds) * 1e3:.1f} ms"
        table.add_row(way, f"{statistics.median(seconds) * 1e3:.1f} ms", spread, f"{rate:.1f}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"rows": options.rows, "seconds": measured}, indent=2) + "\n")


def measure(rows: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, by way."""
    torch.manual_seed(0)
    weights, x, grad = torch.randn(EXPERTS, OUT, IN), torch.randn(EXPERTS, rows, IN), torch.randn(EXPERTS, rows, OUT)
    ways = ways_of(weights, x, grad)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for way, run in ways.items():
        for number in range(rounds + 3):
            start = time.perf_counter()
            run()
            if number >= 3:  # warm-up before
                seconds[way].append(time.perf_counter() - start)
    return seconds


def ways_of(weights: Tensor, x: Tensor, grad: Tensor) -> dict[str, Callable[[], object]]:
    plain, plain_x, plain_grad = weights.numpy(), x.numpy(), grad.numpy()
    every = range(EXPERTS)
    return {
        "oneDNN, forward": lambda: [linear(x[e], weights[e]) for e in every],
        "oneDNN, backward": lambda: [linear(grad[e], weights[e].t()) for e in every],
        "default BLAS, forward": lambda: [x[e] @ weights[e].t() for e in every],
        "default BLAS, backward": lambda: [grad[e] @ weights[e] for e in every],
        "default BLAS, forward, W xᵀ": lambda: [weights[e] @ x[e].t() for e in every],
        "batched, forward": lambda: torch.bmm(x, weights.transpose(1, 2)),
        "batched, backward": lambda: torch.bmm(grad, weights),
        "OpenBLAS, forward": lambda: [plain_x[e] @ plain[e].T for e in every],
        "OpenBLAS, backward": lambda: [plain_grad[e] @ plain[e] for e in every],
        "sum": lambda: weights.sum(),
    }


if __name__ == "__main__":
    main()
