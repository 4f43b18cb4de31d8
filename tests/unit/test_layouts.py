"""Layouts against the published names: every tensor class, where an expert lies in the files, refusals in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.checkpoint import TensorInfo, read_config
from adapters.errors import CheckpointError, LayoutError
from adapters.layouts import LAYOUTS, MoeShape, Source, layout_for, moe_shapes

# family, key in the published files, name in the stock model, class, whether a LoRA of the class lands on it
KEYS = [
    ("llama4_text", "model.layers.1.feed_forward.experts.down_proj", "=", "routed_experts", True),
    ("llama4_text", "model.layers.1.feed_forward.router.weight", "=", "router", True),
    ("llama4_text", "model.layers.1.feed_forward.shared_expert.up_proj.weight", "=", "shared_expert", True),
    ("llama4_text", "model.layers.0.feed_forward.up_proj.weight", "=", "dense_mlp", True),
    (
        "llama4",
        "language_model.model.layers.1.feed_forward.experts.gate_up_proj",
        "model.layers.1.feed_forward.experts.gate_up_proj",
        "routed_experts",
        True,
    ),
    ("llama4", "language_model.lm_head.weight", "lm_head.weight", "lm_head", False),
    (
        "mixtral",
        "model.layers.0.block_sparse_moe.experts.3.w2.weight",
        "model.layers.0.mlp.experts.down_proj",
        "routed_experts",
        True,
    ),
    (
        "mixtral",
        "model.layers.0.block_sparse_moe.experts.3.w3.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
        "routed_experts",
        True,
    ),
    ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.gate.weight", "router", True),
    ("qwen2_moe", "model.layers.0.mlp.shared_expert_gate.weight", "=", "norms", False),
    ("qwen2_moe", "model.layers.0.self_attn.q_proj.bias", "=", "attention", False),
    (
        "qwen3_moe",
        "model.layers.0.mlp.experts.11.up_proj.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
        "routed_experts",
        True,
    ),
    ("qwen3_moe", "model.layers.0.self_attn.q_norm.weight", "=", "norms", False),
    ("qwen3_next", "model.layers.0.linear_attn.in_proj_qkvz.weight", "=", "attention", True),
    ("qwen3_next", "model.layers.0.linear_attn.conv1d.weight", "=", "norms", False),
    ("qwen3_next", "model.layers.0.linear_attn.A_log", "=", "norms", False),
    (
        "qwen3_5_moe",
        "model.language_model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.gate_up_proj",
        "routed_experts",
        True,
    ),
    ("qwen3_5_moe", "lm_head.weight", "=", "lm_head", False),
    ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj_bias", "=", "routed_experts", False),
    ("gpt_oss", "model.layers.0.mlp.router.bias", "=", "router", False),
    ("gpt_oss", "model.layers.0.self_attn.sinks", "=", "norms", False),
    ("deepseek_v2", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "=", "attention", True),
    ("deepseek_v3", "model.layers.0.self_attn.q_a_layernorm.weight", "=", "norms", False),
    ("deepseek_v3", "model.layers.3.mlp.gate.e_score_correction_bias", "=", "router", False),
    ("deepseek_v3", "model.layers.3.mlp.shared_experts.up_proj.weight", "=", "shared_expert", True),
    ("olmoe", "model.layers.0.mlp.gate.weight", "=", "router", True),
    (
        "granitemoe",
        "model.layers.0.block_sparse_moe.input_linear.weight",
        "model.layers.0.block_sparse_moe.experts.gate_up_proj",
        "routed_experts",
        True,
    ),
    (
        "granitemoe",
        "model.layers.0.block_sparse_moe.router.layer.weight",
        "model.layers.0.block_sparse_moe.router.weight",
        "router",
        True,
    ),
    ("phimoe", "model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.router.weight", "router", True),
    ("phimoe", "lm_head.bias", "=", "lm_head", False),
    ("glm4_moe", "model.layers.0.mlp.gate_proj.weight", "=", "dense_mlp", True),
    (
        "ernie4_5_moe",
        "model.layers.0.mlp.moe_statics.e_score_correction_bias",
        "model.layers.0.mlp.gate.moe_statics.e_score_correction_bias",
        "router",
        False,
    ),
    (
        "minimax_m2",
        "model.layers.0.block_sparse_moe.e_score_correction_bias",
        "model.layers.0.mlp.e_score_correction_bias",
        "router",
        False,
    ),
    ("hunyuan_v1_moe", "model.layers.0.mlp.gate.wg.weight", "=", "router", True),
    ("hunyuan_v1_moe", "model.layers.0.mlp.shared_mlp.up_proj.weight", "=", "shared_expert", True),
    ("hunyuan_v1_moe", "model.layers.0.self_attn.query_layernorm.weight", "=", "norms", False),
    ("llama", "model.layers.0.mlp.down_proj.weight", "=", "dense_mlp", True),
    ("mistral", "model.embed_tokens.weight", "=", "embeddings", False),
    ("qwen2", "model.layers.0.self_attn.o_proj.weight", "=", "attention", True),
    ("qwen3", "model.norm.weight", "=", "norms", False),
]


@pytest.mark.parametrize(("family", "key", "name", "tensor_class", "adapted"), KEYS, ids=lambda value: str(value))
def test_published_names(family: str, key: str, name: str, tensor_class: str, adapted: bool) -> None:
    layout = LAYOUTS[family]
    name = key if name == "=" else name
    assert layout.model_key(key) == name
    assert layout.tensor_class(key) == tensor_class
    assert layout.takes_lora(key) == adapted
    if ".experts." not in name or layout.checkpoint == "stacked":
        assert layout.checkpoint_key(name) == key


def test_every_family_is_in_the_table_of_published_names() -> None:
    assert {row[0] for row in KEYS} == set(LAYOUTS) - {"qwen3_5_moe_text"}


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("llama4", "vision_model.layernorm_pre.weight"),
        ("llama4", "multi_modal_projector.linear_1.weight"),
        ("qwen3_5_moe", "model.visual.blocks.0.norm1.weight"),
        ("qwen3_next", "mtp.layers.0.mlp.experts.0.up_proj.weight"),
        ("deepseek_v3", "model.layers.61.self_attn.q_a_proj.weight"),
        ("glm4_moe", "model.layers.61.eh_proj.weight"),
        ("ernie4_5_moe", "model.mtp_block.0.mlp.up_proj.weight"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ],
)
def test_what_is_no_part_of_the_language_model(family: str, key: str) -> None:
    layout = layout_for({"model_type": family, "num_hidden_layers": 61})
    assert layout.model_key(key) is None
    with pytest.raises(LayoutError, match="fits no class"):
        layout.tensor_class(key)


@pytest.mark.parametrize(
    ("family", "stack", "sources"),
    [
        (
            "mixtral",
            "model.layers.2.mlp.experts.gate_up_proj",
            (
                Source("model.layers.2.block_sparse_moe.experts.5.w1.weight"),
                Source("model.layers.2.block_sparse_moe.experts.5.w3.weight"),
            ),
        ),
        (
            "qwen3_moe",
            "model.layers.2.mlp.experts.down_proj",
            (Source("model.layers.2.mlp.experts.5.down_proj.weight"),),
        ),
        (
            "granitemoe",
            "model.layers.2.block_sparse_moe.experts.down_proj",
            (Source("model.layers.2.block_sparse_moe.output_linear.weight", 5),),
        ),
        (
            "gpt_oss",
            "model.layers.2.mlp.experts.down_proj_bias",
            (Source("model.layers.2.mlp.experts.down_proj_bias", 5),),
        ),
        (
            "llama4",
            "model.layers.2.feed_forward.experts.gate_up_proj",
            (Source("language_model.model.layers.2.feed_forward.experts.gate_up_proj", 5),),
        ),
    ],
)
def test_where_an_expert_lies_in_the_files(family: str, stack: str, sources: tuple[Source, ...]) -> None:
    layout = LAYOUTS[family]
    assert layout.sources(stack, 5) == sources
    assert {layout.model_key(source.key) for source in sources} == {stack}


def test_files_say_whether_they_hold_stacks() -> None:
    config = {"model_type": "mixtral", "num_hidden_layers": 2}
    fused = layout_for(config, ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.gate.weight"])
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    assert fused.checkpoint == "stacked" and fused.sources(stack, 1) == (Source(stack, 1),)
    assert fused.checkpoint_key("model.layers.0.mlp.gate.weight") == "model.layers.0.mlp.gate.weight"
    one = ["model.language_model.layers.0.mlp.experts.0.up_proj.weight"]
    assert layout_for({"model_type": "qwen3_5_moe"}).checkpoint == "stacked"
    assert layout_for({"model_type": "qwen3_5_moe"}, one).checkpoint == "per_expert"


def header(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {key: TensorInfo(Path("none"), "F32", shape, 0, 0) for key, shape in shapes.items()}


def test_moe_shapes_follow_the_axis_order_even_where_sizes_are_equal() -> None:
    config = {"model_type": "llama4", "text_config": {"num_hidden_layers": 4}}
    block = "language_model.model.layers.1.feed_forward"
    stacks = {f"{block}.router.weight": (3, 16), f"{block}.experts.down_proj": (3, 24, 16)}
    layout = layout_for(config)
    assert moe_shapes(layout, header(stacks), config) == (MoeShape(1, 3, 16, 24),)
    config, block = {"model_type": "granitemoe", "num_hidden_layers": 4}, "model.layers.2.block_sparse_moe"
    stacks = {f"{block}.router.layer.weight": (3, 24), f"{block}.output_linear.weight": (3, 24, 16)}
    assert moe_shapes(layout_for(config), header(stacks), config) == (MoeShape(2, 3, 24, 16),)
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 2}
    part = "model.layers.{}.mlp.{}.weight".format
    stacks = {
        part(n, name): shape for n in (1, 2) for name, shape in (("gate", (3, 8)), ("experts.0.down_proj", (8, 4)))
    }
    assert moe_shapes(layout_for(config), header(stacks), config) == (MoeShape(1, 3, 8, 4),)
    del stacks["model.layers.1.mlp.experts.0.down_proj.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.0\.down_proj\.weight is missing"):
        moe_shapes(layout_for(config), header(stacks), config)


def test_experts_per_token_by_each_familys_own_name() -> None:
    assert LAYOUTS["mixtral"].experts_per_token({"num_experts_per_tok": 2}) == 2
    assert LAYOUTS["ernie4_5_moe"].experts_per_token({"moe_k": 6}) == 6
    assert LAYOUTS["hunyuan_v1_moe"].experts_per_token({"moe_topk": [8, 8, 4]}) == 8
    assert LAYOUTS["llama"].experts_per_token({}) == 0


def test_a_dense_family_is_the_case_without_experts() -> None:
    layout = layout_for("llama")
    assert not layout.has_experts and moe_shapes(layout, {}, {"num_hidden_layers": 2}) == ()
    assert layout.class_modules("routed_experts") == layout.class_modules("router") == ()
    assert layout.class_modules("dense_mlp") == ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def test_an_unknown_moe_names_what_is_missing_and_where_to_add_it() -> None:
    config = {"model_type": "qwen4_moe", "num_hidden_layers": 2, "num_experts": 64}
    with pytest.raises(LayoutError) as error:
        layout_for(config, ["model.norm.weight", "model.layers.0.ffn.experts.0.w9.weight"])
    text = str(error.value)
    for part in ("'qwen4_moe'", "nearest name is 'qwen", "num_experts: 64", "'model.layers.0.ffn.experts.0.w9.weight'"):
        assert part in text
    for part in ("gate_up_proj", "adapters/layouts.py", "tests/numerics/conftest.py", *sorted(LAYOUTS)):
        assert part in text


def test_an_unknown_family_without_experts_is_not_called_an_moe() -> None:
    with pytest.raises(LayoutError, match="'mamba' is not supported") as error:
        layout_for("mamba")
    assert "it is an MoE" not in str(error.value)


def test_a_config_of_another_shape_names_its_family(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dbrx", "d_model": 8}))
    with pytest.raises(CheckpointError, match=r"num_hidden_layers, .*missing.*adapters/layouts\.py, not 'dbrx'"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}, "mxfp4.*Mxfp4Config"),
        ({"model_type": "deepseek_v3", "quantization_config": {"quant_method": "fp8"}}, "fp8.*FineGrainedFP8Config"),
        ({"model_type": "llama4", "text_config": {"quantization_config": {"quant_method": "gptq"}}}, "gptq"),
        ({"model_type": "mixtral", "quantization_config": {"bits": 4}}, "unknown"),
    ],
)
def test_a_quantised_checkpoint_says_what_to_do(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    keys = dict.fromkeys(("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"), 8)
    (tmp_path / "config.json").write_text(json.dumps({**config, **keys}))
    with pytest.raises(CheckpointError, match=f"quantised already.*{message}"):
        read_config(tmp_path)
