"""A small second source for mixtures: sums and dates, which the base knows from its pretraining, as questions.

    python -m studio.base.known_tasks --out recipes/data

Mixed with new data they are rehearsed, so that less of them is forgotten. No question comes twice.
"""

import argparse
import json
import random
from pathlib import Path

from studio.base.plain_text import Turn, arithmetic_turn, dates_turn

ROWS = 400


def known_tasks(seed: int = 0) -> list[Turn]:
    """Return questions with their answers, half sums and half dates; the same seed always gives the same ones."""
    rng = random.Random(f"known tasks/{seed}")
    found: dict[str, str] = {}
    while len(found) < ROWS:
        question, answer = (arithmetic_turn, dates_turn)[len(found) % 2](rng)
        found.setdefault(question, answer)
    return list(found.items())


def write_known_tasks(directory: Path, seed: int = 0) -> Path:
    """Write known-tasks.jsonl, replacing what is there."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in known_tasks(seed))
    path = directory / "known-tasks.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def main() -> None:
    """Run the command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m studio.base.known_tasks", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("recipes/data"), help="directory of the file")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"{ROWS} rows written to {write_known_tasks(arguments.out, arguments.seed)}")


if __name__ == "__main__":
    main()
