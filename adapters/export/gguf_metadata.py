"""The sizes and constants of a model as GGUF metadata, from its config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from gguf import ExpertGatingFuncType, GGUFWriter, RopeScalingType
from transformers import AutoConfig

from adapters.checkpoint import text_config
from adapters.layouts import ExpertLayout

SIZES = (
    ("add_context_length", ("max_position_embeddings",)),
    ("add_embedding_length", ("hidden_size",)),
    ("add_feed_forward_length", ("intermediate_size_mlp", "intermediate_size")),
    ("add_head_count", ("num_attention_heads",)),
    ("add_head_count_kv", ("num_key_value_heads",)),
    ("add_layer_norm_rms_eps", ("rms_norm_eps",)),
    ("add_expert_count", ("num_local_experts", "num_experts", "n_routed_experts")),
    ("add_expert_used_count", ("num_experts_per_tok",)),
    ("add_expert_group_count", ("n_group",)),
    ("add_expert_group_used_count", ("topk_group",)),
    ("add_key_length", ("head_dim",)),
    ("add_value_length", ("head_dim",)),
)
"""Method of GGUFWriter, and the keys of config.json that it is from; the first one that is there."""

ONE_HEAD = {"num_key_value_heads": 1, "head_dim": None}
"""llama.cpp runs MLA with the compressed state as the one head of keys and values."""

LICENCE_KEYS = (("license", "add_license"), ("license_name", "add_license_name"), ("license_link", "add_license_link"))


def full_config(base: Path) -> dict[str, Any]:
    """The language model's part of config.json, with the family's defaults for what it leaves out."""
    defaults = AutoConfig.from_pretrained(base, trust_remote_code=False)
    written = text_config({**defaults.to_dict(), "text_config": defaults.get_text_config().to_dict()})
    stated = text_config(json.loads((base / "config.json").read_text(encoding="utf-8")))
    return {**written, **stated}


def add_metadata(writer: GGUFWriter, base: Path, config: Mapping[str, Any], layout: ExpertLayout, name: str) -> None:
    """Everything of the file's metadata but the tokenizer and the types.

    Args:
        writer: its tensors are listed already: the size label counts them.
        config: of `full_config`.
    """
    writer.add_type("model")
    writer.add_name(name)
    for key, method in LICENCE_KEYS:
        if found := licence_of(base).get(key):
            getattr(writer, method)(found)
    writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
    writer.add_block_count(config["num_hidden_layers"])
    if layout.model_type == "deepseek_v3":
        config = {**config, **ONE_HEAD}
    for method, keys in SIZES:
        value = next((config[key] for key in keys if config.get(key) is not None), None)
        if value is not None:
            getattr(writer, method)(value)
    _add_rope(writer, config)
    if layout.model_type in FAMILIES:
        FAMILIES[layout.model_type](writer, config)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def licence_of(base: Path) -> dict[str, str]:
    """What the base's own card says in its first lines: license, license_name, license_link. Nothing is assumed.

    Where no card says it, a file with the text of a Llama licence does.
    """
    cards = (card for card in (base / "README.md", base / "MODEL_CARD.md") if card.is_file())
    text = next((card.read_text(encoding="utf-8", errors="replace") for card in cards), "")
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    lines = front[1].splitlines() if front else []
    pairs = (line.split(":", 1) for line in lines if re.match(r"license\w*:\s*\S", line))
    return {key.strip(): value.strip().strip("\"'") for key, value in pairs} or _licence_by_text(base)


def _licence_by_text(base: Path) -> dict[str, str]:
    for file in sorted(base.glob("[Ll][Ii][Cc][Ee][Nn]*")):
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        if found := re.search(r"LLAMA (\d(?:\.\d)?) COMMUNITY LICENSE", text, re.IGNORECASE):
            return {"license": "other", "license_name": f"llama{found[1]}", "license_link": file.name}
    return {}


def _add_rope(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type"))
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        _add_yarn(writer, rope)


def _add_yarn(writer: GGUFWriter, rope: Mapping[str, Any]) -> None:
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    for key, method in (
        ("extrapolation_factor", "add_rope_scaling_yarn_ext_factor"),
        ("attention_factor", "add_rope_scaling_yarn_attn_factor"),
        ("beta_fast", "add_rope_scaling_yarn_beta_fast"),
        ("beta_slow", "add_rope_scaling_yarn_beta_slow"),
    ):
        if rope.get(key) is not None:
            getattr(writer, method)(rope[key])


def _llama(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _llama4(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    _llama(writer, config)
    writer.add_interleave_moe_layer_step(config["interleave_moe_layer_step"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    if all(kind == "full_attention" for kind in config.get("layer_types") or ["chunked_attention"]):
        writer.add_sliding_window(0)


def _qwen3_moe(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _gpt_oss(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_sliding_window(config["sliding_window"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])


def _deepseek_v3(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """Lengths of the compressed state, and of a head's keys and values that are made of it."""
    rank, rotated = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_leading_dense_block_count(config.get("first_k_dense_replace") or 0)
    writer.add_vocab_size(config["vocab_size"])
    if config.get("q_lora_rank") is not None:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rotated)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rotated)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config.get("n_shared_experts") or 0)
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(bool(config.get("norm_topk_prob")))
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)  # whether or not config.json has kept scoring_func
    writer.add_rope_dimension_count(rotated)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("mscale_all_dim") is not None:
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


FAMILIES = {
    "llama4_text": _llama4,
    "mixtral": _llama,
    "llama": _llama,
    "mistral": _llama,
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3,
}
"""What a family states beyond the sizes that all have."""
