"""A whole job on the GPU: measured peak against the plan."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import studio

TICKETS = Path(__file__).parents[2] / "recipes" / "data" / "tickets-train.jsonl"


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_peak_stays_below_the_plan(cuda: str, quantization: str, tmp_path: Path) -> None:
    recipe = studio.Recipe.model_validate(
        {
            "model": {"quantization": quantization},
            "data": {"train": TICKETS, "max_length_tokens": 1024},
            "training": {"max_steps": 4, "batch_size": 16},
            "output": {"dir": tmp_path / "job"},
        }
    )
    job = studio.submit(recipe)
    deadline = time.monotonic() + 600
    while not job.state().ended:
        assert time.monotonic() < deadline, job.log_tail()
        time.sleep(0.5)
    result = job.result()
    assert result is not None, "\n".join(job.log_tail())
    memory = result["memory"]
    assert memory["measured_bytes"] <= 1.1 * memory["predicted_bytes"]
