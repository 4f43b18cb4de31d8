"""Does it matter which experts get LoRA? Arms that place the same LoRA elsewhere, trained on two MoE models.

    python benchmarks/placement.py [--folder FOLDER] [--quick] [--model embedded|larger] [--seeds 5] [--arms WORDS]
                                   [--steps 64] [--with-attention] [--json FILE [--resume]] [--workers 2]
    python benchmarks/placement.py [--folder FOLDER] --speed [--rounds 30]

Models: the embedded base, fine-tuned on the quickstart's tickets; and a Qwen3-MoE with 32 experts, 4 a token, which is
pretrained first (7 minutes, kept in FOLDER; benchmarks/placement_larger.py) and fine-tuned on code, a domain all but
left out of its pretraining, and on the tickets, which are unlike anything in it. Both bases in nf4. Every arm has rank
8, the same scale, learning rate, steps, and, seed by seed, the same rows in the same order; routed arms adapt routed
experts alone, so that nothing else hides the difference. Placements come from the profile of the target's training
rows; random experts are drawn anew with every seed.

Each run is a process of its own with one thread. Reported per arm: held-out loss of the target and of the other
domains (forgetting: after less before), both per learned token; gain, what the arm takes off the base's target loss in
percent of what all experts take off it; trained parameters, bytes of the adapter (compact, 4 a parameter) and of
AdamW's state, peak memory of the process and what training added to it, median step; what the adapted experts cover
of the target's routed tokens. Then the three claims, judged by their whole intervals.

All of it: 15 to 20 minutes on two idle cores, once the larger model is there. --json is written after every run; with
--resume the runs in it are kept. Step times of a run are those with the other worker beside it; --speed measures
alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from placement_larger import STEPS as PRETRAINING_STEPS
from placement_larger import TARGET_DOMAIN, larger_model
from placement_runs import ALL, ALL_DOMAINS, ARMS, ASKED_FOR, TOP, Task, described, measure_base, profile_of, run
from placement_speed import measure_speed, speed_text
from placement_tables import MOST_SEEDS, Results, claims, concentration, order, show
from rich.console import Console

from studio.base import EMBEDDED_DIR

TASKS = (("embedded", "tickets"), ("larger", TARGET_DOMAIN), ("larger", "tickets"))
"""Model, and what it is fine-tuned on."""
BATCH_ROWS = 16
QUICK_ARMS, QUICK_PRETRAINING_STEPS = (TOP, ALL), 40
FULL = {"steps": 64, "held_out_rows": 240, "held_out_documents": 16, "profile_tokens": 131_072}
QUICK = {"steps": 6, "held_out_rows": 24, "held_out_documents": 2, "profile_tokens": 4096}
WORKERS = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2 << 20), "PYTHONWARNINGS": "ignore"}
"""Environment of the runs; glibc's threshold as in training jobs, so that peaks mean the same."""
PRELOADED = ["torch", "transformers", "peft", "adapters.loading", "adapters.lora", "studio.evaluation"]


def main() -> None:
    options = parsed()
    os.environ.update(WORKERS)
    torch.set_num_threads(1)
    tasks = [task_of(*pair, options) for pair in TASKS if pair[0] == (options.model or pair[0])]
    if options.speed:
        print_speed(tasks, options)
        return
    found = measured(tasks, options)
    console = Console(width=200)
    for task in tasks:
        entry = found["tasks"][task.name]
        results = Results(entry["base"], in_order(entry["runs"]))
        show(console, task.name, entry, results)
        entry["claims"] = [asdict(claim) for claim in claims(results)]
    write(options.json, found)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kept = Path("runs/placement")
    parser.add_argument("--folder", type=Path, default=kept, help=f"keeps the larger model and the profiles: {kept}")
    parser.add_argument("--quick", action="store_true", help="two arms, two seeds, few steps: shows that it runs")
    parser.add_argument("--model", choices=("embedded", "larger"), help="one of the two models alone")
    parser.add_argument("--seeds", type=int, help="default 5, with --quick 2")
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), metavar="ARM", help=", ".join(map(repr, ARMS)).replace("%", "%%")
    )
    parser.add_argument("--steps", type=int, help="training steps instead of 64")
    parser.add_argument("--with-attention", action="store_true", help="attention gets LoRA too, in every arm")
    parser.add_argument("--json", type=Path, help="everything measured, written after every run")
    parser.add_argument("--resume", action="store_true", help="keep the runs that --json has already")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--speed", action="store_true", help="the ratios of step times and of profiling instead")
    parser.add_argument("--rounds", type=int, default=30, help="of --speed")
    options = parser.parse_args()
    options.seeds = options.seeds or (2 if options.quick else 5)
    options.arms = options.arms or (QUICK_ARMS if options.quick else tuple(arm for arm in ARMS if arm not in ASKED_FOR))
    if not 1 <= options.seeds <= MOST_SEEDS:
        parser.error(f"--seeds {options.seeds}: allowed are 1 to {MOST_SEEDS}")
    if options.json and options.json.exists() and not options.resume and not options.speed:
        parser.error(f"{options.json} exists: add --resume to keep its runs, or name another file")
    return options


