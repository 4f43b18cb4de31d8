"""The certificate of an export: what was checked and how it came out, with the sha256 of every file. No torch.

checks ── write_certificate ──▶ certificate.json ── read_certificate ──▶ Certificate.checks, for views
                                                 ── changed_files ──▶ what is no longer as it was certified
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import studio
from adapters.checkpoint import read_json_object
from adapters.export import Options, Source
from adapters.fingerprint import file_sha256, fingerprint
from adapters.verify import Check
from studio.errors import ExportError
from studio.job_files import to_json

CERTIFICATE = "certificate.json"
VERSION = 1
VERIFIED, WEIGHTS_ALONE, FAILED = "verified", "weights verified, behaviour not run", "failed"
UNVERIFIED = "not verified"
IN_PROGRAM = "behaviour in "
"""With this begins the name of a check for a program such as vLLM, which needs more than this machine has."""
COMPARED = ("weights: ", "adapter: ")
"""So begin the names of checks that hold values against what the export was made from."""
PROGRAMS = ("torch", "transformers", "peft", "safetensors", "tokenizers", "bitsandbytes", "gguf", "xllamacpp")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


@dataclass(frozen=True)
class Certificate:
    """What certificate.json says.

    Attributes:
        name: of the export. format: in `adapters.export.EXPORTERS`. consumer: the program it is for, "" if none.
        verdict: "verified", "weights verified, behaviour not run", "not verified" or "failed".
        base: {"name", "fingerprint"}. adapter: {file: sha256}, None where there is none.
        held: how training held the base where that was merged into, else None.
        prompts: where the held-out prompts came from.
        options: what the format was asked for. facts: what its writer says.
        checks: every check. files: {path: {"bytes", "sha256"}} of every file but the certificate.
        versions: of the programs. created: UTC, ISO 8601.
    """

    name: str
    format: str
    consumer: str
    verdict: str
    base: Mapping[str, Any]
    adapter: Mapping[str, str] | None
    held: Mapping[str, Any] | None
    prompts: str
    options: Mapping[str, Any]
    facts: Mapping[str, Any]
    checks: tuple[Check, ...]
    files: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]
    created: str


def verdict(checks: Sequence[Check]) -> str:
    """What the checks come to: one failed check fails all, and nothing that was not run counts as passed.

    Files that are as they were certified prove nothing by themselves: without a comparison of weights it is unverified.

    A program that is not run here leaves an export verified where its files behaved in the library that stands for it;
    the certificate says both.
    """
    statuses = {check.status for check in checks}
    if "failed" in statuses:
        return FAILED
    if not any(check.status == "passed" and check.name.startswith(COMPARED) for check in checks):
        return UNVERIFIED
    behaves = any(check.status == "passed" and check.name.startswith("behaviour") for check in checks)
    left = [check.name for check in checks if check.status == "not run"]
    if left and not (behaves and all(name.startswith(IN_PROGRAM) for name in left)):
        return WEIGHTS_ALONE
    return VERIFIED


def write_certificate(
    directory: Path,
    *,
    source: Source,
    base_name: str,
    format: str,
    checks: Sequence[Check],
    prompts_from: str,
    consumer: str = "",
    options: Options | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Certificate:
    """Hashes every file below `directory` and writes certificate.json there: the last file of an export.

    Args:
        base_name: as the card calls it, never a path of this machine.
        prompts_from: where the held-out prompts came from (`studio.held_out.Prompts.origin`).
    """
    asked = {key: str(value) for key, value in asdict(options or Options()).items() if value is not None}
    made = Certificate(
        name=source.name,
        format=format,
        consumer=consumer,
        verdict=verdict(checks),
        base={"name": base_name, "fingerprint": fingerprint(source.base)},
        adapter=_adapter_hashes(source.adapter),
        held=source.held,
        prompts=prompts_from,
        options={**asked, **({"importance": Path(asked["importance"]).name} if "importance" in asked else {})},
        facts=dict(facts or {}),
        checks=tuple(checks),
        files=hash_files(directory),
        versions=versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    text = to_json({"version": VERSION, **asdict(made)}, indent=2)
    (directory / CERTIFICATE).write_text(text + "\n", encoding="utf-8")
    (directory / CERTIFICATE).chmod(0o644)
    return made


def read_certificate(directory: Path | str) -> Certificate:
    """The certificate of the export in `directory`.

    Raises:
        ExportError: there is none, or it cannot be read.
    """
    file = Path(directory) / CERTIFICATE
    if not file.is_file():
        raise ExportError(f"{directory} has no {CERTIFICATE}: expected a directory that `studio export` wrote")
    found = read_json_object(file, ExportError)
    version = found.pop("version", None)
    if version != VERSION:
        raise ExportError(f"{file} is of version {version!r}; this studio reads version {VERSION}")
    try:
        return Certificate(**{**found, "checks": tuple(Check(**check) for check in found["checks"])})
    except (KeyError, TypeError) as error:
        raise ExportError(f"{file} is no whole certificate: {error}") from None


def changed_files(directory: Path, certificate: Certificate) -> list[str]:
    """What is not as it was certified, one line each: files changed, lost, or come since."""
    now = hash_files(directory)
    lines = [f"{name} is missing" for name in certificate.files if name not in now]
    lines += [f"{name} was not there when the export was certified" for name in now if name not in certificate.files]
    both = now.keys() & certificate.files.keys()
    return lines + [f"{name} has changed" for name in sorted(both) if now[name] != dict(certificate.files[name])]


def hash_files(directory: Path) -> dict[str, dict[str, Any]]:
    """{"bytes", "sha256"} of every file below `directory` by its path there, the certificate's own aside."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    names = {path.relative_to(directory).as_posix(): path for path in files}
    names.pop(CERTIFICATE, None)
    return {name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for name, path in names.items()}


def versions() -> dict[str, str]:
    """Of the studio and of the programs that took part, as far as they are installed."""
    found = {"studio": studio.__version__}
    for name in PROGRAMS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _adapter_hashes(adapter: Path | None) -> dict[str, str] | None:
    if adapter is None:
        return None
    return {name: file_sha256(adapter / name) for name in ADAPTER_FILES if (adapter / name).is_file()}


def as_json(certificate: Certificate) -> dict[str, Any]:
    """The certificate as plain values."""
    plain: dict[str, Any] = json.loads(to_json(asdict(certificate)))
    return plain
