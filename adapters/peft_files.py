"""The standard PEFT adapter directory, written and read. What is written here, stock PEFT loads on the stock base.

One canonical form stands between memory and files: per layer and projection `ExpertFactors`, A (E, r, in) and
B (E, out, r), whatever the family. PEFT's file differs from it in three ways, all of them silent when wrong:

- `lora_A` is expert-major (E·r, ·) but the columns of `lora_B` are rank-major (·, r·E);
- keys do not name the parameter: with both adapted, `experts.base_layer` is gate_up_proj and `experts` down_proj;
- for a family with `layout.peft_swaps` (Llama 4), lora_A holds the output side and lora_B the input side.

A stack has one rank in the file: experts with a smaller rank, or none, are filled with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.checkpoint import read_json_object
from adapters.errors import AdapterFileError, listed
from adapters.fingerprint import fingerprint
from adapters.layouts import ExpertLayout, layout_for
from adapters.lora import ExpertLora, expert_count, lora_targets, target_suffixes
from adapters.placement import Placement
from adapters.routed import PROJECTIONS
from adapters.sidecar import Sidecar, write_sidecar
from adapters.tensor_files import new_directory

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
COMPACT_WEIGHTS = "compact_adapter.safetensors"  # of adapters.compact
PREFIX = "base_model.model."
NOT_MERGED = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "layer_replication",
    "fan_in_fan_out",
    "use_qalora",
    "alora_invocation_tokens",
    "trainable_token_indices",
)
"""Options of a LoRA whose merge is more than W + scale · B A: refused, not merged wrongly."""


@dataclass(frozen=True)
class ExpertFactors:
    """The LoRA of one projection of one layer's experts: expert e adds scale · B[e] A[e] to its (out, in) matrix.

    Attributes:
        A: (E, r, in). B: (E, out, r).
    """

    A: Tensor
    B: Tensor
    scale: float

    def delta(self, expert: int) -> Tensor:
        """(out, in) in float32."""
        return self.scale * (self.B[expert].float() @ self.A[expert].float())

    def adapts(self, expert: int) -> bool:
        """Whether the expert has an adapter: one that was given none is zero-filled in the file."""
        return bool(self.A[expert].any() or self.B[expert].any())


@dataclass(frozen=True)
class LinearFactors:
    """The LoRA of one matrix: adds scale · B A to its (out, in) weight. A: (r, in). B: (out, r)."""

    A: Tensor
    B: Tensor
    scale: float

    def delta(self) -> Tensor:
        """(out, in) in float32."""
        return self.scale * (self.B.float() @ self.A.float())


@dataclass(frozen=True)
class AdapterFile:
    """An adapter directory in memory.

    Attributes:
        config: adapter_config.json.
        linear: by base weight key, e.g. `model.layers.0.self_attn.q_proj.weight`.
        experts: by stack key, e.g. `model.layers.0.feed_forward.experts.gate_up_proj`.
    """

    config: dict[str, Any]
    linear: dict[str, LinearFactors]
    experts: dict[str, ExpertFactors]


def to_peft(factors: ExpertFactors, layout: ExpertLayout) -> tuple[Tensor, Tensor]:
    """(lora_A, lora_B) as PEFT stores a stack: expert-major (E·r, ·) and rank-major (·, r·E)."""
    first, second = factors.A, factors.B.transpose(1, 2)
    if layout.peft_swaps:
        first, second = second, first
    experts, rank, _ = first.shape
    return first.reshape(experts * rank, -1), second.permute(2, 1, 0).reshape(-1, rank * experts)


def from_peft(lora_a: Tensor, lora_b: Tensor, rank: int, scale: float, layout: ExpertLayout) -> ExpertFactors:
    """The canonical form of a stack's (lora_A, lora_B)."""
    first = lora_a.reshape(-1, rank, lora_a.shape[1])
    second = lora_b.reshape(lora_b.shape[0], rank, -1).permute(2, 1, 0)
    if layout.peft_swaps:
        first, second = second, first
    return ExpertFactors(A=first, B=second.transpose(1, 2), scale=scale)


def expert_factors(module: ExpertLora, projection: str, adapter_name: str = "default") -> ExpertFactors:
    """A layer's trained factors, zero-filled to the largest rank of the adapter."""
    ranks, rank = module.ranks[adapter_name], module.r[adapter_name]
    flat_a, flat_b = module.factors(adapter_name, projection)
    a = flat_a.new_zeros(len(ranks), rank, flat_a.shape[1])
    b = flat_b.new_zeros(len(ranks), flat_b.shape[1], rank)
    pieces = zip(ranks, flat_a.detach().split(list(ranks)), flat_b.detach().split(list(ranks)), strict=True)
    for expert, (own, piece_a, piece_b) in enumerate(pieces):
        a[expert, :own] = piece_a
        b[expert, :, :own] = piece_b.t()
    return ExpertFactors(a, b, module.scaling[adapter_name])


