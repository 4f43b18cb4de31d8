"""Importance matrices: the mean squares that stock transformers' own hidden states have, and what they are good for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGUFReader
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.errors import ExportError
from adapters.export import Source
from adapters.export.ggml import prepare, quantize
from adapters.export.gguf_tensors import plan_tensors
from adapters.export.importance import importance_for, read_importance
from adapters.export.measure_importance import measure, merged_model, read_examples
from tests.numerics.gguf_models import MODELS

TEXTS = ("Please refund the order 1234, the printer is on fire.", "the ticket and the order")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bases")
    for name in ("llama4", "qwen3_moe", "gpt_oss"):
        MODELS[name].save(root / name)
    return root


def stock_hidden(base: Path, prompts: list[list[int]], modules: list[str]) -> dict[str, Tensor]:
    """What goes into each module of the stock model, (tokens, columns), all prompts one after the other."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}
    for name in modules:
        hook = lambda _, inputs, name=name: seen[name].append(inputs[0].flatten(0, -2))  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook)
    with torch.no_grad():
        for ids in prompts:
            model(torch.tensor([ids]))
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("name", ["llama4", "qwen3_moe", "gpt_oss"])
def test_sums_are_those_of_the_stock_model(name: str, bases: Path) -> None:
    base = bases / name
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    weights = Source(base, None, name).open()
    found = measure(merged_model(weights), weights.layout, prompts)
    block = f"model.layers.1.{weights.layout.block}"
    hidden = stock_hidden(base, prompts, ["model.layers.1.self_attn.q_proj", block])
    tokens, top_k = sum(map(len, prompts)), weights.config["num_experts_per_tok"]
    attention = hidden["model.layers.1.self_attn.q_proj"].double().square().sum(0)
    torch.testing.assert_close(found.sums["blk.1.attn_q.weight"][0], attention, rtol=1e-4, atol=1e-6)
    counts = found.counts["blk.1.ffn_up_exps.weight"]
    assert int(counts.sum()) == tokens * top_k and len(counts) == weights.config[experts_key(weights.config)]
    entering = hidden[block].double()
    if weights.layout.weight_on == "input":  # Llama 4: one expert, whose input is multiplied by the score
        router = weights.read(f"{block}.router.weight").double()
        entering = entering * (entering @ router.t()).max(-1, keepdim=True).values.sigmoid()
    expected = top_k * entering.square().sum(0)
    torch.testing.assert_close(found.sums["blk.1.ffn_gate_exps.weight"].sum(0), expected, rtol=1e-4, atol=1e-6)
    assert "output.weight" not in found.sums and not any("gate_inp" in tensor for tensor in found.sums)


def experts_key(config: dict[str, Any]) -> str:
    return "num_experts" if "num_experts" in config else "num_local_experts"


def test_what_enters_down_is_what_an_expert_makes(bases: Path) -> None:
    """One expert by hand, with the matrices of the files."""
    source = Source(bases / "qwen3_moe", None, "x")
    weights, ids = source.open(), [5, 80, 108, 101, 97, 115]
    found = measure(merged_model(weights), weights.layout, [ids])
    hidden = stock_hidden(source.base, [ids], ["model.layers.1.mlp"])["model.layers.1.mlp"]
    router = weights.read("model.layers.1.mlp.gate.weight").float()
    chosen = (hidden @ router.t()).topk(2, dim=-1).indices
    for expert in range(weights.config[experts_key(weights.config)]):
        rows = hidden[(chosen == expert).any(-1)]
        gate, up = (weights.read(f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight") for part in ("gate", "up"))
        made = torch.nn.functional.silu(rows @ gate.t()) * (rows @ up.t())
        sums = found.sums["blk.1.ffn_down_exps.weight"][expert]
        torch.testing.assert_close(sums, made.double().square().sum(0), rtol=1e-3, atol=1e-9)


def test_measured_on_examples_it_lowers_the_weighted_error(bases: Path, tmp_path: Path) -> None:
    source, examples = Source(bases / "llama4", None, "x"), tmp_path / "examples.jsonl"
    rows = [{"text": TEXTS[0]}, {"text": "the ticket"}]
    rows.append({"messages": [{"role": "user", "content": TEXTS[1]}]})
    examples.write_text("\n".join(map(json.dumps, rows)))
    plan = plan_tensors(source.open())
    found = importance_for(examples, source, plan.tensors)
    stacked = plan.tensors["blk.1.ffn_up_exps.weight"]
    assert found["blk.1.ffn_up_exps.weight"].shape == (stacked[0], stacked[2])
    weights = found["blk.1.attn_output.weight"][0]
    values = source.open().read("model.layers.1.self_attn.o_proj.weight").float()
    prepare("Q2_K")
    errors = []
    for given in (None, weights):
        data = quantize(values, "Q2_K", given).numpy().reshape(len(values), -1)
        back = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q2_K))
        errors.append(float(((back - values).square() * weights).sum()))
    assert errors[1] < 0.9 * errors[0]


def test_files_that_are_no_examples(tmp_path: Path) -> None:
    for name, text in (("empty.jsonl", ""), ("bad.jsonl", "{}"), ("worse.jsonl", "no json")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ExportError, match=f"{name} (cannot be read as|holds no) examples"):
            read_examples(tmp_path / name)


def test_an_expert_without_tokens_counts_all_columns_alike(tmp_path: Path) -> None:
    from adapters.export.importance import write_importance

    name, sums = "blk.0.ffn_up_exps.weight", torch.tensor([[2.0, 4.0], [0.0, 0.0]])
    write_importance(tmp_path / "i.gguf", {name: sums}, {name: torch.tensor([2.0, 0.0])}, 2)
    assert str(GGUFReader(tmp_path / "i.gguf").fields["general.type"].contents()) == "imatrix"
    found = read_importance(tmp_path / "i.gguf", {name: (2, 5, 2)})
    assert found[name].tolist() == [[1.0, 2.0], [1.0, 1.0]]
