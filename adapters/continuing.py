"""A saved adapter put back onto its base, to be trained further.

    placement_of(directory, layout) ─▶ Placement          for an adapter that has no placement.json beside it
    attach(model, placement), load_adapter(model, placement, directory)

Read are the standard PEFT form, made here or by PEFT itself, and the compact one. An adapter that began elsewhere than
at zero (adapters/starts.py) lies in its file with twice its rank: the trained factors, then what is taken off again.

Dimension legend: E experts, r rank, in and out the sides of one matrix.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from adapters.adapter_files import COMPACT_WEIGHTS, PREFIX, AdapterFile, ExpertFactors, LinearFactors, read_adapter
from adapters.compact import own_ranks, to_standard
from adapters.errors import AdapterFileError, listed
from adapters.layouts import LAYER, PROJECTIONS, ExpertLayout, layout_for
from adapters.lora import ExpertLora, lora_linears
from adapters.placement import Method, Placement
from adapters.sidecar import read_sidecar


@contextmanager
def standard_form(directory: Path) -> Iterator[Path]:
    """The adapter as a standard PEFT directory: itself, or for a compact one a copy that goes away."""
    if not (directory / COMPACT_WEIGHTS).is_file():
        yield directory
        return
    with tempfile.TemporaryDirectory() as folder:
        to_standard(directory, Path(folder) / "adapter")
        yield Path(folder) / "adapter"


def placement_of(directory: Path, layout: ExpertLayout) -> Placement:
    """Ranks and method of an adapter, by its files alone.

    Raises:
        AdapterFileError: it cannot be read, or has more than one rank in a class of tensors other than routed experts.
    """
    sidecar = read_sidecar(directory)
    with standard_form(directory) as folder:
        file = read_adapter(folder, layout)
        method = Method(
            rslora=bool(file.config.get("use_rslora")),
            dora=bool(file.config.get("use_dora")),
            start=cast(Any, sidecar.start) if sidecar else "zero",
        )
        ranks, routed = _class_ranks(file, layout, method), _routed_ranks(file, method)
        alpha = float(file.config["lora_alpha"])
    return Placement(**cast(Any, ranks), routed=routed, alpha=alpha / (method.alpha_in_file(1.0)), method=method)


def _class_ranks(file: AdapterFile, layout: ExpertLayout, method: Method) -> dict[str, int]:
    found: dict[str, set[int]] = {}
    for name, factors in file.linear.items():
        kind = layout.tensor_class(name)
        halves = 2 if method.doubles and kind != "router" else 1
        found.setdefault(kind, set()).add(len(factors.A) // halves)
    if several := [f"{kind} has ranks {sorted(ranks)}" for kind, ranks in found.items() if len(ranks) > 1]:
        raise AdapterFileError(f"training goes on with one rank for a class of tensors, but {'; '.join(several)}")
    return {kind: ranks.pop() for kind, ranks in found.items()}


def _routed_ranks(file: AdapterFile, method: Method) -> tuple[tuple[int, ...], ...]:
    layers: dict[int, Tensor] = {}
    for name, factors in file.experts.items():
        a, b = _first_half(factors.A, factors.B, method)
        own = own_ranks(a, b.transpose(1, 2))
        layer = int(LAYER.findall(f"{name}.")[-1])
        layers[layer] = torch.maximum(own, layers.get(layer, own))
    return tuple(tuple(layers[layer].tolist()) for layer in sorted(layers))


def _first_half(a: Tensor, b: Tensor, method: Method) -> tuple[Tensor, Tensor]:
    return (a[:, : a.shape[1] // 2], b[:, :, : b.shape[2] // 2]) if method.doubles else (a, b)


def load_adapter(model: PeftModel, placement: Placement, directory: Path, name: str = "default") -> None:
    """Fills the adapter `name` of `model`, attached by `placement`, with the values in `directory`.

    Where the file's scale is another than the placement's, B takes the difference, so that what is added is the same.

    Raises:
        AdapterFileError: it cannot be read, or does not fit; all misfits are listed, and nothing is changed.
    """
    layout = layout_for(model.config.model_type)
    with standard_form(directory) as folder:
        file = read_adapter(folder, layout)
        stacks = {
            f"{path.removeprefix(PREFIX)}.{projection}": (module, projection)
            for path, module in model.named_modules()
            if isinstance(module, ExpertLora) and name in module.ranks
            for projection in PROJECTIONS
        }
        linears = {f"{path.removeprefix(PREFIX)}.weight": module for path, module in lora_linears(model, name)}
        problems = _misfits(file, stacks, linears, name)
        if problems:
            raise AdapterFileError(listed(f"{directory} does not fit what is to be trained", problems))
        with torch.no_grad():
            for key, (module, projection) in stacks.items():
                _fill_stack(module, projection, file.experts[key], name)
            for key, linear in linears.items():
                _fill_linear(linear, file.linear[key], name)


def _misfits(
    file: AdapterFile, stacks: dict[str, tuple[ExpertLora, str]], linears: dict[str, LoraLayer], name: str
) -> list[str]:
    wanted, found = {*stacks, *linears}, {*file.experts, *file.linear}
    problems = [f"{key} is adapted in the file, and not by this placement" for key in sorted(found - wanted)]
    problems += [f"{key} has no factors in the file" for key in sorted(wanted - found)]
    for key in sorted(wanted & found):
        problem = (
            _stack_misfit(*stacks[key], file.experts[key], name)
            if key in stacks
            else _linear_misfit(linears[key], file.linear[key], name)
        )
        problems += [f"{key}: {problem}"] if problem else []
    return problems


def _stack_misfit(module: ExpertLora, projection: str, factors: ExpertFactors, name: str) -> str | None:
    ranks, sides = module.ranks[name], [factor.shape[1] for factor in module.factors(name, projection)]
    if (len(factors.A), factors.A.shape[2], factors.B.shape[1]) != (len(ranks), *sides):
        return f"A is {tuple(factors.A.shape)} and B {tuple(factors.B.shape)}, expected {len(ranks)} experts of {sides}"
    a, b = _first_half(factors.A, factors.B, module.methods[name])
    own = own_ranks(a, b.transpose(1, 2)).tolist()
    above = [expert for expert, (has, rank) in enumerate(zip(own, ranks, strict=True)) if has > rank]
    return f"experts {above} have a larger rank in the file than the placement gives" if above else None


def _linear_misfit(module: LoraLayer, factors: LinearFactors, name: str) -> str | None:
    a, b = (tuple(cast(Tensor, side[name].weight).shape) for side in (module.lora_A, module.lora_B))
    halves = 2 if name in getattr(module, "lora_start", ()) else 1
    got = (len(factors.A) // halves, factors.A.shape[1]), (len(factors.B), factors.B.shape[1] // halves)
    if (factors.magnitude is not None) != (name in module.lora_magnitude_vector):
        return "one of the file and the placement is DoRA, and the other is not"
    return None if got == (a, b) else f"A is {got[0]} and B {got[1]}, expected {a} and {b}"


def _fill_stack(module: ExpertLora, projection: str, factors: ExpertFactors, name: str) -> None:
    method, ratio = module.methods[name], factors.scale / module.scaling[name]
    _fill_flat(module, module.factors(name, projection), *_first_half(factors.A, factors.B * ratio, method), name)
    if (began := module.start(name, projection)) is not None:
        rank = factors.A.shape[1] // 2
        _fill_flat(module, began, factors.A[:, rank:], -ratio * factors.B[:, :, rank:], name)


def _fill_flat(module: ExpertLora, flat: tuple[Tensor, Tensor], a: Tensor, b: Tensor, name: str) -> None:
    """(R, in) and (R, out) from A (E, r, in) and B (E, out, r); a rank above the file's has zeros in its B."""
    start = 0
    for expert, rank in enumerate(module.ranks[name]):
        rows, have = slice(start, start + rank), min(rank, a.shape[1])
        flat[1][rows] = 0
        flat[0][rows][:have], flat[1][rows][:have] = a[expert, :have], b[expert, :, :have].t()
        start += rank


def _fill_linear(module: LoraLayer, factors: LinearFactors, name: str) -> None:
    ratio, rank = factors.scale / module.scaling[name], module.r[name]
    if name in getattr(module, "lora_start", ()):
        began = cast(Any, module).lora_start[name]
        began.A.copy_(factors.A[rank:])
        began.B.copy_(-ratio * factors.B[:, rank:])
    if factors.magnitude is not None:
        cast(Tensor, module.lora_magnitude_vector[name].weight).copy_(factors.magnitude)
    cast(Tensor, module.lora_A[name].weight).copy_(factors.A[:rank])
    cast(Tensor, module.lora_B[name].weight).copy_(factors.B[:, :rank] * ratio)
