"""Tiny random models of each family, built offline. Shapes include square and doubled stacks, so a wrong axis shows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from adapters.layouts import ExpertLayout, layout_for
from adapters.loading import load_base

VOCAB, EXPERTS, MOE_LAYERS = 96, 6, 2

GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
MLA = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}
DELTA_NET = {
    **GQA,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "rms_norm_eps": 1e-3,  # the norm behind the delta rule would else blow up float32's rounding where q·k is near 0
}
TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LINEAR, FULL = "linear_attention", "full_attention"


@dataclass(frozen=True)
class Tiny:
    """A family at one shape, with two MoE layers of six experts; with a dense layer beside them where it can have one.

    A dense family has two layers of a dense MLP of `width`.
    """

    family: str
    hidden: int
    width: int
    top_k: int = 2

    def __str__(self) -> str:
        return f"{self.family}-H{self.hidden}-I{self.width}-top{self.top_k}"

    @property
    def model_class(self) -> type[AutoModelForCausalLM]:
        return AutoModelForCausalLM

    @property
    def layout(self) -> ExpertLayout:
        return layout_for(self.family)

    @property
    def has_dense_layers(self) -> bool:
        """Whether some layer has a plain MLP in the place of the experts."""
        return "intermediate_size_mlp" in (text := FAMILIES[self.layout.model_type](self)) or (
            "moe_intermediate_size" in text and "intermediate_size" in text
        )

    def config(self) -> dict[str, Any]:
        text = {**TOKENS, "hidden_size": self.hidden, **FAMILIES[self.layout.model_type](self)}
        return {"text_config": text, "vision_config": VISION[self.family]} if self.family in VISION else text

    def build(self, seed: int = 0) -> PreTrainedModel:
        """The model as published: with its vision tower where the family is multimodal."""
        config = AutoConfig.for_model(self.family, **self.config())
        torch.manual_seed(seed)
        kind = AutoModelForImageTextToText if self.family in VISION else AutoModelForCausalLM
        return randomised(kind.from_config(config).eval())


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Every value random, corrections of the routing included, so that none can be lost unseen; norms stay near 1."""
    corrections = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *corrections):
            nn.init.normal_(tensor, mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.15)
    return model


