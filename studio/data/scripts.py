"""Which scripts a text is written in, from the Unicode names of its letters."""

from __future__ import annotations

import string
import unicodedata
from collections import Counter
from functools import cache

LOOKED_AT_CHARACTERS = 2000
"""Of each text."""

ASCII_LETTERS = string.ascii_letters.encode()
SCRIPTS = {"CJK": "Han", "IDEOGRAPHIC": "Han", "HALFWIDTH": "Katakana", "FULLWIDTH": "Latin"}
"""First words of Unicode names that are not the script's own name."""


class Scripts:
    """Counts the characters of texts."""

    def __init__(self) -> None:
        self.characters: Counter[str] = Counter()
        self.ascii_letters = 0

    def add(self, text: str) -> None:
        """Counts the first characters of `text`."""
        text = text[:LOOKED_AT_CHARACTERS]
        if text.isascii():  # as most are: a tenth of the time
            self.ascii_letters += len(text) - len(text.encode("ascii").translate(None, ASCII_LETTERS))
        else:
            self.characters.update(text)

    def shares(self) -> dict[str, float]:
        """Script → share of the letters, the most used first."""
        found = Counter({"Latin": self.ascii_letters} if self.ascii_letters else {})
        for character, count in self.characters.items():
            if name := script_of(character):
                found[name] += count
        total = found.total()
        return {name: count / total for name, count in found.most_common()}


@cache
def script_of(character: str) -> str:
    """ "Latin", "Cyrillic", "Han", …; "" for what is no letter."""
    if not character.isalpha():
        return ""
    first = unicodedata.name(character, "").split(" ")[0].split("-")[0]
    return SCRIPTS.get(first, first.capitalize()) or "Unknown"
