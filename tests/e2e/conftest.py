"""Real jobs through the real command line, small enough for a laptop."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import Llama4ForCausalLM, Llama4TextConfig, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from studio.base import EMBEDDED_DIR

REPOSITORY = Path(__file__).parents[2]
TICKETS = REPOSITORY / "recipes" / "data"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def studio(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """`studio …` as a user would type it."""
    command = [sys.executable, "-m", "studio.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **options)


def write_recipe(path: Path, **sections: dict[str, Any]) -> Path:
    """A recipe of a few seconds; `sections` are merged over the defaults here."""
    recipe: dict[str, dict[str, Any]] = {
        "model": {"base": "embedded"},
        "data": {"train": str(TICKETS / "tickets-train.jsonl"), "eval": str(TICKETS / "tickets-eval.jsonl")},
        "adapter": {"attention_rank": 4, "shared_expert_rank": 4, "routed_experts_rank": 4},
        "training": {"max_steps": 8, "batch_size": 8, "learning_rate": 5e-3, "logging_steps": 1},
        "evaluation": {"examples": 8, "generations": 2, "max_new_tokens": 24},
        "output": {"dir": str(path.parent / "job")},
    }
    for name, section in sections.items():
        recipe[name] = {**recipe.get(name, {}), **section}
    path.write_text(yaml.safe_dump(recipe))
    return path


def build_base(family: str, directory: Path) -> Path:
    """A random base of `family` with the embedded tokenizer. Its untrained router sends tokens to every expert."""
    embedded = json.loads((EMBEDDED_DIR / "config.json").read_text())
    common = {name: embedded[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    common |= {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    torch.manual_seed(0)
    model: PreTrainedModel
    if family == "llama4_text":
        config = Llama4TextConfig(**common, num_local_experts=4, num_experts_per_tok=1, intermediate_size=64)
        model = Llama4ForCausalLM(config)
    else:
        config = Qwen3MoeConfig(**common, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
        model = Qwen3MoeForCausalLM(config)
    for name, parameter in model.named_parameters():
        if not name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, std=0.08)
    model.bfloat16().save_pretrained(directory)
    for name in TOKENIZER_FILES:
        shutil.copy(EMBEDDED_DIR / name, directory / name)
    return directory


@pytest.fixture(autouse=True)
def network_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "120")
