"""What is drawn of a preference job's training: one set of panels for the PNG and for the browser. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from studio.progress import Rows

Points = tuple[tuple[int, float], ...]
"""(step, value) pairs."""


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        lines: name → its points; lines without points are left out.
    """

    title: str
    unit: str
    lines: dict[str, Points]


PANELS: tuple[tuple[str, str, str, dict[str, tuple[str, ...]]], ...] = (
    ("Rewards", "beta x log-ratio to the reference, or scores", "train", {
        "chosen": ("rewards_chosen",), "rejected": ("rewards_rejected",), "mean": ("mean_reward",),
        "lowest": ("min_reward",), "highest": ("max_reward",),
    }),
    ("Margin", "chosen minus rejected", "train", {"margin": ("rewards_margins", "margin")}),
    ("Accuracy", "share of the batch's pairs", "train", {"accuracy": ("rewards_accuracies", "accuracy")}),
    ("KL from the base", "nats a token, held-out answers", "reference", {"kl": ("kl",)}),
)  # fmt: skip
"""Title, unit, kind of row in metrics.jsonl, and line → the names that its values have there."""


def preference_panels(rows: Rows) -> tuple[Panel, ...]:
    """The panels that the rows of metrics.jsonl have values for; () for a job without preferences."""
    panels = []
    for title, unit, kind, lines in PANELS:
        found = {name: _points(rows, kind, keys) for name, keys in lines.items()}
        if kept := {name: points for name, points in found.items() if points}:
            panels.append(Panel(title, unit, kept))
    return tuple(panels)


def _points(rows: Rows, kind: str, keys: tuple[str, ...]) -> Points:
    return tuple(
        (row["step"], row[key]) for row in rows if row.get("kind") == kind for key in keys if row.get(key) is not None
    )
