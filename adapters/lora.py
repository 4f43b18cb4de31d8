"""Expert LoRA inside a real `PeftModel`: computed on the dispatched tokens, no delta ever materialised.

PEFT's own `target_parameters` builds W + BA for all experts in each forward. Here each routed expert adds
scale · (x Aᵀ) Bᵀ to its own tokens only, and its rank may differ from its neighbour's.

    attach(model, placement) ─▶ PeftModel        attention, shared expert: PEFT's own lora.Linear
                                                 router:                   PEFT's own ParamWrapper
                                                 routed experts:           ExpertLora

A router that is trained fully is a LoRA too, of rank E with B the (E, E) identity, frozen, and a scale of exactly 1: A
is (E, H) like the router's weight, starts at 0, and W + A is any weight at all. So `disable_adapter` gives the base
back, stock PEFT loads the file, and a merge needs nothing new. A router's bias or selection correction is not trained.

Training checkpoints hold these parameters as they are; `adapters.peft_files` writes the standard PEFT form.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, cast
from unittest.mock import patch

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapters.errors import StudioError, TargetError
from adapters.layouts import PROJECTIONS, ExpertLayout, TensorClassName, layout_for
from adapters.lora_products import LoraRanks
from adapters.placement import Placement
from adapters.routed import RoutedExperts, moe_blocks

LINEAR_CLASSES: tuple[TensorClassName, ...] = ("attention", "shared_expert", "dense_mlp")


class ExpertLora(nn.Module, LoraLayer):
    """LoRA on the routed experts of one layer, as a PEFT layer around `RoutedExperts`.

    Parameters, by adapter name (R = sum of the ranks of the E experts, experts one after the other):
        lora_gate_up_A: (R, H), lora_gate_up_B: (R, 2I), lora_down_A: (R, I), lora_down_B: (R, H); float32.

    A is Kaiming-uniform and B zero, as in PEFT's linear layers, so a fresh adapter changes nothing.
    """

    adapter_layer_names = ("lora_gate_up_A", "lora_gate_up_B", "lora_down_A", "lora_down_B")
    other_param_names = ("r", "lora_alpha", "scaling", "ranks")

    def __init__(
        self,
        base_layer: RoutedExperts,
        adapter_name: str,
        *,
        config: LoraConfig,
        target_name: str,
        ranks: Mapping[str, tuple[int, ...]],
        alpha: float,
        **_: Any,
    ):
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        del self.lora_A, self.lora_B, self.lora_embedding_A, self.lora_embedding_B, self.lora_dropout
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.ranks: dict[str, tuple[int, ...]] = {}
        self._active_adapter = [adapter_name]
        self._add(adapter_name, ranks[target_name], alpha, max(max(layer) for layer in ranks.values()))
        self.set_adapter([adapter_name], inference_mode=config.inference_mode)

    def _get_in_out_features(self, module: nn.Module) -> tuple[None, None]:
        return None, None

    def _add(self, adapter_name: str, ranks: tuple[int, ...], alpha: float, file_rank: int) -> None:
        self.ranks[adapter_name] = ranks
        self.r[adapter_name], self.lora_alpha[adapter_name] = file_rank, alpha
        self.scaling[adapter_name] = alpha / file_rank
        base = cast(RoutedExperts, self.base_layer)
        device = next(base.parameters()).device
        for short, (inputs, outputs) in _in_out(base).items():
            down = torch.empty(sum(ranks), inputs, device=device)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5)) if len(down) else None
            getattr(self, f"lora_{short}_A")[adapter_name] = nn.Parameter(down)
            getattr(self, f"lora_{short}_B")[adapter_name] = nn.Parameter(
                torch.zeros(sum(ranks), outputs, device=device)
            )

    def forward(self, hidden_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Like `RoutedExperts.forward`, with the active adapters on each expert."""
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.ranks]
        loras = [
            (
                LoraRanks(self.ranks[name], self.scaling[name]),
                [tensor for projection in PROJECTIONS for tensor in self.factors(name, projection)],
            )
            for name in active
        ]
        output: Tensor = self.base_layer(hidden_TH, experts_TK, weights_TK, loras)
        return output

    def factors(self, adapter_name: str, projection: str) -> tuple[Tensor, Tensor]:
        """A (R, in) and Bᵀ (R, out) of one projection, experts one after the other."""
        short = projection.removesuffix("_proj")
        return getattr(self, f"lora_{short}_A")[adapter_name], getattr(self, f"lora_{short}_B")[adapter_name]

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        raise StudioError("a second adapter on routed experts is attached with adapters.lora.attach, not add_adapter")

    def merge(self, *args: Any, **kwargs: Any) -> None:
        raise StudioError("routed experts are merged from files: use `studio merge`, which proves what it writes")

    unmerge = merge
    unload_and_optionally_merge_module = merge


