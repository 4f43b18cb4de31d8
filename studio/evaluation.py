"""Held-out loss, exact match and generations, the same for the base and for the tuned model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from studio.data import Example
from studio.errors import SHOWN_PROBLEMS, DataError, Problem

Progress = Callable[[int, int], None]
LOGITS_CHUNK_TOKENS = 256
"""Positions whose logits exist at one time: a vocabulary of 200,000 must not dominate memory."""
IGNORED = -100


@dataclass(frozen=True)
class Evaluation:
    """Results on held-out examples.

    Attributes:
        loss: mean cross-entropy per completion token, in nats.
        exact_match: share of examples whose greedy answer equals the reference, white space at the ends aside.
        answers: the greedy answers, in the order of the examples.
        references: what they are compared with, as the chat template writes it.
    """

    loss: float
    exact_match: float
    answers: tuple[str, ...]
    references: tuple[str, ...]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_length_tokens: int,
    max_new_tokens: int,
    batch_size: int,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluates `model` as it stands (adapters on or off), in evaluation mode and without gradients.

    Args:
        batch_size: examples in a forward pass; answers are generated for four times as many at once.
    """
    was_training = model.training
    model.eval()
    total = 2 * len(examples)

    def report(done: int) -> None:
        if progress:
            progress(done, total)

    with torch.inference_mode():
        loss = _loss(model, tokenizer, examples, max_length_tokens, batch_size, report)
        answers = _answers(
            model, tokenizer, examples, max_new_tokens, 4 * batch_size, lambda n: report(len(examples) + n)
        )
    model.train(was_training)
    references = tuple(wanted(tokenizer, example) for example in examples)
    right = sum(answer.strip() == text for answer, text in zip(answers, references, strict=True))
    return Evaluation(loss, right / len(examples), tuple(answers), references)


def held_out_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_length_tokens: int,
    batch_size: int,
) -> float:
    """The loss of `evaluate` alone: mean cross-entropy per completion token, in nats."""
    model.eval()
    with torch.inference_mode():
        return _loss(model, tokenizer, examples, max_length_tokens, batch_size, lambda done: None)


def wanted(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """The answer as the model is trained to write it: some templates put an empty think block before it."""
    prompt, whole = _prompt_and_whole(tokenizer, example)
    return str(tokenizer.decode(whole[len(prompt) :], skip_special_tokens=True)).strip()


def prompt_text(example: Example) -> str:
    """The last user turn, for showing."""
    return example.prompt[-1].content


def _loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_length_tokens: int,
    batch_size: int,
    report: Callable[[int], None],
) -> float:
    pairs = [encode(tokenizer, example, max_length_tokens) for example in examples]
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
    summed, count = 0.0, 0
    decoder, head = decoder_and_head(model)
    for start in range(0, len(order), batch_size):
        batch = [pairs[i] for i in order[start : start + batch_size]]
        ids, labels = _padded(batch, tokenizer.pad_token_id, model.device)
        mask = (torch.arange(ids.shape[1], device=ids.device) < _lengths(batch, ids.device)[:, None]).long()
        hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
        learned = labels[:, 1:] != IGNORED
        summed += _cross_entropy(head, hidden[learned], labels[:, 1:][learned])
        count += int(learned.sum())
        report(min(start + batch_size, len(order)))
    return summed / max(count, 1)


def decoder_and_head(model: Any) -> tuple[Any, Any]:
    """The decoder below the output head, and the head; a PeftModel's adapters stay as they are set."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.model, inner.get_output_embeddings()


def _cross_entropy(head: Any, hidden_PH: Tensor, targets_P: Tensor) -> float:
    """Summed cross-entropy in nats of P positions, logits in chunks."""
    pairs = zip(hidden_PH.split(LOGITS_CHUNK_TOKENS), targets_P.split(LOGITS_CHUNK_TOKENS), strict=True)
    losses = [torch.nn.functional.cross_entropy(head(h).float(), t, reduction="sum") for h, t in pairs]
    return float(sum(loss.item() for loss in losses))


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, max_length_tokens: int) -> tuple[list[int], list[int]]:
    """(input ids, labels) of one example by the model's chat template; the prompt's labels are -100."""
    prompt, whole = _prompt_and_whole(tokenizer, example)
    labels = [IGNORED] * len(prompt) + whole[len(prompt) :]
    return whole[:max_length_tokens], labels[:max_length_tokens]


def _prompt_and_whole(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], list[int]]:
    row = example.as_row()
    prompt = _template(tokenizer, row["prompt"], add_generation_prompt=True)
    return prompt, _template(tokenizer, [*row["prompt"], *row["completion"]], add_generation_prompt=False)


def check_lengths(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length_tokens: int, file: str
) -> None:
    """Refuses examples whose prompt alone fills `max_length_tokens`: nothing of their answer would be learned.

    Raises:
        DataError: the first 20 of them, and how many more.
    """
    rows = (
        (number, len(_template(tokenizer, example.as_row()["prompt"], add_generation_prompt=True)))
        for number, example in enumerate(examples, 1)
    )
    allowed = f"allowed: fewer than data.max_length_tokens, {max_length_tokens}; raise it or shorten the prompt"
    problems = [
        Problem("", None, f"example {number}: the prompt has {tokens} tokens; {allowed}", file)
        for number, tokens in rows
        if tokens >= max_length_tokens
    ]
    if problems:
        raise DataError(problems[:SHOWN_PROBLEMS], max(0, len(problems) - SHOWN_PROBLEMS))


def _template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> list[int]:
    return cast(list[int], tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options))


def _padded(batch: Sequence[tuple[list[int], list[int]]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(len(ids) for ids, _ in batch)
    ids = [ids + [pad_id] * (longest - len(ids)) for ids, _ in batch]
    labels = [labels + [IGNORED] * (longest - len(labels)) for _, labels in batch]
    return torch.tensor(ids, device=device), torch.tensor(labels, device=device)


def _lengths(batch: Sequence[tuple[list[int], list[int]]], device: torch.device) -> Tensor:
    return torch.tensor([len(ids) for ids, _ in batch], device=device)


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_new_tokens: int,
    batch_size: int,
    report: Callable[[int], None],
) -> list[str]:
    prompts = [_template(tokenizer, e.as_row()["prompt"], add_generation_prompt=True) for e in examples]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        for i, text in zip(
            chosen, _generate(model, tokenizer, [prompts[i] for i in chosen], max_new_tokens), strict=True
        ):
            answers[i] = text
        report(min(start + batch_size, len(order)))
    return answers


def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int
) -> list[str]:
    longest = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    mask = (torch.arange(longest, device=model.device) >= longest - lengths[:, None]).long()
    output = cast(Any, model).generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad
    )
    return list(tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True))
