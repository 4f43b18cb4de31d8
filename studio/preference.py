"""Preference on held-out pairs, before and after: accuracy, margin, and the KL divergence from the base.

The accuracy is the share of pairs whose preferred answer the model, as it stands, finds more probable than the other:
the sum of the log-probabilities of its tokens, which is how probable the whole text is and what DPO, KTO and CPO
compare. Sums favour the shorter answer, so the share by the mean per token stands beside it. For a reward model it is
the share of pairs whose preferred side scores higher.

Labelled rows have no other side. What is measured of them is the implicit reward that KTO and DPO train: how much more
probable the model makes an answer than the base does. The base against itself is all ties.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from studio.data import Example, Labelled, Preference, Row
from studio.encoding import IGNORED
from studio.evaluation import LOGITS_CHUNK_TOKENS, decoder_and_head
from studio.metrics import Measure, measure, scores_of
from studio.pairs import pair_ids, prompt_and_answer
from studio.ranking import auc
from studio.reward_model import RewardModel

TokenIds = tuple[list[int], list[int]]
"""Input ids, and labels that are -100 where nothing is learned."""

Progress = Callable[[int, int], None]

TIE_NATS = 1e-4
"""Log-ratios below are rounding, and count as ties."""


def evaluate_preferences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    max_length_tokens: int,
    batch_size: int,
    scores: bool = False,
    progress: Progress | None = None,
) -> dict[str, Measure]:
    """Measures `model` as it stands, in evaluation mode.

    Args:
        rows: of any kind; only pairs are looked at.
        scores: by the reward head instead of log-probabilities.

    Returns:
        By their names in `studio.metrics.METRICS`, nothing where there is no pair:
        preference_accuracy: share of pairs whose preferred side is the more probable one, or scores higher. A tie is
            not a win.
        preference_accuracy_per_token: the same by the mean per token. Not of a reward model.
        preference_margin: mean of the preferred side's log-probability minus the other's, in nats, or of the scores.
        reference_kl: mean KL(model || base) over the tokens of the preferred answers, in nats. Not of a reward model,
            and of a PeftModel alone, whose base is at hand.
    """
    pairs = [pair_ids(tokenizer, row, max_length_tokens) for row in rows if isinstance(row, Preference)]
    if not pairs:
        return {}
    sides = [(p + answer, [IGNORED] * len(p) + answer) for p, *answers in pairs for answer in answers]
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        values = _by_batch(model, sides, batch_size, progress, _scores if scores else answer_logps)
        at_hand = hasattr(model, "disable_adapter") and not scores
        kl = _reference_kls(model, sides[::2], batch_size) if at_hand else None
    model.train(was_training)
    margins = values[::2] - values[1::2]
    found = {
        "preference_accuracy": scores_of("preference_accuracy", (margins > 0).tolist()),
        "preference_margin": scores_of("preference_margin", margins.tolist()),
    }
    if not scores:
        lengths = torch.tensor([sum(label != IGNORED for label in labels) for _, labels in sides])
        per_token = values / lengths.clamp(min=1)
        better = (per_token[::2] > per_token[1::2]).tolist()
        found["preference_accuracy_per_token"] = scores_of("preference_accuracy_per_token", better)
    if kl is not None:
        found["reference_kl"] = scores_of("reference_kl", *kl)
    return {name: measure(each) for name, each in found.items()}


def evaluate_labels(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    max_length_tokens: int,
    batch_size: int,
    progress: Progress | None = None,
) -> dict[str, Measure]:
    """Measures a PeftModel on labelled rows, by log P(answer) - log P_base(answer), in evaluation mode.

    Returns:
        Nothing where there is no labelled row; else, by their names in `studio.metrics.METRICS`:
        label_accuracy: share of the rows whose log-ratio is positive where the answer is wanted, negative where it is
            not. A tie is neither.
        label_auc: the share of all pairs of a wanted and an unwanted row in which the wanted one has the larger
            log-ratio, a tie counting half; 0.5 of the base itself. Not where all labels are the same.
    """
    labelled = [row for row in rows if isinstance(row, Labelled)]
    if not labelled:
        return {}
    examples = [Example(row.prompt, row.completion, tools=row.tools) for row in labelled]
    parts = [prompt_and_answer(tokenizer, example, max_length_tokens) for example in examples]
    sides = [(prompt + answer, [IGNORED] * len(prompt) + answer) for prompt, answer in parts]
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        ratios = _by_batch(model, sides, batch_size, progress, answer_logps)
        with model.disable_adapter():
            ratios -= _by_batch(model, sides, batch_size, None, answer_logps)
    model.train(was_training)
    values = [0.0 if abs(ratio) < TIE_NATS else ratio for ratio in ratios.tolist()]
    pairs = list(zip(values, (row.label for row in labelled), strict=True))
    right = [value > 0 if label else value < 0 for value, label in pairs]
    ranked = auc([v for v, label in pairs if label], [v for v, label in pairs if not label])
    found = {"label_auc": ranked} if ranked else {}
    return {**found, "label_accuracy": measure(scores_of("label_accuracy", right))}


def answer_logps(model: Any, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """(N,) float64: summed log-probability of the labelled tokens of each of N rows, in nats."""
    decoder, head = decoder_and_head(model)
    hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    learned = labels[:, 1:] != IGNORED
    targets = labels[:, 1:][learned]
    chunks = zip(hidden[learned].split(LOGITS_CHUNK_TOKENS), targets.split(LOGITS_CHUNK_TOKENS), strict=True)
    losses = [torch.nn.functional.cross_entropy(head(h).float(), t, reduction="none") for h, t in chunks]
    rows = learned.nonzero()[:, 0]
    summed = torch.zeros(len(ids), dtype=torch.float64, device=rows.device)
    return summed.index_add_(0, rows, -torch.cat(losses).double()).cpu()


def _scores(model: Any, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    scores: Tensor = RewardModel(model)(ids, mask).logits
    return scores[:, 0].double().cpu()


def reference_kl(model: Any, probe: Sequence[TokenIds], batch_size: int = 8) -> float:
    """Mean over the labelled tokens of KL(model || base) of the next token, in nats; adapters off is the base."""
    sums, counts = _reference_kls(model, probe, batch_size)
    return sum(sums) / max(sum(counts), 1)


def _reference_kls(model: Any, probe: Sequence[TokenIds], batch_size: int) -> tuple[list[float], list[int]]:
    """Of each row the summed KL and the number of labelled tokens. Logits of both exist for 256 positions at a time."""
    was_training, sums, counts = model.training, list[float](), list[int]()
    model.eval()
    decoder, head = decoder_and_head(model)
    with torch.no_grad():
        for ids, labels, mask in batches(probe, batch_size, model.device):
            learned = labels[:, 1:] != IGNORED
            inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            now = decoder(**inputs).last_hidden_state[:, :-1][learned]
            with model.disable_adapter():
                base = decoder(**inputs).last_hidden_state[:, :-1][learned]
            parts = zip(now.split(LOGITS_CHUNK_TOKENS), base.split(LOGITS_CHUNK_TOKENS), strict=True)
            each = torch.cat([_kl(head(one), head(other)) for one, other in parts]).double()
            summed = torch.zeros(len(ids), dtype=torch.float64, device=each.device)
            sums += summed.index_add_(0, learned.nonzero()[:, 0], each).tolist()
            counts += learned.sum(1).tolist()
    model.train(was_training)
    return sums, counts


def _kl(logits_PV: Tensor, base_PV: Tensor) -> Tensor:
    """(P,) KL in nats of each position."""
    log_p, log_q = (torch.log_softmax(logits.float(), -1) for logits in (logits_PV, base_PV))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def batches(rows: Sequence[TokenIds], batch_size: int, device: torch.device) -> Any:
    """Padded (ids, labels, mask), each (N, length) int64, in the order of the rows."""
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch], device=device)
        labels = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in batch], device=device)
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch], device=device)
        yield ids, labels, mask


def _by_batch(
    model: Any, sides: Sequence[TokenIds], batch_size: int, progress: Progress | None, value: Callable[..., Tensor]
) -> Tensor:
    """`value` of each row, in the order of the rows; rows of like lengths go together."""
    order = sorted(range(len(sides)), key=lambda i: len(sides[i][0]))
    values, done = torch.zeros(len(sides), dtype=torch.float64), 0
    for batch in batches([sides[i] for i in order], batch_size, model.device):
        found = value(model, *batch)
        values[torch.tensor(order[done : done + len(found)])] = found
        done += len(found)
        if progress:
            progress(done, len(sides))
    return values
