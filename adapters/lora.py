"""Expert LoRA inside a real `PeftModel`: computed on the dispatched tokens, no delta ever materialised.

PEFT's own `target_parameters` builds W + BA for all experts in each forward. Here each routed expert adds
scale · (x Aᵀ) Bᵀ to its own tokens only, and its rank may differ from its neighbour's.

    attach(model, placement) ─▶ PeftModel        attention, shared expert: PEFT's own lora.Linear
                                                 router:                   PEFT's own ParamWrapper
                                                 routed experts:           ExpertLora

A router that is trained fully is a LoRA too, of rank E with B the (E, E) identity, frozen, and a scale of exactly 1: A
is (E, H) like the router's weight, starts at 0, and W + A is any weight at all. So `disable_adapter` gives the base
back, stock PEFT loads the file, and a merge needs nothing new. A router's bias or selection correction is not trained.

Several adapters can stand on one base, each with a placement of its own: `attach` with another name. `set_adapter`
chooses the one that computes and is trained, `disable_adapter` gives the base.

Training checkpoints hold these parameters as they are; `adapters.peft_files` writes the standard PEFT form.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapters.errors import StudioError, TargetError
from adapters.filling import Progress
from adapters.layouts import PROJECTIONS, ExpertLayout, TensorClassName, layout_for
from adapters.lora_products import LoraRanks
from adapters.placement import Method, Placement, dora_problem
from adapters.routed import RoutedExperts, moe_blocks

LINEAR_CLASSES: tuple[TensorClassName, ...] = ("attention", "shared_expert", "dense_mlp")


B_FACTOR = re.compile(r"\.lora_(\w+_)?B\.")
"""Names of B factors: lora_B of linear layers and routers, lora_gate_up_B and lora_down_B of routed experts."""

RATE_RATIO = "rate_ratio"
"""Attribute of a parameter that is trained at that many times the learning rate."""


class Factor(nn.Module):
    """One flat factor of all experts of a layer, (R, ·) in `weight`: a parameter named as PEFT names those of its
    linear layers, `….default.weight`. TRL copies an adapter to its reference by that name."""

    def __init__(self, values: Tensor):
        super().__init__()
        self.weight = nn.Parameter(values)


class ExpertLora(nn.Module, LoraLayer):
    """LoRA on the routed experts of one layer, as a PEFT layer around `RoutedExperts`.

    Parameters, by adapter name (R = sum of the ranks of the E experts, experts one after the other):
        lora_gate_up_A: (R, H), lora_gate_up_B: (R, 2I), lora_down_A: (R, I), lora_down_B: (R, H); float32.

    A is Kaiming-uniform and B zero, as in PEFT's linear layers, so a fresh adapter changes nothing; adapters/starts.py
    has other beginnings.
    """

    adapter_layer_names = ("lora_gate_up_A", "lora_gate_up_B", "lora_down_A", "lora_down_B")
    other_param_names = ("r", "lora_alpha", "scaling", "ranks", "methods", "lora_start")

    def __init__(
        self,
        base_layer: RoutedExperts,
        adapter_name: str,
        *,
        config: LoraConfig,
        target_name: str,
        ranks: Mapping[str, tuple[int, ...]],
        alpha: float,
        method: Method,
        **_: Any,
    ):
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        del self.lora_A, self.lora_B, self.lora_embedding_A, self.lora_embedding_B, self.lora_dropout
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.ranks: dict[str, tuple[int, ...]] = {}
        self.methods: dict[str, Method] = {}
        self.lora_start = nn.ModuleDict()
        self._active_adapter = [adapter_name]
        self._add(adapter_name, ranks[target_name], alpha, max(max(layer) for layer in ranks.values()), method)
        self.set_adapter([adapter_name], inference_mode=config.inference_mode)

    def _get_in_out_features(self, module: nn.Module) -> tuple[None, None]:
        return None, None

    def _add(self, adapter_name: str, ranks: tuple[int, ...], alpha: float, file_rank: int, method: Method) -> None:
        self.ranks[adapter_name], self.methods[adapter_name] = ranks, method
        self.r[adapter_name], self.lora_alpha[adapter_name] = file_rank, alpha
        self.scaling[adapter_name] = method.scale(alpha, file_rank)
        base = cast(RoutedExperts, self.base_layer)
        device = next(base.parameters()).device
        for short, (inputs, outputs) in _in_out(base).items():
            down = torch.empty(sum(ranks), inputs, device=device)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5)) if len(down) else None
            getattr(self, f"lora_{short}_A")[adapter_name] = Factor(down)
            getattr(self, f"lora_{short}_B")[adapter_name] = Factor(torch.zeros(sum(ranks), outputs, device=device))

    def forward(self, hidden_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Like `RoutedExperts.forward`, with the active adapters on each expert."""
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.ranks]
        loras = [lora for name in active for lora in self._loras(name)]
        output: Tensor = self.base_layer(hidden_TH, experts_TK, weights_TK, loras)
        return output

    def _loras(self, name: str) -> Iterator[tuple[LoraRanks, list[Tensor]]]:
        ranks, scale, method = self.ranks[name], self.scaling[name], self.methods[name]
        spec = LoraRanks(ranks, scale, method.dropout if self.training else 0.0)
        yield spec, [tensor for projection in PROJECTIONS for tensor in self.factors(name, projection)]
        if method.start == "pissa":
            began = [self.start(name, projection) for projection in PROJECTIONS]
            yield LoraRanks(ranks, -scale), [tensor for pair in began if pair for tensor in pair]

    def factors(self, adapter_name: str, projection: str) -> tuple[Tensor, Tensor]:
        """A (R, in) and Bᵀ (R, out) of one projection, experts one after the other."""
        short = projection.removesuffix("_proj")
        a, b = (getattr(self, f"lora_{short}_{side}")[adapter_name].weight for side in "AB")
        return a, b

    def start(self, adapter_name: str, projection: str) -> tuple[Tensor, Tensor] | None:
        """What A and Bᵀ were at the start, where that is taken off again; None for an adapter that began at zero."""
        if adapter_name not in self.lora_start:
            return None
        short, held = projection.removesuffix("_proj"), self.lora_start[adapter_name]
        return cast(Tensor, getattr(held, f"{short}_A")), cast(Tensor, getattr(held, f"{short}_B"))

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, target_name: str = "", **_: Any
    ) -> None:
        """A further adapter, by the placement that `config` carries: of `attach`, or another's that TRL copies."""
        found = (config._custom_modules or {}).get(cast(Any, RoutedExperts))
        if found is None:
            raise StudioError("a further adapter on routed experts is attached with adapters.lora.attach(…, name=…)")
        given = cast(Any, found).keywords
        largest = max(max(layer) for layer in given["ranks"].values())
        self._add(adapter_name, given["ranks"][target_name], given["alpha"], largest, given["method"])
        self.set_adapter(self.active_adapters)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        raise StudioError("routed experts are merged from files: use `studio merge`, which proves what it writes")

    unmerge = merge
    unload_and_optionally_merge_module = merge


