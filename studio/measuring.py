"""What a model is measured on, before and after the training and for a finished job: held-out rows and lm-eval's tasks.

Measuring(recipe, model, tokenizer, rows).run() ─▶ Evaluation       of the model as it stands, adapters on or off
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from studio.data import Row, asked_sequences
from studio.evaluation import Evaluation, evaluate
from studio.json_answers import read_schema
from studio.methods import METHODS
from studio.preference import evaluate_labels, evaluate_preferences
from studio.recipe import Recipe
from studio.rewards import rewards_of
from studio.rewards.samples import reward_measures

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int], None]


class Measuring:
    """Held-out rows, the schema and the tasks of a recipe, read once and measured as often as asked.

    Args:
        rows: held-out rows, as many as are to be measured.

    Raises:
        StudioError: a schema or a task that cannot be read.
    """

    def __init__(self, recipe: Recipe, rows: Sequence[Row]):
        self.recipe, self.rows = recipe, rows
        schema = recipe.evaluation.json_schema
        self.fits_schema = read_schema(schema) if schema else None
        self.tasks = _tasks(recipe.evaluation.tasks)
        self.rewards = rewards_of(recipe)

    @property
    def nothing(self) -> bool:
        """Whether there is nothing to measure on."""
        return not self.rows and self.tasks is None

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress | None = None
    ) -> Evaluation:
        """Every metric of the model as it stands."""
        settings, batch_size = self.recipe.evaluation, self.recipe.training.batch_size
        found, scores = Evaluation(examples=len(self.rows)), METHODS[self.recipe.training.method].scores
        if asked_sequences(self.rows) and not scores:
            found = evaluate(
                model,
                tokenizer,
                self.rows,
                max_length_tokens=self.recipe.data.max_length_tokens,
                max_new_tokens=settings.max_new_tokens,
                batch_size=batch_size,
                loss_on=self.recipe.training.loss_on,
                fits_schema=self.fits_schema,
                progress=progress,
            )
        found = found.with_measures(
            evaluate_preferences(
                model,
                tokenizer,
                self.rows,
                max_length_tokens=self.recipe.data.max_length_tokens,
                batch_size=batch_size,
                scores=scores,
                progress=progress,
            )
        )
        sizes = {"max_length_tokens": self.recipe.data.max_length_tokens, "batch_size": batch_size}
        if hasattr(model, "disable_adapter"):  # else there is no base to compare with
            found = found.with_measures(evaluate_labels(model, tokenizer, self.rows, **sizes, progress=progress))
        if self.rewards and found.answers:
            found = found.with_measures(reward_measures(self.rewards, self.rows, found.answers))
        if self.tasks is None:
            return found
        return found.with_measures(
            self.tasks.run(
                model,
                tokenizer,
                batch_size=batch_size,
                examples=settings.task_examples,
                chat_template=settings.task_chat_template,
                progress=progress,
            )
        )


def _tasks(wanted: Sequence[str]) -> Any:
    if not wanted:
        return None
    from studio.lm_tasks import Tasks

    return Tasks(wanted)
