"""The training methods: what each reads, the module that runs it, and TRL's class for its options. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from studio.data.rows import RowKind


@dataclass(frozen=True)
class Method:
    """One value of `training.method`.

    Attributes:
        rows: kinds of rows that it trains on, and is evaluated on.
        trainer: module whose `train(model, tokenizer, recipe, rows, job)` runs it.
        config: (file below TRL's package, class) of its options, for the recipe's section `trl`.
        samples: it lets the model write completions, and learns from their rewards.
    """

    rows: tuple[RowKind, ...]
    trainer: str
    config: tuple[str, str]
    samples: bool = False


METHODS: dict[str, Method] = {
    "sft": Method(("example", "text"), "studio.trainers.sft", ("trainer/sft_config.py", "SFTConfig")),
    "grpo": Method(("example",), "studio.trainers.grpo", ("trainer/grpo_config.py", "GRPOConfig"), samples=True),
    "rloo": Method(("example",), "studio.trainers.rloo", ("trainer/rloo_config.py", "RLOOConfig"), samples=True),
    "rejection": Method(
        ("example",), "studio.trainers.rejection", ("trainer/sft_config.py", "SFTConfig"), samples=True
    ),
}
