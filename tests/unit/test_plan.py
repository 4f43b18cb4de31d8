"""The plan: parameters and bytes per class, and everything that can be refused before work is spent."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, disable_progress_bars
from hypothesis import given
from hypothesis import strategies as st
from trl import pack_dataset

from adapters.checkpoint import DTYPE_BYTES, read_index
from adapters.errors import CheckpointError, StudioError, TargetError
from studio import Recipe, make_plan
from studio.base import EMBEDDED_DIR
from studio.memory import _available_to_process
from studio.packed_plan import packed_rows
from studio.plan import total_steps
from studio.recipe import parse_recipe
from studio.weights import four_bit_bytes, int8_bytes

TICKETS = Path(__file__).parents[2] / "recipes" / "data" / "tickets-train.jsonl"
PAIRS = TICKETS.with_name("ticket-pairs-train.jsonl")


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
    ranks = {"attention_rank": 0, "shared_expert_rank": 2, "routed_experts_rank": 3}
    chosen = {"placement": {"rule": "manual", "experts": [0, 7]}, "router": {"mode": "lora", "rank": 5}}
    classes = by_name(make_plan(recipe(adapter=ranks, **chosen)))
    assert classes["attention"].trainable_parameters == 0
    assert classes["shared_expert"].trainable_parameters == layers * 2 * 3 * (hidden + width)
    assert classes["routed_experts"].trainable_parameters == layers * 2 * 3 * ((hidden + 2 * width) + (width + hidden))
    assert classes["router"].trainable_parameters == layers * 5 * (hidden + experts)


@pytest.mark.parametrize(
    ("values", "double_quant", "expected"), [(64, False, 36), (64, True, 41), (65536, True, 33812)]
)
def test_quantized_bytes(values: int, double_quant: bool, expected: int) -> None:
    assert four_bit_bytes(values, double_quant) == expected


def test_fp4_takes_what_nf4_takes_and_int8_a_byte_and_a_scale_for_every_row() -> None:
    held = {kind: by_name(make_plan(recipe(model={"quantization": kind}))) for kind in ("nf4", "fp4", "int8", "none")}
    nf4, fp4, int8, none = (held[kind]["routed_experts"] for kind in ("nf4", "fp4", "int8", "none"))
    assert nf4.bytes == fp4.bytes and (fp4.dtype, int8.dtype) == ("fp4", "int8")
    config = json.loads((EMBEDDED_DIR / "config.json").read_text())
    rows = 4 * 16 * (config["hidden_size"] + config["intermediate_size"])  # the stacks are (E, in, out)
    assert int8.bytes == int8.parameters + 4 * rows and int8_bytes(3, 5) == 27
    assert none.bytes == none.parameters * 4


def test_listed_experts_are_int8_and_the_rest_follows() -> None:
    def routed(**model: Any) -> Any:
        return by_name(make_plan(recipe(model=model)))["routed_experts"]

    nf4, int8, mixed = routed(), routed(quantization="int8"), routed(int8_experts=(0, 3, 7, 9))
    assert mixed.dtype == "nf4, int8"
    assert mixed.bytes == nf4.bytes + (int8.bytes - nf4.bytes) // 4  # four of sixteen
    with pytest.raises(TargetError, match=r"int8_experts: experts \[16\] do not exist; this model has experts 0 to 15"):
        make_plan(recipe(model={"int8_experts": (1, 16)}))


def test_active_parameters_are_all_but_the_idle_experts() -> None:
    plan = make_plan(recipe())
    routed = by_name(plan)["routed_experts"].parameters
    assert plan.active_parameters == plan.parameters - routed * 15 // 16


# -------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("wanted", "at_hand", "path"),
    [("auto", 10**12, "fast"), ("auto", 10**8, "lean"), ("auto", None, "lean"), ("fast", 10**8, "fast")],
)
def test_the_path_follows_the_memory_at_hand(
    wanted: str, at_hand: int | None, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("studio.plan.memory_at_hand", lambda on_gpu: at_hand)
    plan = make_plan(recipe(training={"expert_path": wanted}))
    assert (plan.expert_path, plan.memory_at_hand_bytes) == (path, at_hand)


def test_the_margin_decides_between_the_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, lean = (make_plan(recipe(training={"expert_path": path})).memory.peak_bytes for path in ("fast", "lean"))
    assert lean < fast
    monkeypatch.setattr("studio.plan.memory_at_hand", lambda on_gpu: fast)
    assert make_plan(recipe()).expert_path == "lean"
    monkeypatch.setattr("studio.plan.memory_at_hand", lambda on_gpu: fast * 111 // 100)
    assert make_plan(recipe()).expert_path == "fast"


def test_a_plan_that_does_not_fit_says_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_plan(recipe()).warnings == ()
    monkeypatch.setattr("studio.plan.memory_at_hand", lambda on_gpu: 890_000_000)
    (warning,) = make_plan(recipe()).warnings
    for words in (
        "890 MB at hand",
        "batch_size: 8 with gradient_accumulation_steps: 2",
        "gradient_checkpointing: true",
    ):
        assert words in warning
    monkeypatch.setattr("studio.plan.memory_at_hand", lambda on_gpu: 10**8)
    (warning,) = make_plan(recipe(model={"quantization": "none"})).warnings
    assert "batch_size" not in warning and "model.quantization: nf4" in warning  # a smaller batch alone would not do


def test_memory_at_hand_is_read_from_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:   8000 kB\n")
    assert _available_to_process(tmp_path) == 8000 * 1024
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("1000\n")
    assert _available_to_process(tmp_path) == 8000 * 1024
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("5000000\n")
    assert _available_to_process(tmp_path) == 4_999_000
    assert _available_to_process(tmp_path / "nowhere") is None


def test_checkpointing_lean_and_short_rows_take_less_each() -> None:
    def activations(**training: Any) -> int:
        return make_plan(recipe(training={"expert_path": "fast", **training})).memory.activations_bytes

    assert activations(gradient_checkpointing=True) < activations(expert_path="lean") < activations()
    assert activations(batch_size=8) < activations()


# -------------------------------------------------------------------- other families


def qwen3_moe(directory: Path, layers: int = 48, experts: int = 128, shards: int = 16) -> Path:
    """The shape of Qwen3-30B-A3B with one tensor an expert, in sparse files: headers alone take space."""
    hidden, width, vocabulary, heads, keys = 2048, 768, 151_936, 32 * 128, 4 * 128
    config = {
        "model_type": "qwen3_moe", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "vocab_size": vocabulary, "moe_intermediate_size": width,
        "num_experts": experts, "num_experts_per_tok": 8, "tie_word_embeddings": False,
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": [vocabulary, hidden], "lm_head.weight": [vocabulary, hidden]}
    shapes["model.norm.weight"] = [hidden]
    for layer in range(layers):
        name = f"model.layers.{layer}"
        outputs = {"q_proj": heads, "k_proj": keys, "v_proj": keys}
        shapes |= {f"{name}.self_attn.{part}.weight": [rows, hidden] for part, rows in outputs.items()}
        shapes |= {f"{name}.self_attn.o_proj.weight": [hidden, heads], f"{name}.mlp.gate.weight": [experts, hidden]}
        shapes |= {f"{name}.self_attn.{part}.weight": [128] for part in ("q_norm", "k_norm")}
        shapes |= {f"{name}.{part}.weight": [hidden] for part in ("input_layernorm", "post_attention_layernorm")}
        for expert in range(experts):
            prefix = f"{name}.mlp.experts.{expert}"
            shapes |= {f"{prefix}.{part}.weight": [width, hidden] for part in ("gate_proj", "up_proj")}
            shapes[f"{prefix}.down_proj.weight"] = [hidden, width]
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    keys_of, weight_map = list(shapes), {}
    for shard in range(shards):
        file = f"model-{shard:05}.safetensors"
        mine = {key: shapes[key] for key in keys_of[shard::shards]}
        weight_map |= dict.fromkeys(mine, file)
        write_header(directory / file, mine, "BF16", sparse=True)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(EMBEDDED_DIR / name, directory / name)
    return directory


def test_eighteen_thousand_expert_tensors_are_planned_with_little_work(tmp_path: Path) -> None:
    base = qwen3_moe(tmp_path / "base")
    wanted = recipe(model={"base": str(base)}, adapter={"shared_expert_rank": 0})
    make_plan(wanted)  # the first one imports what plans need
    begun = time.process_time()
    plan = make_plan(wanted)
    assert time.process_time() - begun < 3.0  # seconds of processor time: about 0.5
    assert round(plan.parameters / 1e9, 1) == 30.5 and round(plan.active_parameters / 1e9, 1) == 3.4
    assert (plan.moe_layers, plan.experts, plan.top_k) == (48, 128, 8)
    assert by_name(plan)["routed_experts"].trainable_parameters == 48 * 128 * 16 * (2 * 2048 + 3 * 768)


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
    with pytest.raises(TargetError, match=r"experts \[16\] do not exist; this model has experts 0 to 15"):
        make_plan(recipe(placement={"rule": "manual", "experts": [3, 16]}))


@pytest.mark.parametrize(
    ("metric", "method", "files", "measured"),
    [
        ("preference_accuracy", "sft", "tickets", "loss, perplexity, exact_match, json_valid$"),
        ("label_accuracy", "dpo", "ticket-pairs", "preference_accuracy"),
        ("exact_match", "reward", "ticket-pairs", "measures preference_accuracy, preference_margin$"),
        ("exact_match", "grpo", "prompts", "measures reward, reward/length$"),
        ("reward/regex", "grpo", "prompts", "did you mean .reward/length"),
    ],
)
def test_a_gate_on_what_the_job_can_never_measure_is_refused(
    metric: str, method: str, files: str, measured: str, tmp_path: Path
) -> None:
    train = TICKETS.with_name(f"{files}-train.jsonl")
    if files == "prompts":
        train = tmp_path / "prompts.jsonl"
        train.write_text("".join(json.dumps({"prompt": f"Say {number}"}) + "\n" for number in range(16)))
    length = {"function": "length", "longest_characters": 9}
    sections: dict[str, Any] = {
        "data": {"train": train, "eval": train, "leakage": "off"},
        "training": {"method": method},
        "rewards": (length,) if method == "grpo" else (),
    }
    known = {"grpo": "reward/length", "sft": "loss"}.get(method, "preference_accuracy")
    limit = "max_rise" if known == "loss" else "max_drop"
    make_plan(recipe(**sections, evaluation={"gate": ({"metric": known, limit: 0.1},)}))
    with pytest.raises(StudioError, match=f"gate asks for {metric}, which this job cannot measure.*{measured}"):
        make_plan(recipe(**sections, evaluation={"gate": ({"metric": metric, "max_drop": 0.1},)}))


def test_a_class_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    base = copied_base(tmp_path)
    index = {"weight_map": {"model.layers.0.self_attn.q_proj.weight": "model.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    write_header(base / "model.safetensors", {"model.layers.0.self_attn.q_proj.weight": [256, 256]})
    wanted = {"attention_rank": 4, "shared_expert_rank": 4, "routed_experts_rank": 0}
    with pytest.raises(TargetError, match=r"no tensor of class shared_expert; set adapter\.shared_expert_rank to 0"):
        make_plan(recipe(model={"base": str(base)}, adapter=wanted))


def test_a_base_without_chat_template_gets_its_familys_and_the_plan_says_so(tmp_path: Path) -> None:
    base = copied_base(tmp_path)
    assert not any("chat template" in warning for warning in make_plan(recipe(model={"base": str(base)})).warnings)
    (base / "chat_template.jinja").unlink()
    (warning,) = make_plan(recipe(model={"base": str(base)})).warnings
    assert warning.startswith("the base has no chat template: the default of its family is used")


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


def write_header(path: Path, shapes: dict[str, list[int]], dtype: str = "F32", sparse: bool = False) -> None:
    """A safetensors file of zeros."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = DTYPE_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + (b"" if sparse else bytes(offset)))
    os.truncate(path, 8 + len(text) + offset)


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


