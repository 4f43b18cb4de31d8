"""The learning-rate range test: the rate grows exponentially over a few steps, and the loss shows which rates train.

    submit_lr_test(recipe) ─▶ Job (ordinary, with lr_test.json) ─▶ lr_test_report(job) ─▶ suggestion, lr_test.png

After Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv 1506.01186, section 3.3, with the rate
growing exponentially instead of linearly. The weights are trained from the recipe's start on its real batches, and
thrown away. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio import job_files as files
from studio.errors import JobError, StudioError
from studio.methods import METHODS

if TYPE_CHECKING:
    from studio.jobs import Job
    from studio.recipe import Recipe

RAMP = "lr_test.json"
DIVERGED = 4.0
"""Times the least smoothed loss, at which the test stops, as fastai has it; but not below the loss that it began with,
which a preference loss near 0, or one that may be negative, would else be at by noise alone."""

LEAST_POINTS = 10
SMOOTHING = 0.9
"""Share of the running mean that stays at each step."""


@dataclass(frozen=True)
class Ramp:
    """Learning rates from `start` to `end` in `steps` steps, each a constant factor above the one before."""

    start: float
    end: float
    steps: int

    def rate(self, step: int) -> float:
        """Of the step after `step` steps, counted from 0."""
        return float(self.start * (self.end / self.start) ** (step / max(1, self.steps - 1)))


@dataclass
class Smoother:
    """A running mean of the loss, corrected for its start at 0 (Kingma and Ba, arXiv 1412.6980, section 3)."""

    mean: float = 0.0
    steps: int = 0
    least: float = field(default=math.inf)
    first: float = field(default=math.nan)

    def add(self, loss: float) -> float:
        """The smoothed loss with one more."""
        self.steps += 1
        self.mean = SMOOTHING * self.mean + (1 - SMOOTHING) * loss
        return self.mean / (1 - SMOOTHING**self.steps)

    def has_diverged(self, loss: float) -> bool:
        """Whether the smoothed loss with this one is far above its least, or no number."""
        smooth = self.add(loss)
        self.first = smooth if self.steps == 1 else self.first
        self.least = min(self.least, smooth)
        limit = max(self.least + (DIVERGED - 1) * abs(self.least), self.first)
        return not math.isfinite(smooth) or (self.steps > LEAST_POINTS and smooth > limit)


@dataclass(frozen=True)
class Suggestion:
    """What a range test says.

    Attributes:
        suggested: the rate to take: a third of `least`, or the steepest where that is lower.
        steepest: where the smoothed loss falls fastest by the logarithm of the rate.
        least: where the smoothed loss is lowest.
        diverged: the rate at which the test stopped; None where it ran to its end.
    """

    suggested: float
    steepest: float
    least: float
    diverged: float | None


def submit_lr_test(recipe: Recipe, ramp: Ramp, *, out: Path | None = None) -> Job:
    """Starts the test as a job of its own beside the recipe's, which it queues with; an earlier test is replaced.

    Raises:
        StudioError: as `studio.submit`; a ramp that does not rise.
    """
    from studio.jobs import submit
    from studio.sweep_space import with_values

    if not 0 < ramp.start < ramp.end <= 100 or ramp.steps < LEAST_POINTS:
        raise StudioError(
            f"received rates from {ramp.start:g} to {ramp.end:g} in {ramp.steps} steps; allowed: from above 0 to a "
            f"higher one of at most 100, in at least {LEAST_POINTS} steps"
        )
    if METHODS[recipe.training.method].samples:
        raise StudioError(
            f"a range test reads the rate off the loss, and that of training.method {recipe.training.method} says "
            "nothing of how good the answers are; use studio sweep, with the metric reward"
        )
    folder = out or recipe.output.dir.with_name(f"{recipe.output.dir.name}-lr-test")
    values: dict[str, Any] = {
        "output.dir": str(folder),
        "data.eval": None,
        "evaluation.json_schema": None,
        "evaluation.every_steps": None,
        "evaluation.tasks": [],
        "evaluation.task_examples": None,
        "evaluation.task_chat_template": False,
        "evaluation.gate": [],
        "training.max_steps": ramp.steps,
        "training.learning_rate": min(1.0, ramp.start),
        "training.lr_scheduler": "constant",
        "training.warmup_fraction": 0.0,
        "training.logging_steps": 1,
        "router.watch": False,
    }
    limits = [name for name in type(recipe.router).model_fields if name.startswith(("warn_", "stop_"))]
    test = with_values(recipe, values | {f"router.{name}": None for name in limits})
    return submit(test, overwrite=(folder / RAMP).is_file(), extra={RAMP: files.to_json(asdict(ramp), indent=2)})


def is_lr_test(job: Job) -> bool:
    return (job.path / RAMP).is_file()


def read_ramp(folder: Path) -> Ramp:
    return Ramp(**files.read_json(folder / RAMP))


def points(rows: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """(rate, loss) of every step so far."""
    return [(row["rate"], row["loss"]) for row in rows if row.get("kind") == "lr_test" and row.get("loss") is not None]


def smoothed(losses: Sequence[float]) -> list[float]:
    smoother = Smoother()
    return [smoother.add(loss) for loss in losses]


def suggestion(found: Sequence[tuple[float, float]], ended: bool = True) -> Suggestion:
    """What (rate, loss) points of a whole test say.

    Args:
        ended: whether the ramp was gone to its end.

    Raises:
        JobError: too few points, or a loss that never fell.
    """
    if len(found) < LEAST_POINTS:
        raise JobError(f"the test has {len(found)} steps, too few to read a rate from; allowed: {LEAST_POINTS} or more")
    rates, losses = [rate for rate, _ in found], smoothed([loss for _, loss in found])
    lowest = min(range(len(losses)), key=losses.__getitem__)
    if lowest == 0:
        raise JobError(
            f"the loss never fell: it was lowest at the first rate, {rates[0]:g}; begin lower, with "
            f"--from {rates[0] / 100:g}"
        )
    steps = [math.log(after / before) for before, after in pairwise(rates)]
    slopes = [(losses[i + 1] - losses[i]) / steps[i] for i in range(lowest)]
    steepest = rates[min(range(lowest), key=slopes.__getitem__)]
    least = rates[lowest]
    return Suggestion(min(least / 3, max(steepest, least / 10)), steepest, least, None if ended else rates[-1])


def lr_test_report(job: Job) -> dict[str, Any]:
    """The points, the smoothed loss, the suggestion and the picture of a test that has ended.

    Raises:
        JobError: too few points, or a loss that never fell.
    """
    found, ramp = points(job.metrics()), read_ramp(job.path)
    made = suggestion(found, ended=len(found) >= ramp.steps)
    losses = smoothed([loss for _, loss in found])
    rows = [
        {"rate": rate, "loss": loss, "smoothed": smooth} for (rate, loss), smooth in zip(found, losses, strict=True)
    ]
    return {"job": str(job.path), **asdict(made), "points": rows}
