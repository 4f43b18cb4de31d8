"""Online training in numbers: how many prompts a step takes, how many steps there are, what sampling adds to memory.

TRL samples one *generation batch* at a time, of whole groups of `sampling.completions`, and learns from it in
`steps_per_generation` forward passes, `num_iterations` times over (trl/trainer/grpo_config.py, `RepeatSampler` in
trl/trainer/utils.py). By default a generation batch is what one optimizer step learns from. No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from studio.errors import DataError, Problem

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
    per_pass = training.batch_size
    size = trl.get("generation_batch_size") or per_pass * int(
        trl.get("steps_per_generation") or training.gradient_accumulation_steps  # type: ignore[arg-type]  # checked by TRL
    )
    completions = int(size)  # type: ignore[call-overload]
    prompts = completions // recipe.sampling.completions
    batches = examples // max(1, prompts)  # what does not fill a batch is left out of this pass over the data
    if not batches:
        raise DataError(
            [
                Problem(
                    "",
                    None,
                    f"has {examples} examples, and one generation takes {prompts} prompts "
                    f"({completions} completions, {recipe.sampling.completions} each); allowed: at least as many examples "
                    "as prompts; lower training.batch_size or gradient_accumulation_steps, or add examples",
                    str(recipe.data.train),
                )
            ]
        )
    passes = (completions // per_pass) * int(trl.get("num_iterations") or 1)  # type: ignore[arg-type]
    return Generations(completions, prompts, passes, math.ceil(batches * passes / training.gradient_accumulation_steps))


def online_steps(recipe: Recipe, examples: int) -> int:
    """Optimizer steps of GRPO or RLOO, as Trainer counts them."""
    return math.ceil((recipe.training.epochs or 1.0) * generations(recipe, examples).steps)
