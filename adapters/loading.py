"""A base model streamed from its safetensors files: quantised in parallel, checked before training.

The model is built on the meta device, its tensors are laid out as they will be held, and then filled from the files in
small pieces, so the peak is the model as held and little more. All problems of a checkpoint (missing experts, wrong
shapes, NaN) are found and reported before anything is trained.

    load_base(directory, quantize="nf4") ─▶ stock causal LM whose experts are `RoutedExperts`
    check_quantized(model)               ─▶ raises when a tensor of a quantised class was left in 16 or 32 bit
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from adapters import packed_cache
from adapters.checkpoint import DTYPE_NAMES, TensorInfo, read_config, read_index
from adapters.errors import CheckpointError, QuantizationError
from adapters.expert_math import Stack
from adapters.filling import Progress, Span, Target, fill
from adapters.layouts import PROJECTIONS, QUANTIZED_CLASSES, ExpertLayout, layout_for
from adapters.quantized import FORMATS, DenseWriter, FourBit, Held, QuantizedStack, Writer
from adapters.quantized_linear import linear_problems, quantized_linear
from adapters.routed import RoutedExperts, moe_blocks, replace_experts


def load_base(
    directory: Path,
    *,
    quantize: str = "nf4",
    int8_experts: Collection[int] = (),
    double_quant: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    progress: Progress | None = None,
    cache: Path | None = None,
) -> PreTrainedModel:
    """Loads a causal LM, MoE or dense.

    Args:
        directory: config.json and safetensors weights.
        quantize: "nf4", "fp4", "int8" or "none", for attention, shared expert, routed experts and dense MLPs
            (`QuantizedStack` for the experts, adapters/quantized_linear.py for the linears). Everything else is in
            `dtype`.
        int8_experts: ids of routed experts, of every MoE layer, held in int8 whatever `quantize` says.
        double_quant: quantise the block constants of nf4 and fp4 too (8 bit).
        dtype: of everything that is not quantised, and of the computation.
        progress: called with (bytes read, bytes in all).
        cache: where quantised models are kept for the next load (adapters/packed_cache.py); None for nowhere.

    Raises:
        LayoutError: unsupported family.
        CheckpointError: missing, misshapen or non-finite tensors, all of them listed.
        QuantizationError: an unknown format, or an expert that does not exist.
    """
    if quantize not in FORMATS:
        raise QuantizationError(f"quantize={quantize!r}; allowed: {', '.join(FORMATS)}")
    config, index = read_config(directory), read_index(directory)
    layout = layout_for(config, index)
    model = _empty_model(directory, dtype)
    expected = _expected_keys(model, layout)
    _check_names_and_shapes(directory, layout, expected, index)
    prepared = _prepare(model, layout, Formats(quantize, frozenset(int8_experts), double_quant, dtype, device))
    if cache is None:
        _fill(directory, prepared, layout, index, progress)
    else:
        settings: dict[str, Any] = {
            "quantize": quantize,
            "int8_experts": sorted(int8_experts),
            "double_quant": double_quant,
        }
        settings |= {"dtype": str(dtype), "device": torch.device(device).type, "layout": repr(layout)}
        entry = packed_cache.Entry(cache, directory, sorted({info.file for info in index.values()}), settings)
        if not entry.load(prepared.tensors(), progress):
            with entry.building():
                _fill(directory, prepared, layout, index, progress)
            entry.store(prepared.tensors())
    model.tie_weights()
    _reset_meta_buffers(model, device)
    if quantize != "none":
        check_quantized(model)
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.eval()


def _empty_model(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    for pattern, kept in model._get_dtype_plan(dtype).items():  # what stock keeps in float32 in a 16-bit model
        for name, tensor in _tensors(model):
            if re.search(pattern, name):
                tensor.data = tensor.data.to(kept)
    return cast(PreTrainedModel, model.requires_grad_(False))


def _expected_keys(model: nn.Module, layout: ExpertLayout) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor that the *files* must hold for this model."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        if layout.tensor_class(name) == "routed_experts":
            expected.update(_expert_keys(name, tuple(tensor.shape), layout))
        else:
            expected[layout.checkpoint_key(name)] = tuple(tensor.shape)
    if getattr(model.config, "tie_word_embeddings", False):
        expected.pop(layout.checkpoint_key("lm_head.weight"), None)
    return expected


def _expert_keys(name: str, shape: tuple[int, ...], layout: ExpertLayout) -> dict[str, tuple[int, ...]]:
    """Checkpoint keys of one fused stack: its own, or one for each part of each expert, (out, in)."""
    found = {}
    for expert in range(shape[0]):
        sources = layout.sources(name, expert)
        for source in sources:
            whole = source.expert is not None
            found[source.key] = shape if whole else (shape[1] // len(sources), *shape[2:])
    return found


def _check_names_and_shapes(
    directory: Path, layout: ExpertLayout, expected: dict[str, tuple[int, ...]], index: dict[str, TensorInfo]
) -> None:
    head = layout.checkpoint_key("lm_head.weight")
    problems = [f"{name} is missing, expected shape {shape}" for name, shape in expected.items() if name not in index]
    problems += [
        f"{name} has shape {index[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in index and index[name].shape != shape
    ]
    problems += [
        f"{name} is not a tensor of this model"
        for name in index
        if name not in expected and name != head and layout.model_key(name)
    ]
    problems += [
        f"{name} is {index[name].dtype}; read are {', '.join(DTYPE_NAMES)}"
        for name in expected
        if name in index and index[name].dtype not in DTYPE_NAMES
    ]
    if problems:
        raise CheckpointError(directory, problems)


@dataclass(frozen=True)
class Formats:
    """How the tensors of a base are held; see `load_base`."""

    quantize: str
    int8_experts: frozenset[int]
    double_quant: bool
    dtype: torch.dtype
    device: str

    def of_experts(self, count: int) -> list[str]:
        """The format of each of a layer's experts."""
        if unknown := sorted(e for e in self.int8_experts if not 0 <= e < count):
            raise QuantizationError(f"int8_experts {unknown} do not exist; a layer has experts 0 to {count - 1}")
        return ["int8" if expert in self.int8_experts else self.quantize for expert in range(count)]


