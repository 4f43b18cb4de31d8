"""`export`: a job, an adapter or a model → a folder that one program can use, proven before it appears.

    plan_export ─▶ a folder beside `out` ─▶ weights ─▶ the consumer's files ─▶ card and licence
                     ─▶ verification in fresh processes ─▶ certificate.json ─▶ `out`

A failed check leaves `out` as it was.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import listed
from adapters.export import EXPORTERS, Format
from adapters.export.consumers import CONSUMERS, Consumer, consumers_of
from studio.data import read_examples
from studio.errors import VerificationError
from studio.export_plan import CERTIFICATE, ExportPlan, ExportRequest, plan_export
from studio.job_files import read_json, to_json

if TYPE_CHECKING:
    from adapters.verify import Check

Progress = Callable[[str, int, int], None]
"""Called with (stage, bytes done, bytes in all); the total is 0 where it is not known."""

WRITING, FINISHING, VERIFYING = "Writing", "Adding what goes with it", "Verifying in fresh processes"
STAGES = (WRITING, FINISHING, VERIFYING)
MOST_PROMPTS = 16


def export(request: ExportRequest, progress: Progress | None = None) -> dict[str, Any]:
    """Writes and verifies an export.

    Args:
        progress: called as the stages go on.

    Returns:
        What certificate.json says, and {"out", "command"}.

    Raises:
        VerificationError: a check failed; it has all of them. Nothing of the export is kept.
        StudioError: as `plan_export`, and where the adapter does not fit its base.
    """
    from adapters.tensor_files import new_directory

    told = progress or (lambda stage, done, total: None)
    plan = plan_export(request)
    plan.source.open()  # every adapter tensor finds its place, or nothing is written
    with new_directory(plan.out, request.overwrite) as staged:
        facts = _fill(plan, staged, told)
        told(VERIFYING, 0, 0)
        checks = _verified(plan, staged)
        certificate = write_certificate(plan, staged, facts, checks)
        _refuse(plan, checks)
    return {**certificate, "out": str(plan.out), "command": plan.command}


def _fill(plan: ExportPlan, staged: Path, told: Progress) -> dict[str, Any]:
    """The format's files, what the consumer wants beside them, the card and the licence."""
    inside = plan.consumer.inside(staged, plan.name) if plan.consumer else staged
    inside.mkdir(parents=True, exist_ok=True)
    told(WRITING, 0, plan.bytes)
    facts = plan.format.write(plan.source, inside, plan.options, lambda done, total: told(WRITING, done, total))
    told(FINISHING, 0, 0)
    if plan.consumer and plan.consumer.finish:
        plan.consumer.finish(plan.source, inside, plan.name)
    return facts


def _verified(plan: ExportPlan, staged: Path) -> list[Check]:
    """Every check of the format and of the consumer; none where verification was switched off."""
    from adapters.verify.run import BUILT_IN, verify_export

    if not plan.request.verify:
        return []
    inside = plan.consumer.inside(staged, plan.name) if plan.consumer else staged
    prompts = held_out(plan) or BUILT_IN
    checks = verify_export(inside, plan.format.name, plan.source, prompts, options=plan.options)
    if plan.consumer and plan.consumer.check:
        checks += plan.consumer.check(plan.source, inside)
    return checks


def held_out(plan: ExportPlan) -> list[list[dict[str, str]]]:
    """Conversations to verify with: of the file that the request names, else of the job's held-out examples."""
    job = plan.origin.job
    file = plan.request.prompts or (job.recipe().data.eval if job else None)
    if file is None or not Path(file).is_file():
        return []
    rows = [example.as_row() for example in read_examples(file)[:MOST_PROMPTS]]
    return [[*row["prompt"], *row["completion"]] for row in rows]


def _refuse(plan: ExportPlan, checks: Sequence[Check]) -> None:
    failed = [check for check in checks if check.status == "failed"]
    if failed:
        lines = [f"{check.name}: {check.detail}" for check in failed]
        title = f"{plan.out} was not written: {len(failed)} of {len(checks)} checks failed"
        raise VerificationError(listed(title, lines), checks)


def list_exports(root: Path | str) -> list[dict[str, Any]]:
    """The certificates of the exports in the directory `root`, newest first, each with its "out"."""
    folders = [path for path in Path(root).iterdir() if not path.name.startswith(".")] if Path(root).is_dir() else []
    found = [{**certificate, "out": str(folder)} for folder in folders if (certificate := read_certificate(folder))]
    return sorted(found, key=lambda certificate: certificate["created_at"], reverse=True)


def read_certificate(folder: Path) -> dict[str, Any] | None:
    """The certificate of an export; None where there is none that can be read."""
    try:
        found = read_json(folder / CERTIFICATE)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"created_at", "checks"} <= set(found) else None


def write_certificate(plan: ExportPlan, staged: Path, facts: dict[str, Any], checks: Sequence[Check]) -> dict[str, Any]:
    """Writes certificate.json: what was made of what, every check, and sha256 of every file."""
    files = {
        str(path.relative_to(staged)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(staged.rglob("*"))
        if path.is_file()
    }
    certificate = {
        "name": plan.name,
        "created_at": time.time(),
        "format": plan.format.name,
        "consumer": plan.consumer.name if plan.consumer else None,
        "facts": facts,
        "checks": [vars(check) for check in checks],
        "files": files,
    }
    (staged / CERTIFICATE).write_text(to_json(certificate, indent=2) + "\n", encoding="utf-8")
    return certificate


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -------------------------------------------------------------------- what there is to choose from


def consumers() -> list[Consumer]:
    """The programs that one of the formats at hand is for."""
    return consumers_of(list(EXPORTERS))


def formats(consumer: str) -> list[Format]:
    """The formats at hand that a consumer reads, the default first."""
    return [EXPORTERS[name] for name in CONSUMERS[consumer].formats if name in EXPORTERS]
