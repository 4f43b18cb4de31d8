"""Sequences as token ids by the model's own chat template, and which of the tokens are learned.

One encoding for training, evaluation, profile and what is shown of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import TYPE_CHECKING, Any, Literal, cast

from transformers import PreTrainedTokenizerBase

from studio.data import Example, PlainText, RecipeRows, Row, Sequence, recipe_rows, sequences
from studio.data.lengths import long_prompt
from studio.data.of_recipe import refused
from studio.data.reading import refuse
from studio.data.rows import as_turns
from studio.errors import DataError, Problem

if TYPE_CHECKING:
    from studio.recipe import Recipe

IGNORED = -100
LossOn = Literal["completion", "assistant", "all"]


def encode(
    tokenizer: PreTrainedTokenizerBase, sequence: Sequence, max_length_tokens: int, loss_on: LossOn = "completion"
) -> tuple[list[int], list[int]]:
    """(input ids, labels) of one sequence; the label of a token that is not learned is -100.

    Args:
        loss_on: completion: what comes after the prompt. assistant: every turn of the assistant, those in the prompt
            too. all: every token. Of a PlainText every token is learned.

    Raises:
        DataError: the template writes a turn differently once others follow it, so that the assistant's earlier turns
            cannot be told from the rest (with loss_on assistant alone).
    """
    if isinstance(sequence, PlainText):
        ids = cast(list[int], tokenizer(sequence.text)["input_ids"])
        if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
            ids = [*ids, tokenizer.eos_token_id]
        return ids[:max_length_tokens], ids[:max_length_tokens]
    prompt, whole = prompt_and_whole(tokenizer, sequence)
    learned = range(len(whole)) if loss_on == "all" else range(len(prompt), len(whole))
    labels = [token if place in learned else IGNORED for place, token in enumerate(whole)]
    if loss_on == "assistant":
        for place in _earlier_turns(tokenizer, sequence, whole):
            labels[place] = whole[place]
    return whole[:max_length_tokens], labels[:max_length_tokens]


def _earlier_turns(tokenizer: PreTrainedTokenizerBase, example: Example, whole: list[int]) -> list[int]:
    """Places of the tokens that the assistant wrote in the prompt."""
    found: list[int] = []
    for number, turn in enumerate(example.prompt):
        if turn.role != "assistant":
            continue
        before = template(tokenizer, example, example.prompt[:number], add_generation_prompt=True)
        after = template(tokenizer, example, example.prompt[: number + 1], add_generation_prompt=False)
        if whole[: len(after)] != after or after[: len(before)] != before:
            raise DataError(
                [
                    Problem(
                        "",
                        None,
                        "this model's chat template writes an assistant turn differently once others follow it, so "
                        "earlier turns cannot be learned; set training.loss_on to completion",
                    )
                ]
            )
        found += range(len(before), len(after))
    return found


def prompt_and_whole(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, up to where the answer starts, and of the whole conversation."""
    prompt = template(tokenizer, example, example.prompt, add_generation_prompt=True)
    return prompt, template(tokenizer, example, example.turns, add_generation_prompt=False)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[int]:
    """Token ids of the prompt, up to where the answer starts."""
    return template(tokenizer, example, example.prompt, add_generation_prompt=True)


def template(tokenizer: PreTrainedTokenizerBase, example: Example, turns: Any, **options: Any) -> list[int]:
    """Token ids of `turns` of the example, by the model's chat template, which also gets the example's tools."""
    if example.tools:
        options["tools"] = [dict(tool) for tool in example.tools]
    rendered = tokenizer.apply_chat_template(as_turns(turns), tokenize=True, return_dict=False, **options)
    return cast(list[int], rendered)


def split_by_length(
    tokenizer: PreTrainedTokenizerBase, rows: Many[Row], max_length_tokens: int
) -> tuple[list[Row], list[Problem]]:
    """The rows whose prompt leaves room for an answer, and the others: nothing of their answer would be learned."""
    fitting: list[Row] = []
    problems: list[Problem] = []
    for row in rows:
        prompts = [prompt_ids(tokenizer, side) for side in sequences([row])[:1] if isinstance(side, Example)]
        if prompts and len(prompts[0]) >= max_length_tokens:
            problems.append(long_prompt(row.place, len(prompts[0]), max_length_tokens))
        else:
            fitting.append(row)
    return fitting, problems


def rows_of_job(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> RecipeRows:
    """The recipe's rows without those whose prompt alone fills `data.max_length_tokens`; of the held-out ones as many
    as are evaluated.

    Raises:
        DataError: of all of them, under `data.bad_rows: refuse`.
    """
    found, limit = recipe_rows(recipe), recipe.data.max_length_tokens
    train, long = split_by_length(tokenizer, found.train, limit)
    held_out, long_held_out = split_by_length(tokenizer, found.held_out[: recipe.evaluation.examples], limit)
    refuse([refused(recipe, train, long), refused(recipe, held_out, long_held_out)])
    return RecipeRows(train, held_out, (*found.dropped, *long, *long_held_out))
