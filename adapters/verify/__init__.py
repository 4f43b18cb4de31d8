"""What a verification is made of. No torch at import.

Evidence     the prompts, and what the trained model says to them
Check        one comparison, and how it came out
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Check:
    """One comparison of an export with what it was made from.

    Attributes:
        name: what was compared, in a few words.
        status: "not run" where this machine cannot: that is never "passed".
        detail: one sentence with what was found.
        measured: the numbers, with their limits.
    """

    name: str
    status: Literal["passed", "failed", "not run"]
    detail: str
    measured: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """What the trained model, run by the studio's engine in float32, says to held-out prompts.

    Attributes:
        prompts: token ids of each prompt, special tokens included. texts: the same as text.
        logits: a safetensors file with `tuned.{i}` and `base.{i}`, (T, V) float32, of prompt i with and without the
            adapter; None where the model is too large to be run here.
        why_none: then the reason, in words.
    """

    prompts: Sequence[Sequence[int]]
    texts: Sequence[str] = ()
    logits: Path | None = None
    why_none: str = ""