def test_pairs_go_through_the_model_together_and_orpo_holds_all_logits() -> None:
    def memory(method: str, batch_size: int) -> Any:
        return make_plan(recipe(data={"train": PAIRS}, training={"method": method, "batch_size": batch_size})).memory

    assert memory("dpo", 4).activations_bytes == memory("kto", 8).activations_bytes
    assert memory("orpo", 16).logits_bytes > 4 * memory("dpo", 16).logits_bytes


def test_kto_trains_the_sides_of_a_pair_apart() -> None:
    wanted = recipe(data={"train": PAIRS}, training={"method": "kto", "epochs": 1, "batch_size": 16})
    assert make_plan(wanted).total_steps == 2 * 2400 / 16


@given(st.lists(st.integers(1, 64), min_size=1, max_size=40))
def test_packed_rows_are_those_of_trls_packing(lengths: list[int]) -> None:
    rows = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
    disable_progress_bars()
    assert packed_rows(lengths, 32) == len(pack_dataset(rows, 32))


def test_steps_of_packed_rows_are_an_estimate_and_said_to_be() -> None:
    plan = make_plan(recipe(training={"epochs": 1, "batch_size": 4}, trl={"packing": True}))
    assert plan.total_steps < plan.train_examples / 8
    assert any("estimate" in warning for warning in plan.warnings)


def test_sampling_is_the_peak_where_many_completions_are_drawn_together(tmp_path: Path) -> None:
    """Keys and values of the embedded base: 4 layers, 256 wide each, float32."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "2 + 2 =", "completion": "4"}\n' * 64)

    def planned(accumulation: int) -> Any:
        return make_plan(
            parse_recipe(
                f"data: {{train: '{rows}'}}\noutput: {{dir: '{tmp_path}/job'}}\nrewards: [{{function: exact_match}}]\n"
                f"training: {{method: grpo, batch_size: 4, gradient_accumulation_steps: {accumulation}}}\n"
                "sampling: {completions: 4, max_new_tokens: 512}\n"
            )
        )

    few, many = planned(1), planned(64)
    assert many.longest_tokens > 512 and many.truncated_examples == 0
    cache = 256 * many.longest_tokens * 4 * 2 * 256 * 4
    assert cache <= many.memory.activations_bytes <= 1.5 * cache
    assert many.memory.peak_bytes > few.memory.peak_bytes
    assert (few.total_steps, many.total_steps) == (3 * 64, 3)