def save_adapter(
    model: PeftModel,
    placement: Placement,
    out: Path,
    *,
    base_name: str,
    base: Path | None = None,
    held: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, int]:
    """Writes `model`'s adapter as a standard PEFT directory, whole or not at all.

    Args:
        placement: what the model was attached with.
        base_name: recorded as `base_model_name_or_path`.
        base, held: the base's directory and how it is held, for the `Sidecar`, by which a later merge knows the base.

    Returns:
        {"tensors": ..., "parameters": ..., "bytes": ...} of the weights written.

    Raises:
        AdapterFileError: a value is NaN or infinite; nothing is written.
        OutputExistsError: `out` exists.
    """
    layout = layout_for(model.config.model_type)
    tensors = {name: tensor.float() for name, tensor in adapter_tensors(model, layout).items()}
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise AdapterFileError(listed("the adapter holds NaN or infinity and was not written", broken))
    with new_directory(out, overwrite) as directory:
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt", "peft_version": peft.__version__})
        experts = expert_count(model, layout)
        standard_config(layout, placement, base_name, experts).save_pretrained(str(directory))
        write_sidecar(directory, peft_sidecar(layout, experts, base_name, base, held))
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return {"tensors": len(tensors), "parameters": parameters, "bytes": (out / WEIGHTS).stat().st_size}


def peft_sidecar(
    layout: ExpertLayout, experts: int, base_name: str, base: Path | None, held: Mapping[str, Any] | None
) -> Sidecar:
    """What stands beside the standard form, whose experts lie as PEFT's own `target_parameters` has them."""
    side = "lora_A on the output side, lora_B on the input side" if layout.peft_swaps else "lora_A on the input side"
    return Sidecar(
        format="peft",
        base_name=base_name,
        base=fingerprint(base) if base else None,
        held=held,
        peft_version=peft.__version__,
        model_type=layout.model_type,
        experts={
            "count": experts,
            "orientation": side,
            "packing": "lora_A (E·r, ·) expert-major; lora_B (·, r·E) rank-major; gate and up fused",
        },
        made_for=("transformers", "peft"),
        ignored_by=("vllm", "sglang", "llama.cpp"),
    )


def standard_config(layout: ExpertLayout, placement: Placement, base_name: str, experts: int) -> LoraConfig:
    """The `LoraConfig` with which stock PEFT loads the file that `adapter_tensors` makes; `experts` of a layer."""
    targets = lora_targets(layout, placement, experts)
    if layout.peft_fuses:
        _name_by_parameter(targets, (*layout.class_modules("shared_expert"), *layout.class_modules("dense_mlp")))
    if placement.routed_rank:
        targets["target_parameters"] = [
            *(targets["target_parameters"] or []),
            *target_suffixes(layout, "routed_experts"),
        ]
    return LoraConfig(
        task_type="CAUSAL_LM", base_model_name_or_path=base_name, inference_mode=True, lora_dropout=0.0, **targets
    )


def _name_by_parameter(targets: dict[str, Any], modules: tuple[str, ...]) -> None:
    """Turns target modules into target parameters: the same files, and a name that PEFT takes as it is."""
    moved = [module for module in targets["target_modules"] if module in modules]
    targets["target_modules"] = [module for module in targets["target_modules"] if module not in moved]
    targets["target_parameters"] = [*(targets["target_parameters"] or []), *(f"{module}.weight" for module in moved)]
    pattern = targets["rank_pattern"]
    targets["rank_pattern"] = {f"{key}.weight" if key in moved else key: rank for key, rank in pattern.items()}


