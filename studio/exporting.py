"""`export`: a job, an adapter or a model → a folder that one program can use, proven before it appears.

    plan_export ─▶ a folder beside `out` ─▶ weights ─▶ what the consumer wants beside them
                     ─▶ verification in fresh processes ─▶ card and licence ─▶ certificate.json ─▶ `out`

A failed check leaves `out` as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.export import EXPORTERS, Format, Source
from adapters.export.consumers import CONSUMERS, Consumer, consumers_of, mixed_in_vllm
from adapters.sidecar import SIDECAR, read_sidecar
from adapters.verify import Check
from studio.base import EMBEDDED_DIR
from studio.card import HUB_ID
from studio.certificate import CERTIFICATE
from studio.checking import SWITCHED_OFF, make_readable, refuse_failed
from studio.errors import ExportError, StudioError
from studio.export_plan import ExportPlan, ExportRequest, command_of, plan_export
from studio.export_sizes import GGUF_BITS
from studio.progress import EXPORT_STAGES

if TYPE_CHECKING:
    from studio.certificate import Certificate

Progress = Callable[[str, int, int], None]
"""Called with (stage, bytes done, bytes in all); the total is 0 where it is not known."""

CHOOSING, WRITING, VERIFYING, CERTIFYING = EXPORT_STAGES


def export(request: ExportRequest, progress: Progress | None = None) -> dict[str, Any]:
    """Writes and verifies an export.

    Args:
        progress: called as the stages go on.

    Returns:
        What certificate.json says, with "out" and the "command" that runs it.

    Raises:
        VerificationError: a check failed; it has all of them. Nothing of the export is kept.
        StudioError: as `plan_export`, and where the adapter does not fit its base.
    """
    from adapters.tensor_files import new_directory
    from studio.certificate import as_json

    told = progress or (lambda stage, done, total: None)
    plan = plan_export(request)
    plan.source().open()  # every adapter tensor finds its place, or nothing is written
    source, into = _choose(plan, told)
    with new_directory(plan.out, request.overwrite) as staged:
        certificate = as_json(_export_to(staged, plan, source, into, told))
    return {**certificate, "out": str(plan.out), "command": _command(plan, plan.out, str(plan.out))}


def _choose(plan: ExportPlan, told: Progress) -> tuple[Source, dict[str, Any]]:
    """The source, merged into what was asked for or has the lower held-out loss; and the reason, as a fact."""
    from studio.merge_choice import choose_into

    if plan.origin.adapter is None or plan.format.kind == "adapter":
        return plan.source(), {}
    if plan.chooses:
        told(CHOOSING, 0, 0)
    choice = choose_into(plan.origin.adapter, plan.origin.base, plan.request.into)
    return plan.source(choice.held), {"into": {"chosen": choice.into, "why": choice.why, "losses": choice.losses}}


def _export_to(staged: Path, plan: ExportPlan, source: Source, into: dict[str, Any], told: Progress) -> Certificate:
    """Fills the folder, up to its certificate."""
    from studio.certificate import write_certificate
    from studio.held_out import held_out_prompts

    inside = plan.consumer.inside(staged, plan.name) if plan.consumer else staged
    inside.mkdir(parents=True, exist_ok=True)
    facts = _fill(plan, source, inside, told) | into
    told(VERIFYING, 0, 0)
    prompts = held_out_prompts(job=plan.origin.job.path if plan.origin.job else None, file=plan.request.prompts)
    checks = _verified(plan, source, inside, prompts.items, told) if plan.request.verify else [SWITCHED_OFF]
    refuse_failed(plan.out, checks)
    told(CERTIFYING, 0, 0)
    origin = prompts.origin if plan.request.verify else ""
    _write_card(plan, source, staged, checks, origin)
    return write_certificate(
        staged,
        source=source,
        base_name=plan.public_base,
        format=plan.format.name,
        checks=checks,
        prompts_from=origin,
        consumer=plan.consumer.name if plan.consumer else "",
        options=plan.options,
        facts=facts,
    )


def _fill(plan: ExportPlan, source: Source, inside: Path, told: Progress) -> dict[str, Any]:
    """The format's files, and what the consumer wants beside them, readable for everyone."""
    from studio.calibration import handed_over

    told(WRITING, 0, plan.bytes)
    with handed_over(plan.options, plan.origin) as options:
        facts = plan.format.write(source, inside, options, lambda done, total: told(WRITING, done, total))
    if plan.consumer and plan.consumer.finish:
        plan.consumer.finish(source, inside, plan.name)
    make_readable(inside)
    return facts


def _verified(plan: ExportPlan, source: Source, inside: Path, prompts: Sequence[Any], told: Progress) -> list[Check]:
    """Every check of the format and of the consumer; told of are the weights compared."""
    from adapters.verify.run import verify_export

    compared = partial(told, VERIFYING)
    checks = verify_export(inside, plan.format.name, source, prompts, options=plan.options, progress=compared)
    return checks + plan.consumer.check(source, inside) if plan.consumer and plan.consumer.check else checks


