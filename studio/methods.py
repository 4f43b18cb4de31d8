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
        streams: its trainer reads rows while it trains (`data.streaming`).
    """

    rows: tuple[RowKind, ...]
    trainer: str
    config: tuple[str, str]
    streams: bool = False


METHODS: dict[str, Method] = {
    "sft": Method(("example", "text"), "studio.trainers.sft", ("trainer/sft_config.py", "SFTConfig"), streams=True),
}
