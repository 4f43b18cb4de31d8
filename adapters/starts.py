"""Where adapters begin other than at zero: PiSSA and LoftQ, on linear layers and on each routed expert alike.

    begin(model, placement, name)     fills the factors of an adapter that was just attached, and keeps a copy of them

Both papers change the base; here it stays as it is, so that `disable_adapter` is the base, many adapters stand on one,
the packed cache serves all, and a merge knows what it merges into. With (A₀, B₀) what an adapter begins with:

    pissa   B₀ A₀ = the largest r components of W's singular value decomposition (Meng et al., 2024, arXiv 2404.02948).
            The paper trains BA on W − B₀A₀; computed here is W + scale · (BA − B₀A₀), the same function with the same
            gradients. Of a quantised base, W is what is held: the paper's smaller quantisation error is not to be had.
    loftq   scale · B₀ A₀ = the largest r components of W − Q(W), Q the quantisation (Li et al., 2023, arXiv 2310.08659,
            algorithm 1 with T = 1, as PEFT's `replace_lora_weights_loftq`). Computed is Q(W) + scale · BA: closer to W
            than Q(W) from the first step. More alternations would need another quantised base for each adapter.

What either adds to the *original* weights W is scale · (BA − B₀A₀), a LoRA of rank 2r; so it is saved, as PEFT's own
conversion does, and every reader finds an ordinary LoRA. On Q(W) alone LoftQ's second half is left out
(adapters/merged.py). Routers begin at zero: they are small and never quantised.

Dimension legend: r rank, R sum of the ranks of all experts, in and out the sides of one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant, ParamWrapper
from torch import Tensor, nn

from adapters.adapter_files import PREFIX
from adapters.checkpoint import TensorInfo, read_index
from adapters.errors import TargetError
from adapters.filling import Progress
from adapters.layouts import PROJECTIONS, ExpertLayout, layout_for
from adapters.lora import ExpertLora, lora_linears
from adapters.placement import Placement
from adapters.quantized import QuantizedStack
from adapters.quantized_linear import dense_weight
from adapters.routed import RoutedExperts
from adapters.tensor_files import read_tensor

WHOLE_SIDE = 768
"""Up to this smaller side of a matrix its decomposition is computed whole; above, by a randomised method."""

OVERSAMPLED, ITERATIONS = 8, 4
"""Of the randomised method (Halko et al., 2011): more columns than the rank, and power iterations."""

Original = Callable[[str, int | None], Tensor]


def begin(
    model: PeftModel, placement: Placement, name: str, base: Path | None, progress: Progress | None = None
) -> None:
    """Fills the factors of the adapter `name` by `placement.method.start`.

    Args:
        base: the directory that the model was loaded from; LoftQ reads its 16-bit weights, a matrix at a time.
        progress: called with (matrices, matrices in all).

    Raises:
        TargetError: LoftQ without the base's directory, or on a layer that is not quantised.
    """
    start, layout = placement.method.start, layout_for(model.config.model_type)
    if start == "zero":
        return
    if start == "loftq" and base is None:
        raise TargetError("the start loftq reads the base's 16-bit weights: give the directory of the base")
    original = original_weights(read_index(base), layout) if base and start == "loftq" else None
    jobs = list(_jobs(model, name, original))
    for number, job in enumerate(jobs, 1):
        job()
        if progress:
            progress(number, len(jobs))


def _jobs(model: PeftModel, name: str, original: Original | None) -> Iterator[Callable[[], None]]:
    for path, module in model.named_modules():
        if isinstance(module, ExpertLora) and name in module.ranks:
            yield from _stack_jobs(path.removeprefix(PREFIX), module, name, original)
    for path, linear in lora_linears(model, name):
        if not isinstance(linear, ParamWrapper):
            yield _linear_job(path.removeprefix(PREFIX), linear, name, original)


def original_weights(index: dict[str, TensorInfo], layout: ExpertLayout) -> Original:
    """Reads weights of the base's files by their name in the model, of a stack one expert's: float32, axes as there."""

    def read(name: str, expert: int | None) -> Tensor:
        if expert is None:
            return read_tensor(index[layout.checkpoint_key(name)]).float()
        return torch.cat([read_tensor(index[s.key], s.expert) for s in layout.sources(name, expert)]).float()

    return read


# -------------------------------------------------------------------- routed experts


def _stack_jobs(path: str, module: ExpertLora, name: str, original: Original | None) -> Iterator[Callable[[], None]]:
    held = nn.Module()
    module.lora_start[name] = held
    for projection in PROJECTIONS:
        for short, factor in zip("AB", module.factors(name, projection), strict=True):
            held.register_buffer(f"{projection.removesuffix('_proj')}_{short}", factor.detach().clone())
        ranks, first = module.ranks[name], 0
        for expert, rank in enumerate(ranks):
            rows, first = slice(first, first + rank), first + rank
            if rank:
                yield partial(_begin_expert, module, name, path, projection, expert, rows, original)


def _begin_expert(
    module: ExpertLora, name: str, path: str, projection: str, expert: int, rows: slice, original: Original | None
) -> None:
    base = cast(RoutedExperts, module.get_base_layer())
    stack = getattr(base, projection)
    quantized = isinstance(stack, QuantizedStack)
    weight = stack.dequantize(expert, torch.float32) if quantized else stack.data[expert].float()
    if original is not None:
        if not quantized or stack.formats[expert] == "none":
            raise TargetError(f"{path}.{projection}: expert {expert} is not quantised, so there is nothing for loftq")
        weight = original(f"{path}.{projection}", expert).to(weight.device) - weight
    if base.layout.stack_order == "in_out":
        weight = weight.t()
    a, b = components(weight, rows.stop - rows.start, module.scaling[name])
    began = module.start(name, projection)
    assert began is not None
    for pair in (module.factors(name, projection), began):
        for flat, value in zip(pair, (a, b.t()), strict=True):
            flat.data[rows][: len(value)] = value


# -------------------------------------------------------------------- linear layers


class Began(nn.Module):
    """What a linear layer's adapter began with: A (r, in), B (out, r)."""

    A: Tensor
    B: Tensor

    def __init__(self, a: Tensor, b: Tensor):
        super().__init__()
        self.register_buffer("A", a)
        self.register_buffer("B", b)


