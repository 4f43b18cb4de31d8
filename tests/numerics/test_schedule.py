"""The learning rate after the warm-up, by transformers' own schedules as the trainers get them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from studio.jobs import Job
from studio.recipe import parse_recipe
from studio.trainers.common import options


@pytest.mark.parametrize(("name", "last"), [("constant", 1e-3), ("linear", 5e-4), ("cosine", 5e-4)])
def test_every_schedule_warms_up(name: str, last: float, tmp_path: Path) -> None:
    training = f"{{max_steps: 20, learning_rate: 1.0e-3, lr_scheduler: {name}, warmup_fraction: 0.2}}"
    recipe = parse_recipe(f"data: {{train: a}}\noutput: {{dir: {tmp_path}/job}}\ntraining: {training}")
    found: dict[str, Any] = options(recipe, cast(Job, type("J", (), {"path": tmp_path})))
    args = TrainingArguments(**{key: found[key] for key in ("output_dir", "warmup_steps", "use_cpu")})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=found["learning_rate"])
    schedule = get_scheduler(found["lr_scheduler_type"], optimizer, args.get_warmup_steps(20), 20)
    rates = []
    for _ in range(13):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert rates[12] == pytest.approx(last)
