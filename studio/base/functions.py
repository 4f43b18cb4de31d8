"""Prompts with tests and without answers: a function of two numbers is to be written down again, so that it works.

    python -m studio.base.functions --out recipes/data

The base has seen such code and such requests, but no argument with one of these names, and likes to write one that it
knows instead. Nothing says what the right answer is but the tests, which the program of an answer must survive. No
function comes twice.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from studio.base.plain_text import code_names

ROWS = {"functions-train.jsonl": 400, "functions-eval.jsonl": 120}
WORDS = ("lamp", "door", "wheel", "price", "speed", "pressure", "depth", "width", "angle", "weight")
PAIRS = ((7, 3), (2, 5))
"""What a function is called with; no two of +, - and * agree on either."""


def functions(seed: int = 0) -> list[dict[str, Any]]:
    """Return rows {"prompt", "tests"}; the same seed always gives the same ones."""
    rng = random.Random(f"functions/{seed}")
    found: dict[str, dict[str, Any]] = {}
    while len(found) < sum(ROWS.values()):
        name, a = code_names(rng)
        b = rng.choice(WORDS)
        op = rng.choice("+-*")
        code = f"def {name}({a}, {b}):\n    return {a} {op} {b}"
        tests = [f"assert {name}{pair} == {_value(op, *pair)}" for pair in PAIRS]
        lead = rng.choice(("Repeat the code:", "Show this code again:"))
        found.setdefault(code, {"prompt": f"{lead}\n{code}", "tests": tests})
    return list(found.values())


def _value(op: str, a: int, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[op]


def write_functions(directory: Path, seed: int = 0) -> list[Path]:
    """Write both files, replacing what is there."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = functions(seed)
    written = []
    for name, count in ROWS.items():
        chosen, rows = rows[:count], rows[count:]
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
        written.append(directory / name)
    return written


def main() -> None:
    """Run the command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m studio.base.functions", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("recipes/data"), help="directory of the files")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(*write_functions(arguments.out, arguments.seed), sep="\n")


if __name__ == "__main__":
    main()