class WithoutStart(LoraVariant):
    """PEFT's hook into a linear layer's forward: adds scale · (BA − B₀A₀), dropout before A as ever."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        began = module.lora_start[active_adapter]
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        scale, dropped = module.scaling[active_adapter], module.lora_dropout[active_adapter](x)
        before = (x.to(began.A.dtype) @ began.A.t()) @ began.B.t()
        return result + scale * (b(a(dropped)) - before.to(x.dtype))


def _linear_job(path: str, module: LoraLayer, name: str, original: Original | None) -> Callable[[], None]:
    def job() -> None:
        layer, held = cast(Any, module), module.get_base_layer()
        weight = dense_weight(held)
        if original is not None:
            if held.weight.dtype.is_floating_point:
                raise TargetError(f"{path} is not quantised, so there is nothing for loftq")
            weight = original(f"{path}.weight", None).to(weight.device) - weight
        a, b = components(weight, module.r[name], module.scaling[name])
        own_a, own_b = (cast(Tensor, side[name].weight).data for side in (module.lora_A, module.lora_B))
        own_a[: len(a)], own_b[:, : b.shape[1]] = a, b
        if not hasattr(layer, "lora_start"):
            layer.lora_start = nn.ModuleDict()
        layer.lora_start[name] = Began(own_a.clone(), own_b.clone())
        if original is None:
            layer.lora_variant[name] = WithoutStart()

    return job


# -------------------------------------------------------------------- decomposition


def components(matrix: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (k, in) and B (out, k), k = min(rank, sides), with scale · B A the largest components of `matrix` (out, in).

    Either takes the square root of the singular values (PiSSA, equations 2 and 3).
    """
    side = min(matrix.shape)
    wanted = min(rank, side)
    if side <= WHOLE_SIDE:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(matrix, q=min(side, rank + OVERSAMPLED), niter=ITERATIONS)
        vh = v.t()
    root = (s[:wanted] / scale).sqrt()
    return root[:, None] * vh[:wanted], u[:, :wanted] * root