def adapter_tensors(model: PeftModel, layout: ExpertLayout, adapter_name: str = "default") -> dict[str, Tensor]:
    """Every adapter tensor by its name in a standard PEFT file, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, ExpertLora):
            tensors.update(_stack_tensors(name, module, layout, adapter_name))
    suffix = f".{adapter_name}.weight"
    for name, parameter in model.named_parameters():
        if name.endswith(suffix) and (".lora_A." in name or ".lora_B." in name):
            tensors[name.removesuffix(suffix) + ".weight"] = parameter.detach()
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _stack_tensors(name: str, module: ExpertLora, layout: ExpertLayout, adapter_name: str) -> dict[str, Tensor]:
    tensors = {}
    for projection in PROJECTIONS:
        lora_a, lora_b = to_peft(expert_factors(module, projection, adapter_name), layout)
        place = f"{name}.base_layer" if projection == "gate_up_proj" else name
        tensors[f"{place}.lora_A.weight"] = lora_a
        tensors[f"{place}.lora_B.weight"] = lora_b
    return tensors


def read_adapter(directory: Path, layout: ExpertLayout) -> AdapterFile:
    """Reads a standard PEFT LoRA directory, made here or by PEFT itself.

    Raises:
        AdapterFileError: files missing, not a LoRA, an option whose merge is not implemented, or stray tensors.
    """
    config = _read_config(directory)
    try:
        tensors = load_file(directory / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{directory / WEIGHTS} cannot be read: {error}") from None
    linear: dict[str, LinearFactors] = {}
    experts: dict[str, ExpertFactors] = {}
    problems: list[str] = []
    for key in sorted(name for name in tensors if name.endswith(".lora_A.weight")):
        partner = key.replace(".lora_A.", ".lora_B.")
        if partner not in tensors:
            problems.append(f"{key} has no {partner}")
            continue
        module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        pair = tensors[key], tensors[partner]
        if module.removesuffix(".base_layer").endswith(f"{layout.block}.{layout.experts}"):
            stack = stack_key(module, config)
            rank, scale = rank_and_scale(config, stack)
            if pair[0].shape[0] % rank or pair[1].shape[1] != pair[0].shape[0]:
                problems.append(f"{key} is {tuple(pair[0].shape)} and {tuple(pair[1].shape)}: not of rank {rank}")
                continue
            experts[stack] = from_peft(*pair, rank=rank, scale=scale, layout=layout)
        else:
            rank, scale = rank_and_scale(config, module)
            if pair[0].shape[0] != rank or pair[1].shape[1] != rank:
                problems.append(f"{key} is {tuple(pair[0].shape)} and {tuple(pair[1].shape)}: not of rank {rank}")
                continue
            linear[f"{module}.weight"] = LinearFactors(*pair, scale=scale)
    stray = [k for k in tensors if not k.endswith((".lora_A.weight", ".lora_B.weight"))]
    problems += [f"{key} is not a LoRA factor" for key in stray]
    problems += [f"{key} holds NaN or infinity" for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if problems or not tensors:
        raise AdapterFileError(listed(f"{directory / WEIGHTS} cannot be used", problems or ["it holds no tensors"]))
    return AdapterFile(config, linear, experts)


def stack_key(module: str, config: dict[str, Any]) -> str:
    """The parameter that a stack's key means; PEFT nests the wrappers, gate_up_proj innermost."""
    targeted = {name.rpartition(".")[2] for name in config.get("target_parameters") or []} & set(PROJECTIONS)
    if targeted >= set(PROJECTIONS):
        if module.endswith(".base_layer"):
            return f"{module.removesuffix('.base_layer')}.gate_up_proj"
        return f"{module}.down_proj"
    return f"{module}.{targeted.pop() if targeted else 'gate_up_proj'}"


def rank_and_scale(config: dict[str, Any], key: str) -> tuple[int, float]:
    """Rank and scale of the module or parameter `key`, rank and alpha patterns and rsLoRA included."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    full = f"{key}.weight" if _by_parameter(config, key) else key
    rank = ranks.get(get_pattern_key(list(ranks), full), config["r"])
    alpha = alphas.get(get_pattern_key(list(alphas), full), config["lora_alpha"])
    return int(rank), alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _by_parameter(config: dict[str, Any], key: str) -> bool:
    """Whether the module is targeted by the name of its weight, as routers are."""
    return f"{key}.weight".endswith(tuple(config.get("target_parameters") or ()))


def _read_config(directory: Path) -> dict[str, Any]:
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            hint = ""
            if (directory / "adapter_model.bin").exists():
                hint = "; pickle adapters (adapter_model.bin) are refused"
            if (directory / COMPACT_WEIGHTS).exists():
                hint = "; this one is in the compact form: `studio convert ADAPTER OUT --to peft` first"
            raise AdapterFileError(f"{directory} has no {name}: expected a PEFT adapter directory{hint}")
    config = read_json_object(directory / CONFIG, AdapterFileError)
    if config.get("peft_type") != "LORA":
        raise AdapterFileError(
            f"{directory}: peft_type is {config.get('peft_type')!r}; only LORA adapters can be merged"
        )
    unsupported = [name for name in NOT_MERGED if config.get(name)]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in ("gaussian", "orthogonal"):
        unsupported.append(f"init_lora_weights {start!r}, which changes the base,")
    if unsupported:
        raise AdapterFileError(f"{directory}: adapters with {', '.join(unsupported)} cannot be merged here")
    return config
