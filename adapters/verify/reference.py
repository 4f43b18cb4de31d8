"""What the trained model says to held-out prompts, by the studio's engine in float32, in a process of its own.

    python -m adapters.verify.reference QUESTION ANSWER        asked by adapters.verify.run

The adapter is never merged into a file on the way: routed experts compute it on the dispatched tokens, as in training.

Dimension legend: T tokens of a prompt, V vocabulary, E experts, r rank.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from bitsandbytes.nn.modules import Linear4bit
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adapters.chat_template import load_tokenizer
from adapters.checkpoint import text_config
from adapters.export import Source
from adapters.layouts import PROJECTIONS, ExpertLayout, layout_for
from adapters.loading import load_base
from adapters.lora_products import LoraRanks
from adapters.quantized import Dense, Held, dequantize_rows
from adapters.quantized_linear import Int8Linear, dense_4bit, dense_weight
from adapters.routed import RoutedExperts, moe_blocks
from adapters.sidecar import read_sidecar
from adapters.verify.checker import source_from
from adapters.verify.peft_reading import Pair, PeftReading
from adapters.verify.run import Prompt

MOST_PROMPTS, MOST_TOKENS, LEAST_TOKENS = 16, 128, 16
LOGITS_BYTES = 256_000_000
"""Of all models' logits together: with 200,000 entries in the vocabulary about 100 positions."""


def answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """{"prompts": token ids, "texts"}; with "run" the logits `base.{i}` and `tuned.{i}` go to the file "logits"."""
    source = source_from(question["source"])
    tokenizer = load_tokenizer(source.base, source.adapter)
    texts, ids = encode(tokenizer, question["prompts"][:MOST_PROMPTS])
    vocabulary = int(text_config(json.loads((source.base / "config.json").read_text()))["vocab_size"])
    limit = min(MOST_TOKENS, max(LEAST_TOKENS, LOGITS_BYTES // (12 * vocabulary * max(1, len(ids)))))
    ids = [row[:limit] for row in ids]
    if question["run"] and ids:
        save_file(reference_logits(source, ids), question["logits"])
    return {"prompts": ids, "texts": texts}


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> tuple[list[str], list[list[int]]]:
    """Texts and token ids of the prompts; what gives fewer than two tokens says nothing and is left out."""
    rows = [_encoded(tokenizer, prompt) for prompt in prompts]
    kept = [(text, ids) for text, ids in rows if len(ids) > 1]
    return [text for text, _ in kept], [ids for _, ids in kept]


def _encoded(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[str, list[int]]:
    if isinstance(prompt, str):
        return prompt, list(tokenizer(prompt).input_ids)
    messages = [dict(message) for message in prompt]
    if not tokenizer.chat_template:
        text = "\n\n".join(message["content"] for message in messages)
        return text, list(tokenizer(text).input_ids)
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    return text, list(tokenizer(text, add_special_tokens=False).input_ids)


def reference_logits(source: Source, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """`base.{i}` and `tuned.{i}`, (T, V) float32: the base as `source.held` says, or in its own weights.

    Where it is in its own weights and training held it quantised, `held.{i}` is the adapter on what training held.
    """
    found = _base_and_tuned(source, source.held, prompts)
    sidecar = read_sidecar(source.adapter) if source.adapter and source.held is None else None
    if sidecar and sidecar.held and sidecar.held.get("quantization") not in (None, "none"):
        held = _base_and_tuned(source, sidecar.held, prompts)
        found |= {name.replace("tuned", "held"): held[name] for name in held if name.startswith("tuned")}
    return found


def _base_and_tuned(
    source: Source, held: Mapping[str, Any] | None, prompts: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    how = dict(held or {"quantization": "none"})
    model = load_base(
        source.base,
        quantize=how["quantization"],
        int8_experts=how.get("int8_experts") or (),
        double_quant=how.get("double_quant", True),
        dtype=torch.float32,
    )
    round_as_held(model, getattr(torch, how.get("dtype") or "float32"))
    found = {f"base.{i}": logits for i, logits in enumerate(_logits(model, prompts))}
    if source.adapter is not None:
        layout = layout_for(model.config.model_type)
        put_on(model, reading_on(source.adapter, source.base, layout, held), layout)
    return found | {f"tuned.{i}": logits for i, logits in enumerate(_logits(model, prompts))}


def round_as_held(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Makes the model compute, in float32, with the values that training dequantised to `dtype`, in place."""
    if dtype == torch.float32:
        return
    for name, module in list(model.named_modules()):
        if isinstance(module, Held) and not isinstance(module, Dense):
            cast(Any, module).dequantize = partial(_rounded, module.dequantize, dtype)
        elif isinstance(module, Linear4bit):
            model.set_submodule(name, _linear(module, dense_4bit(module, torch.float32).to(dtype)))
        elif isinstance(module, Int8Linear):
            values = torch.empty(module.weight.shape, dtype=dtype)
            dequantize_rows(module.weight, module.absmax, values)
            model.set_submodule(name, _linear(module, values))


def _rounded(dequantize: Callable[[int, Tensor], None], dtype: torch.dtype, start: int, out: Tensor) -> None:
    values = torch.empty_like(out, dtype=dtype)
    dequantize(start, values)
    out.copy_(values)


def _linear(held: nn.Linear, values: Tensor) -> nn.Linear:
    """A layer with these values, float32, and the bias of `held`."""
    linear = nn.Linear(held.in_features, held.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(values.float(), requires_grad=False)
    linear.bias = held.bias
    return linear


def _logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    with torch.inference_mode():
        return [cast(Any, model)(input_ids=torch.tensor([row]), use_cache=False).logits[0].float() for row in prompts]


def reading_on(adapter: Path, base: Path, layout: ExpertLayout, held: Mapping[str, Any] | None) -> PeftReading:
    """The adapter as it is read on the base's own weights, or on what training held."""
    reading, sidecar = PeftReading(adapter, base), read_sidecar(adapter)
    if held is not None and sidecar is not None and sidecar.start == "loftq":
        reading.leave_out_start(layout.class_modules("router"))
    return reading


def put_on(model: PreTrainedModel, adapter: PeftReading, layout: ExpertLayout) -> None:
    """Makes the engine's model the trained one, in place."""
    blocks = {f"{name}.{layout.experts}": getattr(block, layout.experts) for name, block in moe_blocks(model, layout)}
    for name, pair in adapter.pairs.items():
        if name.rpartition(".")[0] not in blocks:
            _put_on_linear(model, name.removesuffix(".weight"), adapter, pair)
    for name, experts in blocks.items():
        found = {part: adapter.pairs.get(f"{name}.{part}") for part in PROJECTIONS}
        if any(found.values()):
            experts.forward = partial(experts.forward, loras=[_loras(experts, adapter, found)])


def _put_on_linear(model: nn.Module, name: str, adapter: PeftReading, pair: Pair) -> None:
    module = model.get_submodule(name)
    weight = module.weight
    if adapter.is_dora(pair):
        linear = cast(nn.Linear, module)
        dense = dense_weight(linear)
        model.set_submodule(name, _linear(linear, dense + adapter.dora(pair, dense, adapter.delta(pair))))
    elif isinstance(weight, Tensor) and weight.is_floating_point() and tuple(weight.shape) == pair.shape:
        weight.data += adapter.delta(pair)
    else:  # held quantised: the product is added to what the layer gives
        module.register_forward_hook(partial(_added, pair.scale, *adapter.factors(pair)))


def _added(
    scale: float, first: Tensor, second: Tensor, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    return output + scale * (inputs[0] @ first.t() @ second.t())


def _loras(
    experts: RoutedExperts, adapter: PeftReading, found: Mapping[str, Pair | None]
) -> tuple[LoraRanks, list[Tensor]]:
    """The factors as the engine takes them: one rank and scale for both projections, experts one after the other."""
    rank = max(pair.rank for pair in found.values() if pair)
    tensors: list[Tensor] = []
    for part, pair in found.items():
        tensors += _flat(experts, adapter, pair, rank) if pair else _zeros(experts, part, rank)
    return LoraRanks((rank,) * experts.num_experts, 1.0), tensors


def _flat(experts: RoutedExperts, adapter: PeftReading, pair: Pair, rank: int) -> list[Tensor]:
    """A (E·rank, in) and scaled Bᵀ (E·rank, out), filled with zeros to `rank`."""
    left, right = adapter.stacked(pair)
    sides = [right, pair.scale * left.transpose(1, 2)]  # both (E, r, ·): along d2, along d1
    if experts.layout.stack_order == "in_out":
        sides.reverse()
    return [nn.functional.pad(side, (0, 0, 0, rank - pair.rank)).flatten(0, 1).contiguous() for side in sides]


def _zeros(experts: RoutedExperts, part: str, rank: int) -> list[Tensor]:
    _, rows, columns = getattr(experts, part).shape
    sizes = (columns, rows) if experts.layout.stack_order == "out_in" else (rows, columns)
    return [torch.zeros(experts.num_experts * rank, size) for size in sizes]


if __name__ == "__main__":
    made = answer(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(made), encoding="utf-8")
