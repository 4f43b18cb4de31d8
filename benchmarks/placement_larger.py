"""The larger MoE of benchmarks/placement.py: a Qwen3-MoE pretrained from nothing on one CPU thread.

    python benchmarks/placement_larger.py --folder FOLDER [--steps 1000]

4 layers, 32 experts of width 64, 4 experts a token, hidden size 128; the embedded base's tokenizer and its eight
domains (studio/base/domains.py). The domain that the benchmark fine-tunes on, code, is all but left out: one row in a
hundred, so that the routers know it and the experts have much to learn. Two losses shape the routers besides next-token
loss, as in the embedded base: load balance (Switch Transformers, as stock Qwen3-MoE computes it, layer by layer) and
the row coherence of studio/base/routing.py, which draws experts towards domains.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from adapters.layouts import layout_for
from adapters.routed import use_routed_experts
from adapters.routing import Routing, watch_routing
from studio.base import EMBEDDED_DIR
from studio.base.pretrain import (
    ROW_TOKENS,
    ROWS_PER_BATCH,
    TRAIN_STREAM,
    Schedule,
    learning_rate_factor,
    one_document_each,
    packed_rows,
    stream_seed,
)
from studio.base.routing import coherence_loss
from studio.base.tokenizer import MAX_LENGTH_TOKENS

TARGET_DOMAIN = "code"
TARGET_EVERY_BATCHES = 6
"""One row of the target domain in so many batches: about one row in a hundred."""

STEPS, SEED = 1000, 0
COHERENCE = 0.1
"""Weight of the coherence loss, five times that of the embedded base: at its weight the routers stayed indifferent."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
LOG_EVERY_STEPS = 50


def larger_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        moe_intermediate_size=64,
        intermediate_size=256,  # of dense layers, of which there are none
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=MAX_LENGTH_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def larger_model(folder: Path, steps: int = STEPS) -> Path:
    """The directory of the pretrained model, made now if `folder` does not have it: about 7 minutes on one thread."""
    out = folder / f"qwen3_moe-32x4-{steps}-steps"
    if not (out / "config.json").exists():
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        pretrain(partial, Schedule(steps=steps, coherence=COHERENCE))
        partial.rename(out)
    return out


def pretrain(out: Path, schedule: Schedule) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(EMBEDDED_DIR)
    torch.manual_seed(SEED)
    model = Qwen3MoeForCausalLM(larger_config(tokenizer)).train()
    for layer in model.model.layers:  # stock starts them at 0, where every top-k is a tie
        nn.init.normal_(layer.mlp.gate.weight, std=model.config.initializer_range)
    use_routed_experts(model)
    train(model, batches(tokenizer), schedule)
    out.mkdir(parents=True)
    model.to(torch.bfloat16).save_pretrained(out)
    for name in TOKENIZER_FILES:
        shutil.copy(EMBEDDED_DIR / name, out / name)


def batches(tokenizer: PreTrainedTokenizerFast) -> Iterator[Tensor]:
    """Batches (rows, ROW_TOKENS) of token ids: the embedded base's mix, the target's row in few of them."""
    seed = stream_seed(SEED, TRAIN_STREAM)
    streams = {domain: packed_rows(tokenizer, domain, seed, ROW_TOKENS) for domain in ROWS_PER_BATCH}
    others = {domain: rows for domain, rows in ROWS_PER_BATCH.items() if domain != TARGET_DOMAIN}
    number = 0
    while True:
        rows = [next(streams[domain]) for domain, count in others.items() for _ in range(count)]
        if number % TARGET_EVERY_BATCHES == 0:
            rows.append(next(streams[TARGET_DOMAIN]))
        yield torch.tensor(rows)
        number += 1


def train(model: Qwen3MoeForCausalLM, data: Iterator[Tensor], schedule: Schedule) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=schedule.weight_decay, fused=True
    )
    start = time.monotonic()
    with watch_routing(model, layout_for("qwen3_moe")) as seen:
        for step in range(schedule.steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate * learning_rate_factor(step / schedule.steps, schedule)
            language, balance, coherence = losses(model, next(data), seen)
            (language + schedule.balance_start * balance + schedule.coherence * coherence).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % LOG_EVERY_STEPS == 0:
                text = f"loss {language:.3f} balance {balance:.2f} coherence {-coherence:.2f}"
                print(f"pretraining, step {step}, {(time.monotonic() - start) / 60:.1f} min: {text}", flush=True)


def losses(model: Qwen3MoeForCausalLM, batch: Tensor, seen: list[Routing]) -> tuple[Tensor, Tensor, Tensor]:
    """Next-token loss, load balance (1 is even) and coherence of one batch, the latter two averaged over layers."""
    seen.clear()
    packed = one_document_each(batch)
    masks = {"position_ids": packed["position_ids"], "attention_mask": packed["attention_mask"]["full_attention"]}
    predicted = model(input_ids=batch, use_cache=False, **masks).logits
    language = cross_entropy(predicted[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    config = model.config
    experts, top_k = config.num_experts, config.num_experts_per_tok
    balance = [torch.as_tensor(load_balancing_loss_func((r.logits,), experts, top_k)) / top_k for r in seen]
    coherence = [coherence_loss(r.logits, len(batch)) for r in seen]
    return language, torch.stack(balance).mean(), torch.stack(coherence).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the model is kept")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(larger_model(options.folder, options.steps))


if __name__ == "__main__":
    main()
