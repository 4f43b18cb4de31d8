"""An adapter as a list of parts, whatever file it came from: what is combined, and what every adapter form is made of.

    AdapterFile ── parts_of ──▶ [Part] ── adapters.combine ──▶ [Part] ── adapters.export ──▶ files

A part is the LoRA of one matrix or of one stack of experts. Its factors are loaded when they are asked for, so one part
is in memory at a time. Dimension legend: E experts (1 for a matrix), r rank, in and out the sides of one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from adapters.adapter_files import AdapterFile
from adapters.checkpoint import text_config
from adapters.errors import AdapterFileError
from adapters.layouts import EXPERT_COUNTS, PROJECTIONS, ExpertLayout, TensorClassName
from adapters.merged import MergedWeights

Factors = tuple[Tensor, Tensor]
"""A (E, r, in) and B (E, out, r), float32, the scale in B: expert e adds B[e] A[e] to its (out, in) matrix."""


@dataclass(frozen=True)
class Part:
    """The LoRA of one base tensor.

    Attributes:
        name: of the tensor in stock's model: `….q_proj.weight`, or `….experts.gate_up_proj` of a stack.
        stacked: whether it is a stack of experts; else E is 1.
        outputs, inputs: sides of one matrix.
        ranks: of each expert, by what its factors really add: 0 for an expert without an adapter.
        load: gives the factors, of the part's own largest rank or above.
    """

    name: str
    stacked: bool
    outputs: int
    inputs: int
    ranks: tuple[int, ...]
    load: Callable[[], Factors]

    @property
    def rank(self) -> int:
        """The largest of any expert, 1 at least: what no expert needs can still be written."""
        return max(1, *self.ranks)

    def at_rank(self, rank: int) -> Factors:
        """The factors cut or zero-filled to `rank`, which is `self.rank` or above."""
        a, b = self.load()
        have = min(rank, a.shape[1])
        wide_a, wide_b = a.new_zeros(len(a), rank, self.inputs), b.new_zeros(len(b), self.outputs, rank)
        wide_a[:, :have], wide_b[:, :, :have] = a[:, :have], b[:, :, :have]
        return wide_a, wide_b


def parts_of(adapter: AdapterFile) -> list[Part]:
    """Every part of an adapter. Each is read once, for its ranks.

    Raises:
        AdapterFileError: it is a DoRA, whose change has no rank.
    """
    if adapter.config.get("use_dora"):
        raise AdapterFileError(
            "the adapter is a DoRA (use_dora): its change is no product of two thin factors, so it is no LoRA in any "
            "other form, and cannot be combined; merge it into a model instead"
        )
    linear = [_part(name, False, partial(_linear, adapter, name)) for name in adapter.linear]
    return linear + [_part(name, True, partial(_stack, adapter, name)) for name in adapter.experts]


def _linear(adapter: AdapterFile, name: str) -> Factors:
    found = adapter.linear[name]
    return found.A.float()[None], (found.B.float() * found.scale)[None]


def _stack(adapter: AdapterFile, name: str) -> Factors:
    found = adapter.experts[name]
    return found.A.float(), found.B.float() * found.scale


def _part(name: str, stacked: bool, load: Callable[[], Factors]) -> Part:
    a, b = load()
    return Part(name, stacked, b.shape[1], a.shape[2], own_ranks(a, b), load)


def own_ranks(a: Tensor, b: Tensor) -> tuple[int, ...]:
    """Of each expert, the last rank that adds anything: both its row of A and its column of B hold a value."""
    used = a.ne(0).any(2) & b.ne(0).any(1)
    numbers = torch.arange(1, a.shape[1] + 1)
    return tuple((used * numbers).amax(1).tolist()) if a.shape[1] else (0,) * len(a)


def without_change(name: str, stacked: bool, experts: int, outputs: int, inputs: int) -> Part:
    """A part that adds nothing, for a form that wants the tensor there."""
    return Part(
        name,
        stacked,
        outputs,
        inputs,
        (0,) * experts,
        lambda: (torch.zeros(experts, 1, inputs), torch.zeros(experts, outputs, 1)),
    )


# -------------------------------------------------------------------- what a set of parts targets


def suffix(name: str, layout: ExpertLayout) -> str:
    """What the tensor `name` has in common with its likes in other layers: `self_attn.q_proj`, `mlp.gate`,
    `mlp.experts.down_proj`; its whole module where the layout has no such class."""
    module = name.removesuffix(".weight")
    classes: tuple[TensorClassName, ...] = ("attention", "shared_expert", "dense_mlp", "router")
    known = [f"{layout.block}.{layout.experts}.{projection}" for projection in PROJECTIONS]
    known += [known_name for found in classes for known_name in layout.class_modules(found)]
    return max((one for one in known if module.endswith(f".{one}")), key=len, default=module)


def is_router(part: Part, layout: ExpertLayout) -> bool:
    return bool(layout.router) and suffix(part.name, layout) in layout.class_modules("router")


def both_projections(parts: Iterable[Part], layout: ExpertLayout) -> list[Part]:
    """The parts, and one that adds nothing for each stack whose partner in its layer is adapted alone."""
    found = {part.name: part for part in parts}
    for part in list(found.values()):
        prefix, _, projection = part.name.rpartition(".")
        if not part.stacked:
            continue
        other = next(name for name in PROJECTIONS if name != projection)
        if f"{prefix}.{other}" not in found:
            shape = (
                (part.inputs, part.outputs // 2) if projection == "gate_up_proj" else (2 * part.inputs, part.outputs)
            )
            found[f"{prefix}.{other}"] = without_change(f"{prefix}.{other}", True, len(part.ranks), *shape)
    return list(found.values())


def halves(b: Tensor, layout: ExpertLayout) -> tuple[Tensor, Tensor]:
    """Gate's and up's rows of a fused B (E, 2I, r): (E, I, r) each."""
    if layout.interleaved:
        return b[:, ::2], b[:, 1::2]
    middle = b.shape[1] // 2
    return b[:, :middle], b[:, middle:]


def expert_count(merged: MergedWeights) -> int:
    """Routed experts of a layer by the base's config; 0 for a dense model."""
    text = text_config(merged.config)
    return next((int(text[name]) for name in EXPERT_COUNTS if merged.layout.has_experts and name in text), 0)


def opened(merged: MergedWeights) -> AdapterFile:
    """The adapter of `merged`.

    Raises:
        AdapterFileError: there is none.
    """
    if merged.adapter is None:
        raise AdapterFileError("this form is of an adapter, and none was given")
    return merged.adapter
