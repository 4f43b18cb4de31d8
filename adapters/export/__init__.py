"""Every format that a trained model or an adapter can be written in. No torch at import.

    EXPORTERS[format].write(source, directory, options, progress)      fills an empty directory, returns facts
    EXPORTERS[format].check(directory, source, evidence, options)      a list of `adapters.verify.Check`

A format is one function that writes and one that checks, in a module of their own, loaded when they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapters.chat_template import copy_template
from adapters.errors import ExportError

if TYPE_CHECKING:
    from adapters.merged import MergedWeights
    from adapters.verify import Check, Evidence

TOOLS = "make export-tools"
"""The one command that adds what GGUF needs; it is a `pip install` of export-tools.txt, whose hashes are checked."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


IMPORTANCE_EXAMPLES = 512
"""Examples that an importance matrix is measured on, at most."""


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        base: a model directory.
        adapter: a PEFT adapter directory for it, in the standard form; None exports the base as it is.
        name: the model's name, for cards and metadata.
        held: merge into the base as training held it, quantised: the `held` of `adapters.sidecar.Sidecar`; None merges
            into the base's own weights.
        base_name: what the exported files call the base; "" is the name of its folder.
    """

    base: Path
    adapter: Path | None
    name: str
    held: Mapping[str, Any] | None = None
    base_name: str = ""

    @property
    def public_base(self) -> str:
        """The base as files call it that go to others: never a path of this machine."""
        return self.base_name or self.base.resolve().name

    def open(self) -> MergedWeights:
        """The merged weights, to be read tensor by tensor."""
        from adapters.merged import MergedWeights

        return MergedWeights(self.base, self.adapter, self.held)


@dataclass(frozen=True)
class Options:
    """What some formats take and others pass over.

    Attributes:
        dtype: of plain weights: float32, bfloat16 or float16; None keeps each tensor's own.
        quant: the GGUF type, e.g. "Q4_K_M".
        importance: for the GGUF quantiser: an importance matrix, or JSON Lines of {"text": …} or {"messages": […]} that
            one is measured on.
    """

    dtype: str | None = None
    quant: str | None = None
    importance: Path | None = None


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        kind: "model" for the merged whole, "adapter" for the adapter alone.
        writer, checker: "module:function".
    """

    name: str
    title: str
    kind: Literal["model", "adapter"]
    writer: str
    checker: str

    def write(
        self, source: Source, directory: Path, options: Options, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Fills the empty `directory`; returns facts for the certificate."""
        facts: dict[str, Any] = _load(self.writer)(source, directory, options, progress)
        if self.kind == "adapter":
            copy_template(source.adapter, directory)
        return facts

    def check(self, directory: Path, source: Source, evidence: Evidence, options: Options) -> list[Check]:
        """Holds what was written against the source."""
        return _load(self.checker)(directory, source, evidence, options)


def is_importance_matrix(file: Path) -> bool:
    """Whether `file` is, or is called, a GGUF file; what is no file is none."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(4) == b"GGUF" or file.suffix == ".gguf"


def file_stem(name: str) -> str:
    """A model's name as part of a file's name."""
    return "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in name).strip("-.") or "model"


def _load(place: str) -> Callable[..., Any]:
    module, _, function = place.partition(":")
    try:
        return getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name not in ("gguf", "xllamacpp"):
            raise
        raise ExportError(f"GGUF needs the package {error.name}, which is not installed; add it by: {TOOLS}") from None


EXPORTERS: dict[str, Format] = {
    found.name: found
    for found in (
        Format(
            "safetensors",
            "merged model, safetensors",
            "model",
            "adapters.merge:write_safetensors",
            "adapters.verify.model_files:check_safetensors",
        ),
        Format(
            "gguf",
            "GGUF for llama.cpp",
            "model",
            "adapters.export.gguf_child:write_gguf",
            "adapters.verify.gguf_files:check_gguf",
        ),
        Format(
            "bnb-4bit",
            "merged model, bitsandbytes 4-bit, as stock transformers holds it",
            "model",
            "adapters.export.bnb_4bit:write_bnb_4bit",
            "adapters.export.bnb_4bit:check_bnb_4bit",
        ),
        Format(
            "fp8",
            "merged model, FP8 in the compressed-tensors layout",
            "model",
            "adapters.export.fp8:write_fp8",
            "adapters.export.fp8:check_fp8",
        ),
        *(
            Format(
                name,
                title,
                "adapter",
                f"adapters.export.{name.replace('-', '_')}:write_{name.replace('-', '_')}",
                f"adapters.verify.{checker}:check_{name.replace('-', '_')}",
            )
            for name, title, checker in (
                ("peft", "adapter, standard PEFT form: stacks", "adapter_files"),
                ("per-expert", "adapter, two-dimensional factors of each expert: vLLM, SGLang", "adapter_files"),
                ("vllm-3d", "adapter, stacks as vLLM takes them", "adapter_files"),
                ("sglang-3d", "adapter, stacks as SGLang takes them", "adapter_files"),
                ("gguf-lora", "adapter as GGUF, for a GGUF of the base: llama.cpp", "gguf_lora"),
                ("compact", "adapter, each expert with its own rank: this studio", "adapter_files"),
            )
        ),
    )
}
