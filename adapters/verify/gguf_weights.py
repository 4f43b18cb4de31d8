"""A GGUF file read back as the base's tensors: dequantised by numpy, and llama.cpp's order of rows undone.

Nothing here is shared with the writer: not the quantiser (that is ggml's C code, this is the package gguf's numpy), nor
the rules for which rows go where.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFReader
from torch import Tensor

from adapters.checkpoint import read_config, read_index, text_config
from adapters.errors import ExportError
from adapters.layouts import LAYER, layout_for
from adapters.tensor_files import read_tensor
from adapters.verify.weights import ROUNDINGS, Rounding

PERMUTED = ("llama", "mistral", "mixtral")
"""Families whose queries and keys llama.cpp holds with the two halves of each head interleaved."""

ROUNDING_OF_TYPES = {
    "F32": replace(ROUNDINGS[torch.float32], dtype=torch.float32),
    "F16": replace(ROUNDINGS[torch.float16], dtype=torch.float16),
    "BF16": replace(ROUNDINGS[torch.bfloat16], dtype=torch.bfloat16),
    "Q8_0": Rounding(0.02, None, exact=False),
    "Q6_K": Rounding(0.05, None, exact=False),
    "Q5_K": Rounding(0.1, None, exact=False),
    "Q5_1": Rounding(0.11, None, exact=False),
    "Q5_0": Rounding(0.12, None, exact=False),
    "Q4_K": Rounding(0.18, None, exact=False),
    "IQ4_XS": Rounding(0.19, None, exact=False),
    "IQ4_NL": Rounding(0.19, None, exact=False),
    "Q4_0": Rounding(0.22, None, exact=False),
    "Q4_1": Rounding(0.23, None, exact=False),
    "Q3_K": Rounding(0.31, None, exact=False),
    "Q2_K": Rounding(0.8, None, exact=False),
}
"""Twice what each type loses of values spread as cubes of normal ones: 0.009 for Q8_0 … 0.39 for Q2_K (measured)."""


class GgufWeights:
    """The weights of one GGUF file under the names of the base's files.

    Attributes:
        reader: of the file.
    """

    def __init__(self, file: Path, base: Path):
        self.reader = GGUFReader(file)
        self.index, config = read_index(base), read_config(base)
        self.layout, self.config = layout_for(config, self.index), text_config(config)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        architecture = str(self.reader.fields["general.architecture"].contents())
        number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        self.names = gguf.get_tensor_name_map(number, self.config["num_hidden_layers"])

    def rounding(self, key: str) -> Rounding | None:
        """What a tensor loses at most by the type that it has in the file; None for one that is not in it.

        A tensor that lies in two there, of two types, is allowed what the coarser one loses.
        """
        names = [name for name in self._names(key) if name in self.tensors]
        found = [ROUNDING_OF_TYPES[kind] for kind in {self.tensors[name].tensor_type.name for name in names}]
        if not found:
            return None
        coarsest = max(found, key=lambda rounding: rounding.relative)
        return coarsest if len(found) == 1 else replace(coarsest, ulp=None, exact=False, dtype=None)

    def _names(self, key: str) -> list[str]:
        """The file's tensors in which the base's tensor `key` lies."""
        name = self.layout.model_key(key)
        if name is None:
            return []
        layer = LAYER.findall(name)[-1] if LAYER.search(name) else ""
        if self.layout.tensor_class(key) == "routed_experts":
            end = ".bias" if key.endswith("_bias") else ".weight"
            return [f"blk.{layer}.ffn_{part}_exps{end}" for part in self._parts(key, name)]
        if name.endswith("kv_b_proj.weight"):
            return [f"blk.{layer}.attn_{part}_b.weight" for part in "kv"]
        return [self._name(name)]

    def _parts(self, key: str, name: str) -> tuple[str, ...]:
        """Which of "gate", "up" and "down" a tensor of experts holds."""
        projection = name.rpartition(".")[2].removesuffix("_bias")
        if self.layout.checkpoint == "stacked" or key.endswith("_bias"):
            return ("down",) if projection == "down_proj" else ("gate", "up")
        found = re.search(r"\.(\d+)\.(\w+)\.weight$", key)
        assert found is not None
        return (("gate", "up", "down")[self.layout.parts.index(found[2])],)

    def _name(self, name: str) -> str:
        """The file's name of a tensor that lies there by itself."""
        known = name.replace("_correction_bias", "_correction.bias") + (".weight" if name.endswith(".sinks") else "")
        return self.names.get_name(known, try_suffixes=(".weight", ".bias")) or known

    def read(self, key: str, expert: int | None = None) -> Tensor:
        """The tensor that the base's files call `key`, or its matrix [expert], float32 in their axis order.

        What is no part of the language model (a vision tower) is given as the base's: it is not in the file.

        Raises:
            ExportError: the file has no such tensor.
        """
        name = self.layout.model_key(key)
        if name is None:
            return read_tensor(self.index[key], expert)
        if self.layout.tensor_class(key) == "routed_experts":
            return self._expert(key, name, expert)
        if name.endswith("kv_b_proj.weight"):
            return self._compressed(LAYER.findall(name)[-1])
        values = self._values(self._name(name))
        if self.layout.model_type in PERMUTED and re.search(r"self_attn\.[qk]_proj\.", name):
            return self._unpermuted(values, name)
        return values

    def _values(self, tensor: str, matrix: int | None = None) -> Tensor:
        if tensor not in self.tensors:
            raise ExportError(f"the GGUF file has no tensor {tensor}")
        found = self.tensors[tensor]
        data = found.data if matrix is None else found.data[matrix]
        return torch.from_numpy(np.array(gguf.quants.dequantize(data, found.tensor_type), dtype=np.float32))

    def _unpermuted(self, values: Tensor, name: str) -> Tensor:
        heads = self.config["num_attention_heads"]
        if ".k_proj." in name:
            heads = self.config.get("num_key_value_heads") or heads
        halves = values.view(heads, values.shape[0] // heads // 2, 2, -1).transpose(1, 2)
        return halves.reshape(values.shape)

    def _expert(self, key: str, name: str, expert: int | None) -> Tensor:
        layer, projection = LAYER.findall(name)[-1], name.rpartition(".")[2]
        place = f"blk.{layer}.ffn_%s_exps"
        if projection.endswith("_bias"):
            return self._joined(place + ".bias", projection.removesuffix("_bias"), None)
        if self.layout.checkpoint == "stacked":
            matrix = self._joined(place + ".weight", projection, expert)
            return matrix.t() if self.layout.stack_order == "in_out" else matrix
        found = re.search(r"\.(\d+)\.(\w+)\.weight$", key)
        assert found is not None
        (part,) = self._parts(key, name)
        return self._values(place % part + ".weight", int(found[1]))

    def _joined(self, place: str, projection: str, matrix: int | None) -> Tensor:
        """down as it is; gate and up as one matrix, along the outputs."""
        if projection == "down_proj":
            return self._values(place % "down", matrix)
        gate, up = (self._values(place % part, matrix) for part in ("gate", "up"))
        along = -1 if matrix is None else 0
        if not self.layout.interleaved:
            return torch.cat([gate, up], along)
        return torch.stack([gate, up], 1 if along == 0 else 2).flatten(*((0, 1) if along == 0 else (1, 2)))

    def _compressed(self, layer: str) -> Tensor:
        keys, values = (self._values(f"blk.{layer}.attn_{part}_b.weight") for part in "kv")
        return torch.cat([keys.transpose(1, 2), values], 1).flatten(0, 1)


def text_of(reader: GGUFReader, key: str) -> Any:
    """A value of the file's metadata, None where it has none."""
    field = reader.fields.get(key)
    return None if field is None else field.contents()


def file_problems(file: Path) -> list[str]:
    """What is missing of the file by its own header."""
    reader = GGUFReader(file)
    ends = [int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors]
    size = file.stat().st_size
    problems = [f"{file.name} has {size} bytes, its tensors end at {max(ends)}"] if max(ends, default=0) > size else []
    return problems or ([] if reader.tensors else [f"{file.name} holds no tensors"])
