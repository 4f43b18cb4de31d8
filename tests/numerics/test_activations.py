"""What the plan says that autograd keeps of each layer, against the tensors that autograd saves, family by family."""

from __future__ import annotations

import re
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapters.lora import attach
from adapters.placement import Method, Placement, same_experts_everywhere
from adapters.routed import set_expert_path, use_routed_experts
from studio.activations import Pass, layer_bytes
from studio.weights import Base, base_in
from tests.numerics.conftest import EACH, EXPERTS, VOCAB, Tiny

TOLERANCE = 0.09


@pytest.mark.parametrize(("batch", "length", "path"), [(2, 192, "fast"), (1, 192, "lean")])
@pytest.mark.parametrize("tiny", EACH, ids=str)
def test_what_is_kept_of_each_layer(tiny: Tiny, batch: int, length: int, path: Any, tmp_path: Path) -> None:
    stock = tiny.build()
    stock.save_pretrained(tmp_path)
    base = base_in(tmp_path, "tiny")
    model = adapted(stock, base, path)
    run = Pass(batch, length, 4, False, 4, 4 if tiny.layout.shared_expert else 0, 0, 4, path == "fast")
    found = kept_by_layer(model, batch, length)
    moe = {shape.layer: shape for shape in base.moe}
    expected = [layer_bytes(base, layer, moe.get(number), run) * run.tokens for number, layer in enumerate(base.layers)]
    # of the first layer a little less is kept: its input needs no gradient
    assert sum(found.values()) == pytest.approx(sum(expected), rel=TOLERANCE)


METHODS = {
    "dropout": Method(dropout=0.2),
    "pissa": Method(start="pissa"),
    "dora": Method(dora=True),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("family", ["llama4_text", "qwen3_moe"])
def test_what_is_kept_with_a_method(family: str, method: Method, tmp_path: Path) -> None:
    tiny = next(tiny for tiny in EACH if tiny.family == family)
    stock = tiny.build()
    stock.save_pretrained(tmp_path)
    base = base_in(tmp_path, "tiny")
    routed, shared = 0 if method.dora else 4, 4 if tiny.layout.shared_expert else 0
    model = adapted(stock, base, "fast", method)
    rank = routed * (2 if method.start == "pissa" else 1)
    run = Pass(2, 192, 4, False, 4, shared, 0, rank, True, bool(method.dropout), method.dora)
    found = kept_by_layer(model, 2, 192)
    moe = {shape.layer: shape for shape in base.moe}
    expected = [layer_bytes(base, layer, moe.get(number), run) * run.tokens for number, layer in enumerate(base.layers)]
    assert sum(found.values()) == pytest.approx(sum(expected), rel=TOLERANCE)
    plain = replace(run, dropout=False, dora=False, routed_experts_rank=routed)
    less = [layer_bytes(base, layer, moe.get(number), plain) * run.tokens for number, layer in enumerate(base.layers)]
    assert sum(expected) > sum(less)


def adapted(stock: Any, base: Base, path: Any, method: Method = Method()) -> Any:  # noqa: B008 - it is frozen
    layout, model = base.layout, use_routed_experts(stock)
    routed = same_experts_everywhere(4, len(base.moe), EXPERTS) if base.moe and not method.dora else ()
    shared = 4 if layout.shared_expert else 0
    peft = attach(model, Placement(attention=4, shared_expert=shared, routed=routed, method=method))
    set_expert_path(peft, path)
    return peft.train()


class Kept:
    """A saved tensor, as long as the graph wants it."""

    def __init__(self, layer: int, tensor: Tensor):
        self.layer, self.tensor = layer, tensor


def kept_by_layer(model: Any, batch: int, length: int) -> Counter[int]:
    """Bytes of the storages that autograd holds after a forward, by the decoder layer that saved them first."""
    ours = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    packed: list[weakref.ref[Kept]] = []
    layer = -1

    def enter(number: int) -> Any:
        def hook(*_: Any) -> None:
            nonlocal layer
            layer = number

        return hook

    for name, module in model.named_modules():
        if found := re.search(r"\.layers\.(\d+)$", name):
            module.register_forward_pre_hook(enter(int(found[1])))
            module.register_forward_hook(enter(-1))

    def pack(tensor: Tensor) -> Kept:
        kept = Kept(layer, tensor.detach())  # with its graph it would hold itself
        packed.append(weakref.ref(kept))
        return kept

    ids = torch.randint(3, VOCAB, (batch, length))
    mask = torch.ones_like(ids)
    mask[1:, length - 5 :] = 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        output = model.get_base_model().model(input_ids=ids, attention_mask=mask, use_cache=False)
    held: Counter[int] = Counter()
    for kept in filter(None, (reference() for reference in packed)):
        storage = kept.tensor.untyped_storage()
        if kept.layer >= 0 and storage.data_ptr() not in ours:
            ours.add(storage.data_ptr())
            held[kept.layer] += storage.nbytes()
    assert output.last_hidden_state.requires_grad  # the graph was there all along
    return held


def test_a_model_without_the_shared_experts_of_its_family(tmp_path: Path) -> None:
    config = Tiny("ernie4_5_moe", 64, 32, 2).build().config
    config.moe_num_shared_experts = 0
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    base = base_in(tmp_path, "tiny")
    run = Pass(1, 8, 4, False, 4, 0, 0, 4, True)
    for shape in base.moe:
        assert layer_bytes(base, base.layers[shape.layer], shape, run) > 0
    assert base.moe
