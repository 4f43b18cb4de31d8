"""Predicted against measured peak memory of real jobs on the embedded base.

    python benchmarks/memory.py [--quick] [--json FILE]

Each row is a whole job through `accelerate launch`; measured is the resident peak of its process. The first line is
what the libraries alone need; `studio.memory.RUNTIME_BYTES` is fitted to the rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import studio
from studio.memory import RUNTIME_BYTES

TICKETS = Path(__file__).parents[1] / "recipes" / "data" / "tickets-train.jsonl"
IMPORTS = (
    "import torch, bitsandbytes, peft, trl, datasets, resource; from trl import SFTTrainer; from datasets import *"
)
CASES: tuple[dict[str, Any], ...] = (
    {"name": "batch 4", "batch_size": 4, "joined": 1},
    {"name": "batch 16", "batch_size": 16, "joined": 1},
    {"name": "batch 64", "batch_size": 64, "joined": 1},
    {"name": "batch 16, long", "batch_size": 16, "joined": 6},
    {"name": "batch 16, long, checkpointing", "batch_size": 16, "joined": 6, "gradient_checkpointing": True},
    {"name": "batch 32, long", "batch_size": 32, "joined": 6},
    {"name": "batch 16, long, unquantised", "batch_size": 16, "joined": 6, "quantization": "none"},
    {"name": "batch 16, long, attention only", "batch_size": 16, "joined": 6, "attention_only": True},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first three cases alone")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    options = parser.parse_args()
    runtime = measure_runtime()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            run_case(case, Path(folder) / f"case-{i}") for i, case in enumerate(CASES[: 3 if options.quick else None])
        ]
    show(rows, runtime)
    if options.json:
        options.json.write_text(json.dumps({"runtime_bytes": runtime, "rows": rows}, indent=2) + "\n")


def measure_runtime() -> int:
    code = f"{IMPORTS}; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return int(output.splitlines()[-1])


def run_case(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True)
    data = joined_tickets(folder / "train.jsonl", case["joined"])
    off = {"shared_expert_rank": 0, "routed_experts_rank": 0} if case.get("attention_only") else {}
    recipe = studio.Recipe.model_validate(
        {
            "model": {"quantization": case.get("quantization", "nf4")},
            "data": {"train": data, "max_length_tokens": 1024},
            "adapter": off,
            "training": {
                "max_steps": 6,
                "batch_size": case["batch_size"],
                "gradient_checkpointing": case.get("gradient_checkpointing", False),
            },
            "output": {"dir": folder / "job"},
        }
    )
    job = studio.submit(recipe)
    while not job.state().ended:
        time.sleep(0.2)
    result = job.result()
    if result is None:
        sys.exit(f"{case['name']}: the job did not finish\n" + "\n".join(job.log_tail()))
    plan = job.plan()
    return {"name": case["name"], "tokens": plan.longest_tokens, **result["memory"], "plan": plan.memory.model_dump()}


def joined_tickets(path: Path, joined: int) -> Path:
    """Tickets, `joined` of them in one conversation turn each, so that rows get longer."""
    rows = [json.loads(line)["messages"] for line in TICKETS.read_text().splitlines()]
    with path.open("w") as file:
        for start in range(0, len(rows) - joined, joined):
            group = rows[start : start + joined]
            turns = [
                {"role": role, "content": "\n".join(m[i]["content"] for m in group)} for i, role in enumerate(ROLES)
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


ROLES = ("user", "assistant")


def show(rows: list[dict[str, Any]], runtime: int) -> None:
    console = Console()
    console.print(
        f"libraries alone: {runtime / 1e6:.0f} MB; the plan counts {RUNTIME_BYTES / 1e6:.0f} MB for them, the trainer, "
        "tokenised data and what the allocator keeps"
    )
    table = Table("case", "longest row", "predicted", "measured", "predicted / measured")
    for row in rows:
        predicted, measured = row["predicted_bytes"], row["measured_bytes"]
        sizes = (f"{predicted / 1e6:.0f} MB", f"{measured / 1e6:.0f} MB", f"{predicted / measured:.2f}")
        table.add_row(row["name"], f"{row['tokens']} tokens", *sizes)
    console.print(table)


if __name__ == "__main__":
    main()
