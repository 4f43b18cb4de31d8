"""The router profile: where a sample of the user's data goes, layer by layer and expert by expert. No torch.

It is bound to the base model and to the data files by their fingerprints, and kept in one small safetensors file.

    RouterProfile.save(path)       load_profile(path) ─▶ RouterProfile

Dimension legend: L MoE layers, E experts, K experts a token (top-k), S data sources.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from adapters.errors import ProfileError

VERSION = 1
ARRAYS = ("tokens", "routed", "gate", "together")
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RouterProfile:
    """Sums over a token sample.

    Attributes:
        base, data: fingerprints of the base model, and of the data with everything that decides which tokens it gives.
        seed, wanted_tokens: of the sample.
        layers: numbers of the decoder layers that have routed experts.
        top_k: experts a token.
        shared_experts: how many experts of a layer see every token and are counted nowhere here.
        sources: names of the data sources. tokens: (S,) of the sample.
        routed: (S, L, E), tokens routed to each expert. gate: (S, L, E), sum of their routing weights.
        together: (L, E, E), tokens that chose both experts; the diagonal is `routed` over all sources. None where pairs
            were not counted.
    """

    base: str
    data: str
    seed: int
    wanted_tokens: int
    layers: tuple[int, ...]
    top_k: int
    shared_experts: int
    sources: tuple[str, ...]
    tokens: Ints
    routed: Ints
    gate: Floats
    together: Ints | None = None

    @property
    def experts(self) -> int:
        return int(self.routed.shape[2])

    def share(self, source: str | None = None) -> Floats:
        """(L, E): the share of a layer's routed pairs that each expert got; each layer sums to 1.

        This is ESFT's token selection ratio (arXiv 2407.01906, section 3.2), the mean of 1[selected] / K.

        Args:
            source: of this data source alone; None for all.
        """
        return _normalised(self._of(self.routed, source))

    def mean_gate(self, source: str | None = None) -> Floats:
        """(L, E): ESFT's average gate score, the mean over all tokens of the routing weight, 0 where not chosen."""
        tokens = self._of(self.tokens, source)
        gate: Floats = self._of(self.gate, source) / max(1, int(tokens))
        return gate

    def gate_share(self, source: str | None = None) -> Floats:
        """(L, E): `mean_gate`, each layer's divided by its sum."""
        return _normalised(self._of(self.gate, source))

    def load_entropy(self, source: str | None = None) -> Floats:
        """(L,): entropy of `share` over its largest value log E; 1 is even use, 0 one expert for all."""
        return relative_entropy(self.share(source))

    def as_json(self) -> dict[str, Any]:
        """Plain numbers: shares and mean gates by source and over all, and the pairs most often chosen together."""
        facts: dict[str, Any] = {name: value for name, value in vars(self).items() if name not in ARRAYS}
        facts["tokens"] = dict(zip(self.sources, self.tokens.tolist(), strict=True))
        facts["load_entropy"] = self.load_entropy().tolist()
        facts["share"], facts["mean_gate"] = self.share().tolist(), self.mean_gate().tolist()
        facts["by_source"] = {
            source: {"share": self.share(source).tolist(), "mean_gate": self.mean_gate(source).tolist()}
            for source in self.sources
        }
        facts["pairs"] = self.pairs()
        return facts

    def pairs(self, most: int = 5) -> list[list[tuple[int, int, float]]]:
        """Of each layer the pairs of experts most often chosen together, with the share of tokens that chose both.

        [] for top-1 routing, and where pairs were not counted.
        """
        if self.together is None or self.top_k < 2:
            return []
        tokens = max(1, int(self.tokens.sum()))
        upper = np.triu(self.together, 1).reshape(len(self.layers), -1)
        first = np.argsort(-upper, axis=1, kind="stable")[:, :most]
        found: list[list[tuple[int, int, float]]] = []
        for row, chosen in zip(upper, first.tolist(), strict=True):
            found.append(
                [(place // self.experts, place % self.experts, float(row[place]) / tokens) for place in chosen]
            )
        return found

    def _of(self, sums: Any, source: str | None) -> Any:
        if source is None:
            return sums.sum(0)
        if source not in self.sources:
            raise ProfileError(f"the profile has no data source {source!r}; it has {', '.join(self.sources)}")
        return sums[self.sources.index(source)]

    def save(self, path: Path) -> None:
        """Writes the profile beside `path` and renames it: whole or not at all."""
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        facts = {name: value for name, value in vars(self).items() if name not in ARRAYS}
        if "together" in arrays:
            arrays["together"] = arrays["together"].astype(np.int32)  # most of the file; the sample has fewer tokens
        metadata = {"router_profile": json.dumps({"version": VERSION, **facts})}
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # two may save at once
        try:
            with open(descriptor, "wb") as file:
                file.write(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata))
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def load_profile(path: Path) -> RouterProfile:
    """Reads a profile.

    Raises:
        ProfileError: no such file, not a profile, or of another version.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            facts = json.loads((file.metadata() or {}).get("router_profile", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise ProfileError(f"{path} cannot be read as a router profile: {error}") from None
    if facts.pop("version", None) != VERSION:
        raise ProfileError(f"{path} is not a router profile of version {VERSION}; make it again with `studio profile`")
    facts |= {name: tuple(facts[name]) for name in ("layers", "sources")}
    return RouterProfile(**facts, **arrays)


def relative_entropy(share: Floats) -> Floats:
    """(...): entropy of a distribution (..., E) over log E; 1 for E = 1."""
    experts = share.shape[-1]
    if experts == 1:
        return np.ones(share.shape[:-1])
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    entropy: Floats = -(share * logs).sum(-1) / np.log(experts)
    return entropy


def _normalised(sums: Any) -> Floats:
    total = sums.sum(-1, keepdims=True)
    result: Floats = np.divide(sums, total, out=np.zeros(sums.shape), where=total > 0)
    return result