def task_of(model: str, target: str, options: argparse.Namespace) -> Task:
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    pretraining_steps = QUICK_PRETRAINING_STEPS if options.quick else PRETRAINING_STEPS
    base = EMBEDDED_DIR if model == "embedded" else larger_model(folder, pretraining_steps)
    task = Task(
        name=f"{model}-{target}",
        base=str(base),
        target=target,
        others=tuple(domain for domain in ALL_DOMAINS if domain != target),
        batch_rows=BATCH_ROWS,
        joined=options.with_attention,
        folder=str(folder),
        **(QUICK if options.quick else FULL),
    )
    return replace(task, steps=options.steps) if options.steps else task


def measured(tasks: list[Task], options: argparse.Namespace) -> dict[str, Any]:
    """Every run that is not in the file yet, `options.workers` at a time; the file is written after each."""
    found = kept(tasks, options.json if options.resume else None)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(options.workers, context, max_tasks_per_child=1) as pool:
        for task, future in [(task, pool.submit(prepare, task)) for task in tasks]:
            found["tasks"][task.name] |= future.result()
        futures = submitted(pool, tasks, options, found)
        for number, future in enumerate(as_completed(futures), 1):
            task = futures[future]
            found["tasks"][task.name]["runs"].append(future.result())
            write(options.json, found)
            print(f"{number} of {len(futures)}: {line(future.result())}", file=sys.stderr, flush=True)
    return found


def prepare(task: Task) -> dict[str, Any]:
    """What is measured once: the base's losses and where the routers send the target."""
    torch.set_num_threads(1)
    profile = profile_of(task)
    share, entropy = profile.share().tolist(), profile.load_entropy().tolist()
    return {"base": measure_base(task), "share": share, "concentration": concentration(share, entropy)}


def submitted(
    pool: ProcessPoolExecutor, tasks: list[Task], options: argparse.Namespace, found: dict[str, Any]
) -> dict[Future[dict[str, Any]], Task]:
    """Seed by seed, so that an interruption leaves whole comparisons."""
    futures = {}
    for seed in range(options.seeds):
        for task in tasks:
            done = {(r["arm"], r["seed"]) for r in found["tasks"][task.name]["runs"]}
            for arm in order(options.arms):
                if (arm, seed) not in done:
                    futures[pool.submit(run, task, arm, seed)] = task
    return futures


def kept(tasks: list[Task], path: Path | None) -> dict[str, Any]:
    """What an earlier call left, where it was made with the same settings."""
    found: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {"tasks": {}}
    for task in tasks:
        entry = found["tasks"].setdefault(task.name, {"described": described(task), "runs": []})
        if entry["described"] != described(task):
            sys.exit(f"{path}: the runs of {task.name!r} were made with other settings; name another file")
    return found


def write(path: Path | None, found: dict[str, Any]) -> None:
    if path:
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_text(json.dumps(found, indent=1) + "\n")
        temporary.replace(path)


def in_order(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(runs, key=lambda r: (list(ARMS).index(r["arm"]), r["seed"]))


def line(r: dict[str, Any]) -> str:
    first, last = r["train_losses"][0], r["train_losses"][-1]
    return f"{r['task']}, {r['arm']}, seed {r['seed']}: target {r['target']:.4f} (training {first:.2f} to {last:.2f})"


def print_speed(tasks: list[Task], options: argparse.Namespace) -> None:
    found = {}
    for task in tasks:
        found[task.name] = measure_speed(task, 6 if options.quick else options.rounds)
        for text in speed_text(found[task.name]):
            print(f"{task.name}: {text}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
