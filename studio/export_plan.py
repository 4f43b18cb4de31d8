"""What an export will be: where from, which format, which files, how large, what will be checked. No torch.

ExportRequest ── plan_export ──▶ ExportPlan      refuses what cannot be, before anything is written
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapters.checkpoint import DTYPE_NAMES, TensorInfo, read_index, read_json_object
from adapters.export import EXPORTERS, Format, Options, Source, file_stem, is_importance_matrix
from adapters.export.consumers import CONSUMERS, STACKED_IN_VLLM, Consumer, Place, mixed_in_vllm
from adapters.sidecar import check_base
from studio.calibration import calibration
from studio.certificate import CERTIFICATE
from studio.errors import AdapterFileError, ExportError, OutputExistsError
from studio.export_origin import Origin, find_origin
from studio.export_sizes import GGUF_BITS, format_bytes
from studio.held_out import held_out_prompts
from studio.licence import Licence, read_licence
from studio.merge_choice import INTO
from studio.quantities import as_bytes

DTYPES = ("bfloat16", "float16", "float32")
QUANT = "Q4_K_M"
LIBRARIES = {
    "gguf": "llama.cpp",
    "gguf-lora": "llama.cpp",
    "peft": "stock PEFT",
    "per-expert": "a reader of its own",
    "vllm-3d": "a reader of its own",
    "sglang-3d": "a reader of its own",
    "compact": "a reader of its own",
    "fp8": "a reader of its own",
}
"""What reads a format to verify it, where stock transformers cannot; that then runs the values read back of fp8."""

SPARE = 1.02
"""Of the planned bytes: headers, the card, the certificate."""


@dataclass(frozen=True)
class ExportRequest:
    """What is wanted.

    Attributes:
        what: a job directory, an adapter directory, or a model: a directory, "embedded" or a hub id.
        out: the directory to write; its name is the model's name.
        consumer: a name in `adapters.export.consumers.CONSUMERS`; None for a format alone.
        format: a name in `adapters.export.EXPORTERS`; None takes the consumer's first.
        base: the base of an adapter, if not the one that it names.
        quant: the GGUF type; None is Q4_K_M.
        dtype: of plain weights: bfloat16, float16 or float32; None keeps the base's.
        into: what the adapter is merged into: "original", the base's own weights; "quantized", these as training held
            them; "auto", what has the lower loss on held-out data.
        importance: examples from which the GGUF quantiser learns what matters, in any file that data.train takes, or an
            importance matrix; None for none.
        prompts: held-out examples to verify with; None takes the job's, else a few built-in texts.
        verify: hold the result against the trained model.
        overwrite: replace an export that exists.
    """

    what: str
    out: Path
    consumer: str | None = None
    format: str | None = None
    base: str | None = None
    quant: str | None = None
    dtype: str | None = None
    into: str = "auto"
    importance: Path | None = None
    prompts: Path | None = None
    verify: bool = True
    overwrite: bool = False


@dataclass(frozen=True)
class ExportPlan:
    """What will be written.

    Attributes:
        licence: of the base.
        files: (what, bytes or None where that is small), in order.
        bytes: about, of all of them. free_bytes: on that disk now.
        verified_in: the library that will load it, "" where verification is switched off. checks: what is compared.
        command: how its consumer is run afterwards; "" for a format alone.
        warnings: what to know before.
    """

    request: ExportRequest
    origin: Origin
    licence: Licence
    format: Format
    consumer: Consumer | None
    options: Options
    files: tuple[tuple[str, int | None], ...]
    bytes: int
    free_bytes: int
    verified_in: str
    checks: tuple[str, ...]
    command: str
    warnings: tuple[str, ...]

    @property
    def out(self) -> Path:
        return self.request.out

    @property
    def name(self) -> str:
        return self.request.out.name

    @property
    def public_base(self) -> str:
        """The base as cards and certificates call it: never a path of this machine."""
        return self.origin.public_name

    def source(self, held: Mapping[str, Any] | None = None) -> Source:
        """What is written. `held`: merged into the base as training held it."""
        return Source(self.origin.base, self.origin.adapter, self.name, held, self.public_base)

    @property
    def chooses(self) -> bool:
        """Whether there is something to measure: what an adapter that was trained on quantised weights merges into."""
        return self.format.kind == "model" and self.request.into == "auto" and self.origin.held is not None

    def as_json(self) -> dict[str, Any]:
        """Plain values, for --json and the browser."""
        return {
            "out": str(self.out),
            "name": self.name,
            "format": self.format.name,
            "consumer": self.consumer.name if self.consumer else None,
            "base": self.origin.base_name,
            "adapter": str(self.origin.adapter) if self.origin.adapter else None,
            "job": str(self.origin.job.path) if self.origin.job else None,
            "options": {key: value for key, value in asdict(self.options).items() if value is not None},
            "files": [{"what": what, "bytes": size} for what, size in self.files],
            "bytes": self.bytes,
            "free_bytes": self.free_bytes,
            "verified_in": self.verified_in,
            "checks": list(self.checks),
            "command": self.command,
            "warnings": list(self.warnings),
        }


def plan_export(request: ExportRequest) -> ExportPlan:
    """Checks everything that can be checked without reading the weights, and says what will be written.

    Raises:
        ExportError: a format, consumer or option that is not there or do not go together, or too small a disk.
        DataError: the prompts or the examples cannot be read.
        AdapterFileError: the adapter is of another base. CheckpointError: the base cannot be read.
        OutputExistsError: `out` exists.
    """
    consumer, form = choose(request.consumer, request.format)
    options = _options(request, form)
    _check_tools(form)
    name = request.out.name
    origin = find_origin(request.what, request.base)
    if options.importance and not is_importance_matrix(options.importance):
        calibration(options.importance, origin)
    form = _as_vllm_has_it(request, origin, form)
    _check_origin(request, origin, form)
    check_out(request.out, request.overwrite, origin)
    licence = read_licence(origin.base, origin.public_name)
    licence.check_name(name)
    licence.check_files()
    warnings = check_base(origin.sidecar, origin.base) if origin.sidecar else []
    index = read_index(origin.base)
    size = format_bytes(form, options, origin.base, origin.adapter, index)
    free = shutil.disk_usage(_existing(request.out)).free
    if size * SPARE > free:
        raise ExportError(
            f"{request.out} needs about {as_bytes(size * SPARE)}, and {as_bytes(free)} are free on that disk; "
            "free some, or choose another --out"
        )
    return ExportPlan(
        request=request,
        origin=origin,
        licence=licence,
        format=form,
        consumer=consumer,
        options=options,
        files=tuple(_files(form, options, consumer, size, index)),
        bytes=size,
        free_bytes=free,
        verified_in=LIBRARIES.get(form.name, "stock transformers") if request.verify else "",
        checks=tuple(_checks(request, form, consumer, origin)),
        command=command_of(
            consumer,
            name,
            str(request.out),
            origin.path_or_id,
            origin.adapter,
            _gguf(name, consumer, form, options),
            mixed_in_vllm(form.name, origin.model_type),
        ),
        warnings=tuple(warnings),
    )


def choose(consumer: str | None, form: str | None) -> tuple[Consumer | None, Format]:
    """The consumer and the format by their names.

    Raises:
        ExportError: neither is given, one is unknown, or the consumer does not read the format.
    """
    if consumer is None and form is None:
        raise ExportError(f"say what it is for (--for {' | '.join(CONSUMERS)}) or name a format (--format)")
    if consumer is not None and consumer not in CONSUMERS:
        raise ExportError(f"received --for {consumer}; allowed are {', '.join(CONSUMERS)}")
    found = CONSUMERS[consumer] if consumer else None
    allowed = [name for name in (found.formats if found else EXPORTERS) if name in EXPORTERS]
    form = form or (allowed[0] if allowed else None)
    if form is None or form not in allowed:
        reads = f"{found.title} reads {', '.join(found.formats)}" if found else f"allowed are {', '.join(allowed)}"
        raise ExportError(f"received --format {form}; {reads}")
    return found, EXPORTERS[form]


def _options(request: ExportRequest, form: Format) -> Options:
    """The options, refused where the format passes over them.

    Raises:
        ExportError
    """
    if form.name != "gguf" and (request.quant or request.importance):
        raise ExportError(f"--quant and --importance are for the format gguf, not for {form.name}")
    if form.name != "safetensors" and request.dtype:
        raise ExportError(f"--dtype is for the format safetensors, not for {form.name}")
    if request.dtype is not None and request.dtype not in DTYPES:
        raise ExportError(f"received --dtype {request.dtype}; allowed are {', '.join(DTYPES)}")
    quant = (request.quant or QUANT).upper() if form.name == "gguf" else None
    if quant is not None and quant not in GGUF_BITS:
        raise ExportError(f"received --quant {request.quant}; allowed are {', '.join(GGUF_BITS)}")
    if request.prompts is not None and request.prompts.is_file():
        held_out_prompts(file=request.prompts)
    if request.prompts is not None and not request.prompts.is_file():
        raise ExportError(f"{request.prompts} does not exist; expected a file of examples")
    return Options(dtype=request.dtype, quant=quant, importance=request.importance)


def _check_tools(form: Format) -> None:
    """Raises ExportError where a package is missing that this format needs."""
    needed = ("gguf", "xllamacpp") if form.name.startswith("gguf") else ()
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"{form.title} needs {' and '.join(missing)}; one command adds what is missing: make export-tools"
        )


def _as_vllm_has_it(request: ExportRequest, origin: Origin, form: Format) -> Format:
    """The form of an adapter for vLLM: stacks for the families whose class there has stacks."""
    if request.consumer != "vllm-adapter" or form.name != "per-expert" or origin.model_type not in STACKED_IN_VLLM:
        return form
    if request.format is not None:
        raise ExportError(f"vLLM takes no per-expert adapters of {origin.model_type} models; give --format vllm-3d")
    return EXPORTERS["vllm-3d"]


def _check_origin(request: ExportRequest, origin: Origin, form: Format) -> None:
    if request.into not in INTO:
        raise ExportError(f"received --into {request.into}; allowed are {', '.join(INTO)}")
    if form.kind == "adapter" and origin.adapter is None:
        raise ExportError(f"{request.what} is a model without an adapter; {form.title} is a form of an adapter")
    if request.into == "quantized" and origin.held is None:
        reason = (
            "is a model without an adapter"
            if origin.adapter is None
            else "does not say that it was trained on quantised weights"
        )
        raise ExportError(f"{request.what} {reason}; leave --into out, or give --into original")
    if request.into == "quantized" and form.kind == "adapter":
        raise ExportError(f"--into is for merged models; {form.title} holds the adapter alone")


def check_out(out: Path, overwrite: bool, origin: Origin) -> None:
    """Refuses an output that exists, and even with `overwrite` one that is no export, or that is being read.

    Raises:
        OutputExistsError
    """
    here = out.resolve()
    read = [origin.base, *([origin.adapter] if origin.adapter else []), *([origin.job.path] if origin.job else [])]
    if any(here in (path.resolve(), *path.resolve().parents) for path in read):
        raise OutputExistsError(f"{out} holds what is being exported; choose another output")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise OutputExistsError(f"{out} exists already; choose another output or pass --overwrite")
    empty = out.is_dir() and not any(out.iterdir())
    if out.is_symlink() or not (empty or (out / CERTIFICATE).is_file()):
        raise OutputExistsError(f"{out} is no export (it has no {CERTIFICATE}); it is never overwritten")


def _existing(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def _gguf(name: str, consumer: Consumer | None, form: Format, options: Options) -> str:
    """Where the GGUF file will lie in the folder."""
    folder = consumer.folder.format(name=name) if consumer else ""
    file = f"{file_stem(name)}-{'lora' if form.name == 'gguf-lora' else options.quant}.gguf"
    return f"{folder}/{file}" if folder else file


def command_of(
    consumer: Consumer | None,
    name: str,
    folder: str,
    base: str,
    adapter: Path | None,
    gguf: str,
    mixed: bool = False,
) -> str:
    """The one command that runs an export; "" for a format alone.

    Args:
        folder: as it is to be said. base, adapter: of what was exported. gguf: the GGUF file in the folder.
        mixed: stacks for a family that vLLM has by expert.
    """
    if consumer is None:
        return ""
    return consumer.command(Place(folder, name, base, _largest_rank(adapter), gguf, mixed))


def _largest_rank(adapter: Path | None) -> int:
    file = adapter / "adapter_config.json" if adapter else None
    config = read_json_object(file, AdapterFileError) if file and file.is_file() else {}
    return max([int(config.get("r") or 0), *map(int, (config.get("rank_pattern") or {}).values())])


def _files(
    form: Format, options: Options, consumer: Consumer | None, size: int, index: dict[str, TensorInfo]
) -> list[tuple[str, int | None]]:
    shards = len({info.file for info in index.values()})
    kept = "/".join(sorted({DTYPE_NAMES.get(info.dtype, info.dtype) for info in index.values()}))
    what = {
        "safetensors": f"weights, {options.dtype or kept}, {shards} file{'s' if shards > 1 else ''} as in the base",
        "gguf": f"{options.quant} weights, tokenizer and chat template in one GGUF file",
    }.get(form.name, form.title)
    files: list[tuple[str, int | None]] = [(what, size)]
    if form.kind == "model" and form.name != "gguf":
        files.append(("config, tokenizer and chat template of the base", None))
    extra = {
        "transformers": "run.py",
        "peft": "run.py, tokenizer",
        "ollama": "Modelfile: template, stop strings, context",
    }
    if consumer and consumer.name in extra:
        files.append((extra[consumer.name], None))
    return [
        *files,
        ("README.md, licence and notices", None),
        (f"{CERTIFICATE}: every check, and sha256 of every file", None),
    ]


def _checks(request: ExportRequest, form: Format, consumer: Consumer | None, origin: Origin) -> list[str]:
    if not request.verify:
        return []
    library = LIBRARIES.get(form.name, "stock transformers")
    changed = "every adapter tensor is in it, and nothing else has changed" if origin.adapter else "nothing has changed"
    weights = {
        "model": f"Weights: {changed}; finite, names and shapes of the base",
        "adapter": f"Experts: read back, {changed}",
    }
    said = (
        "its logits against the trained model's" if "reader" not in library else "every value against the trained one"
    )
    behaviour = f"Behaviour: loaded by {library} in a fresh process, {said}"
    others = ["Tokenizer, chat template and end tokens agree", "File modes, no pickles, sha256 of every file"]
    modelfile = consumer is not None and consumer.name == "ollama"
    ollama = ["Modelfile: its template gives the text of the chat template"] if modelfile else []
    return [weights[form.kind], behaviour, *others, *ollama]
