"""Metrics on held-out rows and generations, the same for the base and for the tuned model.

    evaluate(model, …) ─▶ Evaluation(measures={name: Measure}, answers, …)

A metric that is made elsewhere, such as preference accuracy, joins with `found.with_measures({name: measure(scores)})`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from studio.data import Example, Row, asked_sequences, wanted_sequences
from studio.encoding import IGNORED, LossOn, encode, prompt_and_whole, prompt_ids
from studio.json_answers import is_json
from studio.metrics import Measure, Scores, as_json, measure, scores_of

Progress = Callable[[int, int], None]
LOGITS_CHUNK_TOKENS = 256
"""Positions whose logits exist at one time: a vocabulary of 200,000 must not dominate memory."""


@dataclass(frozen=True)
class Evaluation:
    """Results on held-out examples.

    Attributes:
        loss: mean cross-entropy per learned token, in nats; None without held-out rows that have one.
        exact_match: share of conversations whose greedy answer equals the reference, white space at the ends aside;
            None where there are none, of plain text and of prompts alone.
        prompts: the last turn before each answer, for showing.
        answers: the greedy answers, in the order of the conversations.
        references: what they are compared with, as the chat template writes it; "" of prompts alone.
        measures: every metric by name, these two among them, each with its interval.
        examples: held-out rows that were measured.
    """

    loss: float | None = None
    exact_match: float | None = None
    prompts: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    measures: Mapping[str, Measure] = field(default_factory=dict)
    examples: int = 0

    def with_measures(self, more: Mapping[str, Measure]) -> Evaluation:
        """The same with further metrics."""
        return replace(self, measures={**self.measures, **more})

    def row(self) -> dict[str, float]:
        """{metric: value}, for metrics.jsonl."""
        return {name: found.metric.value for name, found in self.measures.items()}

    def summary(self) -> dict[str, Any]:
        """What result.json says of one side."""
        named = {"loss": self.loss, "exact_match": self.exact_match, "examples": self.examples}
        return {**named, "metrics": as_json(self.measures)}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    max_length_tokens: int,
    max_new_tokens: int,
    batch_size: int,
    loss_on: LossOn = "completion",
    fits_schema: Callable[[str], bool] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluates `model` as it stands (adapters on or off), in evaluation mode and without gradients.

    Args:
        rows: held-out rows of any kind; what is measured is what a model should come to write of them.
        batch_size: examples in a forward pass; answers are generated for four times as many at once.
        loss_on: the tokens that the loss is over: those that training learns, as `studio.encoding.encode` has them.
        fits_schema: of `studio.json_answers.read_schema`, for the metric schema_valid.
    """
    was_training = model.training
    model.eval()
    found = wanted_sequences(rows)
    examples = [sequence for sequence in asked_sequences(rows) if isinstance(sequence, Example)]
    total = len(found) + len(examples)

    def report(done: int) -> None:
        if progress:
            progress(done, total)

    with torch.inference_mode():
        pairs = [encode(tokenizer, sequence, max_length_tokens, loss_on) for sequence in found]
        losses = _losses(model, tokenizer, pairs, batch_size, report)
        answers = _answers(model, tokenizer, examples, max_new_tokens, 4 * batch_size, lambda n: report(len(found) + n))
    model.train(was_training)
    references = tuple(wanted(tokenizer, example) if example.completion else "" for example in examples)
    prompts = tuple(prompt_text(example) for example in examples)
    answered = zip(answers, references, examples, strict=True)
    compared = [(answer, reference) for answer, reference, example in answered if example.completion]
    measures = _measures(losses, answers, compared, fits_schema)
    match = measures.get("exact_match")
    exact_match = match.metric.value if match else None
    loss = losses.ratio if found else None
    return Evaluation(loss, exact_match, prompts, tuple(answers), references, measures, len(rows))


def _measures(
    losses: Scores,
    answers: Sequence[str],
    compared: Sequence[tuple[str, str]],
    fits_schema: Callable[[str], bool] | None,
) -> dict[str, Measure]:
    """Every metric that these rows allow; `compared`: the answers that have a reference, with it."""
    found = {}
    if losses.values:
        found["loss"] = losses
        found["perplexity"] = scores_of("perplexity", losses.values, losses.tokens)
    if compared:
        found["exact_match"] = scores_of("exact_match", [answer.strip() == text for answer, text in compared])
    if answers:
        if fits_schema or (compared and all(is_json(text) for _, text in compared)):
            found["json_valid"] = scores_of("json_valid", list(map(is_json, answers)))
        if fits_schema:
            found["schema_valid"] = scores_of("schema_valid", list(map(fits_schema, answers)))
    return {name: measure(scores) for name, scores in found.items()}


def held_out_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    max_length_tokens: int,
    batch_size: int,
    loss_on: LossOn = "completion",
) -> float:
    """The loss of `evaluate` alone: mean cross-entropy per learned token, in nats."""
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        pairs = [encode(tokenizer, sequence, max_length_tokens, loss_on) for sequence in wanted_sequences(rows)]
        losses = _losses(model, tokenizer, pairs, batch_size, lambda done: None)
    model.train(was_training)
    return losses.ratio


def wanted(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """The answer as the model is trained to write it: some templates put an empty think block before it."""
    prompt, whole = prompt_and_whole(tokenizer, example)
    return str(tokenizer.decode(whole[len(prompt) :], skip_special_tokens=True)).strip()


def prompt_text(example: Example) -> str:
    """The last user turn, for showing."""
    return example.prompt[-1].content


def _losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[list[int], list[int]]],
    batch_size: int,
    report: Callable[[int], None],
) -> Scores:
    """Summed cross-entropy in nats and number of learned tokens of each pair of ids and labels."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
    sums, counts = [0.0] * len(pairs), [0] * len(pairs)
    decoder, head = decoder_and_head(model)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = [pairs[i] for i in chosen]
        ids, labels = _padded(batch, tokenizer.pad_token_id, model.device)
        mask = (torch.arange(ids.shape[1], device=ids.device) < _lengths(batch, ids.device)[:, None]).long()
        hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
        learned = labels[:, 1:] != IGNORED
        losses = torch.zeros(learned.shape, dtype=torch.float64)
        losses[learned.cpu()] = _cross_entropies(head, hidden[learned], labels[:, 1:][learned]).double().cpu()
        for i, loss, count in zip(chosen, losses.sum(1).tolist(), learned.sum(1).tolist(), strict=True):
            sums[i], counts[i] = loss, count
        report(min(start + batch_size, len(order)))
    return scores_of("loss", sums, counts)


def decoder_and_head(model: Any) -> tuple[Any, Any]:
    """The decoder below the output head, and what makes logits of its states; a PeftModel's adapters stay as they are.

    GraniteMoE divides its logits by `logits_scaling`; no other family does anything after the head.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    head, scale = inner.get_output_embeddings(), getattr(inner.config.get_text_config(), "logits_scaling", None) or 1.0
    return inner.model, head if scale == 1 else lambda hidden: head(hidden) / scale


def _cross_entropies(head: Any, hidden_PH: Tensor, targets_P: Tensor) -> Tensor:
    """Cross-entropy in nats of each of P positions, logits in chunks."""
    pairs = zip(hidden_PH.split(LOGITS_CHUNK_TOKENS), targets_P.split(LOGITS_CHUNK_TOKENS), strict=True)
    found = [torch.nn.functional.cross_entropy(head(h).float(), t, reduction="none") for h, t in pairs]
    return torch.cat(found) if found else targets_P.new_zeros(0, dtype=torch.float32)


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
    prompts = [prompt_ids(tokenizer, example) for example in examples]
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
