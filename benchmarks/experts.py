"""Expert layers: time and peak memory of ours against stock transformers + PEFT, in one run.

    python benchmarks/experts.py [--quick] [--case SUBSTRING] [--json FILE]

One MoE layer, float32, H=512, I=1024, T=1024, LoRA rank 8 on every routed expert; base frozen, the input's gradient
wanted. Stock is the transformers block under PEFT `target_parameters`, as `get_peft_model` makes it; for qwen3_moe with
the experts implementation "grouped_mm".

Time: forward and backward. The sides of a case share their weights and inputs; those on plain stacks are first compared
(a fresh adapter must give the same output). Then all step in turns, round after round; a ratio is that of two sides in
the same round, and its median, quartiles and number of rounds are shown. A side much quicker than the slowest steps
several times a round, its median counts. On a machine that does something else too, threads wait for each other: set
OMP_NUM_THREADS=1 there.

Peak: of one forward and backward beyond what was resident just before it, gradients included (VmHWM, reset before the
step, less VmRSS). Each side in a fresh process, after one step of warm-up, with MALLOC_MMAP_THRESHOLD_=65536 so that
freed blocks go back to the system; both sides alike.

Bound: the time our step would take if it did only what it cannot avoid (`expert_sides.floor`) at the machine's own
speed: the larger of flops / matmul rate and bytes / read rate, the best of each seen so far, sampled every round. The
share is that bound / the quickest step.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from expert_sides import Bench, Shape, Side, build, expert_bytes, floor, stock_model
from machine import Machine
from rich.console import Console
from rich.table import Table

CONSOLE = Console(width=150)


@dataclass(frozen=True)
class Target:
    """`quantity` of side `over` divided by that of side `under` must be at least or at most `limit`.

    A `limit` of None: the ratio is shown, without a target.

    For "bytes" `under` is empty: bytes of the routed experts' base weights per parameter.
    """

    quantity: Literal["time", "peak", "bytes"]
    over: str
    under: str
    wanted: Literal[">=", "<="]
    limit: float | None

    def reached(self, ratio: float) -> bool | None:
        if self.limit is None:
            return None
        return ratio >= self.limit if self.wanted == ">=" else ratio <= self.limit


@dataclass(frozen=True)
class Case:
    """Sides measured together, and the ratios they must reach."""

    name: str
    sides: Mapping[str, Side]
    targets: tuple[Target, ...]
    quick: bool = False


def llama4_case(experts: int, faster: float, less: float) -> Case:
    shape = Shape("llama4_text", experts, 1)
    sides = {"stock": Side(shape, "peft"), "fast": Side(shape, "lora"), "lean": Side(shape, "lora", "lean")}
    targets = (
        Target("time", "stock", "fast", ">=", faster),
        Target("time", "stock", "lean", ">=", None),
        Target("peak", "stock", "fast", ">=", less),
        Target("peak", "stock", "lean", ">=", less),
    )
    return Case(f"llama4 block, E={experts} K=1", sides, targets, quick=experts == 16)


def qwen3_case(experts: int, top_k: int, faster: float, less: float, less_lean: float, nf4: float) -> Case:
    shape = Shape("qwen3_moe", experts, top_k)
    sides = {
        "stock": Side(shape, "peft"),
        "fast": Side(shape, "lora"),
        "lean": Side(shape, "lora", "lean"),
        "frozen": Side(shape, "frozen"),
        "nf4": Side(shape, "lora", stacks="nf4"),
        "nf4 lean": Side(shape, "lora", "lean", stacks="nf4"),
    }
    targets = (
        Target("time", "stock", "fast", ">=", faster),
        Target("time", "stock", "lean", ">=", None),
        Target("peak", "stock", "fast", ">=", less),
        Target("peak", "stock", "lean", ">=", less_lean),
        Target("time", "fast", "frozen", "<=", 1.25),
        Target("time", "nf4", "fast", "<=", nf4),
        Target("time", "nf4 lean", "lean", "<=", nf4),
        Target("bytes", "nf4", "", "<=", 0.52),
    )
    return Case(f"qwen3_moe block, E={experts} K={top_k}", sides, targets, quick=experts == 16)


def scaling_case(part: Literal["block", "experts"], limit: float | None) -> Case:
    few, many = (Shape("llama4_text", experts, 1) for experts in (16, 128))
    sides = {"E=16": Side(few, "lora", part=part), "E=128": Side(many, "lora", part=part)}
    return Case(f"llama4 {part}, E=16 to 128 K=1", sides, (Target("time", "E=128", "E=16", "<=", limit),))


CASES: tuple[Case, ...] = (
    llama4_case(16, 9, 12),
    llama4_case(64, 28, 45),
    llama4_case(128, 45, 90),
    qwen3_case(16, 1, 2.2, 4.5, 14, nf4=1.4),
    qwen3_case(64, 8, 1.9, 3, 35, nf4=1.2),
    qwen3_case(128, 1, 6, 25, 40, nf4=2.0),
    scaling_case("block", 1.6),
    scaling_case("experts", None),  # shown: the block is what has a target
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the 16-expert cases alone, 3 rounds")
    parser.add_argument("--case", default="", metavar="SUBSTRING", help="only cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write everything measured to this file too")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # a side of a case, for the child that measures its peak
    options = parser.parse_args()
    if options.measure:
        print(peak_bytes(side_called(options.measure)))
        return
    cases = [c for c in CASES if options.case in c.name and (c.quick or not options.quick)]
    if not cases:
        sys.exit(f"no case contains {options.case!r}; the cases are: " + "; ".join(case.name for case in CASES))
    machine = Machine()
    CONSOLE.print(str(machine))
    results = [run_case(case, machine, 3 if options.quick else 9) for case in cases]
    if options.json:
        options.json.write_text(json.dumps({"machine": machine.described(), "cases": results}, indent=2) + "\n")


def run_case(case: Case, machine: Machine, rounds: int) -> dict[str, Any]:
    stock = {shape: stock_model(shape) for shape in dict.fromkeys(side.shape for side in case.sides.values())}
    benches = {label: build(side, stock[side.shape]) for label, side in case.sides.items()}
    check_same_layer(benches)
    seconds = rounds_of(benches, rounds, machine)
    described = {label: describe(bench, seconds[label], machine) for label, bench in benches.items()}
    busiest = {label: bench.pairs_by_expert.tolist() for label, bench in benches.items()}
    del benches, stock
    gc.collect()
    for label in dict.fromkeys(label for t in case.targets if t.quantity == "peak" for label in (t.over, t.under)):
        described[label]["peak_bytes"] = measured_in_child(case, label)
    rows = [row(target, described, seconds) for target in case.targets]
    show(case, described, rows, next(iter(busiest.values())))
    return {"name": case.name, "sides": described, "targets": rows, "pairs_by_expert": busiest}


def check_same_layer(benches: Mapping[str, Bench]) -> None:
    """Fresh adapters add nothing: all sides on the same plain weights must give the same output. Then none is fresh."""
    first: dict[Shape, torch.Tensor] = {}
    for label, bench in benches.items():
        if bench.side.stacks == "plain":
            with torch.no_grad():
                output = bench.output()
            reference = first.setdefault(bench.side.shape, output)
            if (output - reference).norm() > 1e-4 * reference.norm():
                sys.exit(f"side {label!r} computes something else than the first one: the times would mean nothing")
    for bench in benches.values():
        bench.train()


def rounds_of(
    benches: Mapping[str, Bench], rounds: int, machine: Machine, most_seconds: float = 30
) -> dict[str, list[float]]:
    """Seconds of each side, round by round: at least 3 rounds, at most `rounds`, no new one after `most_seconds`."""
    warm = {label: bench.timed() for label, bench in benches.items()}
    repeats = {label: min(5, max(1, round(max(warm.values()) / s / 2))) for label, s in warm.items()}
    seconds: dict[str, list[float]] = {label: [] for label in benches}
    start = time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - start > most_seconds:
            break
        machine.sample()
        for label, bench in benches.items():
            seconds[label].append(statistics.median(bench.timed() for _ in range(repeats[label])))
    return seconds


def describe(bench: Bench, seconds: list[float], machine: Machine) -> dict[str, Any]:
    result: dict[str, Any] = {"side": asdict(bench.side), "seconds": seconds}
    if bench.side.kind != "peft":
        flops, moved = floor(bench)
        result |= {
            "matmul_bound_seconds": machine.seconds(flops, 0),
            "traffic_bound_seconds": machine.seconds(0, moved),
            "share_of_bound": machine.seconds(flops, moved) / min(seconds),
            "expert_bytes_per_parameter": expert_bytes(bench) / bench.side.shape.expert_parameters,
        }
    return result


def side_called(name: str) -> Side:
    case, _, label = name.partition("|")
    return next(c for c in CASES if c.name == case).sides[label]


def peak_bytes(side: Side) -> int:
    """Peak resident bytes of one step of `side` beyond what is resident before it, in this process."""
    bench = build(side, stock_model(side.shape))
    bench.train()
    bench.timed()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    bench.step()
    return status_bytes("VmHWM") - before


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measured_in_child(case: Case, label: str) -> int:
    command = [sys.executable, __file__, "--measure", f"{case.name}|{label}"]
    child = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    )
    if child.returncode:
        sys.exit(f"measuring the peak of {label!r} in {case.name!r} failed:\n{child.stderr}")
    return int(child.stdout.split()[-1])


def row(target: Target, described: Mapping[str, Any], seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    ratios = {
        "time": lambda: [a / b for a, b in zip(seconds[target.over], seconds[target.under], strict=True)],
        "peak": lambda: [described[target.over]["peak_bytes"] / described[target.under]["peak_bytes"]],
        "bytes": lambda: [described[target.over]["expert_bytes_per_parameter"]],
    }[target.quantity]()
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        **asdict(target),
        "ratio": statistics.median(ratios),
        "quartiles": [low, middle, high],
        "rounds": len(ratios),
        "reached": target.reached(statistics.median(ratios)),
    }


def show(case: Case, described: Mapping[str, Any], rows: list[dict[str, Any]], counts: list[int]) -> None:
    hit = sum(count > 0 for count in counts)
    busiest = max(counts) / sum(counts) * len(counts)
    title = f"{case.name}  ({hit} of {len(counts)} experts hit, the busiest gets {busiest:.1f} × the mean)"
    table = Table("side", "step, median", "range", "matmul bound", "traffic bound", "share", "peak", title=title)
    for label, found in described.items():
        times = found["seconds"]
        bounds = ("-",) * 3
        if "share_of_bound" in found:
            keys = ("matmul_bound_seconds", "traffic_bound_seconds")
            bounds = (*(milliseconds(found[key]) for key in keys), f"{found['share_of_bound']:.0%}")
        peak = f"{found['peak_bytes'] / 1e6:.1f} MB" if "peak_bytes" in found else "-"
        spread = f"{milliseconds(min(times))} to {milliseconds(max(times))}"
        table.add_row(label, milliseconds(statistics.median(times)), spread, *bounds, peak)
    CONSOLE.print(table)
    for r in rows:
        CONSOLE.print("  " + verdict(r), highlight=False)


def verdict(r: Mapping[str, Any]) -> str:
    what = f"{r['quantity']} {r['over']} / {r['under']}" if r["under"] else f"expert {r['quantity']} per parameter"
    low, _, high = r["quartiles"]
    spread = f" (quartiles {low:.2f} to {high:.2f}, {r['rounds']} rounds)" if r["quantity"] == "time" else ""
    if r["limit"] is None:
        return f"{what}: {r['ratio']:.3g}{spread}, no target"
    colour, word = ("green", "reached") if r["reached"] else ("red", "MISSED")
    return f"{what}: {r['ratio']:.3g}{spread}, must be {r['wanted']} {r['limit']:g}: [{colour}]{word}[/{colour}]"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


if __name__ == "__main__":
    main()