def _write_card(plan: ExportPlan, source: Source, staged: Path, checks: Sequence[Check], prompts_from: str) -> None:
    from studio.card import write_card

    write_card(
        staged,
        source=source,
        base_name=plan.public_base,
        licence=plan.licence,
        format=plan.format.name,
        checks=checks,
        run=_command(plan, staged, ".", _elsewhere(plan.public_base)),
        consumer=plan.consumer.title if plan.consumer else "",
        job=plan.origin.job.path if plan.origin.job else None,
        prompts_from=prompts_from,
    )


def _command(plan: ExportPlan, written: Path, folder: str, base: str = "") -> str:
    """The consumer's command for what was written; `folder` as it is to be said."""
    base = base or plan.origin.path_or_id
    mixed = mixed_in_vllm(plan.format.name, plan.origin.model_type)
    return command_of(plan.consumer, plan.name, folder, base, plan.origin.adapter, _gguf(written), mixed)


def _elsewhere(base: str) -> str:
    """How a command says a base by its public name: what is on no hub lies somewhere."""
    return base if HUB_ID.fullmatch(base) else f"path/to/{base}"


def _gguf(folder: Path) -> str:
    return next((str(path.relative_to(folder)) for path in folder.rglob("*.gguf")), "")


# -------------------------------------------------------------------- what there is


def consumers() -> list[Consumer]:
    """The programs that one of the formats at hand is for."""
    return consumers_of(list(EXPORTERS))


def formats(consumer: str) -> list[Format]:
    """The formats at hand that a consumer reads, the default first."""
    return [EXPORTERS[name] for name in CONSUMERS[consumer].formats if name in EXPORTERS]


def gguf_types() -> list[str]:
    """The types that GGUF weights can have, finest first."""
    return list(GGUF_BITS)


def read_export(folder: Path | str) -> dict[str, Any]:
    """What the certificate of the export in `folder` says, with "out" and the "command" that runs it.

    Raises:
        ExportError: it has no certificate that can be read.
    """
    from studio.certificate import as_json, read_certificate

    folder = Path(folder)
    found = as_json(read_certificate(folder))
    if wrong := _wrong_field(found):
        raise ExportError(f"{folder} has a damaged certificate.json: its field {wrong!r} is not what an export writes")
    consumer = CONSUMERS.get(found["consumer"])
    sidecar = read_sidecar(folder)
    mixed = sidecar is not None and mixed_in_vllm(sidecar.format, sidecar.model_type)
    named = found["base"]["name"]
    base = str(EMBEDDED_DIR) if named == "embedded" else _elsewhere(named)
    command = command_of(consumer, found["name"], str(folder), base, folder, _gguf(folder), mixed)
    return {**found, "out": str(folder), "command": command}


def _wrong_field(found: dict[str, Any]) -> str:
    """The first field that views could not show, "" where there is none: the folder may have come from anywhere."""
    for name, kind in {"base": dict, "facts": dict, "options": dict, "files": dict, "checks": list}.items():
        if not isinstance(found[name], kind):
            return name
    texts = {name: found[name] for name in ("name", "format", "consumer", "verdict", "prompts", "created")}
    texts |= {"base": found["base"].get("name")}
    for check in found["checks"]:
        texts |= {
            f"checks: {part}": check[part] for part in ("name", "status", "detail") if type(check[part]) is not str
        }
    wrong = [name for name, text in texts.items() if not isinstance(text, str)]
    wrong += [
        name
        for name, file in found["files"].items()
        if not isinstance(file, dict) or type(file.get("bytes")) is not int
    ]
    return next(iter(wrong), "") or ("" if _is_time(found["created"]) else "created")


def _is_time(text: str) -> bool:
    with suppress(ValueError):
        return datetime.fromisoformat(text).tzinfo is not None
    return False


def _stamp(file: Path) -> tuple[int, int]:
    """What changes when the file does."""
    with suppress(OSError):
        return (found := file.stat()).st_mtime_ns, found.st_size
    return 0, 0


@lru_cache(maxsize=1000)
def _listed(folder: Path, stamps: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    """`read_export`, again only where the certificate has changed: a page asks every second."""
    return read_export(folder)


def list_exports(root: Path | str) -> list[dict[str, Any]]:
    """The exports in the directory `root`, newest first, as `read_export` gives them."""
    found = []
    for folder in Path(root).iterdir() if Path(root).is_dir() else ():
        if not folder.name.startswith("."):
            with suppress(StudioError):
                found.append(_listed(folder, tuple(_stamp(folder / name) for name in (CERTIFICATE, SIDECAR))))
    return sorted(found, key=lambda export: str(export["created"]), reverse=True)
