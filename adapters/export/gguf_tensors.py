"""Which tensors a GGUF file has, and from which pieces of the base each is filled.

A checkpoint is read piece by piece, a matrix or one expert of a stack at a time, in the order of its files; each piece
fills rows of one or two tensors of the GGUF file, wherever they lie there:

    plan_tensors(weights) ─▶ Plan.tensors     name and shape of each tensor of the file
                          ─▶ Plan.pieces      what to read, and which rows it fills

Names are llama.cpp's (the package gguf has them). What differs between the two is said by the family: Llama's queries
and keys are stored with the halves of each head interleaved, experts lie as (E, out, in) stacks of gate, up and down,
and DeepSeek's compressed keys and values are split by head.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import gguf
import torch
from torch import Tensor

from adapters.checkpoint import TensorInfo, text_config
from adapters.errors import ExportError, listed
from adapters.layouts import LAYER
from adapters.merged import MergedWeights
from adapters.tensor_files import read_tensor

Take = Callable[[Tensor], Tensor]

BAND_BYTES = 64 * 2**20
"""Embeddings and output matrices are read in bands of rows: they can be larger than any expert."""

STACKS = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}


@dataclass(frozen=True)
class Architecture:
    """A family in llama.cpp.

    Attributes:
        name: of the architecture there.
        permuted: queries and keys are stored for rotation of neighbours, as in Llama's original files.
        fixed: keys of config.json that llama.cpp holds as constants, with the only values that it computes rightly.
    """

    name: str
    permuted: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)


NO_WINDOW = {"use_sliding_window": False}
ARCHITECTURES = {
    "llama4_text": Architecture("llama4", fixed={"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1}),
    "mixtral": Architecture("llama", permuted=True, fixed={"sliding_window": None}),
    "qwen3_moe": Architecture(
        "qwen3moe", fixed={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], **NO_WINDOW}
    ),
    "olmoe": Architecture("olmoe", fixed={"norm_topk_prob": False, "clip_qkv": None}),
    "deepseek_v3": Architecture("deepseek2", fixed={"rope_interleave": True}),
    "gpt_oss": Architecture("gpt-oss", fixed={"swiglu_limit": 7.0}),
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True, fixed={"sliding_window": None}),
    "qwen2": Architecture("qwen2", fixed=NO_WINDOW),
    "qwen3": Architecture("qwen3", fixed=NO_WINDOW),
}


def architecture_of(config: Mapping[str, Any], model_type: str) -> Architecture:
    """How llama.cpp knows this model.

    Args:
        config: the language model's part of config.json. model_type: of its layout.

    Raises:
        ExportError: it does not, or it holds something as a constant that this config has otherwise.
    """
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ExportError(f"{model_type!r} models are not written as GGUF; families that are: {known}")
    found = ARCHITECTURES[model_type]
    other = [
        f"{key} is {config[key]!r}; llama.cpp computes {found.name} with {value!r} only"
        for key, value in {"hidden_act": "silu", **found.fixed}.items()
        if key in config and config[key] != value
    ]
    other += FURTHER[model_type](config) if model_type in FURTHER else []
    if other:
        raise ExportError(listed(f"llama.cpp would run this {model_type} model wrongly", other))
    return found


def _further_llama4(config: Mapping[str, Any]) -> list[str]:
    problems, layers = [], range(config["num_hidden_layers"])
    if config.get("use_qk_norm", True) != (config["num_local_experts"] != 128):
        problems.append("use_qk_norm differs: llama.cpp norms queries and keys of Llama 4 unless it has 128 experts")
    if not config.get("attn_temperature_tuning", True):
        problems.append("attn_temperature_tuning is off; llama.cpp always has it on")
    if list(config.get("no_rope_layers") or []) not in ([], [int((layer + 1) % 4 > 0) for layer in layers]):
        problems.append("no_rope_layers is not every fourth layer, which is all that llama.cpp has")
    return problems


def _further_olmoe(config: Mapping[str, Any]) -> list[str]:
    shared = config.get("num_key_value_heads") not in (None, config["num_attention_heads"])
    return ["llama.cpp norms the keys of OLMoE as if each head had its own; here heads share them"] * shared


def _further_deepseek(config: Mapping[str, Any]) -> list[str]:
    """llama.cpp takes models of 26 and 27 layers for the small ones that have no compressed queries."""
    small, plain = config["num_hidden_layers"] in (26, 27), config.get("q_lora_rank") is None
    return [f"q_lora_rank is {config.get('q_lora_rank')}, llama.cpp has it only in other sizes"] * (small != plain)


FURTHER = {"llama4_text": _further_llama4, "olmoe": _further_olmoe, "deepseek_v3": _further_deepseek}


@dataclass(frozen=True)
class Part:
    """The rows of one tensor that a piece fills: `take(piece)`, (rows, columns), from row `first` on."""

    tensor: str
    first: int
    take: Take


@dataclass(frozen=True)
class Piece:
    """One read: `read()` gives a tensor in the file's axis order; `size_bytes` of the base are read for it."""

    read: Callable[[], Tensor]
    parts: tuple[Part, ...]
    size_bytes: int
    place: tuple[str, int] = ("", 0)


