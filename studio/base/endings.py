"""A multiple-choice task of the pretraining domains: which of four endings goes on with a document.

    python -m studio.base.endings > recipes/tasks/domains.jsonl

The wrong endings are those of other documents of the same domain, cut at the same kind of place, so that a model has to
have read the beginning. It shows what fine-tuning makes a base forget.
"""

import json
import random
from collections.abc import Iterator
from itertools import islice

from studio.base.domains import DOMAINS, documents

SEED = 3
"""Neither that of pretraining (0) nor that of `studio.base.measure` (2)."""

ROWS_PER_DOMAIN = 25
CHOICES = 4
ENDING_CHARACTERS = 60
LEAST_CHARACTERS = 60
"""Of a document: each domain writes such, the shortest ones seldom longer."""


def rows(seed: int = SEED) -> Iterator[dict[str, object]]:
    """{"domain", "beginning", "endings", "answer"}: the answer is the place of the right ending."""
    for domain in DOMAINS:
        rng = random.Random(f"{domain}/{seed}")
        texts = (document.text for document in documents(domain, seed) if len(document.text) > LEAST_CHARACTERS)
        parts = [_cut(text, rng) for text in islice(texts, CHOICES * ROWS_PER_DOMAIN)]
        for row in range(ROWS_PER_DOMAIN):
            (beginning, ending), *others = parts[CHOICES * row : CHOICES * (row + 1)]
            endings = [ending, *(other for _, other in others)]
            rng.shuffle(endings)
            yield {"domain": domain, "beginning": beginning, "endings": endings, "answer": endings.index(ending)}


def _cut(text: str, rng: random.Random) -> tuple[str, str]:
    """The text up to a space in its second half, and what follows, space included."""
    spaces = [place for place, letter in enumerate(text) if letter == " " and len(text) // 2 <= place < len(text) - 12]
    place = rng.choice(spaces or [len(text) // 2])
    return text[:place], text[place : place + ENDING_CHARACTERS]


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row, ensure_ascii=False))
