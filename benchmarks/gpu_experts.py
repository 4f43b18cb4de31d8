"""Expert layers at Llama 4's own sizes on a GPU: ours, stock + PEFT and the frozen base, in tokens a second and memory.

    python benchmarks/gpu_experts.py [--quick] [--case SUBSTRING] [--json FILE] [--device cuda|cpu]

One MoE layer, bfloat16, hidden 5120, expert width 8192, top-1, 4,096 tokens, LoRA rank 8 on every routed expert; base
frozen, the input's gradient wanted. In bfloat16 the experts of one layer take 4 GB at 16 (Scout), 8 GB at 32, and 32 GB
at 128 (Maverick), in nf4 1.0, 2.1 and 8.3 GB. Stock runs every token through every expert and builds W + BA for all of
them, so at 128 it needs far more than 80 GB: a side that does not fit is reported as that. Sides run one after the
other, so that only one is in memory beside the base.

Tokens a second: T / median of the steps, forward and backward. Peak: the most that was allocated during one step beyond
what was allocated just before it, gradients included; what is held before it is the side's weights and adapters. Share:
the bound of `expert_sides.floor` at the matmul and read rates measured here, divided by the quickest step.

--device cpu runs reduced sizes, to see that the code runs; it measures no peak and says nothing about a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from expert_sides import Shape, Side, build, expert_bytes, floor, stock_model
from machine import Machine
from rich.console import Console
from rich.table import Table

CONSOLE = Console(width=150)
SIZES = {"cuda": {"hidden": 5120, "width": 8192, "tokens": 4096}, "cpu": {"hidden": 128, "width": 256, "tokens": 128}}
EXPERTS = {"cuda": (16, 32, 128), "cpu": (4, 16)}


def sides(shape: Shape) -> dict[str, Side]:
    return {
        "stock": Side(shape, "peft"),
        "frozen": Side(shape, "frozen"),
        "fast": Side(shape, "lora"),
        "lean": Side(shape, "lora", "lean"),
        "nf4 frozen": Side(shape, "frozen", stacks="nf4"),
        "nf4 fast": Side(shape, "lora", stacks="nf4"),
        "nf4 lean": Side(shape, "lora", "lean", stacks="nf4"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest number of experts alone, 3 steps")
    parser.add_argument("--case", default="", metavar="SUBSTRING", help='only cases whose name contains this: "E=16"')
    parser.add_argument("--json", type=Path, help="write everything measured to this file too")
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA GPU here; --device cpu runs reduced sizes to see that the code runs")
    shapes = {
        f"E={experts}": Shape("llama4_text", experts, 1, **SIZES[options.device]) for experts in EXPERTS[options.device]
    }
    chosen = [name for name in shapes if options.case in name][: 1 if options.quick else None]
    if not chosen:
        sys.exit(f"no case contains {options.case!r}; the cases are: {', '.join(shapes)}")
    machine = Machine(torch.bfloat16, options.device)
    CONSOLE.print(f"{device_name(options.device)}; {machine}")
    results = [run_case(name, shapes[name], machine, 3 if options.quick else 10) for name in chosen]
    if options.json:
        found = {"device": device_name(options.device), "machine": machine.described(), "cases": results}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU, reduced sizes: says nothing about a GPU"


def run_case(name: str, shape: Shape, machine: Machine, steps: int) -> dict[str, Any]:
    found = {}
    for label, side in sides(shape).items():
        found[label] = run_side(side, machine, steps)
        gc.collect()
        if machine.device == "cuda":
            torch.cuda.empty_cache()
    show(name, shape, found)
    return {"name": name, "shape": asdict(shape), "sides": found}


def run_side(side: Side, machine: Machine, steps: int) -> dict[str, Any]:
    """What one side takes; {"out_of_memory": True} where it does not fit."""
    try:
        return measure(side, machine, steps)
    except torch.cuda.OutOfMemoryError:
        return {"out_of_memory": True}


def measure(side: Side, machine: Machine, steps: int) -> dict[str, Any]:
    before = torch.cuda.memory_allocated() if machine.device == "cuda" else 0
    bench = build(side, stock_model(side.shape, machine.dtype, machine.device))
    bench.train()
    gc.collect()  # the plain stacks of a side in nf4
    bench.timed()
    result: dict[str, Any] = {"expert_bytes": expert_bytes(bench) if side.kind != "peft" else None}
    if machine.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        bench.step()
        result |= {"held_bytes": held - before, "peak_bytes": torch.cuda.max_memory_allocated() - held}
        bench.reset()
    seconds = [bench.timed() for _ in range(steps)]
    result |= {"seconds": seconds, "tokens_per_second": side.shape.tokens / statistics.median(seconds)}
    if side.kind != "peft":
        result["share_of_bound"] = machine.seconds(*floor(bench)) / min(seconds)
    return result


def show(name: str, shape: Shape, found: Mapping[str, Mapping[str, Any]]) -> None:
    title = f"{name}: hidden {shape.hidden}, width {shape.width}, {shape.tokens} tokens, rank {shape.rank}"
    table = Table("side", "tokens/s", "× stock", "× frozen", "share", "held", "peak of a step", title=title)
    for label, side in found.items():
        if "out_of_memory" in side:
            table.add_row(label, "out of memory")
            continue
        ratios = (faster(side, found[other]) for other in ("stock", "frozen"))
        share = f"{side['share_of_bound']:.0%}" if "share_of_bound" in side else "-"
        memory = (f"{side[key] / 1e9:.2f} GB" if key in side else "-" for key in ("held_bytes", "peak_bytes"))
        table.add_row(label, f"{side['tokens_per_second']:,.0f}", *ratios, share, *memory)
    CONSOLE.print(table)


def faster(side: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    if "out_of_memory" in other:
        return "-"
    return f"{side['tokens_per_second'] / other['tokens_per_second']:.2f}"


if __name__ == "__main__":
    main()
