"""Speed of router-aware placement: `python benchmarks/placement.py --speed`, on an idle machine.

Sides step in turns on the same batch, round after round; a ratio is that of two sides in one round, and its median and
quartiles are shown.

    training    the busiest quarter of the experts adapted / all experts adapted: forward, backward, optimizer
    profiling   decoder under watch_routing with count_routing / the decoder alone, no gradients
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from placement_runs import (
    ALL,
    TOP,
    Task,
    attached,
    batches,
    optimizer_of,
    padded,
    parameters,
    placement_of,
    profile_of,
    target_rows,
    train_step,
)
from torch import Tensor
from transformers import AutoTokenizer

from adapters.layouts import layout_for
from adapters.loading import load_base
from adapters.routing import count_routing, watch_routing

TRAINING_MOST, PROFILING_MOST = 1.0, 1.15
PROFILED_ROWS = 32
Batch = tuple[Tensor, Tensor, Tensor]


def measure_speed(task: Task, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(task.directory)
    rows, pad = target_rows(task, tokenizer, held_out=False), tokenizer.pad_token_id
    training = [padded(batch, pad) for batch in islice(batches(rows, task.batch_rows, 0), rounds + 2)]
    profiled = [padded(batch, pad) for batch in islice(batches(rows, PROFILED_ROWS, 0), rounds + 2)]
    return {"training": training_ratio(task, training), "profiling": profiling_ratio(task, profiled)}


def training_ratio(task: Task, data: list[Batch]) -> dict[str, Any]:
    profile = profile_of(task)
    models = {arm: attached(task, placement_of(task, arm, profile, 0), 0) for arm in (TOP, ALL)}
    optimizers = {arm: optimizer_of(model, task) for arm, model in models.items()}
    steps = {arm: lambda batch, a=arm: train_step(models[a].train(), optimizers[a], batch) for arm in models}
    counts = {arm: parameters(model)["all"] for arm, model in models.items()}
    result = ratio_of(steps[TOP], steps[ALL], data, TRAINING_MOST)
    held = {arm: state_bytes(optimizer) for arm, optimizer in optimizers.items()}
    return result | {"parameters_ratio": counts[TOP] / counts[ALL], "optimizer_bytes_ratio": held[TOP] / held[ALL]}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(tensor.nbytes for values in optimizer.state.values() for tensor in values.values())


def profiling_ratio(task: Task, data: list[Batch]) -> dict[str, Any]:
    model: Any = load_base(task.directory, quantize="nf4").eval()
    layout = layout_for(model.config.model_type)

    @torch.no_grad()
    def plain(batch: Batch) -> None:
        model.model(input_ids=batch[0], attention_mask=batch[2], use_cache=False)

    def profiled(batch: Batch) -> None:
        kept = batch[2].flatten().bool()
        with watch_routing(model, layout) as seen:
            plain(batch)
        count_routing(seen, kept, torch.zeros(len(kept), dtype=torch.int64))

    return ratio_of(profiled, plain, data, PROFILING_MOST)


def ratio_of(ours: Callable[[Batch], Any], theirs: Callable[[Batch], Any], data: list[Batch], most: float) -> dict:
    """Seconds of ours over theirs on the same batch, whichever goes first changing; two rounds warm up."""
    pairs = []
    for number, batch in enumerate(data):
        if number % 2:
            second, first = seconds_of(theirs, batch), seconds_of(ours, batch)
        else:
            first, second = seconds_of(ours, batch), seconds_of(theirs, batch)
        pairs.append((first, second))
    ratios = [first / second for first, second in pairs[2:]]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": statistics.median(ratios),
        "quartiles": [low, high],
        "rounds": len(ratios),
        "seconds": [statistics.median(side) for side in zip(*pairs[2:], strict=True)],
        "most": most,
    }


def seconds_of(work: Callable[[Batch], Any], batch: Batch) -> float:
    start = time.perf_counter()
    work(batch)
    return time.perf_counter() - start


def speed_text(found: dict[str, Any]) -> list[str]:
    lines = []
    for what, r in found.items():
        word = "reached" if r["ratio"] <= r["most"] else "MISSED"
        first, second = (f"{1e3 * s:.0f} ms" for s in r["seconds"])
        spread = f"quartiles {r['quartiles'][0]:.3f} to {r['quartiles'][1]:.3f}, {r['rounds']} rounds"
        lines.append(f"{what}: {r['ratio']:.3f} ({spread}; {first} to {second}), must be ≤ {r['most']:g}: {word}")
    r = found["training"]
    sizes = (
        f"parameters and adapter bytes {r['parameters_ratio']:.3f}, optimizer bytes {r['optimizer_bytes_ratio']:.3f}"
    )
    return [*lines, f"sizes, top 25 % against all experts: {sizes}"]
