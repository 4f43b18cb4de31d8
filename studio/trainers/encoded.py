"""The rows of a job as token ids, in the columns that TRL's trainers read. The tokens are those of studio.encoding.

TRL would tokenise by itself, with rules of its own for each trainer; so that training, evaluation and what is shown of
a mask are of the same tokens, it is handed ids and does nothing but batch them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from studio.data import Example, Labelled, Preference, Row, sequences
from studio.data.rows import sequence_of
from studio.encoding import LossOn, encode
from studio.pairs import pair_ids, prompt_and_answer


def labelled_sequences(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row], max_length_tokens: int, loss_on: LossOn
) -> Dataset:
    """`input_ids` and `labels`, for SFT: what `encode` gives."""
    encoded = [encode(tokenizer, sequence, max_length_tokens, loss_on) for sequence in sequences(rows)]
    return Dataset.from_dict({"input_ids": [ids for ids, _ in encoded], "labels": [labels for _, labels in encoded]})


def labelled_stream(
    tokenizer: PreTrainedTokenizerBase,
    rows: Callable[[], Iterator[dict[str, Any]]],
    max_length_tokens: int,
    loss_on: LossOn,
) -> IterableDataset:
    """The same of rows that are read while the trainer runs.

    Args:
        rows: starts to read them, as TRL reads them: what `Example.as_row` and `PlainText.as_row` give; without end.
    """

    def encoded() -> Iterator[dict[str, list[int]]]:
        for row in rows():
            ids, labels = encode(tokenizer, sequence_of(row), max_length_tokens, loss_on)
            yield {"input_ids": ids, "labels": labels}

    return IterableDataset.from_generator(encoded)


def pairs(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length_tokens: int) -> Dataset:
    """`prompt_ids`, `chosen_ids`, `rejected_ids`, for DPO."""
    found = [pair_ids(tokenizer, row, max_length_tokens) for row in rows if isinstance(row, Preference)]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Dataset.from_dict(dict(zip(names, zip(*found, strict=True), strict=True)))


def whole_pairs(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length_tokens: int) -> Dataset:
    """`chosen_ids`, `rejected_ids` with their prompts, for reward models."""
    found = [pair_ids(tokenizer, row, max_length_tokens) for row in rows if isinstance(row, Preference)]
    return Dataset.from_dict({"chosen_ids": [p + c for p, c, _ in found], "rejected_ids": [p + r for p, _, r in found]})


def side_by_side(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length_tokens: int) -> Dataset:
    """Ids, attention masks and labels of both sides, for ORPO and CPO, which are older than TRL's other trainers."""
    columns: dict[str, list[list[int]]] = {}
    for row in pairs(tokenizer, rows, max_length_tokens):
        prompt = row["prompt_ids"]
        columns.setdefault("prompt_input_ids", []).append(prompt)
        columns.setdefault("prompt_attention_mask", []).append([1] * len(prompt))
        for side in ("chosen", "rejected"):
            answer = row[f"{side}_ids"]
            columns.setdefault(f"{side}_input_ids", []).append(prompt + answer)
            columns.setdefault(f"{side}_attention_mask", []).append([1] * len(prompt + answer))
            columns.setdefault(f"{side}_labels", []).append([-100] * len(prompt) + answer)
    return Dataset.from_dict(columns)


def labelled_answers(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length_tokens: int, seed: int
) -> Dataset:
    """`prompt_ids`, `completion_ids`, `label`, for KTO, in an order drawn from `seed`: TRL takes it as it is.

    A pair becomes two rows, a wanted and an unwanted one.
    """
    found: list[tuple[list[int], list[int], bool]] = []
    for row in rows:
        labels = (True, False) if isinstance(row, Preference) else (isinstance(row, Labelled) and row.label,)
        for sequence, label in zip(sequences([row]), labels, strict=True):
            assert isinstance(sequence, Example)
            found.append((*prompt_and_answer(tokenizer, sequence, max_length_tokens), label))
    random.Random(seed).shuffle(found)
    names = ("prompt_ids", "completion_ids", "label")
    return Dataset.from_dict(dict(zip(names, zip(*found, strict=True), strict=True)))