FAMILIES: dict[str, Callable[[Tiny], dict[str, Any]]] = {
    "llama4_text": lambda t: {
        **GQA,
        "num_hidden_layers": 4,
        "interleave_moe_layer_step": 2,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": t.top_k,
        "intermediate_size": t.width,
        "intermediate_size_mlp": 2 * t.width,
    },
    "mixtral": lambda t: {
        **GQA,
        "num_hidden_layers": 2,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": t.top_k,
        "intermediate_size": t.width,
    },
    "qwen2_moe": lambda t: {
        **GQA,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "num_experts": EXPERTS,
        "num_experts_per_tok": t.top_k,
        "moe_intermediate_size": t.width,
        "shared_expert_intermediate_size": t.width + 8,
        "intermediate_size": 2 * t.width,
    },
    "qwen3_moe": lambda t: {
        **GQA,
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
        "norm_topk_prob": True,
        "num_experts": EXPERTS,
        "num_experts_per_tok": t.top_k,
        "moe_intermediate_size": t.width,
        "intermediate_size": 2 * t.width,
    },
    "qwen3_next": lambda t: {
        **DELTA_NET,
        "num_hidden_layers": 3,
        "layer_types": [LINEAR, FULL, LINEAR],
        "mlp_only_layers": [0],
        "num_experts": EXPERTS,
        "num_experts_per_tok": t.top_k,
        "moe_intermediate_size": t.width,
        "shared_expert_intermediate_size": t.width + 8,
        "intermediate_size": 2 * t.width,
    },
    "qwen3_5_moe_text": lambda t: {
        **DELTA_NET,
        "num_hidden_layers": 2,
        "layer_types": [LINEAR, FULL],
        "num_experts": EXPERTS,
        "num_experts_per_tok": t.top_k,
        "moe_intermediate_size": t.width,
        "shared_expert_intermediate_size": t.width + 8,
    },
    "gpt_oss": lambda t: {
        **GQA,
        "num_hidden_layers": 2,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": t.top_k,
        "intermediate_size": t.width,
        "swiglu_limit": 0.8,  # low enough to be reached
    },
    "deepseek_v2": lambda t: {
        **MLA,
        "q_lora_rank": None,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 2,
        "num_experts_per_tok": t.top_k,
        "topk_method": "greedy",
        "moe_intermediate_size": t.width,
        "intermediate_size": 2 * t.width,
    },
    "deepseek_v3": lambda t: {
        **MLA,
        "q_lora_rank": 24,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": t.top_k,
        "moe_intermediate_size": t.width,
        "intermediate_size": 2 * t.width,
    },
    "olmoe": lambda t: {
        **GQA,
        "num_hidden_layers": 2,
        "num_experts": EXPERTS,
        "num_experts_per_tok": t.top_k,
        "intermediate_size": t.width,
    },
    "granitemoe": lambda t: {
        **GQA,
        "num_hidden_layers": 2,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": t.top_k,
        "intermediate_size": t.width,
        "tie_word_embeddings": False,
    },
    "phimoe": lambda t: {
        **GQA,
        "num_hidden_layers": 2,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": t.top_k,
        "intermediate_size": t.width,
        "attention_bias": True,
        "lm_head_bias": True,
    },
    "glm4_moe": lambda t: {
        **GQA,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": t.top_k,
        "moe_intermediate_size": t.width,
        "intermediate_size": 2 * t.width,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "ernie4_5_moe": lambda t: {
        **GQA,
        "num_hidden_layers": 3,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
        "moe_num_experts": EXPERTS,
        "moe_k": t.top_k,
        "moe_num_shared_experts": 2,
        "moe_intermediate_size": t.width,
        "intermediate_size": 2 * t.width,
    },
    "minimax_m2": lambda t: {
        **GQA,
        "num_hidden_layers": 2,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": t.top_k,
        "intermediate_size": t.width,
        "rotary_dim": 8,
    },
    "hunyuan_v1_moe": lambda t: {
        **GQA,
        "num_hidden_layers": 2,
        "num_experts": EXPERTS,
        "moe_topk": t.top_k,
        "intermediate_size": t.width,
    },
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3"),
        lambda t: {**GQA, "num_hidden_layers": 2, "intermediate_size": t.width},
    ),
}

VISION: dict[str, dict[str, Any]] = {
    "llama4": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
    },
    "qwen3_5_moe": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "depth": 1,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
    },
}
"""The vision towers of multimodal families."""

# H = 2I makes gate_up_proj square; H = I makes down_proj square and gate_up_proj doubled
TINY = [Tiny(f, h, i, k) for f, k in (("llama4_text", 1), ("qwen3_moe", 2)) for h, i in ((64, 32), (64, 64), (32, 96))]
TINY.append(Tiny("llama4_text", 64, 32, 2))
SQUARE = [TINY[0], TINY[3]]
EACH = [Tiny(name, 64, 32 if number % 2 else 64) for number, name in enumerate(FAMILIES)]
"""Every family once, the two shapes by turns."""
OTHER = [Tiny(tiny.family, 64, 96 - tiny.width) for tiny in EACH if tiny.layout.has_experts]
"""The MoE families at the other shape."""
MULTIMODAL = [Tiny(name, 64, 32) for name in VISION]


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


def load_plain(directory: Path, **options: Any) -> PreTrainedModel:
    """The base, streamed, not quantised."""
    return load_base(directory, quantize="none", **options)


def randomise(model: nn.Module, seed: int = 3, std: float = 0.2) -> None:
    """Trained-looking adapters: every trainable value random."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter.data, std=std)


def four_bit_values(weight: torch.Tensor) -> torch.Tensor:
    """What the codes of a `Params4bit` stand for, (out, in).

    Taken as one row: over rows that end inside a block of 64, bitsandbytes' CPU kernel gives other values.
    """
    import bitsandbytes.functional as bnb

    state = copy.copy(weight.quant_state)
    shape, state.shape = state.shape, torch.Size([state.shape.numel()])
    return bnb.dequantize_4bit(weight.data, state).view(shape)
