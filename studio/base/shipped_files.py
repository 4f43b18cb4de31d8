"""How the scripts of the shipped data write their files: JSON Lines, named by what they hold, by one command line."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Files = Mapping[str, Sequence[Mapping[str, Any]]]
"""Name of a file, without its ending → its rows."""


def write_files(directory: Path, files: Files) -> None:
    """Write each file, replacing what is there."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def run(module: str, says: str, files_of: Callable[[int], Files]) -> None:
    """Run the command line of a script, `python -m studio.base.MODULE [--out DIR] [--seed N]`.

    Args:
        says: the script's docstring. files_of: the files by the seed.
    """
    parser = argparse.ArgumentParser(prog=f"python -m studio.base.{module}", description=says.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("recipes/data"), help="directory of the files")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    files = files_of(arguments.seed)
    write_files(arguments.out, files)
    print(f"written to {arguments.out}: " + ", ".join(f"{name}.jsonl ({len(rows):,})" for name, rows in files.items()))
