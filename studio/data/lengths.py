"""How many tokens rows have by the model's own tokenizer, counted without torch and without the chat template.

The whole of a row counts 8 tokens a turn for the template. Of a prompt the texts alone are counted: one that fills
`data.max_length_tokens` by itself is too long whatever the template adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from studio.data.rows import Example, PlainText, Row, sequences
from studio.errors import CheckpointError, Problem

TEMPLATE_TOKENS = 8
"""Of a turn, for what the chat template writes around it."""


class TokenCounter:
    """Counts tokens by the tokenizer.json in `directory`.

    Raises:
        CheckpointError: there is none that can be read.
    """

    def __init__(self, directory: Path):
        from tokenizers import Tokenizer

        try:
            self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # what the Rust library raises has no narrower class
            raise CheckpointError(directory / "tokenizer.json", [f"cannot be read: {error}"]) from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        """Tokens of each row, of a pair the longer side."""
        sides = [[_texts(side) for side in sequences([row])] for row in rows]
        counts = iter(self._counts(["\n".join(texts) for of_row in sides for texts in of_row], True))
        return [max(next(counts) + TEMPLATE_TOKENS * len(texts) for texts in of_row) for of_row in sides]

    def prompt_lengths(self, rows: Sequence[Row]) -> list[int]:
        """Tokens of each row's prompt, at least; 0 of plain text."""
        texts = ["" if isinstance(row, PlainText) else "\n".join(t.content.strip() for t in row.prompt) for row in rows]
        return self._counts(texts, False)

    def long_prompts(
        self, rows: Sequence[Row], lengths: Sequence[int], max_length_tokens: int
    ) -> list[tuple[int, Problem]]:
        """(index, problem) of the rows whose prompt alone fills `max_length_tokens`."""
        long = [number for number, length in enumerate(lengths) if length > max_length_tokens]
        prompts = self.prompt_lengths([rows[number] for number in long])
        return [
            (number, problem_of(rows[number], "prompt", too_long(tokens, max_length_tokens)))
            for number, tokens in zip(long, prompts, strict=True)
            if tokens >= max_length_tokens
        ]

    def _counts(self, texts: Sequence[str], special: bool) -> list[int]:
        return [len(found) for found in self.tokenizer.encode_batch_fast(texts, add_special_tokens=special)]


def too_long(tokens: int, max_length_tokens: int) -> str:
    """What is said of a prompt that leaves nothing of its answer to be learned."""
    allowed = f"allowed: fewer than data.max_length_tokens, {max_length_tokens}; raise it or shorten the prompt"
    return f"has {tokens} tokens; {allowed}"


def problem_of(row: Row, field: str, message: str) -> Problem:
    """A problem with the file and line of the row."""
    file, line, counted = row.place or (None, None, "line")
    return Problem(field, line, message, file, counted)


def _texts(sequence: Example | PlainText) -> list[str]:
    if isinstance(sequence, Example):
        return [turn.thinking + turn.content + "".join(map(str, turn.tool_calls)) for turn in sequence.turns]
    return [sequence.text]
