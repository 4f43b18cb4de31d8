"""What an export says, against what the trained model says: teacher-forced, over the whole vocabulary.

Two numbers decide. KL(trained ‖ export), the mean over all positions of the prompts in nats, says how far the export is
from the trained model; the same from the base says whether it is the trained model at all. Greedy text alone misleads:
with random or barely trained weights one close call turns all that follows.

Dimension legend: T tokens of a prompt, V vocabulary, P positions of all prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from adapters.verify import Check, Evidence

DECIDED_NATS = 0.1
"""A position is decided where the trained model's first choice leads its second by this much; others may tip."""
CHUNK_ROWS = 32


@dataclass(frozen=True)
class Limits:
    """What counts as the same model.

    Attributes:
        kl: mean KL(trained ‖ export) in nats, at most.
        top1: share of decided positions with the same first choice, at least.
        reason: where the numbers come from.
    """

    kl: float
    top1: float
    reason: str


LIMITS = {
    "float32": Limits(1e-6, 1.0, "right merges measure below 1e-8, one layer's lost delta 4e-2"),
    "float16": Limits(1e-3, 0.99, "rounding merged weights to 11 bits measures near 4e-6, to 8 bits near 2e-4"),
    "bfloat16": Limits(1e-2, 0.97, "rounding merged weights to 8 bits measures near 2e-4, one layer's lost delta 4e-2"),
    "fp8": Limits(1e-1, 0.90, "4 bits of mantissa; losing the adapter of the quickstart's job measures 2.8"),
    "4-bit": Limits(5e-1, 0.75, "4 bits a weight; losing the adapter of the quickstart's job measures 2.8"),
}


def divergence(reference_TV: Tensor, other_TV: Tensor) -> Tensor:
    """KL(reference ‖ other) at each position, (T,) float64, from logits."""
    rows = zip(reference_TV.split(CHUNK_ROWS), other_TV.split(CHUNK_ROWS), strict=True)
    return torch.cat([_divergence(reference.double(), other.double()) for reference, other in rows])


def _divergence(reference: Tensor, other: Tensor) -> Tensor:
    log_p, log_q = reference.log_softmax(-1), other.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def same_choice(reference_TV: Tensor, other_TV: Tensor) -> Tensor:
    """Whether the first choice is the same, of the decided positions alone: (≤ T,) bool."""
    first, second = reference_TV.topk(2, dim=-1).values.unbind(-1)
    return (reference_TV.argmax(-1) == other_TV.argmax(-1))[first - second > DECIDED_NATS]


def check_behaviour(
    evidence: Evidence, export: Path | Mapping[str, Tensor], limits: Limits, program: str
) -> list[Check]:
    """Holds an export's logits against the evidence.

    Args:
        export: `export.{i}`, (T, V), of every prompt of the evidence: a safetensors file, or the tensors.
        program: what computed them, e.g. "stock transformers 5.23.0".
    """
    assert evidence.logits is not None
    found: dict[str, list[Tensor]] = {name: [] for name in ("tuned", "base", "held", "moved", "choices")}
    with safe_open(evidence.logits, "pt") as reference:
        has_held = "held.0" in reference.keys()  # noqa: SIM118
        for number in range(len(evidence.prompts)):
            trained, plain = (reference.get_tensor(f"{name}.{number}") for name in ("tuned", "base"))
            logits = _logits(export, number)
            if logits is None or logits.shape != trained.shape or not torch.isfinite(logits).all():
                shape = None if logits is None else tuple(logits.shape)
                problem = f"prompt {number}: {program} gave {shape}, expected finite logits {tuple(trained.shape)}"
                return [Check(SAME, "failed", problem)]
            found["tuned"].append(divergence(trained, logits))
            found["base"].append(divergence(plain, logits))
            found["moved"].append(divergence(trained, plain))
            found["choices"].append(same_choice(trained, logits))
            if has_held:
                found["held"].append(divergence(reference.get_tensor(f"held.{number}"), logits))
    return _judged({name: torch.cat(rows) for name, rows in found.items() if rows}, limits, program)


SAME, APART = "behaviour: as the trained model", "behaviour: apart from the base"


def _judged(found: Mapping[str, Tensor], limits: Limits, program: str) -> list[Check]:
    choices = found["choices"]
    kl, agreement = float(found["tuned"].mean()), float(choices.double().mean()) if len(choices) else 1.0
    measured: dict[str, Any] = {
        "kl_mean": kl,
        "kl_max": float(found["tuned"].max()),
        "kl_limit": limits.kl,
        "top1": agreement,
        "top1_limit": limits.top1,
        "decided_positions": len(choices),
        "positions": len(found["tuned"]),
        "program": program,
    }
    right = kl <= limits.kl and agreement >= limits.top1
    detail = (
        f"{program}: KL {kl:.1e} to the trained model (limit {limits.kl:.0e}: {limits.reason}), same first choice at "
        f"{100 * agreement:.1f} % of {len(choices)} decided positions (limit {100 * limits.top1:.0f} %)"
    )
    if "held" in found:
        measured["kl_from_quantised_base_of_training"] = drift = float(found["held"].mean())
        detail += f"; from the adapter on the quantised base of its training, which is another model, {drift:.1e}"
    same = Check(SAME, "passed" if right else "failed", detail, measured)
    return [same, _apart(kl, float(found["base"].mean()), float(found["moved"].mean()), limits)]


def _apart(kl: float, from_base: float, moved: float, limits: Limits) -> Check:
    measured = {"kl_export_from_base": from_base, "kl_trained_from_base": moved, "kl_export_from_trained": kl}
    if not moved:
        detail = "the trained model says just what the base says: there is no adapter, or it changes nothing"
        return Check(APART, "passed", detail, measured)
    if moved <= limits.kl / 10:
        detail = f"the adapter moves the model by a KL of {moved:.1e} alone: only the weights can tell the two apart"
        return Check(APART, "passed", detail, measured)
    detail = (
        f"from the base the export is a KL of {from_base:.1e} away, the trained model {moved:.1e}; from the trained "
        f"model the export is {kl:.1e} (limit: half of what training moved)"
    )
    return Check(APART, "passed" if kl <= moved / 2 else "failed", detail, measured)


def behaviour_not_run(why: str) -> list[Check]:
    """For a model that cannot be run here: said so, and never passed."""
    return [Check(name, "not run", f"weights verified, behaviour not run: {why}") for name in (SAME, APART)]


def _logits(export: Path | Mapping[str, Tensor], number: int) -> Tensor | None:
    name = f"export.{number}"
    if not isinstance(export, Path):
        return export.get(name)
    with safe_open(export, "pt") as file:
        return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118
