"""Measures an importance matrix: the merged model reads the user's examples, and every matrix's inputs are squared.

    python -m adapters.export.measure_importance QUESTION ANSWER       asked by adapters.export.importance

Dimension legend: T tokens, K experts a token, P = T·K pairs, E experts, H hidden size, I expert width.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import gguf
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedModel

from adapters.checkpoint import text_config
from adapters.errors import ExportError
from adapters.expert_math import gated
from adapters.export import IMPORTANCE_EXAMPLES
from adapters.export.gguf_tensors import architecture_of
from adapters.export.importance import write_importance
from adapters.layouts import LAYER, PROJECTIONS, ExpertLayout
from adapters.loading import load_base
from adapters.merged import MergedWeights
from adapters.routed import RoutedExperts, moe_blocks
from adapters.verify.checker import source_from
from adapters.verify.memory import why_not
from adapters.verify.reference import encode
from adapters.verify.run import Prompt

MOST_TOKENS = 512
"""Of an example that are read."""


class Importance:
    """Sums of squared inputs (matrices, columns) float64, and how many inputs each is over (matrices,), by tensor."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, tensor: str, inputs: Tensor, matrix: int = 0, matrices: int = 1) -> None:
        """`inputs` (rows, columns) of one matrix."""
        if tensor not in self.sums:
            self.sums[tensor] = torch.zeros(matrices, inputs.shape[-1], dtype=torch.float64)
            self.counts[tensor] = torch.zeros(matrices)
        self.sums[tensor][matrix] += inputs.double().square().sum(0)
        self.counts[tensor][matrix] += len(inputs)


def answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the file question["out"]; {"examples", "tokens", "tensors"}.

    Raises:
        ExportError: the file of examples cannot be read, or the model is too large to be run here.
    """
    source = source_from(question["source"])
    weights = source.open()
    if why := why_not(weights.index):
        raise ExportError(f"{why}; give an importance matrix that llama-imatrix made elsewhere (a .gguf file)")
    tokenizer = AutoTokenizer.from_pretrained(source.base, trust_remote_code=False)
    _, ids = encode(tokenizer, read_examples(Path(question["examples"])))
    ids = [row[:MOST_TOKENS] for row in ids]
    found = measure(merged_model(weights), weights.layout, ids)
    tokens = sum(map(len, ids))
    write_importance(Path(question["out"]), found.sums, found.counts, tokens)
    return {"examples": len(ids), "tokens": tokens, "tensors": len(found.sums)}


def read_examples(file: Path) -> list[Prompt]:
    """The first examples of JSON Lines, each {"text": …} or {"messages": […]}.

    Raises:
        ExportError: unreadable, or empty.
    """
    try:
        with file.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in islice(lines, IMPORTANCE_EXAMPLES)]
        found = [cast(Prompt, row["messages"]) if "messages" in row else str(row["text"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = 'expected JSON Lines of {"text": …} or {"messages": […]}'
        raise ExportError(f"{file} cannot be read as examples, {said}: {error!r}") from None
    if not found:
        raise ExportError(f"{file} holds no examples to measure importance on")
    return found


def merged_model(weights: MergedWeights) -> PreTrainedModel:
    """The engine's model in float32 with the merged values in it."""
    model = load_base(weights.base, quantize="none", dtype=torch.float32)
    parameters = dict(model.named_parameters())
    for name in sorted({cast(str, weights.layout.model_key(key)) for key in weights.changed}):
        for target, values in _merged(weights, name, parameters[name].data):
            target.copy_(values)
    return model


def _merged(weights: MergedWeights, name: str, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(place in the model, value) of a matrix, or of each expert of a stack."""
    if target.ndim != 3:
        yield target, weights.read(weights.layout.checkpoint_key(name))
        return
    along = 1 if weights.layout.stack_order == "in_out" else 0
    for expert in range(len(target)):
        parts = [weights.read(place.key, place.expert) for place in weights.layout.sources(name, expert)]
        yield target[expert], torch.cat([part.float() for part in parts], along)


def measure(model: PreTrainedModel, layout: ExpertLayout, prompts: Sequence[Sequence[int]]) -> Importance:
    """Runs the prompts and sums up the squared inputs of every matrix that GGUF files hold quantised.

    Embeddings, output and routers are left out, and DeepSeek's keys and values that are split by head.
    """
    config = text_config(model.config.to_dict())
    architecture = architecture_of(config, layout.model_type).name
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    found = Importance()
    handles = []
    for name, module in model.named_modules():
        tensor = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
        left_out = name.endswith(("lm_head", "kv_b_proj", layout.router or "lm_head"))
        if isinstance(module, nn.Linear) and tensor and not left_out:
            handles.append(module.register_forward_pre_hook(partial(_on_linear, found, tensor)))
    for name, block in moe_blocks(model, layout):
        experts, layer = getattr(block, layout.experts), LAYER.findall(f"{name}.")[-1]
        handles.append(experts.register_forward_pre_hook(partial(_on_experts, found, layer)))
    with torch.inference_mode():
        for ids in prompts:
            cast(Any, model)(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def _on_linear(found: Importance, tensor: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    found.add(tensor, inputs[0].flatten(0, -2))


def _on_experts(found: Importance, layer: str, experts: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Of each expert: what gate and up get, and, computed once more, what down gets."""
    assert isinstance(experts, RoutedExperts)
    hidden_TH, experts_TK, weights_TK = inputs[:3]
    for expert in range(experts.num_experts):
        rows, places = (experts_TK == expert).nonzero(as_tuple=True)
        entering = hidden_TH[rows]
        if experts.layout.weight_on == "input":
            entering = entering * weights_TK[rows, places].unsqueeze(1)
        for tensor in ("ffn_gate_exps", "ffn_up_exps"):
            found.add(f"blk.{layer}.{tensor}.weight", entering, expert, experts.num_experts)
        leaving = gated(_product(experts, expert, entering), experts.gate, experts.act_fn)[0]
        found.add(f"blk.{layer}.ffn_down_exps.weight", leaving, expert, experts.num_experts)


def _product(experts: RoutedExperts, expert: int, entering: Tensor) -> Tensor:
    matrix = cast(Tensor, getattr(experts, PROJECTIONS[0]))[expert]
    bias = experts.gate_up_proj_bias
    by_rows = matrix.t() if experts.layout.stack_order == "in_out" else matrix
    return F.linear(entering, by_rows, None if bias is None else bias[expert])


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(answer(given)), encoding="utf-8")
