"""The base's loss on every row of a recipe's data: how hard each one is. One load of the base, one pass over the rows.

make_scores(recipe) ─▶ nats a token, kept in the user's cache; studio/data/hard_examples.py reads them
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from studio.data import Row, sequences, wanted_sequences
from studio.data import Sequence as Encodable
from studio.data.hard_examples import keep_scores, scores_path
from studio.data.of_recipe import refused, source_rows
from studio.data.reading import Reading, refuse
from studio.encoding import IGNORED, encode
from studio.errors import DataError, Problem, ProfileError
from studio.evaluation import LOGITS_CHUNK_TOKENS, decoder_and_head

if TYPE_CHECKING:
    from studio.recipe import Recipe

BATCH_TOKENS = 4096
"""Padded tokens of one forward pass, where one row has no more."""

Progress = Callable[[int, int], None]


def make_scores(recipe: Recipe, progress: Progress | None = None, loading: Progress | None = None) -> list[list[float]]:
    """Scores every row of the recipe's sources on the base as the recipe holds it, and keeps the scores.

    Args:
        progress: called with (rows done, rows in all). loading: with (bytes read, bytes in all) before that.

    Returns:
        The scores of each source's rows, in their order, in nats a token.

    Raises:
        StudioError: bad data or base; the data changed meanwhile.
    """
    from studio.base_model import load_recipe_base

    if recipe.data.streaming:
        message = "streamed data has no list of rows to score; set data.streaming to false"
        raise DataError([Problem("data.streaming", None, message)])
    sources, bad = source_rows(recipe, Reading.of(recipe))
    refuse([refused(recipe, rows, found) for rows, found in zip(sources, bad, strict=True)])
    bound = scores_path(recipe)
    model, tokenizer = load_recipe_base(recipe, loading)
    rows = [row for source in sources for row in source]
    flat = iter(row_losses(model, tokenizer, rows, recipe.data.max_length_tokens, progress))
    scores = [[next(flat) for _ in source] for source in sources]
    if scores_path(recipe) != bound:
        raise ProfileError("the base or the data changed while the rows were being scored; score them again")
    keep_scores(recipe, scores)
    return scores


def row_losses(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_length_tokens: int,
    progress: Progress | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[float]:
    """Mean cross-entropy in nats of each row's learned tokens, as `studio.evaluation` has it: of a pair the preferred
    answer, of a labelled row its answer, of plain text every token. NaN for a row whose cut leaves no such token.
    """
    pairs = [encode(tokenizer, _scored_side(row), max_length_tokens) for row in rows]
    losses, done, was_training = [0.0] * len(rows), 0, model.training
    decoder, head = decoder_and_head(model)
    model.eval()
    with torch.inference_mode():
        for batch in _batches([len(ids) for ids, _ in pairs], batch_tokens):
            found = _losses(decoder, head, [pairs[i] for i in batch], int(tokenizer.pad_token_id), model.device)
            for place, loss in zip(batch, found, strict=True):
                losses[place] = loss
            done += len(batch)
            if progress:
                progress(done, len(rows))
    model.train(was_training)
    return losses


def _scored_side(row: Row) -> Encodable:
    return (wanted_sequences([row]) or sequences([row]))[0]


def _batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Places of rows of about one length together, the longest first, as many as `batch_tokens` holds."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    batches = []
    while order:
        size = max(1, batch_tokens // max(1, lengths[order[0]]))
        batches.append(order[:size])
        order = order[size:]
    return batches


def _losses(
    decoder: Any, head: Any, pairs: Sequence[tuple[list[int], list[int]]], pad_id: int, device: torch.device
) -> list[float]:
    """The loss of each of B rows of at most T tokens; logits of 256 positions at a time."""
    longest = max(len(ids) for ids, _ in pairs)
    ids_BT = torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids, _ in pairs], device=device)
    labels_BT = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in pairs], device=device)
    lengths_B = torch.tensor([len(ids) for ids, _ in pairs], device=device)
    mask_BT = (torch.arange(longest, device=device) < lengths_B[:, None]).long()
    hidden = decoder(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state[:, :-1]
    learned = labels_BT[:, 1:] != IGNORED
    each = _cross_entropies(head, hidden[learned], labels_BT[:, 1:][learned])
    summed = torch.zeros(len(pairs), dtype=torch.float64, device=device)
    summed.index_add_(0, learned.nonzero()[:, 0], each)
    return list((summed / learned.sum(1)).tolist())


def _cross_entropies(head: Any, hidden_PH: Tensor, targets_P: Tensor) -> Tensor:
    """(P,) float64 nats of P positions."""
    pieces = zip(hidden_PH.split(LOGITS_CHUNK_TOKENS), targets_P.split(LOGITS_CHUNK_TOKENS), strict=True)
    losses = [torch.nn.functional.cross_entropy(head(h).float(), t, reduction="none") for h, t in pieces]
    return torch.cat(losses).double() if losses else torch.zeros(0, dtype=torch.float64, device=targets_P.device)
