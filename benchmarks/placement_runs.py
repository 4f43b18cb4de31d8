"""One run of benchmarks/placement.py: a base, an arm that says where LoRA goes, a seed; trained, then measured.

    profile_of(task)            ─▶ RouterProfile of the target's training rows, kept in the task's folder
    measure_base(task)          ─▶ held-out losses of the base, before any training
    run(task, arm, seed)        ─▶ everything measured of one training, as plain data

Rows are (token ids, labels); a label of -100 is not learned. Ranks are layers x experts, as in `Placement.routed`.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from adapters.errors import ProfileError
from adapters.layouts import layout_for
from adapters.loading import load_base
from adapters.lora import attach
from adapters.placement import ExpertGrid, Placement, Ranks, Scores, all_experts, budget, esft, no_experts, top_fraction
from adapters.router_profile import RouterProfile, load_profile
from adapters.routing import count_routing, watch_routing
from studio.base.domains import DOMAINS, Document, documents
from studio.base.tokenizer import chat_messages, render
from studio.data import Example, Message, read_examples
from studio.encoding import IGNORED, encode

Row = tuple[list[int], list[int]]

DATA = Path(__file__).parents[1] / "recipes" / "data"
TRAIN_STREAM, HELD_OUT_STREAM = 23, 24
"""Streams of documents that no pretraining reads."""
TRAIN_DOCUMENTS, MAX_LENGTH_TOKENS = 2400, 256

RANK, FRACTION, ESFT_P = 8, 0.25, 0.2
SCALE = 4.0
"""LoRA's alpha / rank, the same for every arm and every rank."""
MIN_RANK, RANK_STEP, MAX_RANK = 4, 4, 64
LEARNING_RATE = 3e-3
WARMUP_FRACTION, MAX_GRAD_NORM = 0.05, 1.0


@dataclass(frozen=True)
class Task:
    """A base, the domain that it is fine-tuned on, and how.

    Attributes:
        target: "tickets" (the quickstart's data) or a pretraining domain. others: domains that should not be forgotten.
        joined: attention gets LoRA too, in every arm.
        folder: where the router profile is kept.
    """

    name: str
    base: str
    target: str
    others: tuple[str, ...]
    steps: int
    batch_rows: int
    joined: bool
    held_out_rows: int
    held_out_documents: int
    profile_tokens: int
    folder: str

    @property
    def directory(self) -> Path:
        return Path(self.base)


# -- data ---------------------------------------------------------------------------------------------------------


def target_rows(task: Task, tokenizer: PreTrainedTokenizerBase, held_out: bool) -> list[Row]:
    if task.target == "tickets":
        examples = read_examples(DATA / f"tickets-{'eval' if held_out else 'train'}.jsonl")
        rows = [encode(tokenizer, example, MAX_LENGTH_TOKENS) for example in examples]
        return rows[: task.held_out_rows] if held_out else rows
    if held_out:
        return domain_rows(task.target, tokenizer, HELD_OUT_STREAM, task.held_out_rows)
    return domain_rows(task.target, tokenizer, TRAIN_STREAM, TRAIN_DOCUMENTS)


def domain_rows(domain: str, tokenizer: PreTrainedTokenizerBase, stream: int, count: int) -> list[Row]:
    return [document_row(document, tokenizer) for document in islice(documents(domain, stream), count)]


def document_row(document: Document, tokenizer: PreTrainedTokenizerBase) -> Row:
    """A chat is learned in its last answer, a plain text all over."""
    if document.turns:
        messages = tuple(Message(**message) for message in chat_messages(document))
        return encode(tokenizer, Example(messages[:-1], messages[-1:]), MAX_LENGTH_TOKENS)
    ids = tokenizer.encode(render(document), add_special_tokens=False)[:MAX_LENGTH_TOKENS]
    return ids, [IGNORED, *ids[1:]]


def batches(rows: Sequence[Row], batch_rows: int, seed: int) -> Iterator[list[Row]]:
    """Endless batches, every epoch shuffled anew; the same seed gives the same batches whatever is trained."""
    rng = random.Random(f"order/{seed}")
    while True:
        order = rng.sample(range(len(rows)), len(rows))
        for start in range(0, len(order) - batch_rows + 1, batch_rows):
            yield [rows[i] for i in order[start : start + batch_rows]]


def padded(rows: Sequence[Row], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, labels, mask), each (rows, longest) int64, filled up on the right."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows])
    return ids, labels, mask


# -- arms ---------------------------------------------------------------------------------------------------------


