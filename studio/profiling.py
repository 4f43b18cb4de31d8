"""A sample of examples through a model's routers, counted: how a router profile comes about."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adapters.layouts import layout_for
from adapters.router_profile import RouterProfile
from adapters.routing import Counts, count_routing, watch_routing
from studio.data import Sequence as Encodable
from studio.encoding import encode
from studio.profile import SAMPLE_SEED

BATCH_TOKENS = 4096
"""Padded tokens of one forward pass."""

MOST_SOURCES = 32
OTHER_SOURCES = "(other sources)"
"""Some data sets name a source in every row; so many sources are told apart, and the rest are one."""


@dataclass(frozen=True)
class Sample:
    """Token ids of the drawn examples, and the number of the data source of each, in `sources`."""

    rows: tuple[tuple[int, ...], ...]
    numbers: tuple[int, ...]
    sources: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return sum(len(row) for row in self.rows)


@dataclass(frozen=True)
class Counted:
    """What was counted, and in which layers; `bound_to` makes a profile of it."""

    counts: Counts
    layers: tuple[int, ...]
    top_k: int
    sources: tuple[str, ...]

    def bound_to(self, base: str, data: str, seed: int, wanted_tokens: int, shared_experts: int) -> RouterProfile:
        """The profile, bound to the fingerprints of base and data."""
        arrays = {name: tensor.numpy() for name, tensor in vars(self.counts).items() if tensor is not None}
        of_model = (self.layers, self.top_k, shared_experts, self.sources)
        return RouterProfile(base, data, seed, wanted_tokens, *of_model, **arrays)


def draw_sample(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Encodable], max_length_tokens: int, wanted_tokens: int
) -> Sample:
    """Examples in a random, fixed order until there are `wanted_tokens` tokens; the last one is cut there.

    Prompt and answer as in training, cut to `max_length_tokens`. All examples where they have fewer tokens.
    """
    order = list(range(len(examples)))
    random.Random(SAMPLE_SEED).shuffle(order)
    rows: list[tuple[int, ...]] = []
    named: list[str] = []
    left = wanted_tokens
    for place in order:
        if left <= 0:
            break
        ids = encode(tokenizer, examples[place], max_length_tokens)[0][:left]
        rows.append(tuple(ids))
        named.append(examples[place].source)
        left -= len(ids)
    return Sample(tuple(rows), *_numbered(named))


def _numbered(named: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The number of each row's source, and the names by number: the most frequent ones, all others as one."""
    frequent = [name for name, _ in Counter(named).most_common(MOST_SOURCES + 1)]
    kept = sorted(frequent if len(frequent) <= MOST_SOURCES else frequent[: MOST_SOURCES - 1])
    sources = kept if len(frequent) <= MOST_SOURCES else [*kept, OTHER_SOURCES]
    numbers = {name: number for number, name in enumerate(kept)}
    return tuple(numbers.get(name, len(kept)) for name in named), tuple(sources)


def profile_routing(
    model: PreTrainedModel,
    sample: Sample,
    pad_id: int,
    progress: Callable[[int, int], None] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    pairs: bool = True,
) -> Counted:
    """Sums over every token of the sample, in evaluation mode and without gradients; the output head is not run.

    Args:
        model: as it stands, adapters on or off.
        progress: called with (tokens done, tokens in all).
        batch_tokens: padded tokens of one forward pass, where one row has no more.
        pairs: count which experts are chosen together, too.
    """
    inner: Any = model
    inner = inner.get_base_model() if hasattr(model, "get_base_model") else inner
    was_training, total, done = model.training, sample.tokens, 0
    counts: Counts | None = None
    model.eval()
    layout = layout_for(inner.config.model_type)
    with torch.inference_mode(), watch_routing(model, layout) as seen:
        for rows, numbers in _batches(sample, batch_tokens):
            ids, kept = _padded(rows, pad_id, inner.device)
            seen.clear()
            inner.model(input_ids=ids, attention_mask=kept.long(), use_cache=False)
            sources = torch.tensor(numbers, device=ids.device).unsqueeze(1).expand_as(ids).flatten()
            found = count_routing(seen, kept.flatten(), sources, len(sample.sources), pairs)
            counts = found if counts is None else counts + found
            done += sum(map(len, rows))
            if progress:
                progress(done, total)
        layers, top_k = tuple(routing.layer for routing in seen), int(seen[0].experts.shape[1])
    model.train(was_training)
    assert counts is not None, "files without rows are refused"
    return Counted(counts, layers, top_k, sample.sources)


def _batches(sample: Sample, batch_tokens: int) -> Iterator[tuple[list[tuple[int, ...]], list[int]]]:
    """Rows of about one length together, as many as `batch_tokens` holds."""
    order = sorted(range(len(sample.rows)), key=lambda place: -len(sample.rows[place]))
    while order:
        size = max(1, batch_tokens // len(sample.rows[order[0]]))
        chosen, order = order[:size], order[size:]
        yield [sample.rows[place] for place in chosen], [sample.numbers[place] for place in chosen]


def _padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (rows, longest) and what is no padding, bool of the same shape."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(longest, device=device) < lengths.unsqueeze(1)
