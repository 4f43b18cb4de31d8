"""Verification of an export, whatever its format: in fresh processes, in the consumer's own library. No torch.

    prompts ── reference (a process) ──▶ Evidence ── checker (a process) ──▶ checks
                                                         └── stock_*.py (processes without any of the studio's code)

A process that fails is a failed check and never an error of the caller, so that nothing is passed by accident.
"""

from __future__ import annotations

import stat
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapters.checkpoint import PICKLES, read_index
from adapters.errors import ExportError
from adapters.export import EXPORTERS, Options, Progress, Source
from adapters.verify import Check, Evidence
from adapters.verify.fresh import FreshProcessError, ask_module
from adapters.verify.memory import why_not
from adapters.verify.tokenizer import has_tokenizer

Prompt = str | Sequence[Mapping[str, str]]
"""A text, or a conversation of {"role", "content"} that the base's chat template writes out, answer included."""

BUILT_IN: tuple[Prompt, ...] = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    'def area(width, height):\n    """Of a rectangle."""\n    return width * height\n',
    "Am 3. Mai 2024 kostete das Ersatzteil 1.249,50 €; das Lager in Köln hatte noch sieben Stück.",
    ({"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "Paris."}),
    ({"role": "user", "content": "List three prime numbers."}, {"role": "assistant", "content": "2, 3 and 5."}),
)
"""What is asked where the user has no held-out data at hand."""

FILE_MODE = 0o644
REFERENCE = "behaviour: the reference"
NOT_RUN = "files and weights alone are compared here; `studio export` runs the model too"


def verify_export(
    directory: Path,
    format: str,
    source: Source,
    prompts: Sequence[Prompt] = BUILT_IN,
    *,
    options: Options | None = None,
    progress: Progress | None = None,
) -> list[Check]:
    """Holds an export against what it was made from.

    Args:
        directory: what the writer of the format filled, and nothing else that is not to be shipped.
        format: a name in `adapters.export.EXPORTERS`.
        prompts: held-out texts or conversations; what the trained model says to them is the reference.
        options: those that it was written with.
        progress: called with bytes of the base whose weights have been compared.

    Returns:
        Every check. It is for the caller to refuse the export when one has failed.

    Raises:
        ExportError: no such format.
    """
    if format not in EXPORTERS:
        raise ExportError(f"format {format!r}: allowed are {', '.join(EXPORTERS)}")
    checks = [check_plain_files(directory)]
    if checks[0].status == "failed":
        return checks
    with tempfile.TemporaryDirectory(prefix="studio-evidence-") as folder:
        try:
            evidence = make_evidence(source, prompts, Path(folder))
        except FreshProcessError as error:
            checks.append(Check(REFERENCE, "failed", f"the trained model could not be run: {error}"))
            evidence = Evidence((), (), None, "the process that runs the trained model failed")
        return [*checks, *_checked(directory, format, source, evidence, options, progress)]


def verify_files(directory: Path, format: str, source: Source, *, options: Options | None = None) -> list[Check]:
    """The checks of `verify_export` that compare files and weights, in a fresh process; no model is run."""
    plain = check_plain_files(directory)
    if plain.status == "failed":
        return [plain]
    return [plain, *_checked(directory, format, source, Evidence((), (), None, NOT_RUN), options)]


def _checked(
    directory: Path,
    format: str,
    source: Source,
    evidence: Evidence,
    options: Options | None,
    progress: Progress | None = None,
) -> list[Check]:
    question = {
        "directory": directory,
        "format": format,
        "source": asdict(source),
        "evidence": asdict(evidence),
        "options": asdict(options or Options()),
    }
    return _asked("adapters.verify.checker", question, format, progress)


def verify_combined(
    directory: Path, base: Path, adapters: Sequence[Path], weights: Sequence[float], method: str
) -> list[Check]:
    """Holds a combination in the standard form against the adapters that it was made of, in a fresh process."""
    plain = check_plain_files(directory)
    if plain.status == "failed":
        return [plain]
    question = {"directory": directory, "base": base, "adapters": adapters, "weights": weights, "method": method}
    return [plain, *_asked("adapters.verify.combined", question, "combination")]


def verify_converted(directory: Path, adapter: Path) -> list[Check]:
    """Holds an adapter in one of the forms "peft" and "compact" against the other it was made from, likewise.

    Files beside the weights are the adapter's own and not looked at.
    """
    return _asked("adapters.verify.converted", {"directory": directory, "adapter": adapter}, "conversion")


def _asked(module: str, question: Mapping[str, Any], what: str, progress: Progress | None = None) -> list[Check]:
    try:
        return [Check(**row) for row in ask_module(module, question, progress=progress)]
    except FreshProcessError as error:
        return [Check(f"{what}: checked", "failed", f"the check itself failed: {error}")]


def make_evidence(source: Source, prompts: Sequence[Prompt], folder: Path) -> Evidence:
    """What the trained model says to the prompts, computed in a process of its own and left in `folder`.

    A base without a tokenizer, or too large for the memory here, gives an Evidence without logits that says why.

    Raises:
        FreshProcessError: the process failed for any other reason: the model, or the studio, is wrong.
    """
    if not has_tokenizer(source.base):
        return Evidence((), (), None, "the base has no tokenizer")
    question = {"source": asdict(source), "prompts": prompts, "logits": folder / "logits.safetensors"}
    why = why_not(read_index(source.base))
    try:
        answer: dict[str, Any] = ask_module("adapters.verify.reference", {**question, "run": not why})
    except FreshProcessError as error:
        if not error.for_memory:
            raise
        return Evidence((), (), None, "memory did not suffice to run the trained model here")
    if not answer["prompts"]:
        why = why or "no prompt has two tokens or more"
    return Evidence(answer["prompts"], answer["texts"], None if why else folder / "logits.safetensors", why)


def check_plain_files(directory: Path) -> Check:
    """Ordinary readable files and folders alone: no links out of the folder, no pickles, nothing only root can read."""
    problems: list[str] = []
    files = [path for path in sorted(directory.rglob("*")) if path.is_symlink() or not path.is_dir()]
    for path in files:
        name, mode = path.relative_to(directory), path.lstat().st_mode
        if not stat.S_ISREG(mode):
            problems.append(f"{name} is no regular file")
        elif stat.S_IMODE(mode) != FILE_MODE:
            problems.append(f"{name} has mode {stat.S_IMODE(mode):04o}")
        if any(path.match(pattern) for pattern in PICKLES):
            problems.append(f"{name} looks like a pickle, which can run code when opened")
    if not files:
        problems.append("the folder is empty")
    detail = "; ".join(problems) or f"{len(files)} files, all regular, mode 0644, no links, no pickles"
    return Check("files: modes and kinds", "failed" if problems else "passed", detail, {"files": len(files)})
