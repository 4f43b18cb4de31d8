"""Online training in numbers: how many prompts a step takes, how many steps there are, what sampling adds to memory.

TRL samples one *generation batch* at a time, of whole groups of `sampling.completions`, and learns from it in
`steps_per_generation` forward passes, `num_iterations` times over (trl/trainer/grpo_config.py, `RepeatSampler` in
trl/trainer/utils.py). By default a generation batch is what one optimizer step learns from. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from studio.data.lengths import problem_of
from studio.data.rows import Example, Row, wanted_sequences
from studio.errors import DataError, Problem
from studio.memory import Drawn
from studio.methods import METHODS

if TYPE_CHECKING:
    from studio.recipe import Recipe


@dataclass(frozen=True)
class Generations:
    """The sizes of online training.

    Attributes:
        completions: of a generation batch, all sampled together. prompts: that they belong to.
        passes: forward passes that learn from one generation batch, over all iterations.
        steps: optimizer steps from one pass over the data.
    """

    completions: int
    prompts: int
    passes: int
    steps: int


def generations(recipe: Recipe, examples: int) -> Generations:
    """
    Raises:
        DataError: fewer examples than a generation batch has prompts: nothing would be trained.
    """
    training, trl = recipe.training, recipe.trl
    completions = completions_together(recipe)
    prompts = completions // recipe.sampling.completions
    batches = examples // max(1, prompts)  # what does not fill a batch is left out of this pass over the data
    if not batches:
        raise DataError(
            [
                Problem(
                    "",
                    None,
                    f"has {examples} examples, and one generation takes {prompts} prompts "
                    f"({completions} completions, {recipe.sampling.completions} each); allowed: at least as many "
                    "examples as prompts; lower training.batch_size or gradient_accumulation_steps, or add examples",
                    str(recipe.data.sources[0].path),
                )
            ]
        )
    iterations: Any = trl.get("num_iterations") or 1
    passes = completions // training.batch_size * int(iterations)
    return Generations(completions, prompts, passes, math.ceil(batches * passes / training.gradient_accumulation_steps))


def is_online(recipe: Recipe) -> bool:
    """Whether the recipe samples in every step, as GRPO and RLOO do."""
    return recipe.training.method in ("grpo", "rloo")


def check_prompts(recipe: Recipe, train: Sequence[Row], held_out: Sequence[Row]) -> None:
    """Refuses what needs completions where the rows are prompts alone.

    Raises:
        DataError
    """
    prompts = [row for row in train if isinstance(row, Example) and not row.completion]
    problems = []
    if prompts and (recipe.data.drop_easiest or recipe.data.drop_hardest):
        said = "is a prompt alone and has no loss; leave out data.drop_easiest and drop_hardest, which choose by it"
        problems.append(problem_of(prompts[0], "", said))
    if recipe.evaluation.every_steps and held_out and not wanted_sequences(held_out):
        said = "is a prompt alone, as all held-out rows are; evaluation.every_steps measures a loss, leave it out"
        problems.append(problem_of(held_out[0], "", said))
    if problems:
        raise DataError(problems)


def asked(recipe: Recipe, rows: Sequence[Row]) -> list[Row]:
    """The rows without their completions where the model writes its own; else as they are."""
    if not METHODS[recipe.training.method].samples:
        return list(rows)
    return [replace(row, completion=()) if isinstance(row, Example) else row for row in rows]


def drawn_together(recipe: Recipe, longest_tokens: int) -> Drawn | None:
    """What is sampled together, for the plan; `longest_tokens` of a prompt with its completion. None: nothing is."""
    sampling = recipe.sampling
    if not METHODS[recipe.training.method].samples:
        return None
    rows = max(sampling.completions, 4 * recipe.training.batch_size)
    if is_online(recipe):
        rows = completions_together(recipe)
    return Drawn(rows, longest_tokens, longest_tokens - sampling.max_new_tokens, sampling.top_p < 1)


def completions_together(recipe: Recipe) -> int:
    """Completions of a generation batch of GRPO or RLOO."""
    training, trl = recipe.training, recipe.trl
    size: Any = trl.get("generation_batch_size")  # a number: checked against TRL's annotation
    if size:
        return int(size)
    passes: Any = trl.get("steps_per_generation") or training.gradient_accumulation_steps
    return training.batch_size * int(passes)


def online_steps(recipe: Recipe, examples: int) -> int:
    """Optimizer steps of GRPO or RLOO, as Trainer counts them."""
    return math.ceil((recipe.training.epochs or 1.0) * generations(recipe, examples).steps)
