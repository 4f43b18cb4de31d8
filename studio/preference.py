"""Preference on held-out pairs, before and after: accuracy, margin, and the KL divergence from the base.

The accuracy is the share of pairs whose preferred answer the model, as it stands, finds more probable than the other:
the sum of the log-probabilities of its tokens, which is how probable the whole text is and what DPO, KTO and CPO
compare. Sums favour the shorter answer, so the share by the mean per token stands beside it. For a reward model it is
the share of pairs whose preferred side scores higher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from studio.data import Preference, Row
from studio.encoding import IGNORED
from studio.evaluation import LOGITS_CHUNK_TOKENS, decoder_and_head
from studio.pairs import pair_ids
from studio.reward_model import RewardModel

TokenIds = tuple[list[int], list[int]]
"""Input ids, and labels that are -100 where nothing is learned."""

Progress = Callable[[int, int], None]
Z_95 = 1.959964


@dataclass(frozen=True)
class Preferences:
    """Results on held-out pairs.

    Attributes:
        accuracy: share of pairs whose preferred side is the more probable one, or scores higher. A tie is not a win.
        interval: its 95 % interval (Wilson).
        accuracy_per_token: the same by the mean per token; None for a reward model.
        margin: mean of the preferred side's log-probability minus the other's, in nats, or of the scores.
        kl: mean KL(model || base) over the tokens of the preferred answers, in nats; None for a reward model.
        pairs: how many.
    """

    accuracy: float
    interval: tuple[float, float]
    accuracy_per_token: float | None
    margin: float
    kl: float | None
    pairs: int

    def as_metrics(self) -> dict[str, Any]:
        """By the names in metrics.jsonl and result.json."""
        return {
            "preference_accuracy": self.accuracy,
            "preference_interval": list(self.interval),
            "preference_accuracy_per_token": self.accuracy_per_token,
            "preference_margin": self.margin,
            "reference_kl": self.kl,
            "pairs": self.pairs,
        }


def evaluate_preferences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    max_length_tokens: int,
    batch_size: int,
    scores: bool = False,
    progress: Progress | None = None,
) -> Preferences | None:
    """Measures `model` as it stands (a PeftModel, so that its base is at hand), in evaluation mode.

    Args:
        rows: of any kind; only pairs are looked at.
        scores: by the reward head instead of log-probabilities.

    Returns:
        None where there is no pair.
    """
    pairs = [pair_ids(tokenizer, row, max_length_tokens) for row in rows if isinstance(row, Preference)]
    if not pairs:
        return None
    sides = [(p + answer, [IGNORED] * len(p) + answer) for p, *answers in pairs for answer in answers]
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        values = _by_batch(model, sides, batch_size, progress, _scores if scores else answer_logps)
        kl = None if scores else reference_kl(model, sides[::2], batch_size)
    model.train(was_training)
    lengths = torch.tensor([sum(label != IGNORED for label in labels) for _, labels in sides])
    margins = values[::2] - values[1::2]
    per_token = values / lengths.clamp(min=1)
    wins = int((margins > 0).sum())
    return Preferences(
        accuracy=wins / len(pairs),
        interval=wilson_interval(wins, len(pairs)),
        accuracy_per_token=None if scores else float((per_token[::2] > per_token[1::2]).double().mean()),
        margin=float(margins.mean()),
        kl=kl,
        pairs=len(pairs),
    )


def wilson_interval(wins: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), which stays within 0 and 1."""
    share, spread = wins / of, Z_95**2 / of
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


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
    """Mean over the labelled tokens of KL(model || base) of the next token, in nats; adapters off is the base.

    The logits of both exist for 256 positions at a time.
    """
    was_training, summed, count = model.training, 0.0, 0
    model.eval()
    decoder, head = decoder_and_head(model)
    with torch.no_grad():
        for ids, labels, mask in batches(probe, batch_size, model.device):
            learned = labels[:, 1:] != IGNORED
            inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            now = decoder(**inputs).last_hidden_state[:, :-1][learned]
            with model.disable_adapter():
                base = decoder(**inputs).last_hidden_state[:, :-1][learned]
            for one, other in zip(now.split(LOGITS_CHUNK_TOKENS), base.split(LOGITS_CHUNK_TOKENS), strict=True):
                log_p, log_q = (torch.log_softmax(head(hidden).float(), -1) for hidden in (one, other))
                summed += float((log_p.exp() * (log_p - log_q)).sum())
            count += int(learned.sum())
    model.train(was_training)
    return summed / max(count, 1)


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
