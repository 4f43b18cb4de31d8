"""Preference on held-out pairs, before and after: accuracy, margin, and the KL divergence from the base.

The accuracy is the share of pairs whose preferred answer the model, as it stands, finds more probable than the other:
the sum of the log-probabilities of its tokens, which is how probable the whole text is and what DPO, KTO and CPO
compare. Sums favour the shorter answer, so the share by the mean per token stands beside it. For a reward model it is
the share of pairs whose preferred side scores higher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from studio.data import Preference, Row
from studio.encoding import IGNORED
from studio.evaluation import LOGITS_CHUNK_TOKENS, decoder_and_head
from studio.metrics import Measure, measure, scores_of
from studio.pairs import pair_ids
from studio.reward_model import RewardModel

TokenIds = tuple[list[int], list[int]]
"""Input ids, and labels that are -100 where nothing is learned."""

Progress = Callable[[int, int], None]


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
    """Measures `model` as it stands (a PeftModel, so that its base is at hand), in evaluation mode.

    Args:
        rows: of any kind; only pairs are looked at.
        scores: by the reward head instead of log-probabilities.

    Returns:
        By their names in `studio.metrics.METRICS`, nothing where there is no pair:
        preference_accuracy: share of pairs whose preferred side is the more probable one, or scores higher. A tie is
            not a win.
        preference_accuracy_per_token: the same by the mean per token. Not of a reward model.
        preference_margin: mean of the preferred side's log-probability minus the other's, in nats, or of the scores.
        reference_kl: mean KL(model || base) over the tokens of the preferred answers, in nats. Not of a reward model.
    """
    pairs = [pair_ids(tokenizer, row, max_length_tokens) for row in rows if isinstance(row, Preference)]
    if not pairs:
        return {}
    sides = [(p + answer, [IGNORED] * len(p) + answer) for p, *answers in pairs for answer in answers]
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        values = _by_batch(model, sides, batch_size, progress, _scores if scores else answer_logps)
        kl = None if scores else _reference_kls(model, sides[::2], batch_size)
    model.train(was_training)
    margins = values[::2] - values[1::2]
    found = {
        "preference_accuracy": scores_of("preference_accuracy", (margins > 0).tolist()),
        "preference_margin": scores_of("preference_margin", margins.tolist()),
    }
    if kl is not None:
        lengths = torch.tensor([sum(label != IGNORED for label in labels) for _, labels in sides])
        per_token = values / lengths.clamp(min=1)
        better = (per_token[::2] > per_token[1::2]).tolist()
        found["preference_accuracy_per_token"] = scores_of("preference_accuracy_per_token", better)
        found["reference_kl"] = scores_of("reference_kl", *kl)
    return {name: measure(each) for name, each in found.items()}


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
