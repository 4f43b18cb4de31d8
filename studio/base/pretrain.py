"""Pretrain the embedded base: a Llama-4-architecture MoE of about 5 M parameters, from nothing, on one CPU thread.

    python -m studio.base.pretrain --out DIR --seed 0

Writes a complete model directory: config, bfloat16 safetensors, tokenizer, chat template, generation config and model
card. The tokenizer, the data, the weights' start and the order of everything follow from the seed; the result is the
same wherever the arithmetic is (same torch, same thread count, same kind of CPU).
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, Llama4ForCausalLM, Llama4TextConfig, PreTrainedTokenizerFast

from adapters.routed import use_routed_experts
from studio.base.card import write_card
from studio.base.domains import documents
from studio.base.measure import measure
from studio.base.routing import balance_loss, coherence_loss, recorded_router_logits
from studio.base.start import start_with_copying
from studio.base.tokenizer import EOS, EOT, MAX_LENGTH_TOKENS, render, save_tokenizer, train_tokenizer

ROWS_PER_BATCH: dict[str, int] = {
    "arithmetic": 1,
    "dates": 1,
    "records": 3,
    "code": 1,
    "prose": 1,
    "logs": 2,
    "reports": 3,
    "copying": 4,
}
"""Rows of each domain in every batch: those that teach copying weigh most."""

ROW_TOKENS = 192
LOG_EVERY_STEPS = 50
"""Where the output is no terminal, a line each so many steps stands for the progress bar."""

TRAIN_STREAM, HELD_OUT_STREAM = 1, 2
"""Which stream of documents a run reads; mixed with the seed, so that no run is measured on what it was trained on."""


@dataclass(frozen=True)
class Schedule:
    """The numbers of one pretraining run."""

    steps: int = 1200
    minutes: float | None = None
    learning_rate: float = 2e-3
    warmup_steps: int = 60
    final_lr_fraction: float = 0.03
    weight_decay: float = 0.05
    balance_start: float = 0.03
    balance_end: float = 0.02
    coherence: float = 0.02


def base_config(tokenizer: PreTrainedTokenizerFast) -> Llama4TextConfig:
    """Return the architecture: four MoE layers, 16 experts each, top-1, a shared expert, NoPE in the fourth layer."""
    return Llama4TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=64,
        intermediate_size_mlp=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        num_local_experts=16,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
        no_rope_layer_interval=4,
        use_qk_norm=True,
        max_position_embeddings=MAX_LENGTH_TOKENS,
        attention_chunk_size=8192,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=0.03,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.get_vocab()[token] for token in (EOS, EOT)],
        pad_token_id=tokenizer.pad_token_id,
    )


def packed_rows(tokenizer: PreTrainedTokenizerFast, domain: str, seed: int, row_tokens: int) -> Iterator[list[int]]:
    """Yield rows of `row_tokens` token ids, each starting a fresh document of `domain` and cut at its end."""
    stream = documents(domain, seed)
    while True:
        row: list[int] = []
        while len(row) < row_tokens:
            row += tokenizer.encode(render(next(stream)), add_special_tokens=False)
        yield row[:row_tokens]


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Tensor]:
    """Yield batches (rows, ROW_TOKENS) of token ids that mix the domains by `ROWS_PER_BATCH`."""
    streams = {d: packed_rows(tokenizer, d, stream_seed(seed, TRAIN_STREAM), ROW_TOKENS) for d in ROWS_PER_BATCH}
    while True:
        yield torch.tensor([next(streams[domain]) for domain, rows in ROWS_PER_BATCH.items() for _ in range(rows)])


def one_document_each(batch_rt: Tensor) -> dict[str, Any]:
    """Return the positions and attention masks that keep the documents packed into a row apart.

    Each document is read as if it stood alone, as fine-tuning reads it: positions count from its first token, and
    its tokens attend to no other document.

    Args:
        batch_rt: (rows, tokens) ids; every row begins with a document, every document with the same token.
    """
    starts_rt = batch_rt == batch_rt[0, 0]
    index_rt = torch.arange(batch_rt.shape[1]).expand_as(batch_rt)
    first_rt = torch.where(starts_rt, index_rt, 0).cummax(1).values
    mask_rtt = (first_rt[:, :, None] == first_rt[:, None, :]) & (index_rt[:, :, None] >= index_rt[:, None, :])
    mask = mask_rtt[:, None]  # the same for every head
    masks = {"full_attention": mask, "chunked_attention": mask}
    return {"position_ids": index_rt - first_rt, "attention_mask": masks}


def stream_seed(seed: int, stream: int) -> int:
    """Return the seed of one stream of documents of one run."""
    return 10 * seed + stream


def learning_rate_factor(fraction: float, schedule: Schedule) -> float:
    """Return the factor on the peak learning rate at a fraction of the run: linear warm-up, then cosine."""
    warmup = schedule.warmup_steps / schedule.steps
    if fraction < warmup:
        return (fraction * schedule.steps + 1) / (schedule.warmup_steps + 1)
    cosine = 0.5 * (1 + math.cos(math.pi * (fraction - warmup) / (1 - warmup)))
    return schedule.final_lr_fraction + (1 - schedule.final_lr_fraction) * cosine


def _optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.AdamW:
    """Return AdamW that decays matrices only, not norms and embeddings."""
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and "embed_tokens" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim <= 1 or "embed_tokens" in name]
    groups = [{"params": decayed, "weight_decay": schedule.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.95), fused=True)


def _losses(model: Llama4ForCausalLM, batch: Tensor, logits: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return next-token loss, balance and coherence of one batch, the latter two averaged over layers."""
    logits.clear()
    predicted = model(input_ids=batch, use_cache=False, **one_document_each(batch)).logits
    language = cross_entropy(predicted[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    balance = torch.stack([balance_loss(layer) for layer in logits]).mean()
    coherence = torch.stack([coherence_loss(layer, len(batch)) for layer in logits]).mean()
    return language, balance, coherence


def _step(
    model: Llama4ForCausalLM,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    logits: list[Tensor],
    schedule: Schedule,
    fraction: float,
) -> str:
    """Take one optimizer step at `fraction` of the run and return its losses as text."""
    for group in optimizer.param_groups:
        group["lr"] = schedule.learning_rate * learning_rate_factor(fraction, schedule)
    language, balance, coherence = _losses(model, batch, logits)
    balance_weight = schedule.balance_start + (schedule.balance_end - schedule.balance_start) * fraction
    (language + balance_weight * balance + schedule.coherence * coherence).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return f"loss {language:.3f} balance {balance:.2f} coherence {-coherence:.2f}"


def train(model: Llama4ForCausalLM, data: Iterator[Tensor], schedule: Schedule, console: Console) -> None:
    """Train `model` in place; stops after `schedule.steps`, or after `schedule.minutes` where that comes first."""
    optimizer = _optimizer(model, schedule)
    start, columns = time.monotonic(), (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(TextColumn("{task.description}"), *columns, console=console) as progress,
        recorded_router_logits(model) as logits,
    ):
        bar = progress.add_task("pretraining", total=schedule.steps)
        for step in range(schedule.steps):
            minutes = (time.monotonic() - start) / 60
            fraction = max(step / schedule.steps, minutes / schedule.minutes if schedule.minutes else 0.0)
            if fraction >= 1:
                break
            text = _step(model, optimizer, next(data), logits, schedule, fraction)
            progress.update(bar, advance=1, description=text)
            if step % LOG_EVERY_STEPS == 0 and not console.is_terminal:
                console.print(f"step {step} {minutes:.1f} min {text}")


def pretrain(out: Path, seed: int, schedule: Schedule, console: Console) -> None:
    """Make the whole model directory `out`; an existing one is refused.

    Raises:
        FileExistsError: `out` exists and is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: give a new directory")
    tokenizer = train_tokenizer(seed)
    torch.manual_seed(seed)
    model = Llama4ForCausalLM(base_config(tokenizer)).train()
    start_with_copying(model, seed)
    use_routed_experts(model)
    train(model, batches(tokenizer, seed), schedule, console)

    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=model.config.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(out)
    save_tokenizer(tokenizer, out)
    write_card(out, seed, schedule.steps, measure(out, stream_seed(seed, HELD_OUT_STREAM)))


def main() -> None:
    """Run the command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m studio.base.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="new directory of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Schedule.steps)
    parser.add_argument("--minutes", type=float, help="stop sooner, after so many minutes; then not reproducible")
    parser.add_argument("--learning-rate", type=float, default=Schedule.learning_rate)
    parser.add_argument("--balance-start", type=float, default=Schedule.balance_start)
    parser.add_argument("--balance-end", type=float, default=Schedule.balance_end)
    parser.add_argument("--coherence", type=float, default=Schedule.coherence)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the shipped weights were made with 1")
    given = vars(parser.parse_args())
    out, seed = given.pop("out"), given.pop("seed")
    torch.set_num_threads(given.pop("threads"))
    torch.backends.mkldnn.set_flags(False)  # the shipped weights were made with the plain BLAS; the same bytes again
    pretrain(out, seed, Schedule(**given), Console())


if __name__ == "__main__":
    main()
