"""Hyper-parameters to begin with, by the size of the model, the size of the data and the method; each with its source.

    suggestions(facts) ─▶ (Suggested("training.learning_rate", 4.3e-3, why, source), …)      a pure function
    settled(recipe, base, rows) ─▶ the recipe with every "auto" replaced                     at submission

Sources
    LoRA      Schulman et al., "LoRA Without Regret", Thinking Machines Lab, 2025: the best rate of LoRA is 10 times
              that of full fine-tuning and hardly depends on the rank (scale alpha / rank, alpha 32); parameters at
              least as many as learned tokens; large batches cost more than with full fine-tuning; for policy
              gradients a rank of 1 is enough; with experts, the rank of each is the rank over the number of active ones
    Tinker    tinker-cookbook, hyperparam_utils.py: rate = 5e-5 · 10 · (2000 / hidden size)^p, p = 0.781 for Llama and
              0.0775 for Qwen, fitted to a sweep
    QLoRA     Dettmers et al., arXiv 2305.14314, appendix B: batches of 16, 3 % warm-up
    TRL       trl 1.16, the method's Config class
    Zephyr    Tunstall et al., arXiv 2310.16944: one epoch of DPO, 10 % warm-up
    Alpaca    Taori et al., 2023: 3 epochs of 52,000 rows
Starting points, not optima: `studio lr-test` and `studio sweep` measure. docs/hyperparameters.md has what was measured.
No torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapters.placement import LINEAR
from studio.data.rows import Example, PlainText, Row, sequences
from studio.errors import StudioError
from studio.starting import continued

if TYPE_CHECKING:
    from studio.recipe import Recipe
    from studio.weights import Base

FULL_RATES = {
    "dpo": 1e-6,
    "kto": 1e-6,
    "orpo": 1e-6,
    "cpo": 1e-6,
    "grpo": 1e-6,
    "rloo": 1e-6,
    "reward": 1e-5,
}
"""Rates of full fine-tuning: TRL's defaults. Its 1e-4 for reward models is ten times this already."""

ONLINE = ("grpo", "rloo")
REFERENCE_HIDDEN = 4096
"""Width that TRL's defaults are taken to be meant for: a model of 7 or 8 billion parameters."""

RANKS = (8, 16, 32, 64, 128)
LEAST_STEPS = 100
PROMPTS = 4
"""Prompts of a step of an online method: with fewer, a step may see no group whose answers differ in reward."""

CHARACTERS_A_TOKEN = 4
REFERENCE_ALPHA = 32.0


@dataclass(frozen=True)
class Facts:
    """What the suggestions depend on.

    Attributes:
        method: of the recipe's `training.method`.
        model_type: of the base's config.
        top_k: experts of a token, 0 for a dense model.
        parameters_a_rank: trainable parameters with rank 1 on everything that the recipe adapts.
        rows: of training. learned_tokens: about how many tokens one pass over them learns.
        alpha: of the adapter, for a scale of alpha / rank.
        completions: of a prompt, where the method samples them in every step.
        max_steps: of the recipe, which then says how long the training is, whatever its epochs.
    """

    method: str
    model_type: str
    hidden_size: int
    top_k: int
    parameters_a_rank: int
    rows: int
    learned_tokens: int
    alpha: float = REFERENCE_ALPHA
    completions: int = 8
    max_steps: int | None = None


@dataclass(frozen=True)
class Suggested:
    """A value for one field of the recipe."""

    field: str
    value: float | int
    why: str
    source: str


def suggestions(facts: Facts) -> tuple[Suggested, ...]:
    """Learning rate, batch, epochs, ranks and warm-up."""
    batch, epochs = _batch(facts), _epochs(facts)
    if facts.max_steps is not None:
        epochs = replace(epochs, why=f"{epochs.why}; the recipe has max_steps {facts.max_steps:,} instead")
    return (_rate(facts), batch, epochs, *_ranks(facts), _warmup(facts))


def _rate(facts: Facts) -> Suggested:
    power, known = _power(facts.model_type)
    family = f"p = {power} for {known}"
    if facts.method not in FULL_RATES:
        rate, source = 5e-5 * 10 * (2000 / facts.hidden_size) ** power, "Tinker, LoRA"
        why = f"5e-5 · 10 · (2000 / {facts.hidden_size:,})^p, {family}"
    else:
        full = FULL_RATES[facts.method]
        rate, source = 10 * full * (REFERENCE_HIDDEN / facts.hidden_size) ** power, "TRL, LoRA"
        why = f"10 · {full:g}, TRL's for full fine-tuning, scaled from width {REFERENCE_HIDDEN:,}, {family}"
    if facts.method == "dpo":
        why += "; careful: about 20 times as much was best on the embedded base (docs/hyperparameters.md)"
    if facts.alpha != REFERENCE_ALPHA:
        rate *= REFERENCE_ALPHA / facts.alpha
        why += f"; times 32 / alpha ({facts.alpha:.3g})"
    return Suggested("training.learning_rate", _rounded(min(rate, 0.1)), why, source)


def _power(model_type: str) -> tuple[float, str]:
    if "qwen" in model_type:
        return 0.0775, "Qwen"
    return (
        0.781,
        "Llama" if "llama" in model_type else f"Llama, the more careful of the two: {model_type} was not swept",
    )


def _batch(facts: Facts) -> Suggested:
    if facts.method in ONLINE:
        why = f"it counts completions here: {PROMPTS} prompts with {facts.completions} each (sampling.completions)"
        return Suggested("training.batch_size", PROMPTS * facts.completions, why, "ours")
    size = 8 if facts.rows < 500 else 16 if facts.rows < 50_000 else 32
    why = f"{facts.rows:,} rows; QLoRA takes 16, and LoRA loses more by large batches than full fine-tuning"
    return Suggested("training.batch_size", size, why, "QLoRA, LoRA")


