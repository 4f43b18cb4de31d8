"""The check of the format "gguf-lora": read back by llama.cpp's rules, and laid over the base by llama.cpp itself.

The base is written as an F32 GGUF beside it for that, and thrown away afterwards.

Dimension legend: E experts, r rank, out and in the sides of a matrix; gate before up in a fused (out, in).
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from torch import Tensor

from adapters.checkpoint import read_config, read_index, text_config
from adapters.errors import AdapterFileError, ExportError
from adapters.export import Options, Source
from adapters.export.gguf import gguf_file
from adapters.export.gguf_child import write_gguf
from adapters.layouts import layout_for
from adapters.verify import Check, Evidence
from adapters.verify.adapter_files import CLOSE, Trained, check_beside, compare
from adapters.verify.behaviour import behaviour_not_run, check_behaviour
from adapters.verify.gguf_files import limits_of
from adapters.verify.llama_cpp import LlamaCppTimeout, run_llama_cpp
from adapters.verify.memory import why_no_room

METADATA, LOADED = "file: metadata", "loads in llama.cpp"
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "{block}.gate_proj",
    "ffn_up": "{block}.up_proj",
    "ffn_down": "{block}.down_proj",
    "ffn_gate_inp": "{block}.{router}",
    "ffn_gate_shexp": "{block}.{shared}.gate_proj",
    "ffn_up_shexp": "{block}.{shared}.up_proj",
    "ffn_down_shexp": "{block}.{shared}.down_proj",
}
"""llama.cpp's names of weights (`src/llama-arch.cpp`), and what stock transformers calls the same."""


class LoraFile:
    """The factors of one GGUF LoRA as llama.cpp finds them.

    Attributes:
        keys: names of all tensors. used: of those that were asked for.
    """

    def __init__(self, file: Path, base: Path):
        config = read_config(base)
        self.layout = layout_for(config, read_index(base))
        self.config = text_config(config)
        self.reader = GGUFReader(file)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        self.keys, self.used = frozenset(self.tensors), set[str]()
        parts = {"block": self.layout.block, "router": self.layout.router, "shared": self.layout.shared_expert}
        self.names = {theirs.format(**parts): ours for ours, theirs in NAMES.items()}

    def field(self, key: str) -> Any:
        found = self.reader.get_field(key)
        return found.contents() if found else None

    def factors(self, weight: str) -> tuple[Tensor, Tensor]:
        """(lora_a, lora_b · scale), float64; build_lora_mm: alpha / r, by nothing where alpha is 0."""
        for side in ("lora_a", "lora_b"):
            if f"{weight}.{side}" not in self.tensors:
                raise AdapterFileError(f"the file has no {weight}.{side}")
        self.used |= {f"{weight}.lora_a", f"{weight}.lora_b"}
        a, b = (torch.tensor(self.tensors[f"{weight}.{side}"].data).double() for side in ("lora_a", "lora_b"))
        alpha = float(self.field("adapter.lora.alpha") or 0)
        return a, b * (alpha / b.shape[-1] if alpha else 1.0)

    def linear(self, name: str) -> Tensor:
        layer, short = re.findall(r"\.layers\.(\d+)\.(.+)\.weight$", name)[-1]
        if short not in self.names:
            raise AdapterFileError(f"llama.cpp has no name for {name}")
        a, b = self.factors(f"blk.{layer}.{self.names[short]}.weight")
        delta = b @ a
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(short.rpartition(".")[2])
        if heads is None or self.field("general.architecture") != "llama":
            return delta
        by_head = delta.view(self.config[heads], -1, delta.shape[1])
        return torch.cat([by_head[:, ::2], by_head[:, 1::2]], dim=1).flatten(0, 1)

    def unused(self) -> list[str]:
        return sorted(self.keys - self.used)


def expert(file: LoraFile, stack: str, number: int, experts: int) -> Tensor:
    """build_lora_mm_id: the last axis in ggml's order, the first one here, is the expert's."""
    layer = re.findall(r"\.layers\.(\d+)\.", stack)[-1]
    kinds = ("ffn_down_exps",) if stack.endswith(".down_proj") else ("ffn_gate_exps", "ffn_up_exps")
    found = [file.factors(f"blk.{layer}.{kind}.weight") for kind in kinds]
    return torch.cat([b[number] @ a[number] for a, b in found])


def check_gguf_lora(directory: Path, source: Source, evidence: Evidence, options: Options) -> list[Check]:
    """Every check of a GGUF LoRA; see the module."""
    try:
        file = LoraFile(gguf_file(directory), source.base)
    except (ExportError, ValueError, OSError, IndexError) as error:
        return [Check(METADATA, "failed", f"cannot be read as GGUF: {error}")]
    assert source.adapter is not None
    dtype = options.dtype or "float32"
    trained = Trained(source.adapter, source.base, file.layout)
    checks = [check_metadata(file), *compare(file, trained, expert, CLOSE[dtype])]
    checks.append(check_beside(directory, "gguf-lora", source))
    return [*checks, *check_in_llama_cpp(gguf_file(directory), source, evidence, dtype)]


def check_metadata(file: LoraFile) -> Check:
    """What llama.cpp asks for before it looks at a tensor."""
    expected = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 0.0}
    found = {key: file.field(key) for key in (*expected, "general.architecture")}
    problems = [
        f"{key} is {found[key]!r}, expected {value!r}" for key, value in expected.items() if found[key] != value
    ]
    detail = "; ".join(problems) or f"a LoRA for {found['general.architecture']}, scales folded"
    return Check(METADATA, "failed" if problems else "passed", detail, found)


def check_in_llama_cpp(file: Path, source: Source, evidence: Evidence, dtype: str) -> list[Check]:
    """Runs the base's F32 GGUF with the LoRA over it, and compares what it says."""
    if evidence.logits is None:
        why = evidence.why_none or "no evidence was made"
        return [Check(LOADED, "not run", why), *behaviour_not_run(why)]
    with tempfile.TemporaryDirectory(prefix="studio-base-") as folder:
        parameters = sum(info.parameters for info in read_index(source.base).values())
        if why := why_no_room(Path(folder), 4 * parameters):
            return [Check(LOADED, "not run", why), *behaviour_not_run(why)]
        try:
            write_gguf(Source(source.base, None, "base"), Path(folder), Options(quant="F32"))
            run = run_llama_cpp(gguf_file(Path(folder)), evidence.prompts, lora=file)
        except LlamaCppTimeout as error:
            return [Check(LOADED, "not run", str(error)), *behaviour_not_run(str(error))]
        except ExportError as error:
            return [Check(LOADED, "failed", str(error))]
    limits = limits_of(source.base, "F32" if dtype == "float32" else "F16")
    said = {f"export.{number}": logits for number, logits in enumerate(run.logits)}
    program = f"llama.cpp {run.version}, LoRA over an F32 base"
    return [Check(LOADED, "passed", program), *check_behaviour(evidence, said, limits, program)]
