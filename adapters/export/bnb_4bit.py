"""The format "bnb-4bit": safetensors that stock transformers loads as a bitsandbytes model in nf4.

Linear layers (attention, shared expert, dense MLP) are nf4 with double quantisation, in the tensors that bitsandbytes
itself serialises: `weight` (n / 2, 1) uint8, `weight.absmax`, `weight.nested_absmax`, `weight.quant_map`,
`weight.nested_quant_map` and `weight.quant_state.bitsandbytes__nf4` (bitsandbytes.functional.QuantState.as_dict).

So are the experts of Llama 4, which stock transformers then holds as separate linear layers. Of other families it holds
the stacks of routed experts in 16 bit, and what it cannot hold it would not load: there they stay as they are, and such
a model is larger than its name says. `share_in_4_bit` of the writer's facts says how much; for 4-bit experts take gguf.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from adapters.checkpoint import TensorInfo
from adapters.export import Options, Progress, Source
from adapters.export.quantized_files import Encoding, Matrix, Specs, check_encoded, write_encoded
from adapters.four_bit import ABSMAX_BLOCK, BLOCK, block_count
from adapters.quantized import FourBit
from adapters.quantized_linear import quant_state
from adapters.tensor_files import DTYPES, read_tensor
from adapters.verify import Check, Evidence
from adapters.verify.weights import Rounding

SEQUENTIAL = ("llama4", "llama4_text")
"""Families whose experts stock transformers holds as separate linear layers where the model is quantised
(MODULES_TO_PATCH_FOR_QUANTIZATION in transformers/quantizers/base.py)."""

STATE = "quant_state.bitsandbytes__nf4"
STATE_BYTES = 256
"""JSON, filled with spaces: its length depends on its numbers, and the file's header comes before them."""


class Bnb4Bit(Encoding):
    """bitsandbytes' nf4 of the linear layers of one model."""

    title = "bitsandbytes' 4-bit form"
    rounding = Rounding(relative=0.25, ulp=None, exact=False)  # 0.09 measured for normal values, 0.15 for long tails
    limits = "4-bit"
    split = SEQUENTIAL

    def quantizes(self, key: str) -> bool:
        stack = self.merged.layout.tensor_class(key) == "routed_experts" if self.merged.layout.model_key(key) else False
        return super().quantizes(key) and (not stack or self.merged.layout.model_type in SEQUENTIAL)

    def parts(self, matrix: Matrix) -> Specs:
        weight, values = f"{matrix.name}.weight", matrix.shape[0] * matrix.shape[1]
        if matrix.shape[1] % BLOCK:  # bitsandbytes on a CPU dequantises rows that are no whole blocks wrongly
            return {weight: (DTYPES[self.merged.index[matrix.key].dtype], matrix.shape)}
        blocks = block_count(values)
        return {
            weight: (torch.uint8, (values // 2, 1)),
            f"{weight}.absmax": (torch.uint8, (blocks,)),
            f"{weight}.quant_map": (torch.float32, (16,)),
            f"{weight}.nested_absmax": (torch.float32, (block_count(blocks, ABSMAX_BLOCK),)),
            f"{weight}.nested_quant_map": (torch.float32, (256,)),
            f"{weight}.{STATE}": (torch.uint8, (STATE_BYTES,)),
        }

    def encode(self, matrix: Matrix, values: Tensor) -> Iterator[Tensor]:
        dtype = DTYPES[self.merged.index[matrix.key].dtype]  # of what it is dequantised to
        if matrix.shape[1] % BLOCK:
            yield values.to(dtype)
            return
        held = FourBit("nf4", 1, *matrix.shape)
        writer = held.writer(0)
        writer.put(0, values.view(-1))
        writer.close()
        parts = quant_state(held, dtype).as_dict(packed=True)
        yield held.packed.data.view(-1, 1)
        for name in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"):
            yield parts[name]
        yield torch.cat([parts[STATE], torch.full((STATE_BYTES - len(parts[STATE]),), ord(" "), dtype=torch.uint8)])

    def read_back(self, index: Mapping[str, TensorInfo], key: str, expert: int | None) -> Tensor:
        """By bitsandbytes' own dequantisation."""
        if not self.quantizes(key):
            return read_tensor(index[key], expert)
        halves = [self._decode(index, matrix) for matrix in self.matrices(key) if matrix.expert == expert]
        transposed = expert is not None and self.merged.layout.stack_order == "in_out"
        return torch.cat(halves).t().contiguous() if transposed else torch.cat(halves)

    def _decode(self, index: Mapping[str, TensorInfo], matrix: Matrix) -> Tensor:
        weight = f"{matrix.name}.weight"
        if f"{weight}.{STATE}" not in index:
            return read_tensor(index[weight]).float()
        names = [name for name in self.parts(matrix) if name != weight]
        state = bnb.QuantState.from_dict({name: read_tensor(index[name]) for name in names}, torch.device("cpu"))
        state.dtype = torch.float32
        return bnb.dequantize_4bit(read_tensor(index[weight]), state)

    def config(self) -> dict[str, Any]:
        dtypes = {self.merged.index[key].dtype for key in self.merged.index if self.quantizes(key)}
        compute = str(DTYPES[max(dtypes)] if len(dtypes) == 1 else torch.float32).removeprefix("torch.")
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": compute,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": self.left(),
            "llm_int8_threshold": 6.0,
        }


def write_bnb_4bit(
    source: Source, directory: Path, options: Options, progress: Progress | None = None
) -> dict[str, Any]:
    """The format "bnb-4bit". "share_in_4_bit" of the facts is of the parameters."""
    encoding = Bnb4Bit(source.open())
    facts = write_encoded(encoding, directory, progress)
    index = encoding.merged.index
    matrices = [matrix for key in index if encoding.quantizes(key) for matrix in encoding.matrices(key)]
    held = sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices if len(encoding.parts(matrix)) > 1)
    return {**facts, "share_in_4_bit": held / sum(info.parameters for info in index.values())}


def check_bnb_4bit(directory: Path, source: Source, evidence: Evidence, options: Options) -> list[Check]:
    """Every value as bitsandbytes dequantises it against base + adapter; then what stock transformers says."""
    return check_encoded(Bnb4Bit(source.open()), directory, source, evidence, options, stock=True)
