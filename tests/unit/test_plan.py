"""The plan: parameters and bytes per class, and everything that can be refused before work is spent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from adapters.checkpoint import read_index
from adapters.errors import CheckpointError, StudioError, TargetError
from studio import Recipe, make_plan
from studio.base import EMBEDDED_DIR
from studio.plan import total_steps
from studio.weights import four_bit_bytes

TICKETS = Path(__file__).parents[2] / "recipes" / "data" / "tickets-train.jsonl"


def recipe(**sections: dict[str, Any]) -> Recipe:
    return Recipe.model_validate({"data": {"train": TICKETS}, "output": {"dir": "unused"}, **sections})


def by_name(plan: Any) -> dict[str, Any]:
    return {entry.name: entry for entry in plan.classes}


def test_every_parameter_of_the_base_is_in_one_class() -> None:
    plan = make_plan(recipe())
    file = EMBEDDED_DIR / "model.safetensors"
    assert sum(entry.parameters for entry in plan.classes) == plan.parameters
    assert 2 * plan.parameters == pytest.approx(file.stat().st_size, rel=0.01)  # bfloat16
    assert plan.bytes == sum(entry.bytes for entry in plan.classes)


def test_only_the_quantised_classes_are_nf4() -> None:
    dtypes = {entry.name: entry.dtype for entry in make_plan(recipe(model={"dtype": "float32"})).classes}
    assert {name for name, dtype in dtypes.items() if dtype == "nf4"} == {
        "attention",
        "shared_expert",
        "routed_experts",
    }
    unquantised = make_plan(recipe(model={"dtype": "bfloat16", "quantization": "none"}))
    assert {entry.dtype for entry in unquantised.classes} == {"bfloat16"}


def test_lora_parameters_by_hand() -> None:
    config = json.loads((EMBEDDED_DIR / "config.json").read_text())
    hidden, width, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    layers = config["num_hidden_layers"]
    ranks = {"attention_rank": 0, "shared_expert_rank": 2, "routed_experts_rank": 3, "router_rank": 5}
    classes = by_name(make_plan(recipe(adapter={**ranks, "routed_experts": (0, 7)})))
    assert classes["attention"].trainable_parameters == 0
    assert classes["shared_expert"].trainable_parameters == layers * 2 * 3 * (hidden + width)
    assert classes["routed_experts"].trainable_parameters == layers * 2 * 3 * ((hidden + 2 * width) + (width + hidden))
    assert classes["router"].trainable_parameters == layers * 5 * (hidden + experts)


@pytest.mark.parametrize(
    ("values", "double_quant", "expected"), [(64, False, 36), (64, True, 41), (65536, True, 33812)]
)
def test_quantized_bytes(values: int, double_quant: bool, expected: int) -> None:
    assert four_bit_bytes(values, double_quant) == expected


def test_steps_of_an_epoch_round_up_like_the_trainers() -> None:
    def steps(**training: Any) -> int:
        return total_steps(recipe(training=training), 103)

    assert steps(epochs=1.0, batch_size=10) == 11
    assert steps(epochs=2.0, batch_size=10, gradient_accumulation_steps=4) == 6
    assert steps(max_steps=7) == 7


def test_longer_examples_than_the_limit_are_counted() -> None:
    assert make_plan(recipe()).truncated_examples == 0
    short = make_plan(recipe(data={"train": TICKETS, "max_length_tokens": 64}))
    assert 0 < short.truncated_examples <= short.train_examples
    assert short.memory.activations_bytes < make_plan(recipe()).memory.activations_bytes


def test_an_expert_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TargetError, match=r"routed experts \[16\] do not exist; this model has experts 0 to 15"):
        make_plan(recipe(adapter={"routed_experts": (3, 16)}))


def test_a_class_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    base = copied_base(tmp_path)
    index = {"weight_map": {"model.layers.0.self_attn.q_proj.weight": "model.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    write_header(base / "model.safetensors", {"model.layers.0.self_attn.q_proj.weight": [256, 256]})
    wanted = {"attention_rank": 4, "shared_expert_rank": 4, "routed_experts_rank": 0}
    with pytest.raises(TargetError, match=r"no tensor of class shared_expert; set adapter\.shared_expert_rank to 0"):
        make_plan(recipe(model={"base": str(base)}, adapter=wanted))


def test_a_base_without_chat_template_is_refused(tmp_path: Path) -> None:
    base = copied_base(tmp_path)
    (base / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="no chat template"):
        make_plan(recipe(model={"base": str(base)}))


def test_pickle_weights_are_refused(tmp_path: Path) -> None:
    base = copied_base(tmp_path)
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickles can run code when opened and are refused"):
        make_plan(recipe(model={"base": str(base)}))


def test_a_hub_model_that_is_not_here_says_how_to_fetch_it() -> None:
    with pytest.raises(StudioError, match="hf download org/name-that-is-not-here"):
        make_plan(recipe(model={"base": "org/name-that-is-not-here"}))


def copied_base(folder: Path) -> Path:
    shutil.copytree(EMBEDDED_DIR, folder / "base")
    return folder / "base"


def write_header(path: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of zeros in float32."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4
        for side in shape:
            size *= side
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(offset))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "[]", "expected a JSON object"),
        ("config.json", "{}", "model_type, num_hidden_layers"),
        ("config.json", "{", "cannot be read as JSON"),
        ("tokenizer.json", "{", "tokenizer.json"),
        ("tokenizer_config.json", "{", "cannot be read as JSON"),
        ("model.safetensors.index.json", "{}", "no weight_map"),
    ],
)
def test_torn_files_of_a_base_are_refused_in_words(tmp_path: Path, name: str, text: str, message: str) -> None:
    base = copied_base(tmp_path)
    (base / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        make_plan(recipe(model={"base": str(base)}))


def test_a_multimodal_config_without_its_language_model_is_refused_in_words(tmp_path: Path) -> None:
    base = copied_base(tmp_path)
    (base / "config.json").write_text(json.dumps({"model_type": "llama4", "text_config": {}}))
    with pytest.raises(CheckpointError, match="num_hidden_layers, hidden_size"):
        make_plan(recipe(model={"base": str(base)}))


def test_the_multimodal_llama_4_is_planned_as_its_language_model(tmp_path: Path) -> None:
    alone, base = make_plan(recipe()), copied_base(tmp_path)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({"model_type": "llama4", "text_config": config}))
    shapes = {f"language_model.{key}": list(info.shape) for key, info in read_index(EMBEDDED_DIR).items()}
    write_header(base / "model.safetensors", {**shapes, "vision_model.class_embedding": [8]})
    inside = make_plan(recipe(model={"base": str(base)}))
    apart = {"model", "memory_at_hand_bytes"}
    assert inside.model_dump(exclude=apart) == alone.model_dump(exclude=apart)


def test_a_tokenizer_that_truncates_does_not_shorten_the_plan(tmp_path: Path) -> None:
    base = copied_base(tmp_path)
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert make_plan(recipe(model={"base": str(base)})).longest_tokens == make_plan(recipe()).longest_tokens
