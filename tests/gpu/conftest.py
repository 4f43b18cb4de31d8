"""Tests of the same code on a GPU. Without one they are skipped.

STUDIO_GPU_TESTS=cpu runs what does not need CUDA itself on the CPU: that tells whether the tests run, nothing about a
GPU.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.numerics.conftest import VOCAB

DEVICE = os.environ.get("STUDIO_GPU_TESTS", "cuda")
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def cuda() -> str:
    if DEVICE != "cuda":
        pytest.skip("needs CUDA itself")
    return DEVICE


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (3, 17), generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    """TF32 would round float32 matmuls to 10 bits."""
    torch.backends.cuda.matmul.allow_tf32 = False