def _in_out(base: RoutedExperts) -> dict[str, tuple[int, int]]:
    def sizes(shape: tuple[int, ...]) -> tuple[int, int]:
        return (shape[1], shape[2]) if base.layout.stack_order == "in_out" else (shape[2], shape[1])

    return {"gate_up": sizes(tuple(base.gate_up_proj.shape)), "down": sizes(tuple(base.down_proj.shape))}


def attach(model: PreTrainedModel, placement: Placement) -> PeftModel:
    """Puts adapters where `placement` says; everything else is frozen.

    Args:
        model: a causal LM whose experts are `RoutedExperts` (adapters.loading, or `use_routed_experts`).

    Raises:
        TargetError: a class with a rank matches no tensor of this model, or the placement does not fit its layers.
    """
    layout = layout_for(model.config.model_type)
    check_targets(model, layout, placement)
    targets = lora_targets(layout, placement, expert_count(model, layout))
    if placement.routed_rank:
        targets["target_modules"] = [*targets["target_modules"], *layout.class_modules("routed_experts")]
    config = LoraConfig(task_type="CAUSAL_LM", **targets)
    if placement.routed_rank:
        names = [f"{name}.{layout.experts}" for name, _ in moe_blocks(model, layout)]
        ranks = dict(zip(names, placement.routed, strict=True))
        layer = partial(ExpertLora, ranks=ranks, alpha=placement.alpha)
        config._register_custom_module({RoutedExperts: cast(Any, layer)})
    # PEFT would take some of these names for those of transformers 4 and target other tensors: ExpertLayout.peft_fuses
    as_named = patch("peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers")
    with warnings.catch_warnings(), as_named:
        # PEFT looks for the patterns among modules alone; those of target_parameters are used all the same
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        adapted = cast(PeftModel, get_peft_model(model, config))
    if placement.router_full:
        _train_routers_fully(adapted, layout)
    return adapted


def _train_routers_fully(model: PeftModel, layout: ExpertLayout) -> None:
    """A = 0 is trained; B = identity is not, also after `disable_adapter`, which has PEFT unfreeze its adapters."""
    for _, block in moe_blocks(model, layout):
        router = cast(LoraLayer, block.get_submodule(layout.router))
        nn.init.zeros_(cast(Tensor, router.lora_A["default"].weight))
        nn.init.eye_(cast(Tensor, router.lora_B["default"].weight))
        router.frozen_peft_weight_names = {"default": ("lora_B",)}
        router.set_adapter(router.active_adapters)


def expert_count(model: nn.Module, layout: ExpertLayout) -> int:
    """Routed experts of a layer, adapted or not; 0 for a dense model."""
    for _, block in moe_blocks(model, layout):
        experts = getattr(block, layout.experts)
        return cast(RoutedExperts, experts.get_base_layer() if isinstance(experts, ExpertLora) else experts).num_experts
    return 0


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
    experts = [getattr(block, layout.experts).num_experts for block in blocks]
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
    return {
        "r": largest,
        "lora_alpha": placement.alpha,
        "target_modules": modules,
        "target_parameters": list(routers) if "router" in ranks else None,
        "rank_pattern": pattern,
        "alpha_pattern": dict.fromkeys(routers, experts) if placement.router_full else {},
    }


def target_suffixes(layout: ExpertLayout, name: TensorClassName) -> tuple[str, ...]:
    """What stock PEFT's `target_modules` / `target_parameters` call the tensors of a class."""
    modules = layout.class_modules(name)
    if name == "router":
        return tuple(f"{module}.weight" for module in modules)
    if name == "routed_experts":
        return tuple(f"{module}.{projection}" for module in modules for projection in PROJECTIONS)
    return modules
