"""Completions drawn from a model as it stands, in evaluation mode, through the same routed engine that trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from studio.data import Example
from studio.encoding import prompt_ids
from studio.recipe_training import SamplingSettings

Progress = Callable[[int, int], None]

AS_IT_IS: dict[str, Any] = {"min_p": 0.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""Options of a generation that a checkpoint's generation_config.json may set, so that what is drawn is not what the
model says; with these values they do nothing."""


@dataclass(frozen=True)
class Drawn:
    """One completion.

    Attributes:
        text: without special tokens.
        clipped: it was cut at `sampling.max_new_tokens`, before the model ended it.
    """

    text: str
    clipped: bool


def draw(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    sampling: SamplingSettings,
    *,
    rows: int,
    seed: int,
    progress: Progress | None = None,
) -> list[list[Drawn]]:
    """`sampling.completions` completions of each example's prompt, in order.

    Args:
        rows: completions that are drawn together, at least those of one prompt.
        seed: of the drawing.
        progress: called with (prompts done, prompts in all).
    """
    was_training = model.training
    model.eval()
    torch.manual_seed(seed)
    prompts = [prompt_ids(tokenizer, example) for example in examples]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: list[list[Drawn]] = [[] for _ in prompts]
    together = max(1, rows // sampling.completions)
    with torch.inference_mode():
        for start in range(0, len(order), together):
            chosen = order[start : start + together]
            drawn = _draw(model, tokenizer, [prompts[i] for i in chosen], sampling)
            for place, i in enumerate(chosen):
                found[i] = drawn[place * sampling.completions : (place + 1) * sampling.completions]
            if progress:
                progress(start + len(chosen), len(order))
    model.train(was_training)
    return found


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of every token that ends an answer: the tokenizer's, and those that the model's files name."""
    named: Any = cast(Any, model.generation_config).eos_token_id
    ids = [named] if isinstance(named, int) else list(named or [])
    own = tokenizer.eos_token_id
    return ids if own is None or own in ids else [int(own), *ids]


def _draw(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], sampling: SamplingSettings
) -> list[Drawn]:
    longest, pad, ends = max(map(len, prompts)), tokenizer.pad_token_id, ends_of(model, tokenizer)
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    mask = (torch.arange(longest, device=model.device) >= longest - lengths[:, None]).long()
    output: Tensor = cast(Any, model).generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,
        **AS_IT_IS,
        max_new_tokens=sampling.max_new_tokens,
        num_return_sequences=sampling.completions,
        eos_token_id=ends or None,
        pad_token_id=pad,
    )[:, longest:]
    ended = torch.isin(output, torch.tensor(ends, device=output.device)).any(1).tolist()
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    return [Drawn(text, not end) for text, end in zip(texts, ended, strict=True)]