@dataclass(frozen=True)
class Plan:
    """Shapes of the file's tensors, the row last, and the pieces that fill them."""

    architecture: Architecture
    tensors: dict[str, tuple[int, ...]]
    pieces: list[Piece]


def plan_tensors(weights: MergedWeights) -> Plan:
    """Every tensor of the language model under its GGUF name, and how it is filled.

    Raises:
        ExportError: llama.cpp does not know the family, has no name for a tensor, or rows of a tensor are missing.
    """
    config = dict(text_config(weights.config))
    planner = _Planner(weights, config, architecture_of(config, weights.layout.model_type))
    for key, info in weights.index.items():
        planner.add(key, info)
    if (factors := _rope_factors(config)) is not None:
        planner.put("rope_freqs.weight", tuple(factors.shape), lambda: factors, 0)
    planner.check()
    pieces = sorted(planner.pieces, key=lambda piece: piece.place)
    return Plan(planner.architecture, planner.tensors, pieces)


class _Planner:
    def __init__(self, weights: MergedWeights, config: Mapping[str, Any], architecture: Architecture):
        self.weights, self.config, self.architecture = weights, config, architecture
        self.layout = weights.layout
        number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
        self.names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
        self.tensors: dict[str, tuple[int, ...]] = {}
        self.pieces: list[Piece] = []
        self.problems: list[str] = []

    def add(self, key: str, info: TensorInfo) -> None:
        name = self.layout.model_key(key)
        if name is None:
            return
        if self.layout.tensor_class(key) == "routed_experts":
            self._add_experts(key, name, info)
        elif name.endswith("kv_b_proj.weight"):
            self._add_compressed(key, name, info)
        else:
            self._add_plain(key, name, info)

    def put(self, tensor: str, shape: tuple[int, ...], read: Callable[[], Tensor], size_bytes: int) -> None:
        """A tensor made whole by one piece."""
        self.tensors[tensor] = shape
        self.pieces.append(Piece(read, (Part(tensor, 0, _as_rows),), size_bytes))

    def _add_plain(self, key: str, name: str, info: TensorInfo) -> None:
        renamed = name.replace("e_score_correction_bias", "e_score_correction.bias")
        if renamed.endswith(".sinks"):
            renamed += ".weight"
        tensor = self.names.get_name(renamed, try_suffixes=(".weight", ".bias"))
        if tensor is None:
            self.problems.append(f"{key}: llama.cpp has no name for it in {self.architecture.name}")
            return
        self.tensors[tensor] = info.shape
        take = self._permuted(name) if self.architecture.permuted else _as_rows
        banded = self.layout.tensor_class(key) in ("embeddings", "lm_head") and key not in self.weights.changed
        self.pieces += _bands(tensor, info) if banded else [self._piece(key, info, None, Part(tensor, 0, take))]

    def _permuted(self, name: str) -> Take:
        heads = self.config["num_attention_heads"]
        if name.endswith((".q_proj.weight", ".q_proj.bias")):
            return partial(_interleaved_halves, heads)
        if name.endswith((".k_proj.weight", ".k_proj.bias")):
            return partial(_interleaved_halves, self.config.get("num_key_value_heads") or heads)
        return _as_rows

    def _add_experts(self, key: str, name: str, info: TensorInfo) -> None:
        layer, projection = LAYER.findall(name)[-1], name.rpartition(".")[2]
        if projection.endswith("_bias"):
            self._add_biases(key, layer, projection.removesuffix("_bias"), info)
        elif self.layout.checkpoint == "stacked":
            self._add_stack(key, layer, projection, info)
        else:
            self._add_expert(key, layer, projection, info)

    def _add_expert(self, key: str, layer: str, projection: str, info: TensorInfo) -> None:
        """One matrix of one expert, from files that hold each on its own."""
        gate, up, down = self.layout.parts
        expert, part = re.findall(rf"\.{self.layout.experts}\.(\d+)\.({gate}|{up}|{down})\.weight$", key)[-1]
        kind = {gate: "ffn_gate_exps", up: "ffn_up_exps", down: "ffn_down_exps"}[part]
        tensor, rows = f"blk.{layer}.{kind}.weight", info.shape[0]
        self.tensors[tensor] = (self._experts(), *info.shape)
        self.pieces.append(self._piece(key, info, None, Part(tensor, int(expert) * rows, _as_rows)))

    def _add_stack(self, key: str, layer: str, projection: str, info: TensorInfo) -> None:
        """All experts of a layer, from files that hold them as one tensor."""
        transposed, halves = self.layout.stack_order == "in_out", STACKS[projection]
        experts, first, second = info.shape
        outputs, inputs = (second, first) if transposed else (first, second)
        rows = outputs // len(halves)
        for half in halves:
            self.tensors[f"blk.{layer}.{half}.weight"] = (experts, rows, inputs)
        for expert in range(experts):
            parts = [
                Part(
                    f"blk.{layer}.{half}.weight",
                    expert * rows,
                    partial(_half, number, len(halves), self.layout.interleaved, transposed),
                )
                for number, half in enumerate(halves)
            ]
            self.pieces.append(self._piece(key, info, expert, *parts))

    def _add_biases(self, key: str, layer: str, projection: str, info: TensorInfo) -> None:
        """(E, outputs): one row an expert."""
        halves = STACKS[projection]
        experts, outputs = info.shape
        parts = []
        for number, half in enumerate(halves):
            tensor = f"blk.{layer}.{half}.bias"
            self.tensors[tensor] = (experts, outputs // len(halves))
            take = partial(_half_columns, number, len(halves), self.layout.interleaved)
            parts.append(Part(tensor, 0, take))
        self.pieces.append(self._piece(key, info, None, *parts))

    def _add_compressed(self, key: str, name: str, info: TensorInfo) -> None:
        """DeepSeek's kv_b_proj: by head, rows that make keys and rows that make values of the compressed state."""
        layer = LAYER.findall(name)[-1]
        heads, keys = self.config["num_attention_heads"], self.config["qk_nope_head_dim"]
        values, rank = self.config["v_head_dim"], info.shape[1]
        self.tensors[f"blk.{layer}.attn_k_b.weight"] = (heads, rank, keys)
        self.tensors[f"blk.{layer}.attn_v_b.weight"] = (heads, values, rank)
        parts = (
            Part(f"blk.{layer}.attn_k_b.weight", 0, partial(_compressed_keys, heads, keys)),
            Part(f"blk.{layer}.attn_v_b.weight", 0, partial(_compressed_values, heads, keys)),
        )
        self.pieces.append(self._piece(key, info, None, *parts))

    def _piece(self, key: str, info: TensorInfo, expert: int | None, *parts: Part) -> Piece:
        size = info.size_bytes if expert is None else info.size_bytes // info.shape[0]
        place = (str(info.file), info.start + size * (expert or 0))
        return Piece(partial(self.weights.read, key, expert), parts, size, place)

    def _experts(self) -> int:
        counts = (self.config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
        return next(count for count in counts if count)

    def check(self) -> None:
        filled: dict[str, set[int]] = {}
        for part in (part for piece in self.pieces for part in piece.parts if "_exps.weight" in part.tensor):
            filled.setdefault(part.tensor, set()).add(part.first)
        for tensor, firsts in filled.items():
            if len(firsts) != (experts := self.tensors[tensor][0]):
                self.problems.append(f"{tensor}: {len(firsts)} of {experts} experts are in the files")
        if self.problems:
            raise ExportError(listed("this model cannot be written as GGUF", self.problems))


def _bands(tensor: str, info: TensorInfo) -> list[Piece]:
    """A large matrix as bands of rows, read from the file as they are."""
    row = info.size_bytes // info.shape[0]
    step = max(1, BAND_BYTES // row)
    pieces = []
    for first in range(0, info.shape[0], step):
        rows, start = min(step, info.shape[0] - first), info.start + first * row
        band = replace(info, shape=(rows, *info.shape[1:]), start=start, size_bytes=rows * row)
        part = Part(tensor, first, _as_rows)
        pieces.append(Piece(partial(read_tensor, band), (part,), band.size_bytes, (str(info.file), start)))
    return pieces


def _as_rows(tensor: Tensor) -> Tensor:
    return tensor[None] if tensor.ndim == 1 else tensor.flatten(0, -2)


def _half(number: int, halves: int, interleaved: bool, transposed: bool, matrix: Tensor) -> Tensor:
    """The rows of gate or of up, (rows, in), of one expert's matrix; all of it where there is no second half."""
    matrix = matrix.t() if transposed else matrix
    return matrix[number::halves] if interleaved else matrix.chunk(halves)[number]


def _half_columns(number: int, halves: int, interleaved: bool, biases: Tensor) -> Tensor:
    return _half(number, halves, interleaved, True, biases).t()


def _interleaved_halves(heads: int, tensor: Tensor) -> Tensor:
    """Each head's rows as 0, n/2, 1, n/2 + 1, …: the order that llama.cpp rotates in for the architecture llama."""
    rows = _as_rows(tensor) if tensor.ndim > 1 else tensor[:, None]
    swapped = rows.view(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)
    return swapped if tensor.ndim > 1 else swapped.t()


def _compressed_keys(heads: int, keys: int, matrix: Tensor) -> Tensor:
    return matrix.view(heads, -1, matrix.shape[1])[:, :keys].transpose(1, 2).reshape(-1, keys)


def _compressed_values(heads: int, keys: int, matrix: Tensor) -> Tensor:
    return matrix.view(heads, -1, matrix.shape[1])[:, keys:].reshape(-1, matrix.shape[1])


def _rope_factors(config: Mapping[str, Any]) -> Tensor | None:
    """What each frequency is divided by where Llama 3.1's scaling is on (transformers, modeling_rope_utils.py,
    _compute_llama3_parameters); llama.cpp reads the factors from a tensor."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) != "llama3":
        return None
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    lengths = 2 * math.pi / (1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((rope["original_max_position_embeddings"] / lengths - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
