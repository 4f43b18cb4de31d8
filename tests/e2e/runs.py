"""Trainings in this process on tiny bases, with 4-bit experts and LoRA on every one of them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml

from adapters.lora import attach
from studio.base_model import load_recipe_base
from studio.data import Row
from studio.jobs import Job
from studio.methods import METHODS
from studio.placing import plan_placement
from studio.plan import Plan, recipe_base
from studio.recipe import parse_recipe
from studio.reward_model import add_reward_head
from tests.e2e.conftest import TICKETS

SHORT = {
    "epochs": None, "max_steps": 2, "batch_size": 2, "learning_rate": 5e-3, "lr_scheduler": "constant",
    "warmup_fraction": 0.0, "logging_steps": 1,
}  # fmt: skip


class Recorder:
    """What a trainer needs of a job; of its plan only where the order of the rows was planned."""

    def __init__(self, path: Path, plan: Plan | None = None):
        self.path, self.planned, self.rows = path, plan, list[dict[str, Any]]()

    def plan(self) -> Plan:
        assert self.planned is not None
        return self.planned

    def log_metrics(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def update(self, **_: Any) -> None:
        pass

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] == kind]


class Run:
    """One model that a recipe describes, ready to be trained on `rows`."""

    def __init__(self, base: Path, rows: Sequence[Row], folder: Path, method: str = "sft", **sections: dict[str, Any]):
        recipe = {
            "model": {"base": str(base)},
            "data": {"train": str(TICKETS / "tickets-train.jsonl"), "max_length_tokens": 96},
            "adapter": {"attention_rank": 2, "shared_expert_rank": 0, "routed_experts_rank": 2},
            "output": {"dir": str(folder / "job")},
        } | {name: section for name, section in sections.items() if name != "training"}
        recipe["training"] = {**SHORT, "method": method, **sections.get("training", {})}
        self.recipe = parse_recipe(yaml.safe_dump(recipe))
        self.method, self.rows, self.job = METHODS[method], rows, Recorder(folder)
        torch.manual_seed(0)
        model, self.tokenizer = load_recipe_base(self.recipe)
        self.model = attach(model, plan_placement(self.recipe, recipe_base(self.recipe)))
        if self.method.scores:
            add_reward_head(self.model)

    def randomised(self) -> Run:
        """Adapters that say something, so that policy and base differ."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad and "reward_head" not in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return self

    def train(self) -> Run:
        self._module().train(self.model, self.tokenizer, self.recipe, self.rows, cast(Job, self.job))
        return self

    def trainer(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """The trainer as it is before its first step."""
        with monkeypatch.context() as patched:
            patched.setattr(self._module(), "finish", lambda trainer: trainer)
            return self._module().train(self.model, self.tokenizer, self.recipe, self.rows, cast(Job, self.job))

    def _module(self) -> Any:
        return importlib.import_module(self.method.trainer)

    def frozen(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if not p.requires_grad}

    def adapters(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
