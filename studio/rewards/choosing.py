"""Which sampled completions rejection sampling keeps, and why it drops the others. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from studio.rewards.samples import as_sample
from studio.rewards.scoring import Scored

Fate = Literal["kept", "clipped", "empty", "below the threshold", "duplicate", "not among the best"]


@dataclass(frozen=True)
class Judged:
    """A completion and what became of it."""

    scored: Scored
    fate: Fate

    def as_row(self) -> dict[str, Any]:
        return {"fate": self.fate, **as_sample(self.scored)}


def choose(group: Sequence[Scored], clipped: Sequence[bool], threshold: float, keep: int) -> list[Judged]:
    """Judges the completions of one prompt, in order.

    A completion that was cut off, or says nothing, is dropped whatever its reward: it would teach to stop there. Of
    the rest, those with at least `threshold` are kept, each text once, at most `keep`, the best rewarded first, and
    the earlier drawn where two are equal.
    """
    fates: list[Fate] = ["below the threshold"] * len(group)
    seen: set[str] = set()
    kept = 0
    for place in sorted(range(len(group)), key=lambda i: -group[i].total):
        text = group[place].attempt.completion.strip()
        if clipped[place] or not text:
            fates[place] = "clipped" if clipped[place] else "empty"
        elif group[place].total < threshold:
            continue
        elif text in seen:
            fates[place] = "duplicate"
        elif kept == keep:
            fates[place] = "not among the best"
        else:
            fates[place] = "kept"
            kept += 1
        seen.add(text)
    return [Judged(scored, fate) for scored, fate in zip(group, fates, strict=True)]
