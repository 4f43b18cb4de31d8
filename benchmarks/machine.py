"""What the machine under a benchmark can do: the ceilings that a step is compared with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from adapters.expert_math import linear

MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
READ_VALUES = {"cpu": 2**27, "cuda": 2**30}


class Machine:
    """The best matmul rate and the best read rate (sum of a large tensor) seen so far, in one dtype on one device.

    On a CPU the matmul rate is the better one of the default BLAS and oneDNN, which ours uses in float32. Sample again
    between measurements: what the machine can do may change when it does something else too.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.dtype, self.device = dtype, device
        self.matrix = torch.randn(MATMUL_SIZE[device], MATMUL_SIZE[device], device=device).to(dtype)
        self.long = torch.ones(READ_VALUES[device], dtype=dtype, device=device)
        self.flops_per_second = self.bytes_per_second = 0.0
        self.load_before = os.getloadavg()[0]
        for _ in range(5):
            self.sample()

    def sample(self) -> None:
        products = (lambda: self.matrix @ self.matrix, lambda: linear(self.matrix, self.matrix))
        matmul, read = min(map(self._seconds_of, products)), self._seconds_of(self.long.sum)
        self.flops_per_second = max(self.flops_per_second, 2 * len(self.matrix) ** 3 / matmul)
        self.bytes_per_second = max(self.bytes_per_second, self.long.nbytes / read)

    def _seconds_of(self, work: Callable[[], Tensor]) -> float:
        synchronize(self.matrix)
        start = time.perf_counter()
        work()
        synchronize(self.matrix)
        return time.perf_counter() - start

    def seconds(self, flops: float, moved_bytes: float) -> float:
        """The least time for that much work: the larger of the two."""
        return max(flops / self.flops_per_second, moved_bytes / self.bytes_per_second)

    def described(self) -> dict[str, float]:
        return {
            "threads": torch.get_num_threads(),
            "load_before": self.load_before,
            "flops_per_second": self.flops_per_second,
            "bytes_per_second": self.bytes_per_second,
        }

    def __str__(self) -> str:
        where = (
            f"{torch.get_num_threads()} threads (load {self.load_before:.1f} before)" if self.device == "cpu" else ""
        )
        return (
            f"{where} best seen: {str(self.dtype).removeprefix('torch.')} matmul {self.flops_per_second / 1e9:,.0f} "
            f"GFLOP/s, memory read {self.bytes_per_second / 1e9:,.1f} GB/s"
        ).strip()


def synchronize(like: Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize()