def _epochs(facts: Facts) -> Suggested:
    if facts.method in ONLINE or (facts.method in FULL_RATES and facts.rows >= 2_000):
        return Suggested("training.epochs", 1, "one pass over prompts or pairs", "Zephyr")
    needed = math.ceil(LEAST_STEPS * int(_batch(facts).value) / max(1, facts.rows))
    if facts.rows >= 100_000:
        return Suggested("training.epochs", 1, f"{facts.rows:,} rows are enough for one pass", "Alpaca")
    if needed > 3:
        why = f"{facts.rows:,} rows: at least {LEAST_STEPS} steps"
        return Suggested("training.epochs", min(needed, 30), why, "Tinker")
    return Suggested("training.epochs", 3, f"{facts.rows:,} rows", "Alpaca")


def _ranks(facts: Facts) -> list[Suggested]:
    if facts.method in ONLINE:
        rank, why = RANKS[0], f"a reward says about one bit an answer: rank 1 would do, {RANKS[0]} is our least"
    else:
        parameters = max(1, facts.parameters_a_rank)
        rank = next((r for r in RANKS if r * parameters >= facts.learned_tokens), RANKS[-1])
        why = f"{rank * parameters:,} parameters for about {facts.learned_tokens:,} learned tokens"
    found = [Suggested("adapter.attention_rank", rank, why, "LoRA")]
    if facts.top_k:
        each = max(4, rank // facts.top_k)
        why = f"rank {rank} over {facts.top_k} active expert{'s' if facts.top_k > 1 else ''}, 4 at least"
        found.append(Suggested("adapter.routed_experts_rank", each, why, "LoRA"))
    return found


def _warmup(facts: Facts) -> Suggested:
    if facts.method in FULL_RATES and facts.method not in ONLINE:
        return Suggested("training.warmup_fraction", 0.1, "preference tuning starts at its reference", "Zephyr")
    return Suggested("training.warmup_fraction", 0.03, "B starts at 0, so a short one is enough", "QLoRA")


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")


# -------------------------------------------------------------------- of a recipe


def facts_of(recipe: Recipe, base: Base, rows: Sequence[Row]) -> Facts:
    """What the suggestions for a recipe depend on."""
    return Facts(
        method=recipe.training.method,
        model_type=base.layout.model_type,
        hidden_size=base.number("hidden_size"),
        top_k=base.top_k,
        parameters_a_rank=_parameters_a_rank(recipe, base),
        rows=len(rows),
        learned_tokens=sum(map(_learned_characters, rows)) // CHARACTERS_A_TOKEN,
        alpha=_alpha(recipe, base),
        completions=recipe.sampling.completions,
        max_steps=recipe.training.max_steps,
    )


def _alpha(recipe: Recipe, base: Base) -> float:
    """The alpha with which alpha / rank is the adapter's scale, of the one that is trained further where there is one.

    rsLoRA's alpha / sqrt(rank) is that of alpha · sqrt(rank); where ranks differ, the largest counts.
    """
    going_on = continued(recipe, base)
    if going_on is None:
        adapter, rslora = recipe.adapter, recipe.adapter.rslora
        alpha, ranks = adapter.alpha, [getattr(adapter, f"{name}_rank") for name in (*LINEAR, "routed_experts")]
    else:
        placed, rslora = going_on.placement, going_on.placement.method.rslora
        alpha, ranks = placed.alpha, [*(getattr(placed, name) for name in LINEAR), placed.routed_rank]
    return float(alpha * math.sqrt(max(1, *ranks)) if rslora else alpha)


def settled(recipe: Recipe, base: Base, rows: Sequence[Row]) -> Recipe:
    """The recipe with a number in place of every "auto"."""
    if recipe.training.learning_rate != "auto":
        return recipe
    rate = float(_rate(facts_of(recipe, base, rows)).value)
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"learning_rate": rate})})


def suggest(recipe: Recipe) -> list[tuple[Suggested, Any]]:
    """The suggestions for a recipe, each with what the recipe has.

    Raises:
        StudioError: its data or its base cannot be read.
    """
    from studio.data import training_rows
    from studio.plan import recipe_base

    facts = facts_of(recipe, recipe_base(recipe), training_rows(recipe))
    values = recipe.model_dump(mode="json")
    return [(found, values[found.field.split(".")[0]][found.field.split(".")[1]]) for found in suggestions(facts)]


def settled_learning_rate(recipe: Recipe) -> float:
    """The learning rate of a submitted recipe.

    Raises:
        StudioError: it is still "auto".
    """
    rate: Any = recipe.training.learning_rate
    if rate == "auto":
        raise StudioError("training.learning_rate is still auto: a job's recipe has its number from studio.submit")
    return float(rate)


def _parameters_a_rank(recipe: Recipe, base: Base) -> int:
    from adapters.placement import Placement, same_experts_everywhere
    from studio.weights import trainable_parameters

    adapter = recipe.adapter
    routed = adapter.routed_experts_rank and base.moe and recipe.placement.rule not in ("attention", "shared")
    everywhere = Placement(
        attention=int(adapter.attention_rank > 0),
        shared_expert=int(adapter.shared_expert_rank > 0),
        dense_mlp=int(adapter.dense_mlp_rank > 0),
        routed=same_experts_everywhere(1, len(base.moe), base.experts) if routed else (),
    )
    return sum(trainable_parameters(base, everywhere).values())


def _learned_characters(row: Row) -> int:
    total = 0
    for sequence in sequences([row]):
        if isinstance(sequence, PlainText):
            total += len(sequence.text)
        elif isinstance(sequence, Example):
            total += sum(len(turn.content) + len(turn.thinking) for turn in sequence.completion)
    return total
