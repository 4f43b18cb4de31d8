"""Which tensor classes and which experts get adapters, and of what rank. Plain data and pure functions, no torch.

A rank of 0 means no adapter: no parameters, no optimizer state.

    grid, scores ── PLACEMENTS[rule].choose ──▶ Ranks ──▶ Placement.routed

A rule sees the routed experts as an `ExpertGrid`, and what the router did with a data sample as a score per layer and
expert: plain nested sequences, as `RouterProfile.share().tolist()` gives them. Where scores are equal, the lower layer
and the lower expert come first.

Dimension legend: L MoE layers, E routed experts of a layer.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from adapters.errors import TargetError

Ranks = tuple[tuple[int, ...], ...]
Scores = Sequence[Sequence[float]]
LINEAR = ("attention", "shared_expert", "dense_mlp")
TRAINING_BYTES = 16
"""Bytes of a trainable parameter: weight 4, gradient 4, AdamW's two moments 8."""


Start = Literal["zero", "pissa", "loftq"]
STARTS: tuple[Start, ...] = get_args(Start)


@dataclass(frozen=True)
class Method:
    """How adapters compute and where they begin.

    Attributes:
        rslora: the scale is alpha / sqrt(r) (rsLoRA, arXiv 2312.03732) instead of alpha / r.
        dora: linear layers are DoRA: a magnitude for each row of W + scale · B A (arXiv 2402.09353).
        start: "zero": B = 0. "pissa": the principal components of W (arXiv 2404.02948). "loftq": those of what the
            quantisation lost of W (arXiv 2310.08659, one alternation). The base stays as it is: adapters/starts.py.
        dropout: share of an adapter's inputs that are 0 in training. Routers have none.
    """

    rslora: bool = False
    dora: bool = False
    start: Start = "zero"
    dropout: float = 0.0

    def scale(self, alpha: float, rank: int) -> float:
        """What an adapter's product is multiplied by."""
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    @property
    def doubles(self) -> bool:
        """The file has twice the rank: the trained factors, and the negative of where they began."""
        return self.start != "zero"

    def alpha_in_file(self, alpha: float) -> float:
        """The alpha with which a file of twice the rank has the scale of the training."""
        return alpha * (math.sqrt(2) if self.rslora else 2) if self.doubles else alpha


@dataclass(frozen=True)
class Placement:
    """LoRA ranks (Hu et al., 2021, arXiv 2106.09685) per tensor class, and per layer and expert for routed experts.

    Attributes:
        attention, shared_expert, dense_mlp, router: rank for every module of the class.
        routed: one tuple of E ranks for each MoE layer, in the order of the layers; () for no routed adapters.
        alpha: LoRA alpha. The scale is that of `method` for the rank; for routed experts for the largest rank in
            `routed`, because PEFT's file has one rank and one scale for a whole stack.
        router_full: the whole router is trained; then `router` is 0.
        method: of all these adapters.
    """

    attention: int = 0
    shared_expert: int = 0
    dense_mlp: int = 0
    router: int = 0
    routed: Ranks = ()
    alpha: float = 16.0
    router_full: bool = False
    method: Method = Method()

    @property
    def routed_rank(self) -> int:
        """The largest rank of any routed expert, 0 when none is adapted."""
        return max((rank for layer in self.routed for rank in layer), default=0)

    @property
    def adapted_experts(self) -> int:
        """Routed experts with a rank above 0, over all layers."""
        return sum(rank > 0 for layer in self.routed for rank in layer)

    def class_ranks(self) -> dict[str, int]:
        """Rank by tensor class, routed experts by their largest."""
        return {
            "attention": self.attention,
            "shared_expert": self.shared_expert,
            "dense_mlp": self.dense_mlp,
            "routed_experts": self.routed_rank,
            "router": self.router,
        }


