"""`merge`: an adapter and its base → a model directory; `convert`: an adapter → its other form. For both interfaces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from adapters.checkpoint import read_json_object
from adapters.export import Options, Source
from adapters.verify.run import verify_converted, verify_files
from studio.checking import BeforeItAppears, make_readable, refuse_failed
from studio.errors import AdapterFileError, ExportError
from studio.merge_choice import INTO, choose_into
from studio.models import resolve_base
from studio.score_head import add_head, check_head, is_reward_model, without_head

DTYPES = ("float32", "bfloat16", "float16")
FORMS = ("compact", "peft")


def merge(
    adapter: Path | str,
    out: Path | str,
    *,
    base: str | None = None,
    dtype: str | None = None,
    into: str = "auto",
    verify: bool = True,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Merges an adapter into the weights of its base. Killed, the next call goes on where it was.

    Args:
        adapter: a PEFT adapter directory, or a job directory that holds one.
        out: the model directory to write; it appears only when it is whole.
        base: "embedded", a directory or a hub id; None reads it from the adapter.
        dtype: float32, bfloat16 or float16; None keeps the base's.
        into: "original": the base's own weights; "quantized": these as training held them, dequantised; "auto": what
            has the lower loss on the job's held-out data, and the base's own where that cannot be measured; of a reward
            model these as training held them.
        verify: hold files and weights against base and adapter, in a fresh process, before `out` appears.
        progress: called with (bytes written, bytes in all).

    Returns:
        The fields of `adapters.merge.MergeReport`, "into": {"chosen", "why", "losses"}, and every check as "checks". Of
        a reward model "head" says which class of transformers loads it (studio/score_head.py), None of other adapters.

    Raises:
        VerificationError: a check failed; it has all of them. Nothing is kept.
        StudioError: the adapter or base cannot be read, they do not fit, the disk has no room, or `out` exists; nothing
            is written.
    """
    directory = adapter_directory(Path(adapter))
    source = resolve_base(base or _recorded_base(directory))
    if dtype is not None and dtype not in DTYPES:
        raise AdapterFileError(f"dtype {dtype!r}: allowed are {', '.join(DTYPES)}")
    if into not in INTO:
        raise ExportError(f"received --into {into!r}; allowed are {', '.join(INTO)}")

    import torch

    from adapters.merge import check_output, merge_adapter

    check_output(source, directory, Path(out).absolute(), overwrite)
    choice = choose_into(directory, source, into)
    merged = Source(source, directory, Path(out).name, choice.held)
    check = BeforeItAppears(
        Path(out),
        partial(verify_files, format="safetensors", source=merged, options=Options(dtype)) if verify else None,
    )
    head = _WithHead(directory, source, check, verify) if is_reward_model(directory) else None
    report = merge_adapter(
        source,
        directory,
        Path(out),
        dtype=getattr(torch, dtype) if dtype else None,
        held=choice.held,
        overwrite=overwrite,
        progress=progress,
        check=head or check,
    )
    chosen = {"chosen": choice.into, "why": choice.why, "losses": choice.losses}
    found = {**dataclasses.asdict(report), "out": str(report.out), "into": chosen, "checks": check.as_json()}
    return head.told(found) if head else {**found, "head": None}


class _WithHead:
    """Checks the merged weights of a reward model, and then writes its head beside them and checks that."""

    def __init__(self, adapter: Path, base: Path, check: BeforeItAppears, verify: bool):
        self.adapter, self.base, self.check, self.verify = adapter, base, check, verify
        self.checks: list[Any] = []
        self.facts: dict[str, Any] = {}

    def __call__(self, folder: Path) -> None:
        without_head(folder, self.base)
        self.check(folder)
        self.facts = add_head(folder, self.adapter)
        make_readable(folder)
        self.checks = check_head(folder, self.adapter) if self.verify else []
        refuse_failed(self.check.out, self.checks)

    def told(self, report: dict[str, Any]) -> dict[str, Any]:
        """The report of the merge with the head in it."""
        from adapters.fingerprint import file_sha256

        out = Path(report["out"])
        sha256 = {file.name: file_sha256(file) for file in sorted(out.iterdir()) if file.name not in report["sha256"]}
        kept = {self.facts["renamed"].get(name, name): digest for name, digest in report["sha256"].items()}
        kept["config.json"] = file_sha256(out / "config.json")
        checks = [*report["checks"], *map(dataclasses.asdict, self.checks)]
        head = {"class": self.facts["class"]}
        return {**report, "sha256": {**sha256, **kept}, "checks": checks, "head": head}


def convert(
    adapter: Path | str, out: Path | str, *, to: str, verify: bool = True, overwrite: bool = False
) -> dict[str, Any]:
    """Writes an adapter in its other form, without loss.

    Args:
        adapter: an adapter directory, or a job directory that holds one.
        out: the adapter directory to write; it appears only when it is whole.
        to: "compact", which holds each expert's own rank and nothing else; or "peft", which stock PEFT loads.
        verify: compare both forms bit by bit, in a fresh process, before `out` appears.

    Returns:
        {"out", "to", "bytes_before", "bytes", "experts", "checks"}: of the weights, the expert matrices that have a
        rank, and every check.

    Raises:
        VerificationError: a check failed; it has all of them. Nothing is kept.
        StudioError: the adapter cannot be read or is in that form already, or `out` exists; nothing is written.
    """
    if to not in FORMS:
        raise AdapterFileError(f"received --to {to!r}; allowed are {', '.join(FORMS)}")
    from adapters.compact import to_compact, to_standard

    change = to_compact if to == "compact" else to_standard
    directory = adapter_directory(Path(adapter))
    check = BeforeItAppears(Path(out), partial(verify_converted, adapter=directory) if verify else None)
    report = change(directory, Path(out), overwrite=overwrite, check=check)
    return {"out": str(out), "to": to, **report, "checks": check.as_json()}


def adapter_directory(path: Path) -> Path:
    """Of a job, the folder of its adapter; else `path` itself."""
    inside = path / "adapter"
    return inside if (inside / "adapter_config.json").is_file() else path


def _recorded_base(directory: Path) -> str:
    file = directory / "adapter_config.json"
    if not file.is_file():
        raise AdapterFileError(f"{directory} holds no adapter_config.json: expected a PEFT adapter or a finished job")
    base = read_json_object(file, AdapterFileError).get("base_model_name_or_path")
    if not base:
        raise AdapterFileError(f"{file} does not name its base model; give it with --base")
    return str(base)
