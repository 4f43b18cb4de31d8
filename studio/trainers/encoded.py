"""The rows of a job as token ids, in the columns that TRL's trainers read. The tokens are those of studio.encoding.

    dataset(recipe, rows, encoded)      of rows in memory, or of those that are streamed while the trainer runs
    encoded(row) ─▶ {column: ids}       one of the functions below: what a method reads of a row

TRL would tokenise by itself, with rules of its own for each trainer; so that training, evaluation and what is shown of
a mask are of the same tokens, it is handed ids and does nothing but batch them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from studio.data import Example, Labelled, Preference, Row, sequences
from studio.data.curriculum import phases_of
from studio.data.lengths import problem_of
from studio.data.reading import Reading
from studio.data.rows import row_of
from studio.data.streaming import endless_rows
from studio.encoding import IGNORED, LossOn, encode
from studio.errors import DataError
from studio.methods import METHODS
from studio.pairs import pair_ids, prompt_and_answer
from studio.plan import row_counter
from studio.recipe import Recipe

Columns = dict[str, Any]


def dataset(recipe: Recipe, rows: Iterable[Row], encoded: Callable[[Row], Columns]) -> Dataset | IterableDataset:
    """The rows as a trainer reads them; of streamed data all that the sources hold, whatever `rows` has of them.

    Raises:
        DataError: while a stream is read, at a bad row, or at one of which nothing would be learned.
    """
    if not recipe.data.streaming:
        return Dataset.from_list([encoded(row) for row in rows])
    limit = recipe.data.max_length_tokens

    def stream() -> Iterator[Columns]:
        for row in streamed_rows(recipe):
            columns = encoded(row)
            if not _is_learned(columns):
                raise DataError([problem_of(row, "", NOTHING_LEARNED.format(limit))])
            yield columns

    return IterableDataset.from_generator(stream)


NOTHING_LEARNED = (
    "holds nothing to learn once it is cut to data.max_length_tokens, {}: its prompt fills that, or both sides "
    "of the pair begin alike so far; raise it, or leave the row out"
)


def _is_learned(columns: Columns) -> bool:
    if "labels" in columns:
        return any(label != IGNORED for label in columns["labels"])
    if "label" in columns:
        return bool(columns["completion_ids"])
    return bool(columns["chosen_ids"] != columns["rejected_ids"])


def streamed_rows(recipe: Recipe) -> Iterator[Row]:
    """The rows of a recipe whose data is streamed, without end; for KTO each side of a pair by itself.

    Raises:
        DataError: at a bad row.
    """
    count = row_counter(recipe) if any(phase.until_tokens for phase in recipe.data.phases) else None
    tokens_of = (lambda row: count([row])[0]) if count else None
    data, method = recipe.data, recipe.training.method
    phases = phases_of(recipe, [1] * len(data.sources))  # sizes are not read: each source has a weight
    kinds, apart = METHODS[method].rows, method == "kto"
    found = endless_rows(
        data.sources, phases, kinds, Reading.of(recipe), recipe.training.seed, tokens_of=tokens_of, apart=apart
    )
    return map(row_of, found)


# -------------------------------------------------------------------- what a method reads of a row


def labelled_tokens(tokenizer: PreTrainedTokenizerBase, max_length_tokens: int, loss_on: LossOn, row: Row) -> Columns:
    """`input_ids` and `labels`, for SFT: what `encode` gives."""
    (sequence,) = sequences([row])
    ids, labels = encode(tokenizer, sequence, max_length_tokens, loss_on)
    return {"input_ids": ids, "labels": labels}


def pair(tokenizer: PreTrainedTokenizerBase, max_length_tokens: int, row: Row) -> Columns:
    """`prompt_ids`, `chosen_ids`, `rejected_ids`, for DPO."""
    assert isinstance(row, Preference)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return dict(zip(names, pair_ids(tokenizer, row, max_length_tokens), strict=True))


def whole_pair(tokenizer: PreTrainedTokenizerBase, max_length_tokens: int, row: Row) -> Columns:
    """`chosen_ids`, `rejected_ids` with their prompts, for reward models."""
    assert isinstance(row, Preference)
    prompt, chosen, rejected = pair_ids(tokenizer, row, max_length_tokens)
    return {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}


def side_by_side(tokenizer: PreTrainedTokenizerBase, max_length_tokens: int, row: Row) -> Columns:
    """Ids, attention masks and labels of both sides, for ORPO and CPO, which are older than TRL's other trainers."""
    assert isinstance(row, Preference)
    prompt, chosen, rejected = pair_ids(tokenizer, row, max_length_tokens)
    columns: Columns = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        columns[f"{side}_input_ids"] = prompt + answer
        columns[f"{side}_attention_mask"] = [1] * len(prompt + answer)
        columns[f"{side}_labels"] = [IGNORED] * len(prompt) + answer
    return columns


def labelled_answer(tokenizer: PreTrainedTokenizerBase, max_length_tokens: int, row: Row) -> Columns:
    """`prompt_ids`, `completion_ids`, `label`, for KTO."""
    assert isinstance(row, Labelled)
    (example,) = sequences([row])
    assert isinstance(example, Example)
    prompt, completion = prompt_and_answer(tokenizer, example, max_length_tokens)
    return {"prompt_ids": prompt, "completion_ids": completion, "label": row.label}
