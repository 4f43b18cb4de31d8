"""A base model streamed from its safetensors files: experts quantised one at a time, checked before training.

The model is built on the meta device and filled tensor by tensor, so the peak is the quantised model plus one expert.
All problems of a checkpoint (missing experts, wrong shapes, NaN) are found and reported before anything is trained.

    load_base(directory, quantize=True) ─▶ stock causal LM whose experts are `RoutedExperts`
    check_quantized(model)              ─▶ raises when a tensor of a 4-bit class was left in 16 or 32 bit
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from adapters.checkpoint import TensorInfo, read_config, read_index
from adapters.errors import CheckpointError, QuantizationError
from adapters.expert_math import Stack
from adapters.layouts import QUANTIZED_CLASSES, ExpertLayout, layout_for
from adapters.quantized import QuantizedStack
from adapters.routed import PROJECTIONS, RoutedExperts, moe_blocks, replace_experts
from adapters.tensor_files import read_tensor

Progress = Callable[[int, int], None]
Write = Callable[[Tensor], None]


def load_base(
    directory: Path,
    *,
    quantize: bool = True,
    double_quant: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Loads a text MoE causal LM.

    Args:
        directory: config.json and safetensors weights.
        quantize: nf4 for attention, shared expert, routed experts and dense MLPs (bitsandbytes' `Linear4bit` for the
            linears, `QuantizedStack` for the experts); everything else in `dtype`.
        double_quant: quantise the block constants too (8 bit).
        dtype: of everything that is not quantised, and of the computation.
        progress: called with (bytes read, bytes in all).

    Raises:
        LayoutError: unsupported family.
        CheckpointError: missing, misshapen or non-finite tensors, all of them listed.
    """
    config, index = read_config(directory), read_index(directory)
    layout = layout_for(config, index)
    model = _empty_model(directory, dtype)
    expected = _expected_keys(model, layout)
    _check_names_and_shapes(directory, layout, expected, index)
    _prepare_modules(model, layout, quantize, double_quant, dtype, device)
    _fill(directory, model, layout, index, device, progress)
    _reset_meta_buffers(model, device)
    if quantize:
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
    if problems:
        raise CheckpointError(directory, problems)


def _prepare_modules(
    model: PreTrainedModel, layout: ExpertLayout, quantize: bool, double_quant: bool, dtype: torch.dtype, device: str
) -> None:
    """Swaps experts for `RoutedExperts` and, quantised, linears of the 4-bit classes for `Linear4bit`."""

    def stack(parameter: Tensor) -> nn.Parameter | QuantizedStack:
        if quantize:
            experts, rows, cols = parameter.shape
            return QuantizedStack(experts, rows, cols, double_quant, device)
        return nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device), requires_grad=False)

    for _, block in list(moe_blocks(model, layout)):
        stock = getattr(block, layout.experts)
        replace_experts(block, layout, stock, stack(stock.gate_up_proj), stack(stock.down_proj))
    if quantize:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and layout.tensor_class(f"{name}.weight") in QUANTIZED_CLASSES:
                model.set_submodule(name, _linear_4bit(module, double_quant, dtype))


def _linear_4bit(stock: nn.Linear, double_quant: bool, dtype: torch.dtype) -> Linear4bit:
    linear = Linear4bit(
        stock.in_features,
        stock.out_features,
        bias=stock.bias is not None,
        compute_dtype=dtype,
        compress_statistics=double_quant,
        quant_type="nf4",
        device="meta",
    )
    # On CPUs with AVX512-BF16 bitsandbytes repacks weights at the first evaluation into a form that computes in
    # bfloat16 and has no backward: training after an evaluation would silently lose gradients.
    linear.support_avx512bf16_for_cpu = False
    if linear.bias is not None:
        linear.bias.data = linear.bias.data.to(dtype)
    return linear.requires_grad_(False)