def dora_problem(placement: Placement, peft_fuses: bool = False) -> str | None:
    """Why these adapters cannot be DoRA; None where they can.

    Args:
        peft_fuses: `ExpertLayout.peft_fuses` of the family.
    """
    if placement.routed_rank:
        return (
            "dora is true and routed experts have a rank: stock PEFT loads no DoRA on stacks of experts, nor a file in "
            "which any class is DoRA beside them; set placement.rule to shared or attention, or dora to false"
        )
    if placement.router or placement.router_full:
        return (
            "dora is true and the routers are trained: stock PEFT loads no DoRA beside adapted routers; set "
            "router.mode to frozen, or dora to false"
        )
    if peft_fuses and (placement.shared_expert or placement.dense_mlp):
        return (
            "dora is true, and in this family stock PEFT finds shared experts and dense MLPs by the name of their "
            "parameter alone, where it loads no DoRA; set shared_expert_rank and dense_mlp_rank to 0 (placement.rule "
            "attention), or dora to false"
        )
    if placement.method.start != "zero":
        return (
            f"dora is true and init is {placement.method.start}: a file that stock PEFT loads holds the change of such "
            "a start as a LoRA of twice the rank, which no magnitude fits; set dora to false or init to zero"
        )
    return None


@dataclass(frozen=True)
class ExpertGrid:
    """The routed experts of a model.

    Attributes:
        layers: decoder layer numbers of the MoE layers.
        experts: of each layer.
        costs: parameters of one rank of one expert's adapter, by layer.
    """

    layers: tuple[int, ...]
    experts: int
    costs: tuple[int, ...]

    def parameters(self, ranks: Ranks) -> int:
        """Trainable parameters of `ranks`; 0 for ()."""
        return sum(sum(layer) * cost for layer, cost in zip(ranks, self.costs, strict=False))


# -------------------------------------------------------------------- rules


def no_experts(grid: ExpertGrid) -> Ranks:
    """No routed expert gets an adapter."""
    return ()


def all_experts(grid: ExpertGrid, *, rank: int) -> Ranks:
    """Every expert gets `rank`."""
    return same_experts_everywhere(rank, len(grid.layers), grid.experts)


def manual(grid: ExpertGrid, *, experts: Sequence[int] | Mapping[int, Sequence[int]], rank: int) -> Ranks:
    """The experts in the list, in every layer; or those that a mapping lists for a decoder layer's number.

    Raises:
        TargetError: a layer or an expert that the model does not have.
    """
    named = experts if isinstance(experts, Mapping) else dict.fromkeys(grid.layers, experts)
    layers = sorted(set(named) - set(grid.layers))
    if layers:
        has = ", ".join(map(str, grid.layers))
        raise TargetError(
            f"placement.experts: layers {layers} have no routed experts; this model's MoE layers are {has}"
        )
    unknown = sorted({expert for ids in named.values() for expert in ids if not 0 <= expert < grid.experts})
    if unknown:
        raise TargetError(
            f"placement.experts: experts {unknown} do not exist; this model has experts 0 to {grid.experts - 1}"
        )
    return _chosen(grid, [named.get(layer, ()) for layer in grid.layers], rank)


def esft(grid: ExpertGrid, scores: Scores, *, p: float, rank: int) -> Ranks:
    """In each layer the highest scores, until they make up the share `p` of the layer's sum; at least one expert.

    ESFT (Wang et al., 2024, arXiv 2407.01906), with the average gate score or the token selection ratio as score. The
    sums are over the experts of a layer.
    """
    return _chosen(grid, [_reaching(layer, p) for layer in scores], rank)


def top_fraction(
    grid: ExpertGrid, scores: Scores, *, fraction: float, scope: Literal["layer", "model"], rank: int
) -> Ranks:
    """The ceil(fraction · E) highest scores of each layer, or the ceil(fraction · L · E) highest of the whole model."""
    if scope == "layer":
        return _chosen(grid, [_best(layer)[: _ceil(fraction * grid.experts)] for layer in scores], rank)
    best = _best([score for layer in scores for score in layer])[: _ceil(fraction * grid.experts * len(grid.layers))]
    places = [divmod(place, grid.experts) for place in best]
    return _chosen(grid, [[expert for at, expert in places if at == layer] for layer in range(len(grid.layers))], rank)


