"""What a plan warns of: memory that is not there, data, the template, an adapter that is trained further. No torch.

warnings(recipe, base, …) ─▶ ("…", …)      in the plan's order, each in words for whoever starts the job
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adapters.placement import Placement
from studio.data import Row, wanted_sequences
from studio.data.curriculum import Mixed, mixture_warnings
from studio.data.leakage import LeakPlan, leaks_text
from studio.data.of_recipe import DROPPED, SAMPLE_ROWS, count_of
from studio.errors import Problem
from studio.memory import MemoryPlan, fits
from studio.packed_plan import packs
from studio.quantities import as_bytes
from studio.recipe import Recipe
from studio.rewards.programs import missing_protections
from studio.starting import continued, differing_ranks
from studio.weights import Base


def warnings(
    recipe: Recipe,
    base: Base,
    placement: Placement,
    rows: list[Row],
    dropped: Sequence[Problem],
    mixed: Mixed | None,
    leaks: LeakPlan | None,
    memory: MemoryPlan,
    at_hand: int | None,
) -> tuple[str, ...]:
    """Everything to know before the job is started.

    Args:
        rows: of training. dropped: what is wrong with rows that are left out.
        at_hand: bytes of memory, None where they are not known.
    """
    return (
        *_of_the_run(recipe, base, memory, at_hand),
        *_said_of_template(base, rows),
        *_dropped(dropped),
        *mixture_warnings(recipe, mixed),
        *_data_warnings(recipe, leaks),
        *_going_on(recipe, base, placement),
    )


def _of_the_run(recipe: Recipe, base: Base, memory: MemoryPlan, at_hand: int | None) -> tuple[str, ...]:
    found = []
    if packs(recipe) and recipe.training.max_steps is None:
        found.append("packing: the number of steps is an estimate until the rows are packed")
    if at_hand is not None and not fits(memory.peak_bytes, at_hand):
        options = "; ".join(_options(recipe, base, memory, at_hand))
        peak = f"the predicted peak of {as_bytes(memory.peak_bytes)} plus 10 %"
        found.append(f"{peak} does not fit into the {as_bytes(at_hand)} at hand. What would help: {options}")
    if any(reward.function == "code" for reward in recipe.rewards) and (missing := missing_protections()):
        found.append(missing)
    if base.directory is None:
        found.append(f"{base.name} is a published shape: its weights and its tokenizer were not looked for")
    return tuple(found)


def _options(recipe: Recipe, base: Base, memory: MemoryPlan, at_hand: int) -> list[str]:
    """What would make the peak smaller, the cheapest first."""
    training = recipe.training
    options = []
    if fits(memory.fixed_bytes, at_hand):
        if base.moe and training.expert_path == "fast":
            options.append("training.expert_path: lean")
        if training.batch_size % 2 == 0:
            steps = training.gradient_accumulation_steps * 2
            options.append(f"training.batch_size: {training.batch_size // 2} with gradient_accumulation_steps: {steps}")
        if not training.gradient_checkpointing:
            options.append("training.gradient_checkpointing: true")
        options.append("a shorter data.max_length_tokens")
    if recipe.model.quantization in ("none", "int8"):
        options.append("model.quantization: nf4")
    if base.moe and recipe.placement.rule == "all_experts" and recipe.adapter.routed_experts_rank:
        options.append("a placement.rule that adapts fewer experts, or a lower rank")
    return [*options, "a machine with more memory"]


def _said_of_template(base: Base, rows: list[Row]) -> tuple[str, ...]:
    if base.directory is None:
        return ()
    from studio.chat_template import SAMPLED_ROWS, template_warnings

    return template_warnings(base.directory, wanted_sequences(rows[:SAMPLED_ROWS]))


def _dropped(problems: Sequence[Problem]) -> tuple[str, ...]:
    if not problems:
        return ()
    first = f"{Path(problems[0].file or '').name}, {problems[0]}"
    return (f"{count_of(problems):,} bad rows are dropped; the first: {first}. The job lists all in {DROPPED}",)


def _data_warnings(recipe: Recipe, leaks: LeakPlan | None) -> list[str]:
    found = []
    if leaks is not None and leaks.found:
        more = f"; and {leaks.found - 3:,} more" if leaks.found > 3 else ""
        found.append(f"{leaks_text(leaks)}: {'; '.join(leaks.shown[:3])}{more}")
    if recipe.data.streaming:
        found.append(
            f"the data is streamed: examples, lengths and held-out rows in the training data are those of the first "
            f"{SAMPLE_ROWS:,} rows of each source; a bad row further on stops the job (studio validate reads all)"
        )
    return found


def _going_on(recipe: Recipe, base: Base, placement: Placement) -> list[str]:
    """What is said of an adapter that is trained further."""
    if (found := continued(recipe, base)) is None:
        return []
    ignored = [f"adapter.{name}_rank" for name in differing_ranks(recipe, placement)]
    ignored += ["adapter.alpha"] if recipe.adapter.alpha != placement.alpha else []
    ignored += ["placement.rule"] if recipe.placement.rule != "all_experts" else []
    ignored += ["router.rank"] if recipe.router.mode == "lora" and recipe.router.rank != placement.router else []
    taken = f"not read: {', '.join(ignored)}; adapter.start_from has ranks, an alpha and experts of its own"
    return [*found.warnings, *([taken] if ignored else [])]
