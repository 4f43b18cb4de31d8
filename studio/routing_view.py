"""What there is to see of a plan's or a job's routing, as plain arrays: the PNGs and the browser draw the same ones.

                                                       plan, profile ── plan_routing ──▶ RoutingView
    profile.safetensors  placement.json  profile_after.safetensors  delta_norms.json ── job_routing ──▶ RoutingView
                                                       RoutingView ── heatmaps, coverage ──▶ pictures.py, ui/heatmaps.py

Dimension legend: L MoE layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from adapters.errors import StudioError
from adapters.router_profile import Floats, RouterProfile, load_profile
from studio import job_files as files
from studio.plan import Plan

Kind = Literal["use", "rank", "change", "delta"]
REACH_FRACTION = 0.9
"""A source reaches the fewest experts of a layer that together get this share of its routed tokens."""


@dataclass(frozen=True)
class Heatmap:
    """One picture of layers by experts.

    Attributes:
        kind: what it shows. title: in words. unit: of the values.
        layers: decoder layer numbers, L of them.
        values: (L, E). shares of 0 to 1, ranks, differences of shares, or norms.
        share, rank: (L, E) of the same experts, for whoever points at one; None where they are not known.
    """

    kind: Kind
    title: str
    unit: str
    layers: tuple[int, ...]
    values: Floats
    share: Floats | None = None
    rank: Floats | None = None


@dataclass(frozen=True)
class SourceCoverage:
    """One data source and the experts.

    Attributes:
        source: its name. tokens: of the sample.
        reached: experts a layer, averaged over the layers, that get `REACH_FRACTION` of its routed tokens.
        experts: of a layer.
        covered_fraction: of its routed tokens on experts with an adapter; None without a placement.
    """

    source: str
    tokens: int
    reached: float
    experts: int
    covered_fraction: float | None


@dataclass(frozen=True)
class RoutingView:
    """Everything that is known of a routing; None for what is not.

    Attributes:
        profile: of the base. after: of the tuned model, over the same sample.
        layers: decoder layer numbers of the MoE layers. ranks: (L, E) of the routed experts' adapters.
        deltas: (L, E), the Frobenius norm of each expert's update, over its matrices.
    """

    layers: tuple[int, ...] = ()
    profile: RouterProfile | None = None
    after: RouterProfile | None = None
    ranks: Floats | None = None
    deltas: Floats | None = None

    def heatmaps(self, source: str | None = None) -> tuple[Heatmap, ...]:
        """Use, rank, change of use and norm of the update, as far as they are known; use of one source or of all."""
        share = self.profile.share(source) if self.profile else None
        after = self.after.share(source) if self.after else None
        change = None if share is None or after is None else 100 * (after - share)
        use = f"Use by the tokens of {source}" if source else "Use by the training tokens"
        found: list[tuple[Kind, str, str, Floats | None]] = [
            ("use", use, "share of the layer's routed tokens", share),
            ("rank", "LoRA rank of each expert", "rank; grey: no adapter", self.ranks),
            ("change", "Use after training minus before", "percentage points of the layer's routed tokens", change),
            ("delta", "Size of the update", "Frobenius norm of the expert's ΔW; grey: no adapter", self.deltas),
        ]
        known = [(kind, title, unit, values) for kind, title, unit, values in found if values is not None]
        return tuple(Heatmap(*entry[:3], self.layers, entry[3], share, self.ranks) for entry in known)

    def coverage(self) -> tuple[SourceCoverage, ...]:
        """Each data source of the profile, in its order; () without a profile."""
        profile = self.profile
        return tuple(self._covered(profile, source) for source in profile.sources) if profile else ()

    def _covered(self, profile: RouterProfile, source: str) -> SourceCoverage:
        share = profile.share(source)
        tokens = int(profile.tokens[profile.sources.index(source)])
        covered = None if self.ranks is None else float((share * (self.ranks > 0)).sum(-1).mean())
        return SourceCoverage(source, tokens, reach(share), profile.experts, covered)


def plan_routing(plan: Plan, profile: RouterProfile | None) -> RoutingView | None:
    """What a plan says of the routed experts; None for a dense model."""
    placement = plan.placement
    if placement is None:
        return None
    return RoutingView(placement.layers, profile, ranks=_array(placement.ranks) if placement.ranks else None)


def reach(share: Floats, fraction: float = REACH_FRACTION) -> float:
    """The fewest experts that get `fraction` of a layer's tokens, the mean over the layers of `share` (L, E)."""
    cumulative = np.cumsum(-np.sort(-share, axis=-1), axis=-1)
    return float((1 + (cumulative < fraction - 1e-12).sum(-1)).clip(max=share.shape[-1]).mean())


def job_routing(job_dir: Path | str) -> RoutingView | None:
    """What the files of a job directory say; a file that is absent or cannot be read is passed over. None: nothing."""
    folder = Path(job_dir)
    profile = _profile(folder / "profile.safetensors")
    placement, norms = _json(folder / "placement.json"), _json(folder / "delta_norms.json")
    layers = profile.layers if profile else tuple((placement or norms or {}).get("layers", ()))
    if not layers:
        return None
    return RoutingView(
        layers=layers,
        profile=profile,
        after=_profile(folder / "profile_after.safetensors"),
        ranks=_array(placement["routed"]) if placement and placement.get("routed") else None,
        deltas=np.hypot(*(_array(norms[name]) for name in ("gate_up_proj", "down_proj"))) if norms else None,
    )


def _profile(path: Path) -> RouterProfile | None:
    try:
        return load_profile(path) if path.is_file() else None
    except StudioError:
        return None


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = files.read_json(path)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _array(values: Any) -> Floats:
    return np.asarray(values, dtype=np.float64)
