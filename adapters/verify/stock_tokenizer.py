"""Tokenizers of model directories in stock transformers, in a process that has none of the studio's code:

    python -I stock_tokenizer.py QUESTION ANSWER

QUESTION  {"directories": [..], "strings": [..], "conversations": [[{"role", "content"}]], "template": a file that
          stands for the first directory's own, or null}
ANSWER    for each directory {"version", "ids": of each string with special tokens as they come, "templated": ids of
          each conversation, "ends": the special tokens behind the last answer, "eos", "bos", "pad": ids or null,
          "size", "error": why the template failed, or null}
"""

import json
import sys
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer


def describe(directory: str, template: str | None, strings: list[str], conversations: list[Any]) -> dict[str, Any]:
    tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if template:
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    templated, ends, error = [], [], None
    if tokenizer.chat_template:
        try:
            for messages in conversations:
                templated.append(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
                ends.append(ending(tokenizer, templated[-1], special))
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
    return {
        "version": transformers.__version__,
        "ids": [list(tokenizer(text).input_ids) for text in strings],
        "templated": templated,
        "ends": ends,
        "error": error,
        "has_template": bool(tokenizer.chat_template),
        "eos": tokenizer.eos_token_id,
        "bos": tokenizer.bos_token_id,
        "pad": tokenizer.pad_token_id,
        "size": len(tokenizer),
    }


def ending(tokenizer: Any, ids: list[int], special: set[int]) -> list[int]:
    """The special tokens at the end of `ids`, white space between and behind them aside."""
    last = len(ids)
    while last and (ids[last - 1] in special or not tokenizer.decode(ids[last - 1]).strip()):
        last -= 1
    return [token for token in ids[last:] if token in special]


def main(question: dict[str, Any]) -> list[dict[str, Any]]:
    strings, conversations = question["strings"], question["conversations"]
    first, *others = question["directories"]
    template = question.get("template")
    return [
        describe(first, template, strings, conversations),
        *(describe(directory, None, strings, conversations) for directory in others),
    ]


if __name__ == "__main__":
    answer = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    assert not {"studio", "adapters", "ui"} & set(sys.modules)
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")
