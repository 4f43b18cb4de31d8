"""Sequences as token ids by the model's own chat template, and which of the tokens are learned.

One encoding for training, evaluation, profile and what is shown of a mask.
"""

from __future__ import annotations

from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerBase

from studio.chat_template import EARLIER_TURN
from studio.data import Example, PlainText, Sequence
from studio.data.lengths import problem_of
from studio.data.rows import as_turns
from studio.errors import DataError

IGNORED = -100
LossOn = Literal["completion", "assistant", "all"]


def encode(
    tokenizer: PreTrainedTokenizerBase, sequence: Sequence, max_length_tokens: int, loss_on: LossOn = "completion"
) -> tuple[list[int], list[int]]:
    """(input ids, labels) of one sequence; the label of a token that is not learned is -100.

    Args:
        loss_on: completion: what comes after the prompt. assistant: every turn of the assistant, those in the prompt
            too that are `learned`. all: every token. Of a PlainText every token is learned.

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
    """Places of the tokens that the assistant wrote in the prompt, in turns that are learned."""
    found: list[int] = []
    for number, turn in enumerate(example.prompt):
        if turn.role != "assistant" or not turn.learned:
            continue
        before = template(tokenizer, example, example.prompt[:number], add_generation_prompt=True)
        after = template(tokenizer, example, example.prompt[: number + 1], add_generation_prompt=False)
        if whole[: len(after)] != after or after[: len(before)] != before:
            raise DataError([problem_of(example, "", EARLIER_TURN)])
        found += range(len(before), len(after))
    return found


def prompt_and_whole(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, up to where the answer starts, and of the whole conversation, which begins with them.

    Where the last characters of the prompt and the first of the answer are one token, the answer starts with that.
    """
    prompt = prompt_ids(tokenizer, example)
    whole = template(tokenizer, example, example.turns, add_generation_prompt=False)
    common = next((place for place, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    return prompt[:common], whole


def prompt_ids(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[int]:
    """Token ids of the prompt, up to where the answer starts."""
    return template(tokenizer, example, example.prompt, add_generation_prompt=True)


def template(tokenizer: PreTrainedTokenizerBase, example: Example, turns: Any, **options: Any) -> list[int]:
    """Token ids of `turns` of the example, by the model's chat template, which also gets the example's tools."""
    if example.tools:
        options["tools"] = [dict(tool) for tool in example.tools]
    rendered = tokenizer.apply_chat_template(as_turns(turns), tokenize=True, return_dict=False, **options)
    return cast(list[int], rendered)
