"""`verify`: an export that is there, held against its certificate and against what it was made from. No torch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapters.export import EXPORTERS, Options, Source
from adapters.export.consumers import CONSUMERS
from adapters.fingerprint import file_sha256, fingerprint
from adapters.verify import Check
from adapters.verify.run import verify_export
from studio.certificate import ADAPTER_FILES, Certificate, changed_files, read_certificate, verdict
from studio.errors import ExportError, StudioError
from studio.held_out import held_out_prompts
from studio.models import resolve_base

UNCHANGED, AGAIN = "files: as certified", "against the trained model"


def verify(
    directory: Path | str,
    *,
    base: str | None = None,
    adapter: Path | None = None,
    prompts: Path | None = None,
) -> dict[str, Any]:
    """Verifies an export again; nothing is written.

    Args:
        directory: what `studio export` wrote.
        base: the base that it was made from; None takes the one that the certificate names, if it is here.
        adapter: the adapter, or the job that trained it; None for an export that has none.
        prompts: held-out examples; None takes the job's, else a few built-in texts.

    Returns:
        {"out", "name", "format", "consumer", "verdict", "checks", "prompts"}. Without base or adapter the files alone
        are compared with the certificate, and the rest is "not run".

    Raises:
        ExportError: no certificate; or this base, or this adapter, is not the one that the export was made from.
    """
    folder = Path(directory)
    certificate = read_certificate(folder)
    checks, asked = [_unchanged(folder, certificate)], held_out_prompts(job=_job(adapter), file=prompts)
    source = _source(certificate, base, adapter)
    if isinstance(source, str):
        checks.append(Check(AGAIN, "not run", source))
    else:
        checks += _again(folder, certificate, source, asked.items)
    return {
        "out": str(folder),
        "name": certificate.name,
        "format": certificate.format,
        "consumer": certificate.consumer,
        "verdict": verdict(checks),
        "prompts": asked.origin,
        "checks": [asdict(check) for check in checks],
    }


def _unchanged(folder: Path, certificate: Certificate) -> Check:
    problems = changed_files(folder, certificate)
    detail = "; ".join(problems[:8]) or f"{len(certificate.files)} files have their sha256"
    return Check(UNCHANGED, "failed" if problems else "passed", detail, {"files": len(certificate.files)})


def _again(folder: Path, certificate: Certificate, source: Source, prompts: Any) -> list[Check]:
    consumer = CONSUMERS.get(certificate.consumer)
    inside = consumer.inside(folder, certificate.name) if consumer else folder
    options = Options(**{name: certificate.options.get(name) for name in ("dtype", "quant")})
    if certificate.format not in EXPORTERS:
        raise ExportError(f"the export is in the format {certificate.format!r}, which this studio does not know")
    checks = verify_export(inside, certificate.format, source, prompts, options=options)
    return checks + consumer.check(source, inside) if consumer and consumer.check else checks


def _job(adapter: Path | None) -> Path | None:
    return (
        next((path for path in (adapter, adapter.parent) if (path / "recipe.yaml").is_file()), None)
        if adapter
        else None
    )


def _source(certificate: Certificate, base: str | None, adapter: Path | None) -> Source | str:
    """What the export was made from; or why that is not at hand."""
    try:
        directory = resolve_base(base or certificate.base["name"])
    except StudioError:
        if base is not None:
            raise
        return f"the base {certificate.base['name']!r} is not on this machine; name it with --base"
    if certificate.adapter is not None and adapter is None:
        return "the export was made with an adapter; name it, or its job, with --adapter"
    found = adapter / "adapter" if adapter and (adapter / "adapter").is_dir() else adapter
    _check_origin(certificate, directory, found)
    return Source(directory, found, certificate.name, certificate.held)


def _check_origin(certificate: Certificate, base: Path, adapter: Path | None) -> None:
    """Refuses another base, or another adapter, than those that the certificate has the hashes of."""
    now = fingerprint(base)
    other = [part for part in ("weights", "config") if now[part] != certificate.base["fingerprint"][part]]
    if other:
        raise ExportError(
            f"{base} is not the base of this export: its {' and '.join(other)} differ; name it with --base"
        )
    hashes = (
        {name: file_sha256(adapter / name) for name in ADAPTER_FILES if (adapter / name).is_file()} if adapter else None
    )
    if hashes != certificate.adapter:
        raise ExportError(
            f"{adapter} is not the adapter of this export; name the one that it was made from (--adapter)"
        )
