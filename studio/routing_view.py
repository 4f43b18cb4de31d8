"""What there is to see of a plan's or a job's routing, as plain arrays: the PNGs and the browser draw the same ones.

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
class PlacedExperts:
    """How many experts have an adapter.

    Attributes:
        adapted: experts with a rank above 0, of all `experts` of all layers.
        largest_rank: of any of them.
        saved_fraction: of the parameters that the largest rank on every expert would take.
    """

    adapted: int
    experts: int
    largest_rank: int
    saved_fraction: float


@dataclass(frozen=True)
class RoutingView:
    """Everything that is known of a routing; None for what is not.

    Attributes:
        profile: of the base. after: of the tuned model, over the same sample.
        placement: as placement.json has it. deltas: as delta_norms.json has it.
    """

    profile: RouterProfile | None = None
    after: RouterProfile | None = None
    placement: dict[str, Any] | None = None
    deltas: dict[str, Any] | None = None

    def heatmaps(self, source: str | None = None) -> tuple[Heatmap, ...]:
        """Use, rank, change of use and norm of the update, as far as they are known; use of one source or of all."""
        maps = (self._use(source), self._rank(source), self._change(source), self._delta(source))
        return tuple(found for found in maps if found is not None)

    def coverage(self) -> tuple[SourceCoverage, ...]:
        """Each data source of the profile, in its order; () without a profile."""
        profile = self.profile
        if profile is None:
            return ()
        return tuple(self._covered(profile, source) for source in profile.sources)

    def ranks(self) -> Floats | None:
        """(L, E), or None where no routed expert has a rank."""
        routed = (self.placement or {}).get("routed")
        return np.asarray(routed, dtype=np.float64) if routed else None

    def placed(self) -> PlacedExperts | None:
        """None without a placement, or for one that leaves the routed experts out."""
        ranks = self.ranks()
        if ranks is None:
            return None
        largest = int(ranks.max())
        saved = 1 - float(ranks.mean()) / largest if largest else 1.0
        return PlacedExperts(int((ranks > 0).sum()), ranks.size, largest, saved)

    def _use(self, source: str | None) -> Heatmap | None:
        if self.profile is None:
            return None
        share = self.profile.share(source)
        whose = f"tokens of {source}" if source else "training tokens"
        return self._map("use", f"Use by the {whose}", "share of the layer's routed tokens", share, source)

    def _rank(self, source: str | None) -> Heatmap | None:
        ranks = self.ranks()
        return (
            None
            if ranks is None
            else self._map("rank", "LoRA rank of each expert", "rank; grey: no adapter", ranks, source)
        )

    def _change(self, source: str | None) -> Heatmap | None:
        if self.profile is None or self.after is None:
            return None
        change = 100 * (self.after.share(source) - self.profile.share(source))
        return self._map(
            "change",
            "Use after training minus before",
            "percentage points of the layer's routed tokens",
            change,
            source,
        )

    def _delta(self, source: str | None) -> Heatmap | None:
        if self.deltas is None:
            return None
        norms = np.sqrt(sum(np.square(_array(self.deltas[name])) for name in ("gate_up_proj", "down_proj")))
        return self._map(
            "delta", "Size of the update", "Frobenius norm of the expert's ΔW; grey: no adapter", norms, source
        )

    def _map(self, kind: Kind, title: str, unit: str, values: Floats, source: str | None) -> Heatmap:
        share = self.profile.share(source) if self.profile else None
        return Heatmap(kind, title, unit, self._layers(), values, share, self.ranks())

    def _layers(self) -> tuple[int, ...]:
        if self.profile is not None:
            return self.profile.layers
        return tuple((self.placement or self.deltas or {})["layers"])

    def _covered(self, profile: RouterProfile, source: str) -> SourceCoverage:
        share, ranks = profile.share(source), self.ranks()
        tokens = int(profile.tokens[profile.sources.index(source)])
        covered = None if ranks is None else float((share * (ranks > 0)).sum(-1).mean())
        return SourceCoverage(source, tokens, reach(share), profile.experts, covered)


def reach(share: Floats, fraction: float = REACH_FRACTION) -> float:
    """The fewest experts that get `fraction` of a layer's tokens, the mean over the layers of `share` (L, E)."""
    cumulative = np.cumsum(-np.sort(-share, axis=-1), axis=-1)
    return float((1 + (cumulative < fraction - 1e-12).sum(-1)).clip(max=share.shape[-1]).mean())


def job_routing(job_dir: Path | str) -> RoutingView:
    """What the files of a job directory say; a file that is absent or cannot be read is passed over."""
    folder = Path(job_dir)
    return RoutingView(
        profile=_profile(folder / "profile.safetensors"),
        after=_profile(folder / "profile_after.safetensors"),
        placement=_json(folder / "placement.json"),
        deltas=_json(folder / "delta_norms.json"),
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
