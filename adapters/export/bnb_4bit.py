"""The format "bnb-4bit": safetensors that stock transformers loads as a bitsandbytes model in nf4.

Linear layers (attention, shared expert, dense MLP) are nf4 with double quantisation, in the tensors that bitsandbytes
itself serialises: `weight` (n / 2, 1) uint8, `weight.absmax`, `weight.nested_absmax`, `weight.quant_map`,
`weight.nested_quant_map` and `weight.quant_state.bitsandbytes__nf4` (bitsandbytes.functional.QuantState.as_dict).

Stacks of routed experts stay in 16 bit: stock transformers has no 4-bit form of them, and what it cannot hold it would
not load. Such a model is larger than its name says; the writer's facts give the share. For 4-bit experts take gguf.
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
from adapters.export.quantized_files import Encoding, Specs, check_encoded, write_encoded
from adapters.four_bit import ABSMAX_BLOCK, BLOCK, block_count
from adapters.quantized import FourBit
from adapters.quantized_linear import quant_state
from adapters.tensor_files import DTYPES, read_tensor
from adapters.verify import Check, Evidence
from adapters.verify.weights import Rounding

STATE = "quant_state.bitsandbytes__nf4"
STATE_BYTES = 256
"""JSON, filled with spaces: its length depends on its numbers, and the file's header comes before them."""


class Bnb4Bit(Encoding):
    """bitsandbytes' nf4 of the linear layers of one model."""

    title = "bitsandbytes' 4-bit form"
    rounding = Rounding(relative=0.15, ulp=None, exact=False)
    limits = "4-bit"

    def quantizes(self, key: str) -> bool:
        info = self.merged.index[key]
        if not super().quantizes(key) or self.merged.layout.tensor_class(key) == "routed_experts":
            return False
        return info.shape[-1] % BLOCK == 0  # bitsandbytes on a CPU dequantises other rows wrongly

    def parts(self, key: str) -> Specs:
        rows, cols = self.merged.index[key].shape
        blocks = block_count(rows * cols)
        return {
            key: (torch.uint8, (rows * cols // 2, 1)),
            f"{key}.absmax": (torch.uint8, (blocks,)),
            f"{key}.quant_map": (torch.float32, (16,)),
            f"{key}.nested_absmax": (torch.float32, (block_count(blocks, ABSMAX_BLOCK),)),
            f"{key}.nested_quant_map": (torch.float32, (256,)),
            f"{key}.{STATE}": (torch.uint8, (STATE_BYTES,)),
        }

    def encode(self, key: str) -> Iterator[Tensor]:
        matrix = self.merged.read(key).float()
        held = FourBit("nf4", 1, *matrix.shape)
        writer = held.writer(0)
        writer.put(0, matrix.view(-1))
        writer.close()
        parts = quant_state(held, DTYPES[self.merged.index[key].dtype]).as_dict(packed=True)
        yield held.packed.data.view(-1, 1)
        for name in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"):
            yield parts[name]
        yield torch.cat([parts[STATE], torch.full((STATE_BYTES - len(parts[STATE]),), ord(" "), dtype=torch.uint8)])

    def decode(self, directory: Path, index: Mapping[str, TensorInfo], key: str, expert: int | None) -> Tensor:
        parts = {name: read_tensor(info) for name, info in index.items() if name.startswith(f"{key}.")}
        state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
        state.dtype = torch.float32
        return bnb.dequantize_4bit(read_tensor(index[key]), state)

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
    sizes = {key: info.parameters for key, info in encoding.merged.index.items()}
    held = sum(size for key, size in sizes.items() if encoding.quantizes(key))
    return {**facts, "share_in_4_bit": held / sum(sizes.values())}


def check_bnb_4bit(directory: Path, source: Source, evidence: Evidence, options: Options) -> list[Check]:
    """Every value as bitsandbytes dequantises it against base + adapter; then what stock transformers says."""
    return check_encoded(Bnb4Bit(source.open()), directory, source, evidence, options, stock=True)
