"""The base as a job held it in training: quantised, and dequantised again, matrix by matrix.

Merging an adapter into these values gives the model that was trained; merging it into the 16-bit originals gives one
that training never saw. Blocks and double quantisation run over the fused matrix of the model, gate and up together, so
an expert that lies in two tensors is quantised as one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.checkpoint import TensorInfo
from adapters.errors import CheckpointError, QuantizationError
from adapters.layouts import QUANTIZED_CLASSES, ExpertLayout
from adapters.quantized import FORMATS, hold
from adapters.tensor_files import read_tensor

KEPT_MATRICES = 3
"""Of the last matrices made; each is read in several pieces, by threads that may stand at the ends of two."""


class HeldBase:
    """Values of a base as they were held.

    Args:
        index: the base's tensors. layout: of its family.
        stacks: (name in the model, experts) of every stack of routed experts.
        held: {"quantization", "int8_experts", "double_quant", "dtype"}.

    Raises:
        QuantizationError: an unknown format, or experts that do not exist.
        CheckpointError: when read, a matrix that holds NaN or infinity.
    """

    def __init__(
        self,
        index: Mapping[str, TensorInfo],
        layout: ExpertLayout,
        stacks: Collection[tuple[str, int]],
        held: Mapping[str, Any],
    ):
        self._index, self._layout, self._kind = index, layout, held["quantization"]
        self._int8, self._double = frozenset(held.get("int8_experts") or ()), bool(held.get("double_quant", True))
        self._dtype = getattr(torch, held.get("dtype") or "float32")
        if self._kind not in FORMATS:
            raise QuantizationError(f"quantization {self._kind!r}; allowed: {', '.join(FORMATS)}")
        self._places = self._expert_places(stacks)
        self._made: OrderedDict[tuple[str, int | None], Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def _expert_places(self, stacks: Collection[tuple[str, int]]) -> dict[str, tuple[str, int, int]]:
        """Of each per-expert tensor: its stack, its expert, and the first of its rows in the fused matrix."""
        places = {}
        for name, experts in stacks:
            if unknown := sorted(expert for expert in self._int8 if not 0 <= expert < experts):
                raise QuantizationError(f"int8_experts {unknown} do not exist; a layer has experts 0 to {experts - 1}")
            for expert in range(experts):
                row = 0
                for source in self._layout.sources(name, expert):
                    if source.expert is None:
                        places[source.key] = (name, expert, row)
                        row += self._index[source.key].shape[0]
        return places

    def covers(self, key: str) -> bool:
        """Whether training held the tensor quantised."""
        name = self._layout.model_key(key)
        if name is None or (found := self._layout.tensor_class(key)) not in QUANTIZED_CLASSES:
            return False
        kinds = {self._kind, "int8"} if self._int8 and found == "routed_experts" else {self._kind}
        return kinds != {"none"} and self._layout.takes_lora(key)

    def read(self, key: str, expert: int | None, rows: tuple[int, int] | None) -> Tensor:
        """(rows, cols) float32, a copy; (E, rows, cols) of a stack without `expert`."""
        shape = self._index[key].shape
        if len(shape) == 3 and expert is None:
            return torch.stack([self._matrix(key, number) for number in range(shape[0])])
        if key in self._places:
            name, expert, first = self._places[key]
            matrix = self._matrix(name, expert)[first : first + shape[0]]
        else:
            matrix = self._matrix(key, expert if len(shape) == 3 else None)
        return (matrix if rows is None else matrix[slice(*rows)]).clone()

    def _matrix(self, name: str, expert: int | None) -> Tensor:
        with self._lock:
            place = (name, expert)
            if place not in self._made:
                while len(self._made) >= KEPT_MATRICES:
                    self._made.popitem(last=False)
                self._made[place] = self._dequantized(name, expert)
            self._made.move_to_end(place)
            return self._made[place]

    def _dequantized(self, name: str, expert: int | None) -> Tensor:
        if expert is not None and name not in self._index:
            values = torch.cat([read_tensor(self._index[s.key]) for s in self._layout.sources(name, expert)])
        else:
            values = read_tensor(self._index[name], expert)
        kind = "int8" if expert in self._int8 else self._kind
        if kind == "none":
            return values.float()
        options: dict[str, Any] = {"double_quant": self._double, "dtype": self._dtype, "device": "cpu"}
        held = hold(kind, 1, *values.shape, **options)
        writer = held.writer(0)
        try:
            writer.put(0, values.contiguous().view(-1))
            writer.close()
        except QuantizationError as error:
            raise CheckpointError("the base", [f"{name} {error}"]) from None
        out = torch.empty((1, *values.shape), dtype=self._dtype)
        held.dequantize(0, out)
        return out[0].float()