def grid_of(task: Task, profile: RouterProfile) -> ExpertGrid:
    config = AutoConfig.from_pretrained(task.directory)
    hidden = config.hidden_size
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)
    cost = (hidden + 2 * width) + (width + hidden)  # of a rank: both factors, gate and up fused; both factors, down
    return ExpertGrid(profile.layers, profile.experts, (cost,) * len(profile.layers))


def top(grid: ExpertGrid, share: Scores, seed: int) -> Ranks:
    return top_fraction(grid, share, fraction=FRACTION, scope="layer", rank=RANK)


def random_experts(grid: ExpertGrid, share: Scores, seed: int) -> Ranks:
    rng = random.Random(f"experts/{seed}")
    return top(grid, [[rng.random() for _ in layer] for layer in share], seed)


def least_used(grid: ExpertGrid, share: Scores, seed: int) -> Ranks:
    return top(grid, [[-use for use in layer] for layer in share], seed)


def same_budget(grid: ExpertGrid, share: Scores, seed: int) -> Ranks:
    parameters = grid.parameters(top(grid, share, seed))
    return budget(grid, share, parameters=parameters, min_rank=MIN_RANK, rank_step=RANK_STEP, max_rank=MAX_RANK)


ATTENTION, ALL, TOP, ESFT, BUDGET, RANDOM, LEAST, HALF = (
    "attention only", "all experts", "routed top 25 %", "esft_token", "budget ranks", "random 25 %", "least-used 25 %",
    "routed top 50 %",
)  # fmt: skip
ARMS: dict[str, Callable[[ExpertGrid, Scores, int], Ranks]] = {
    ATTENTION: lambda grid, share, seed: no_experts(grid),
    ALL: lambda grid, share, seed: all_experts(grid, rank=RANK),
    TOP: top,
    ESFT: lambda grid, share, seed: esft(grid, share, p=ESFT_P, rank=RANK),
    BUDGET: same_budget,
    RANDOM: random_experts,
    LEAST: least_used,
    HALF: lambda grid, share, seed: top_fraction(grid, share, fraction=2 * FRACTION, scope="layer", rank=RANK),
}
"""Ranks of the routed experts, from what each gets of the target's tokens, and the seed."""
ASKED_FOR = (HALF,)
"""Arms that run only where --arms names them."""


def placement_of(task: Task, arm: str, profile: RouterProfile, seed: int) -> Placement:
    """Routed experts alone, or attention alone; with `task.joined` attention in any case."""
    routed = ARMS[arm](grid_of(task, profile), profile.share().tolist(), seed)
    attention = RANK if task.joined or not routed else 0
    return Placement(attention=attention, routed=routed, alpha=SCALE * max(map(max, routed), default=RANK))


# -- the router profile -------------------------------------------------------------------------------------------


def profile_of(task: Task) -> RouterProfile:
    """The profile of the target's training rows; one kept from before is taken if base and data are the same."""
    path = Path(task.folder) / f"{task.name}-{task.profile_tokens}.profile.safetensors"
    tokenizer = AutoTokenizer.from_pretrained(task.directory)
    rows = profiled_rows(task, tokenizer)
    base = hashlib.sha256((task.directory / "model.safetensors").read_bytes()).hexdigest()
    data = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    try:
        kept = load_profile(path)
    except ProfileError:
        kept = None
    if kept is None or (kept.base, kept.data) != (base, data):
        kept = make_profile(task, rows, tokenizer.pad_token_id, base, data)
        kept.save(path)
    return kept


