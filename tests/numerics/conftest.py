"""Tiny random models of each family, built offline. Shapes include square and doubled stacks, so a wrong axis shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCAB, EXPERTS, LAYERS = 96, 6, 4


@dataclass(frozen=True)
class Tiny:
    """A family at one shape. Half of its layers are MoE layers."""

    family: str
    hidden: int
    width: int
    top_k: int

    def __str__(self) -> str:
        return f"{self.family}-H{self.hidden}-I{self.width}-top{self.top_k}"

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return Llama4ForCausalLM if self.family == "llama4_text" else Qwen3MoeForCausalLM

    def build(self, seed: int = 0) -> PreTrainedModel:
        common = {
            "vocab_size": VOCAB,
            "hidden_size": self.hidden,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts_per_tok": self.top_k,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if self.family == "llama4_text":
            config = Llama4TextConfig(
                **common,
                num_local_experts=EXPERTS,
                intermediate_size=self.width,
                intermediate_size_mlp=2 * self.width,
                interleave_moe_layer_step=2,
            )
        else:
            config = Qwen3MoeConfig(
                **common,
                num_experts=EXPERTS,
                moe_intermediate_size=self.width,
                intermediate_size=2 * self.width,
                decoder_sparse_step=2,
                norm_topk_prob=True,
            )
        torch.manual_seed(seed)
        model = self.model_class(config).eval()
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                torch.nn.init.normal_(parameter, std=0.15)
        return model


# H = 2I makes gate_up_proj square; H = I makes down_proj square and gate_up_proj doubled
TINY = [Tiny(f, h, i, k) for f, k in (("llama4_text", 1), ("qwen3_moe", 2)) for h, i in ((64, 32), (64, 64), (32, 96))]
TINY.append(Tiny("llama4_text", 64, 32, 2))
SQUARE = [TINY[0], TINY[3]]


@pytest.fixture(params=TINY, ids=str)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return request.param


@pytest.fixture(params=SQUARE, ids=str)
def square(request: pytest.FixtureRequest) -> Tiny:
    return request.param


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (3, 17), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def saved(tiny: Tiny, tmp_path: Path) -> Path:
    """The tiny model as a float32 checkpoint, written by stock transformers."""
    return save(tiny, tmp_path)


def save(tiny: Tiny, tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    tiny.build().save_pretrained(directory)
    return directory
