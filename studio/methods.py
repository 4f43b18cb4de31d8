"""The training methods: what each reads, the module that runs it, and TRL's class for its options. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from studio.data.rows import RowKind

REWARD_HEAD = "reward_head.safetensors"
"""In the adapter directory of a reward model; studio/reward_model.py says what it holds."""

PAIRED: tuple[RowKind, ...] = ("preference",)
ASKED: tuple[RowKind, ...] = ("example", "prompt")


@dataclass(frozen=True)
class Method:
    """One value of `training.method`.

    Attributes:
        rows: kinds of rows that it trains on, and is evaluated on.
        trainer: module whose `train(model, tokenizer, recipe, rows, job)` runs it.
        config: (file below TRL's package, class) of its options, for the recipe's section `trl`.
        paired: both sides of a pair go through the model in one batch.
        reads: fields of the recipe's section `preference` that it reads.
        losses: values of `preference.loss_type`, the first one is taken where the recipe has none.
        smoothed: those of the losses that read `preference.label_smoothing`.
        full_logits: its loss holds the logits of every position at once; the others never do.
        scores: what it trains is a reward model, which writes no text.
        streams: its trainer reads rows while it trains (`data.streaming`).
        samples: it lets the model write completions, and learns from their rewards.
        beta: of its comparison with what the training begins with, where `trl.beta` or `preference.beta` does not say;
            None where it compares with nothing.
    """

    rows: tuple[RowKind, ...]
    trainer: str
    config: tuple[str, str]
    paired: bool = False
    reads: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    smoothed: tuple[str, ...] = ()
    full_logits: bool = False
    scores: bool = False
    streams: bool = False
    samples: bool = False
    beta: float | None = None


METHODS: dict[str, Method] = {
    "sft": Method(("example", "text"), "studio.trainers.sft", ("trainer/sft_config.py", "SFTConfig"), streams=True),
    "dpo": Method(
        PAIRED,
        "studio.trainers.dpo",
        ("trainer/dpo_config.py", "DPOConfig"),
        paired=True,
        streams=True,
        reads=("beta", "loss_type", "loss_weights", "label_smoothing"),
        losses=(
            "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
            "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
        ),
        smoothed=("robust", "exo_pair", "aot", "aot_unpaired"),
        beta=0.1,
    ),
    "kto": Method(
        ("labelled", "preference"),
        "studio.trainers.kto",
        ("trainer/kto_config.py", "KTOConfig"),
        streams=True,
        reads=("beta", "loss_type"),
        losses=("kto", "apo_zero_unpaired"),
        beta=0.1,
    ),
    "orpo": Method(
        PAIRED,
        "studio.trainers.orpo",
        ("experimental/orpo/orpo_config.py", "ORPOConfig"),
        paired=True,
        reads=("beta",),
        full_logits=True,
    ),
    "cpo": Method(
        PAIRED,
        "studio.trainers.cpo",
        ("experimental/cpo/cpo_config.py", "CPOConfig"),
        paired=True,
        reads=("beta", "loss_type", "label_smoothing"),
        losses=("sigmoid", "hinge", "ipo", "simpo"),
        smoothed=("sigmoid", "simpo"),
        full_logits=True,
    ),
    "reward": Method(
        PAIRED,
        "studio.trainers.reward",
        ("trainer/reward_config.py", "RewardConfig"),
        paired=True,
        scores=True,
        streams=True,
    ),
    "grpo": Method(ASKED, "studio.trainers.grpo", ("trainer/grpo_config.py", "GRPOConfig"), samples=True, beta=0.0),
    "rloo": Method(ASKED, "studio.trainers.rloo", ("trainer/rloo_config.py", "RLOOConfig"), samples=True, beta=0.05),
    "rejection": Method(ASKED, "studio.trainers.rejection", ("trainer/sft_config.py", "SFTConfig"), samples=True),
}  # fmt: skip


def readers_of(field: str) -> tuple[str, ...]:
    """The methods that read a field of the recipe's section `preference`."""
    return tuple(name for name, method in METHODS.items() if field in method.reads)


def reading_kind(kind: RowKind) -> tuple[str, ...]:
    """The methods that train on rows of a kind."""
    return tuple(name for name, method in METHODS.items() if kind in method.rows)
