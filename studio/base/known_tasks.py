"""A small second source for mixtures: sums and dates, which the base knows from its pretraining, as questions.

    python -m studio.base.known_tasks --out recipes/data

Mixed with new data they are rehearsed, so that less of them is forgotten. No question comes twice.
"""

import random

from studio.base.plain_text import Turn, arithmetic_turn, dates_turn
from studio.base.shipped_files import Files, run

ROWS = 400


def known_tasks(seed: int = 0) -> list[Turn]:
    """Return questions with their answers, half sums and half dates; the same seed always gives the same ones."""
    rng = random.Random(f"known tasks/{seed}")
    found: dict[str, str] = {}
    while len(found) < ROWS:
        question, answer = (arithmetic_turn, dates_turn)[len(found) % 2](rng)
        found.setdefault(question, answer)
    return list(found.items())


def known_files(seed: int = 0) -> Files:
    """Return the rows of known-tasks."""
    return {"known-tasks": [{"prompt": prompt, "completion": answer} for prompt, answer in known_tasks(seed)]}


if __name__ == "__main__":
    run("known_tasks", __doc__, known_files)