@dataclass(frozen=True)
class Prepared:
    """A model whose tensors are laid out and not yet filled.

    Attributes:
        stacks: the routed experts, by their name in the stock model.
        linears: the tensors of quantised linear layers, by the name of the weight.
        plain: everything else that a checkpoint holds, by name.
    """

    model: PreTrainedModel
    stacks: dict[str, QuantizedStack | Tensor]
    linears: dict[str, Held]
    plain: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that filling writes, by a name of its own."""
        found = dict(self.plain)
        for name, held in self.linears.items():
            found |= {f"{name}.{part}": tensor for part, tensor in held.tensors.items()}
        for name, stack in self.stacks.items():
            parts = {name: stack} if isinstance(stack, Tensor) else _prefixed(name, stack)
            found |= parts
        return {name: tensor.detach() for name, tensor in found.items()}


def _prefixed(name: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.{part}": tensor for part, tensor in _tensors(module)}


def _prepare(model: PreTrainedModel, layout: ExpertLayout, formats: Formats) -> Prepared:
    """Swaps experts for `RoutedExperts` and linears of the quantised classes for quantised ones; allocates the rest."""
    prepared = Prepared(model, {}, {}, {})

    def stack(name: str, parameter: Tensor) -> nn.Parameter | QuantizedStack:
        kinds = formats.of_experts(parameter.shape[0])
        held: nn.Parameter | QuantizedStack
        if set(kinds) == {"none"}:
            held = nn.Parameter(_empty(parameter, formats.device), requires_grad=False)
        else:
            options: dict[str, Any] = {"double_quant": formats.double_quant, "device": formats.device}
            experts, rows, cols = parameter.shape
            held = QuantizedStack(experts, rows, cols, kinds, dtype=formats.dtype, **options)
        prepared.stacks[name] = held
        return held

    for name, block in list(moe_blocks(model, layout)):
        stock, prefix = getattr(block, layout.experts), f"{name}.{layout.experts}"
        stacks = [stack(f"{prefix}.{part}", getattr(stock, part)) for part in PROJECTIONS]
        replace_experts(block, layout, stock, *stacks)
    if formats.quantize != "none":
        _prepare_linears(prepared, layout, formats)
    _allocate(prepared, formats.device)
    return prepared


def _prepare_linears(prepared: Prepared, layout: ExpertLayout, formats: Formats) -> None:
    options: dict[str, Any] = {
        "double_quant": formats.double_quant,
        "dtype": formats.dtype,
        "device": formats.device,
    }
    for name, module in list(prepared.model.named_modules()):
        if isinstance(module, nn.Linear) and layout.tensor_class(f"{name}.weight") in QUANTIZED_CLASSES:
            linear, prepared.linears[f"{name}.weight"] = quantized_linear(module, formats.quantize, **options)
            if linear.bias is not None:
                linear.bias.data = linear.bias.data.to(module.bias.dtype)
            prepared.model.set_submodule(name, linear)


def _allocate(prepared: Prepared, device: str) -> None:
    """Gives every tensor of the state dict that is still on meta its memory; tied ones follow their twins later."""
    model = prepared.model
    tied = "lm_head.weight" if getattr(model.config, "tie_word_embeddings", False) else None
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_meta or name == tied:
            continue
        module, part = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        held = _empty(tensor, device)
        if part in dict(module.named_buffers(recurse=False)):
            setattr(module, part, held)
        else:
            setattr(module, part, nn.Parameter(held, requires_grad=False))
        prepared.plain[name] = held


def _empty(like: Tensor, device: str) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=device)


def _fill(
    directory: Path,
    prepared: Prepared,
    layout: ExpertLayout,
    index: Mapping[str, TensorInfo],
    progress: Progress | None,
) -> None:
    problems = fill(list(_targets(prepared, layout, index)), progress)
    if problems:
        raise CheckpointError(directory, problems)


def _targets(prepared: Prepared, layout: ExpertLayout, index: Mapping[str, TensorInfo]) -> Iterator[Target]:
    for name, stack in prepared.stacks.items():
        for expert in range(stack.shape[0]):
            sources = layout.sources(name, expert)
            # end to end in memory is end to end along the out axis only where that axis comes first
            assert len(sources) == 1 or layout.stack_order == "out_in", layout.model_type
            spans = tuple(Span(index[source.key], source.expert) for source in sources)
            yield Target(f"{sources[0].key} (expert {expert})", spans, partial(_expert_writer, stack, expert))
    for name, held in prepared.linears.items():
        key = layout.checkpoint_key(name)
        yield Target(key, (Span(index[key]),), partial(_matrix_writer, held, 0))
    for name, tensor in prepared.plain.items():
        key = layout.checkpoint_key(name)
        if index[key].parameters:
            yield Target(key, (Span(index[key]),), partial(_dense_writer, tensor))


def _expert_writer(stack: QuantizedStack | Tensor, expert: int, quantizer: Any) -> Writer:
    if isinstance(stack, Tensor):
        return DenseWriter(stack.data[expert])
    held, _ = stack.place(expert)
    return stack.writer(expert, _scratch(held, quantizer))


def _matrix_writer(held: Held, slot: int, quantizer: Any) -> Writer:
    return held.writer(slot, _scratch(held, quantizer))


def _dense_writer(tensor: Tensor, _: Any) -> Writer:
    return DenseWriter(tensor)


def _scratch(held: Held, quantizer: Any) -> Any:
    return quantizer(held.kind) if isinstance(held, FourBit) else None


def _reset_meta_buffers(model: PreTrainedModel, device: str) -> None:
    """Rebuilds modules whose non-persistent buffers (rotary frequencies) are still on meta, from their config."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            fresh = type(module)(cast(Any, module).config)
            model.set_submodule(name, fresh.to(device))
    left = [name for name, tensor in _tensors(model) if tensor.is_meta]
    assert not left, left


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def check_quantized(model: nn.Module) -> None:
    """Proves that every tensor of a quantised class is quantised, and that its scales are finite.

    Raises:
        QuantizationError: naming each tensor left in 16 or 32 bit, each expert never written, each bad scale.
    """
    layout = layout_for(cast(Any, model).config.model_type)
    problems = []
    for name, module in model.named_modules():
        if ".lora_" in name:
            continue  # an adapter's own matrices, not base tensors
        if isinstance(module, RoutedExperts):
            for projection in PROJECTIONS:
                problems += _stack_problems(f"{name}.{projection}", getattr(module, projection))
        elif isinstance(module, nn.Linear) and layout.tensor_class(_plain(name)) in QUANTIZED_CLASSES:
            problems += [f"{name}.weight {problem}" for problem in linear_problems(module)]
    if problems:
        raise QuantizationError("a quantised base, but not everything in it is: " + "; ".join(problems[:20]))


def _stack_problems(name: str, stack: Stack) -> list[str]:
    if not isinstance(stack, QuantizedStack):
        return [f"{name} is {stack.dtype}"]
    dense = [expert for expert, kind in enumerate(stack.formats) if kind == "none"]
    problems = [f"experts {dense} are not quantised"] if dense else []
    return [f"{name}: {problem}" for problem in [*problems, *stack.problems()]]


def _plain(name: str) -> str:
    """The stock name of a module that PEFT may have wrapped."""
    return f"{name.removesuffix('.base_layer')}.weight"
