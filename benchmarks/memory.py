"""Predicted against measured peak memory of real jobs: the embedded base, and larger random ones of other families.

    python benchmarks/memory.py [--quick] [--only WORDS] [--json FILE]

Each row is a whole job through `accelerate launch`; measured is the resident peak of its process. The first line is
what the libraries alone need; `studio.memory.RUNTIME_BYTES` is fitted to the rows. The random bases take the embedded
one's tokenizer; most of their memory is the model's own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import studio
from studio.base import EMBEDDED_DIR
from studio.memory import RUNTIME_BYTES

TICKETS = Path(__file__).parents[1] / "recipes" / "data" / "tickets-train.jsonl"
IMPORTS = (
    "import torch, bitsandbytes, peft, trl, datasets, resource; from trl import SFTTrainer; from datasets import *"
)
BUILD = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model(**CONFIG)
torch.manual_seed(0)
AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(sys.argv[1])
"""
COMMON = {"vocab_size": 1792, "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
BASES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_hidden_layers": 8, "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 512,
    },
    "mixtral": {
        "num_hidden_layers": 4, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 2048,
    },
}  # fmt: skip
"""Random bases: 0.4 and 0.2 billion parameters."""

ATTENTION_ONLY = {"shared_expert_rank": 0, "routed_experts_rank": 0}
NO_SHARED = {"shared_expert_rank": 0}
LONG = {"batch_size": 16, "joined": 6}
CASES: tuple[dict[str, Any], ...] = (
    {"name": "batch 16", "batch_size": 16},
    {"name": "batch 16, long, fast", **LONG, "training": {"expert_path": "fast"}},
    {"name": "qwen3_moe 0.4 B, nf4, fast", "base": "qwen3_moe", "batch_size": 4, "joined": 3, "adapter": NO_SHARED},
    {"name": "batch 16, long, lean", **LONG, "training": {"expert_path": "lean"}},
    {"name": "batch 16, long, checkpointing", **LONG, "training": {"gradient_checkpointing": True}},
    {"name": "batch 16, long, attention only", **LONG, "adapter": ATTENTION_ONLY},
    {"name": "batch 16, long, unquantised", **LONG, "model": {"quantization": "none"}},
    {"name": "dpo, batch 8, long", "batch_size": 8, "joined": 6, "training": {"method": "dpo"}},
    {"name": "orpo, batch 8, long", "batch_size": 8, "joined": 6, "training": {"method": "orpo"}},
    {"name": "packed, batch 8, rows of 512 tokens", "batch_size": 8, "max_length": 512, "trl": {"packing": True}},
    {"name": "batch 4, rows of 1,024 tokens", "batch_size": 4, "joined": 16},
    {"name": "batch 16, held-out examples", "batch_size": 16, "held_out": True},
    {
        "name": "qwen3_moe 0.4 B, int8, lean, accumulated", "base": "qwen3_moe", "batch_size": 4, "joined": 3,
        "model": {"quantization": "int8"}, "adapter": NO_SHARED,
        "training": {"expert_path": "lean", "gradient_accumulation_steps": 2},
    },
    {
        "name": "qwen3_moe 0.4 B, nf4 and int8, checkpointing", "base": "qwen3_moe", "batch_size": 8, "joined": 6,
        "model": {"int8_experts": [0, 1, 2, 3]}, "adapter": NO_SHARED, "training": {"gradient_checkpointing": True},
    },
    {
        "name": "mixtral 0.2 B, float32", "base": "mixtral", "batch_size": 4, "joined": 4,
        "model": {"quantization": "none"}, "adapter": NO_SHARED,
    },
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first three cases alone")
    parser.add_argument("--only", default="", help="cases whose name has these words")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    options = parser.parse_args()
    runtime = measure_runtime()
    chosen = [case for case in CASES[: 3 if options.quick else None] if options.only in case["name"]]
    with tempfile.TemporaryDirectory() as folder:
        rows = [run_case(case, Path(folder) / f"case-{i}") for i, case in enumerate(chosen)]
    show(rows, runtime)
    if options.json:
        options.json.write_text(json.dumps({"runtime_bytes": runtime, "rows": rows}, indent=2) + "\n")


def measure_runtime() -> int:
    code = f"{IMPORTS}; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return int(output.splitlines()[-1])


def run_case(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True)
    pairs = case.get("training", {}).get("method", "sft") != "sft"
    train = joined_tickets(folder / "train.jsonl", case.get("joined", 1), pairs)
    data = {"train": train, "max_length_tokens": case.get("max_length", 1024)}
    base = str(random_base(case["base"], folder.parent / case["base"])) if "base" in case else "embedded"
    recipe = studio.Recipe.model_validate(
        {
            "model": {"base": base, **case.get("model", {})},
            "data": {**data, "eval": TICKETS} if case.get("held_out") else data,
            "adapter": case.get("adapter", {}),
            "training": {"max_steps": 6, "batch_size": case["batch_size"], **case.get("training", {})},
            "trl": case.get("trl", {}),
            "evaluation": {"examples": 64, "generations": 1, "max_new_tokens": 32},
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
    row = {"name": case["name"], "tokens": plan.longest_tokens, **result["memory"], "plan": plan.memory.model_dump()}
    print(f"{row['name']}: {row['predicted_bytes'] / row['measured_bytes']:.2f}", file=sys.stderr, flush=True)
    return row


def random_base(family: str, directory: Path) -> Path:
    """A random bfloat16 base with the embedded tokenizer, made in a process of its own."""
    if not directory.exists():
        code = BUILD.replace("CONFIG", repr({"model_type": family, **COMMON, **BASES[family]}))
        subprocess.run([sys.executable, "-c", code, str(directory)], check=True, capture_output=True)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(EMBEDDED_DIR / name, directory / name)
    return directory


def joined_tickets(path: Path, joined: int, pairs: bool) -> Path:
    """Tickets, `joined` of them in one conversation turn each, so that rows get longer; also as pairs."""
    rows = [json.loads(line)["messages"] for line in TICKETS.read_text().splitlines()]
    with path.open("w") as file:
        for start in range(0, len(rows) - joined, joined):
            group = rows[start : start + joined]
            turns = [
                {"role": role, "content": "\n".join(m[i]["content"] for m in group)} for i, role in enumerate(ROLES)
            ]
            prompt, answer = (turn["content"] for turn in turns)
            pair = {"prompt": prompt, "chosen": answer, "rejected": f"{answer}!"}
            file.write(json.dumps(pair if pairs else {"messages": turns}) + "\n")
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