def _in_out(base: RoutedExperts) -> dict[str, tuple[int, int]]:
    def sizes(shape: tuple[int, ...]) -> tuple[int, int]:
        return (shape[1], shape[2]) if base.layout.stack_order == "in_out" else (shape[2], shape[1])

    return {"gate_up": sizes(tuple(base.gate_up_proj.shape)), "down": sizes(tuple(base.down_proj.shape))}


def attach(
    model: PreTrainedModel | PeftModel,
    placement: Placement,
    name: str = "default",
    *,
    base: Path | None = None,
    progress: Progress | None = None,
) -> PeftModel:
    """Puts adapters where `placement` says; everything else is frozen.

    Args:
        model: a causal LM whose experts are `RoutedExperts` (adapters.loading, or `use_routed_experts`); or what
            `attach` returned, for one more adapter. That one computes nothing until `set_adapter(name)`.
        name: of the adapter.
        base: the directory that the model was loaded from, for a start that reads its 16-bit weights ("loftq").
        progress: called with (matrices, matrices in all) while a start is computed.

    Raises:
        TargetError: a class with a rank matches no tensor of this model, the placement does not fit its layers, the
            method cannot be had on them, or the name is taken.
    """
    inner = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    layout = layout_for(inner.config.model_type)
    check_targets(inner, layout, placement)
    _check_name(model, name)
    if placement.method.dora and (problem := dora_problem(placement, layout.peft_fuses)):
        raise TargetError(problem)
    config = _config(inner, layout, placement)
    with _as_named():
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
            adapted = model
        else:
            adapted = cast(PeftModel, get_peft_model(model, config, adapter_name=name))
    for _, module in lora_linears(adapted, name):
        if placement.method.dropout and not isinstance(module, ParamWrapper):
            module.lora_dropout[name] = nn.Dropout(placement.method.dropout)
    if placement.router_full:
        _train_routers_fully(adapted, layout, name)
    from adapters.dora import use_dora  # both fill what is made here, and so import this module
    from adapters.starts import begin

    begin(adapted, placement, name, base, progress)
    if placement.method.dora:
        use_dora(adapted, name)
    return adapted


def _check_name(model: nn.Module, name: str) -> None:
    if not name or "." in name or name in getattr(model, "peft_config", {}):
        raise TargetError(f"adapter name {name!r}: a name without dots that no other adapter of the model has")


def _config(model: PreTrainedModel, layout: ExpertLayout, placement: Placement) -> LoraConfig:
    targets = lora_targets(layout, placement, expert_count(model, layout))
    if placement.routed_rank:
        targets["target_modules"] = [*targets["target_modules"], *layout.class_modules("routed_experts")]
    config = LoraConfig(task_type="CAUSAL_LM", **targets)
    if placement.routed_rank:
        names = [f"{name}.{layout.experts}" for name, _ in moe_blocks(model, layout)]
        ranks = dict(zip(names, placement.routed, strict=True))
        layer = partial(ExpertLora, ranks=ranks, alpha=placement.alpha, method=placement.method)
        config._register_custom_module({RoutedExperts: cast(Any, layer)})
    return config