def profiled_rows(task: Task, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    rows, tokens = [], 0
    for row in random.Random("profile").sample(all_rows := target_rows(task, tokenizer, held_out=False), len(all_rows)):
        if tokens >= task.profile_tokens:
            break
        rows.append(row)
        tokens += len(row[0])
    return rows


def make_profile(task: Task, rows: Sequence[Row], pad: int, base: str, data: str) -> RouterProfile:
    model = load_base(task.directory, quantize="nf4").eval()
    layout = layout_for(model.config.model_type)
    total = None
    with watch_routing(model, layout) as seen, torch.no_grad():
        for start in range(0, len(rows), 32):
            ids, _, mask = padded(rows[start : start + 32], pad)
            seen.clear()
            model(input_ids=ids, attention_mask=mask, use_cache=False)
            kept = mask.flatten().bool()
            counts = count_routing(seen, kept, torch.zeros(len(kept), dtype=torch.int64))
            total = counts if total is None else total + counts
    assert total is not None
    layers, top_k = tuple(r.layer for r in seen), seen[0].experts.shape[1]
    arrays: dict[str, Any] = {name: getattr(total, name).numpy() for name in ("tokens", "routed", "gate", "together")}
    shared = 1 if layout.shared_expert else 0
    return RouterProfile(base, data, 0, task.profile_tokens, layers, top_k, shared, (task.target,), **arrays)


# -- measuring ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def held_out_loss(model: Any, rows: Sequence[Row], pad: int) -> float:
    """Mean cross-entropy of the learned tokens, in nats."""
    summed, count = 0.0, 0
    ordered = sorted(rows, key=lambda row: len(row[0]))
    for start in range(0, len(ordered), 32):
        ids, labels, mask = padded(ordered[start : start + 32], pad)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        summed += float(cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"))
        count += int((labels[:, 1:] != IGNORED).sum())
    return summed / count


def losses(task: Task, model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Held-out loss on the target, and on each other domain."""
    model.eval()
    pad = tokenizer.pad_token_id
    return {
        "target": held_out_loss(model, target_rows(task, tokenizer, held_out=True), pad),
        "others": {
            domain: held_out_loss(model, domain_rows(domain, tokenizer, HELD_OUT_STREAM, task.held_out_documents), pad)
            for domain in task.others
        },
    }


def measure_base(task: Task) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(task.directory)
    return losses(task, load_base(task.directory, quantize="nf4"), tokenizer)


def run(task: Task, arm: str, seed: int) -> dict[str, Any]:
    """Trains one arm in this process, which should be a fresh one: its peak memory is measured."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(task.directory)
    profile = profile_of(task)
    placement = placement_of(task, arm, profile, seed)
    model = attached(task, placement, seed)
    trained = train(task, model, target_rows(task, tokenizer, held_out=False), tokenizer.pad_token_id, seed)
    return {
        "task": task.name,
        "arm": arm,
        "seed": seed,
        "parameters": parameters(model),
        "routed": placement.routed,
        "coverage": coverage(profile.share().tolist(), placement.routed),
        **trained,
        **losses(task, model, tokenizer),
    }


def attached(task: Task, placement: Placement, seed: int) -> Any:
    model: PreTrainedModel = load_base(task.directory, quantize="nf4")
    torch.manual_seed(seed)
    return attach(model, placement)


def train(task: Task, model: Any, rows: Sequence[Row], pad: int, seed: int) -> dict[str, Any]:
    """AdamW for `task.steps`, learning rate warmed up, then along a cosine to 0."""
    optimizer = optimizer_of(model, task)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, task.steps))
    model.train()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, found, seconds = status_bytes("VmRSS"), [], []
    for batch in islice(batches(rows, task.batch_rows, seed), task.steps):
        start = time.perf_counter()
        found.append(train_step(model, optimizer, padded(batch, pad)))
        schedule.step()
        seconds.append(time.perf_counter() - start)
    peak = status_bytes("VmHWM")
    state = [t for values in optimizer.state.values() for t in values.values()]
    return {
        "train_losses": found,
        "step_seconds": statistics.median(seconds),
        "peak_bytes": peak,
        "training_bytes": peak - before,
        "optimizer_bytes": sum(t.nbytes for t in state),
    }


def optimizer_of(model: Any, task: Task) -> torch.optim.AdamW:
    learned = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(learned, lr=LEARNING_RATE, weight_decay=0.0)


def rate_factor(step: int, steps: int) -> float:
    warmup = max(1, round(WARMUP_FRACTION * steps))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_step(model: Any, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor, Tensor]) -> float:
    ids, labels, mask = batch
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def parameters(model: Any) -> dict[str, int]:
    learned = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    routed = sum(count for name, count in learned.items() if ".experts.lora_" in name)
    return {"routed": routed, "all": sum(learned.values())}


def coverage(share: Scores, ranks: Ranks) -> list[float]:
    """By layer: the share of the target's routed tokens that go to experts with an adapter; [] without any."""
    pairs = zip(share, ranks, strict=True) if ranks else ()
    return [sum(use for use, rank in zip(layer, own, strict=True) if rank) for layer, own in pairs]


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def described(task: Task) -> dict[str, Any]:
    """What decides the results of a task's runs, paths aside: a run of another description is not taken over."""
    weights = hashlib.sha256((task.directory / "model.safetensors").read_bytes()).hexdigest()
    facts = {name: value for name, value in asdict(task).items() if name not in ("base", "folder", "others")}
    fixed = {"rank": RANK, "scale": SCALE, "learning_rate": LEARNING_RATE}
    return {**facts, **fixed, "others": list(task.others), "base_sha256": weights}


ALL_DOMAINS = tuple(DOMAINS)
