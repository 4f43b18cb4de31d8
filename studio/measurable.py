"""What a job can measure, by its method, its held-out rows and its rewards: known before the base is loaded. No torch.

check_measurable(recipe, held_out)      refuses a gate on another metric
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from studio.data.rows import Example, Labelled, Preference, Row, asked_sequences
from studio.errors import StudioError
from studio.methods import METHODS
from studio.metrics import METRICS
from studio.rewards import reward_names

if TYPE_CHECKING:
    from studio.recipe import Recipe


def check_measurable(recipe: Recipe, held_out: Sequence[Row]) -> None:
    """Refuses a gate whose metric this job can never measure. What the tasks of lm-eval give is known when they run.

    Raises:
        StudioError
    """
    found = measurable(recipe, held_out)
    for metric in (rule.metric for rule in recipe.evaluation.gate):
        task = metric.partition("/")[0]
        if metric in found or ("/" in metric and task != "reward"):
            continue
        near = get_close_matches(metric, found, n=1)
        hint = f'; did you mean "{near[0]}"?' if near else ""
        raise StudioError(
            f"evaluation.gate asks for {metric}, which this job cannot measure; by its method "
            f"({recipe.training.method}) and its held-out rows it measures {', '.join(found) or 'nothing'}{hint}"
        )


def measurable(recipe: Recipe, rows: Sequence[Row]) -> list[str]:
    """The metrics of a job on these held-out rows, tasks of lm-eval aside."""
    scores, schema = METHODS[recipe.training.method].scores, recipe.evaluation.json_schema is not None
    asked = [] if scores else asked_sequences(rows)
    answered = [sequence for sequence in asked if isinstance(sequence, Example)]
    compared = [sequence for sequence in answered if sequence.completion]
    labels = {row.label for row in rows if isinstance(row, Labelled)}
    pairs = any(isinstance(row, Preference) for row in rows)
    found = {
        "loss": len(asked) > len(answered) or bool(compared),
        "exact_match": bool(compared),
        "json_valid": bool(compared or (answered and schema)),
        "schema_valid": bool(answered and schema),
        "preference_accuracy": pairs,
        "preference_accuracy_per_token": pairs and not scores,
        "preference_margin": pairs,
        "reference_kl": pairs and not scores,
        "label_accuracy": bool(labels),
        "label_auc": len(labels) == 2,
        "reward": bool(answered and recipe.rewards),
    }
    found["perplexity"] = found["loss"]
    rewards = [f"reward/{name}" for name in reward_names(recipe)] if found["reward"] else []
    return [*(name for name in METRICS if found[name]), *rewards]
