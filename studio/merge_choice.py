"""Whether an adapter is merged into the base's own weights or into these as training held them, quantised.

An adapter that was trained on a 4-bit base has learned to live with its errors. Merged into the dequantised weights it
gives the model that was trained; merged into the originals, one that training never saw. Which of the two is better on
held-out data varies, so both are measured where data is at hand, in a process of its own: a merge takes little memory,
and this takes the whole model.

python -m studio.merge_choice QUESTION ANSWER       (JSON files; asked by `choose_into`)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.checkpoint import DTYPE_NAMES, read_index
from adapters.errors import ExportError
from adapters.sidecar import read_sidecar
from adapters.verify.memory import available_bytes
from studio.data import held_out_rows, wanted_sequences
from studio.errors import DataError, JobError
from studio.jobs import open_job
from studio.methods import REWARD_HEAD

INTO = ("auto", "original", "quantized")
EXAMPLES = 200
"""Held-out examples at most, the first ones."""

SPARE_BYTES = 1_500_000_000
"""Beside the model: the process with its libraries, and what an evaluation holds."""


@dataclass(frozen=True)
class Choice:
    """What is merged into.

    Attributes:
        into: "original" or "quantized".
        held: how training held the base, to merge into that; None for the base's own weights.
        why: one sentence.
        losses: mean cross-entropy in nats per completion token by "original" and "quantized"; None if not measured.
    """

    into: str
    held: Mapping[str, Any] | None
    why: str
    losses: Mapping[str, float] | None = None


def choose_into(adapter: Path, base: Path, into: str) -> Choice:
    """Decides what `adapter` is merged into.

    Args:
        adapter: a PEFT adapter directory; that of a job is `JOB/adapter`.
        into: "original", "quantized", or "auto": the lower loss on the job's held-out data.

    Raises:
        ExportError: "quantized" is asked for, and the adapter does not say that training held the base so.
    """
    sidecar = read_sidecar(adapter)
    held = sidecar.held_quantized if sidecar else None
    if into == "quantized" and held is None:
        raise ExportError(
            f"{adapter} does not say that it was trained on quantised weights (studio_adapter.json), so there are none "
            "to merge into; take --into original"
        )
    if into == "quantized":
        return Choice(into, held, "as asked for")
    if into == "original" or held is None:
        return Choice("original", None, "as asked for" if into == "original" else "training did not quantise the base")
    if (adapter / REWARD_HEAD).is_file():
        return Choice("quantized", held, "a reward model gives the scores that it was trained to give")
    return _measured(adapter, base, held)


def _measured(adapter: Path, base: Path, held: dict[str, Any]) -> Choice:
    try:
        recipe = open_job(adapter.parent).recipe()
        examples = held_out_rows(recipe)[:EXAMPLES]
    except (JobError, DataError):
        examples = []
    if not wanted_sequences(examples):
        return Choice("original", None, "no held-out data is at hand to compare the two")
    needed, free = _model_bytes(base, held) + SPARE_BYTES, available_bytes()
    if needed > free:
        sizes = f"{needed / 1e9:.1f} GB of memory are needed, {free / 1e9:.1f} GB are free"
        return Choice("original", None, f"the two cannot be compared here: {sizes}")
    from adapters.merged import MergedWeights
    from adapters.verify.fresh import ask_module

    MergedWeights(base, adapter)  # what does not fit is refused before it is measured
    question = {
        "base": base,
        "adapter": adapter,
        "held": held,
        "job": adapter.parent,
        "max_length_tokens": recipe.data.max_length_tokens,
        "batch_size": recipe.training.batch_size,
    }
    losses = ask_module("studio.merge_choice", question)
    chosen = min(("original", "quantized"), key=lambda name: losses[name])
    why = f"the lower loss on {len(examples)} held-out examples"
    return Choice(chosen, held if chosen == "quantized" else None, why, losses)


def _model_bytes(base: Path, held: Mapping[str, Any]) -> int:
    """Of the weights in the dtype of the computation."""
    size = {"float32": 4, "bfloat16": 2, "float16": 2}[held["dtype"]]
    return sum(size * info.parameters for info in read_index(base).values() if info.dtype in DTYPE_NAMES)


# -------------------------------------------------------------------- in a process of its own


def measure(question: Mapping[str, Any]) -> dict[str, float]:
    """The held-out loss of both merged models, each computed from the values that would be written."""
    import torch

    from adapters.loading import load_base
    from adapters.merged import MergedWeights
    from studio.base_model import load_tokenizer
    from studio.evaluation import held_out_loss

    base, adapter, held = Path(question["base"]), Path(question["adapter"]), question["held"]
    model = load_base(base, quantize="none", dtype=getattr(torch, held["dtype"]))
    tokenizer = load_tokenizer(base)
    recipe = open_job(Path(question["job"])).recipe()
    rows = held_out_rows(recipe)[:EXAMPLES]
    sizes = {name: question[name] for name in ("max_length_tokens", "batch_size")}
    losses = {}
    for name, merged in (("original", MergedWeights(base, adapter)), ("quantized", MergedWeights(base, adapter, held))):
        put_into(model, merged)
        losses[name] = held_out_loss(model, tokenizer, rows, loss_on=recipe.training.loss_on, **sizes)
    return losses


def put_into(model: Any, merged: Any) -> None:
    """Writes the computed values over those of a model that was loaded unquantised from the same base."""
    import torch

    stacks = dict(merged.stacks())
    for name, parameter in model.named_parameters():
        if name in stacks:
            for expert in range(stacks[name]):
                sources = merged.layout.sources(name, expert)
                if any(merged.computed(source.key) for source in sources):
                    parts = [merged.read(source.key, source.expert).float() for source in sources]
                    parameter.data[expert].copy_(torch.cat(parts))
        elif merged.computed(key := merged.layout.checkpoint_key(name)):
            parameter.data.copy_(merged.read(key))


if __name__ == "__main__":
    answer = measure(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")