def _fill(
    directory: Path,
    model: PreTrainedModel,
    layout: ExpertLayout,
    index: dict[str, TensorInfo],
    device: str,
    progress: Progress | None,
) -> None:
    problems: list[str] = []
    done, total = 0, sum(info.size_bytes for info in index.values())
    for label, tensor, write in _pieces(model, layout, index, device):
        if torch.isfinite(tensor).all():
            write(tensor)
        else:
            problems.append(f"{label} holds NaN or infinity")
        done += tensor.numel() * tensor.element_size()
        if progress:
            progress(min(done, total), total)
    if problems:
        raise CheckpointError(directory, problems)
    model.tie_weights()


def _pieces(
    model: PreTrainedModel, layout: ExpertLayout, index: dict[str, TensorInfo], device: str
) -> Iterator[tuple[str, Tensor, Write]]:
    """(label, tensor as stored, what to do with it), never more than one expert or one tensor at a time."""
    for name, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if isinstance(module, RoutedExperts):
            for projection in PROJECTIONS:
                yield from _expert_pieces(f"{name}.{projection}", getattr(module, projection), layout, index)
            own = [(part, tensor) for part, tensor in own if part not in PROJECTIONS]
        elif any(isinstance(parent, RoutedExperts) for parent in _parents(model, name)):
            continue
        for part, tensor in own:
            key = layout.checkpoint_key(f"{name}.{part}")
            if key in index:
                yield key, read_tensor(index[key]), _writer(module, part, tensor.dtype, device)


def _parents(model: nn.Module, name: str) -> Iterator[nn.Module]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield model.get_submodule(name)


def _expert_pieces(
    key: str, stack: Stack, layout: ExpertLayout, index: dict[str, TensorInfo]
) -> Iterator[tuple[str, Tensor, Write]]:
    for expert in range(stack.shape[0]):

        def write(matrix: Tensor, expert: int = expert) -> None:
            if isinstance(stack, QuantizedStack):
                stack.write(expert, matrix)
            else:
                stack.data[expert] = matrix.to(stack.device, stack.dtype)

        sources = layout.sources(key, expert)
        pieces = [read_tensor(index[source.key], source.expert) for source in sources]
        yield f"{sources[0].key} (expert {expert})", pieces[0] if len(pieces) == 1 else torch.cat(pieces), write


def _writer(module: nn.Module, parameter_name: str, dtype: torch.dtype, device: str) -> Write:
    def write(tensor: Tensor) -> None:
        if isinstance(module, Linear4bit) and parameter_name == "weight":
            # quantised from the stored dtype, as the experts are
            weight = Params4bit(
                tensor,
                requires_grad=False,
                compress_statistics=cast(Params4bit, module.weight).compress_statistics,
                quant_type="nf4",
                module=module,
            )
            module.weight = cast(Any, weight).to(device)
        elif parameter_name in dict(module.named_buffers(recurse=False)):
            setattr(module, parameter_name, tensor.to(device, dtype))
        else:
            setattr(module, parameter_name, nn.Parameter(tensor.to(device, dtype), requires_grad=False))

    return write


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
    """Proves that every tensor of a 4-bit class is 4-bit.

    Raises:
        QuantizationError: naming each tensor left in 16 or 32 bit, and each expert never written.
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
            weight = module.weight
            if weight.dtype != torch.uint8 or getattr(weight, "quant_state", None) is None:
                problems.append(f"{name}.weight is {weight.dtype}")
    if problems:
        raise QuantizationError("a 4-bit recipe, but not everything is nf4: " + "; ".join(problems[:20]))


def _stack_problems(name: str, stack: Stack) -> list[str]:
    if not isinstance(stack, QuantizedStack):
        return [f"{name} is {stack.dtype}"]
    unwritten = (~stack.written).nonzero().flatten().tolist()
    return [f"{name}: experts {unwritten} were never quantised"] if unwritten else []


def _plain(name: str) -> str:
    """The stock name of a module that PEFT may have wrapped."""
    return f"{name.removesuffix('.base_layer')}.weight"
