"""The studio's own encoding of rows with tool calls and reasoning is what TRL would have made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, Llama4ForCausalLM
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from studio.base import EMBEDDED_DIR
from studio.data import Example
from studio.data.formats import convert
from studio.encoding import encode

TEMPLATE = """{{- bos_token -}}
{%- if tools %}{{ tools | tojson }}{% endif -%}
{%- for message in messages -%}
<|header_start|>{{ message.role }}<|header_end|>
{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif -%}
{{- message.content -}}
{%- for call in message.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor -%}
<|eot|>
{%- endfor -%}
{%- if add_generation_prompt %}<|header_start|>assistant<|header_end|>{% endif -%}"""


def row(arguments: dict[str, Any], tools: list[dict[str, Any]] | None = None) -> Example:
    call = {"function": {"name": "look_up", "arguments": arguments}}
    turns = [
        {"role": "user", "content": "Where is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "look first"},
        {"role": "tool", "name": "look_up", "content": "Marlow"},
        {"role": "assistant", "content": "<think>found</think>In Marlow."},
    ]
    found = convert({"messages": turns, "tools": tools or []}, ("example",))[1]
    assert isinstance(found, Example)
    return found


ROWS = [
    row({"asset": "PMP-1"}),
    row({"site": "Marlow", "deep": {"a": [1, "x"]}}, [{"name": "look_up", "parameters": {"type": "object"}}]),
    row({"asset": 7}, [{"name": "other"}]),
    row({}),
]


def dataset_of(rows: list[Example]) -> Dataset:
    """The rows as TRL reads them.

    `Dataset.from_list` alone would keep the columns of the first row only, so that all tools are lost where it has
    none, and Arrow would give every tool call the arguments of all others, as null.
    """
    found = [row.as_row() for row in rows]
    columns = dict.fromkeys(name for row in found for name in row)
    return Dataset.from_list([{name: row.get(name) for name in columns} for row in found], on_mixed_types="use_json")


def test_the_trainers_tokens_are_the_studios(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_DIR)
    tokenizer.chat_template = TEMPLATE
    trainer = SFTTrainer(
        model=Llama4ForCausalLM.from_pretrained(EMBEDDED_DIR, dtype=torch.float32),
        args=SFTConfig(output_dir=str(tmp_path), max_length=512, completion_only_loss=True, use_cpu=True, report_to=[]),
        train_dataset=dataset_of(ROWS),
        processing_class=tokenizer,
    )
    for trained, example in zip(trainer.train_dataset, ROWS, strict=True):
        ids, labels = encode(tokenizer, example, 512)
        assert trained["input_ids"] == ids
        assert trained["labels"] == labels
        assert "null" not in tokenizer.decode(ids)


@pytest.mark.parametrize("example", ROWS[:2])
def test_what_is_written_holds_every_part_of_the_row(example: Example) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_DIR)
    tokenizer.chat_template = TEMPLATE
    text = tokenizer.decode(encode(tokenizer, example, 512)[0])
    for part in ("look first", "look_up{", "Marlow", "<think>found</think>In Marlow."):
        assert part in text
