"""Preference pairs as token ids: the prompt, and what each side goes on with."""

from __future__ import annotations

from collections.abc import Sequence as Many

from transformers import PreTrainedTokenizerBase

from studio.chat_template import CUT_ALIKE
from studio.data import Example, Preference, Row, sequences
from studio.data.lengths import problem_of
from studio.encoding import prompt_and_whole
from studio.errors import SHOWN_PROBLEMS, DataError

PairIds = tuple[list[int], list[int], list[int]]
"""Token ids of the prompt, of the preferred answer, and of the other."""


def pair_ids(tokenizer: PreTrainedTokenizerBase, pair: Preference, max_length_tokens: int) -> PairIds:
    """The pair, each side cut to `max_length_tokens` with its prompt.

    Where a template writes the prompt alone otherwise than with an answer, the answers begin where the two part.
    """
    (prompt, chosen), (_, rejected) = (
        prompt_and_whole(tokenizer, side) for side in sequences([pair]) if isinstance(side, Example)
    )
    start = min(common_start(prompt, chosen), common_start(prompt, rejected))
    return chosen[:start], chosen[start:max_length_tokens], rejected[start:max_length_tokens]


def prompt_and_answer(
    tokenizer: PreTrainedTokenizerBase, example: Example, max_length_tokens: int
) -> tuple[list[int], list[int]]:
    """The prompt and the answer, cut to `max_length_tokens` together."""
    prompt, whole = prompt_and_whole(tokenizer, example)
    start = common_start(prompt, whole)
    return whole[:start], whole[start:max_length_tokens]


def common_start(one: Many[int], other: Many[int]) -> int:
    """How many tokens the two begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def check_pairs(tokenizer: PreTrainedTokenizerBase, rows: Many[Row], max_length_tokens: int) -> None:
    """Refuses pairs whose sides are the same once they are cut to `max_length_tokens`: they prefer nothing.

    Raises:
        DataError: the first 20 of them, and how many more.
    """
    same = [row for row in rows if isinstance(row, Preference) and _alike(tokenizer, row, max_length_tokens)]
    problems = [problem_of(row, "", CUT_ALIKE.format(max_length_tokens)) for row in same[:SHOWN_PROBLEMS]]
    if problems:
        raise DataError(problems, len(same) - len(problems))


def _alike(tokenizer: PreTrainedTokenizerBase, pair: Preference, max_length_tokens: int) -> bool:
    _, chosen, rejected = pair_ids(tokenizer, pair, max_length_tokens)
    return chosen == rejected