@contextmanager
def _as_named() -> Iterator[None]:
    """PEFT would take some of these names for those of transformers 4 and target others: ExpertLayout.peft_fuses."""
    as_named = patch("peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers")
    with warnings.catch_warnings(), as_named:
        # PEFT looks for the patterns among modules alone; those of target_parameters are used all the same
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        yield


def set_lora_plus(model: nn.Module, ratio: float) -> None:
    """LoRA+ (Hayou et al., 2024, arXiv 2402.12354): the B factors, those of routed experts included, are trained at
    `ratio` times the learning rate of all others. A B that is frozen, of a router that is trained fully, stays so."""
    for name, parameter in model.named_parameters():
        if B_FACTOR.search(name):
            setattr(parameter, RATE_RATIO, ratio)


def lora_linears(model: nn.Module, name: str) -> Iterator[tuple[str, LoraLayer]]:
    """PEFT's own layers with the adapter `name`: linear layers, and routers behind a `ParamWrapper`."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and not isinstance(module, ExpertLora) and name in module.lora_A:
            yield path, module


def _train_routers_fully(model: PeftModel, layout: ExpertLayout, name: str) -> None:
    """A = 0 is trained; B = identity is not, also after `disable_adapter`, which has PEFT unfreeze its adapters."""
    for _, block in moe_blocks(model, layout):
        router = cast(LoraLayer, block.get_submodule(layout.router))
        nn.init.zeros_(cast(Tensor, router.lora_A[name].weight))
        nn.init.eye_(cast(Tensor, router.lora_B[name].weight))
        router.frozen_peft_weight_names = {**router.frozen_peft_weight_names, name: ("lora_B",)}
        router.set_adapter(router.active_adapters)


def expert_count(model: nn.Module, layout: ExpertLayout) -> int:
    """Routed experts of a layer, adapted or not; 0 for a dense model."""
    for _, block in moe_blocks(model, layout):
        return _routed(getattr(block, layout.experts)).num_experts
    return 0


def _routed(experts: nn.Module) -> RoutedExperts:
    return cast(RoutedExperts, experts.get_base_layer() if isinstance(experts, ExpertLora) else experts)


def check_targets(model: nn.Module, layout: ExpertLayout, placement: Placement) -> None:
    """Raises `TargetError` naming every class of the placement that this model does not have."""
    modules = [name for name, _ in model.named_modules()]
    ranks = {**placement.class_ranks(), "router": placement.router or int(placement.router_full)}
    missing = [
        name
        for name, rank in ranks.items()
        if rank and not any(m.endswith(f".{s}") for m in modules for s in layout.class_modules(name))  # type: ignore[arg-type]
    ]
    if missing:
        raise TargetError(
            f"no tensor of class {', '.join(missing)} in this {layout.model_type} model; "
            "set the rank of a class that the model does not have to 0"
        )
    blocks = [block for _, block in moe_blocks(model, layout)]
    experts = [_routed(getattr(block, layout.experts)).num_experts for block in blocks]
    if placement.routed and [len(layer) for layer in placement.routed] != experts:
        given = [len(layer) for layer in placement.routed]
        raise TargetError(f"the placement has ranks for experts {given} by layer, the model has {experts}")


def lora_targets(layout: ExpertLayout, placement: Placement, experts: int) -> dict[str, Any]:
    """The `LoraConfig` fields for everything but the routed experts: targets, rank, alpha and their patterns.

    Args:
        experts: of a layer; the rank of a router that is trained fully.
    """
    ranks = {name: rank for name, rank in placement.class_ranks().items() if rank}
    routers = target_suffixes(layout, "router")
    if placement.router_full:
        ranks["router"] = experts
    if not ranks:
        raise TargetError("every rank is 0: nothing would be trained; give at least one class a rank")
    largest = max(ranks.values())
    modules = [suffix for name in LINEAR_CLASSES if name in ranks for suffix in layout.class_modules(name)]
    pattern = {
        suffix: rank
        for name, rank in ranks.items()
        if rank != largest
        for suffix in target_suffixes(layout, cast(TensorClassName, name))
    }
    method = placement.method
    whole = math.sqrt(experts) if method.rslora else experts  # the scale of a router that is trained fully is 1
    return {
        "r": largest,
        "lora_alpha": placement.alpha,
        "use_rslora": method.rslora,
        "use_dora": method.dora,
        "target_modules": modules,
        "target_parameters": list(routers) if "router" in ranks else None,
        "rank_pattern": pattern,
        "alpha_pattern": dict.fromkeys(routers, whole) if placement.router_full else {},
    }


def target_suffixes(layout: ExpertLayout, name: TensorClassName) -> tuple[str, ...]:
    """What stock PEFT's `target_modules` / `target_parameters` call the tensors of a class."""
    modules = layout.class_modules(name)
    if name == "router":
        return tuple(f"{module}.weight" for module in modules)
    if name == "routed_experts":
        return tuple(f"{module}.{projection}" for module in modules for projection in PROJECTIONS)
    return modules