def budget(grid: ExpertGrid, scores: Scores, *, parameters: int, min_rank: int, rank_step: int, max_rank: int) -> Ranks:
    """Ranks that cost at most `parameters`, given where the data goes: water-filling.

    Maximises Σ use · log(1 + rank) over layers and experts. The sum is concave in each rank, so the next step always
    goes to the expert that gains most by it for each parameter; a step that is too dear is left out and cheaper ones
    still taken. An expert has no rank, or one from `min_rank` to `max_rank` in steps of `rank_step`; one that the data
    never reached has none.

    Args:
        scores: (L, E), at least 0: the share of a layer's routed pairs that each expert got.

    Raises:
        TargetError: not even one used expert can be given `min_rank`.
    """
    ranks = [[0] * grid.experts for _ in grid.layers]

    def offer(layer: int, expert: int) -> tuple[float, float, int, int, int]:
        """(-gain for each parameter, -use, layer, expert, parameters) of the expert's next step."""
        rank, use = ranks[layer][expert], scores[layer][expert]
        step = rank_step if rank else min_rank
        gain = use * (math.log1p(rank + step) - math.log1p(rank))
        return -gain / (step * grid.costs[layer]), -use, layer, expert, step * grid.costs[layer]

    used = [(at, expert) for at, layer in enumerate(scores) for expert, use in enumerate(layer) if use > 0]
    offers = [offer(*place) for place in used]
    smallest = min((cost for *_, cost in offers), default=0)
    if smallest > parameters or not offers:
        raise TargetError(
            f"a budget of {parameters:,} parameters is too small for one expert at min_rank {min_rank}; the smallest "
            f"that works is {smallest:,} parameters ({smallest * TRAINING_BYTES:,} training bytes)"
        )
    heapq.heapify(offers)
    while offers:
        *_, layer, expert, cost = heapq.heappop(offers)
        if cost > parameters:
            continue
        parameters -= cost
        ranks[layer][expert] += rank_step if ranks[layer][expert] else min_rank
        if ranks[layer][expert] + rank_step <= max_rank:
            heapq.heappush(offers, offer(layer, expert))
    return tuple(map(tuple, ranks))


@dataclass(frozen=True)
class Rule:
    """A placement rule.

    Attributes:
        choose: (grid, [scores,] **settings) to the ranks of the routed experts.
        settings: names of the keywords of `choose`.
        score: what `scores` is: "share" or "gate" of the router profile; None for a rule that needs none.
        joins: the other tensor classes that get the ranks they are given; the rest gets none.
    """

    choose: Callable[..., Ranks]
    settings: tuple[str, ...] = ()
    score: Literal["share", "gate"] | None = None
    joins: tuple[str, ...] = LINEAR


PLACEMENTS: dict[str, Rule] = {
    "all_experts": Rule(all_experts, ("rank",)),
    "attention": Rule(no_experts, joins=("attention",)),
    "shared": Rule(no_experts, joins=("attention", "shared_expert")),
    "esft_gate": Rule(esft, ("p", "rank"), "gate"),
    "esft_token": Rule(esft, ("p", "rank"), "share"),
    "top_fraction": Rule(top_fraction, ("fraction", "scope", "rank"), "share"),
    "budget": Rule(budget, ("parameters", "min_rank", "rank_step", "max_rank"), "share"),
    "manual": Rule(manual, ("experts", "rank")),
}


def same_experts_everywhere(rank: int, moe_layers: int, experts: int, chosen: Sequence[int] | None = None) -> Ranks:
    """Ranks for `Placement.routed`: `rank` for the `chosen` experts (None: all) of every MoE layer.

    Raises:
        TargetError: the model has no routed experts, or a chosen one does not exist.
    """
    if rank == 0:
        return ()
    if not moe_layers or not experts:
        raise TargetError("routed experts were given a rank, but this model has no routed experts; set the rank to 0")
    wanted = range(experts) if chosen is None else chosen
    unknown = [expert for expert in wanted if not 0 <= expert < experts]
    if unknown or not wanted:
        raise TargetError(f"routed experts {unknown or '[]'} do not exist; this model has experts 0 to {experts - 1}")
    layer = tuple(rank if expert in set(wanted) else 0 for expert in range(experts))
    return (layer,) * moe_layers


def _chosen(grid: ExpertGrid, chosen: Sequence[Sequence[int]], rank: int) -> Ranks:
    """`rank` for the experts `chosen` in each layer, 0 for the rest."""
    wanted = [set(ids) for ids in chosen]
    return tuple(tuple(rank if expert in ids else 0 for expert in range(grid.experts)) for ids in wanted)


def _best(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda at: (-scores[at], at))


def _reaching(scores: Sequence[float], p: float) -> list[int]:
    """The best places whose scores make up `p` of the sum, float rounding forgiven."""
    wanted, reached, taken = (p - 1e-9) * sum(scores), 0.0, []
    for place in _best(scores):
        taken.append(place)
        reached += scores[place]
        if reached >= wanted:
            break
    return taken


def _ceil(value: float) -> int:
    """ceil, where 0.07 · 100 is 7."""
    return math.ceil(round(value, 9))
