"""What is written is held against what it was made from before it appears under its name. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapters.errors import listed
from adapters.verify import Check
from studio.errors import VerificationError

SWITCHED_OFF = Check("verification", "not run", "it was switched off (--no-verify): nothing was compared")


class BeforeItAppears:
    """A call with the folder that is ready to appear as `out`: makes it readable for everyone, checks it, or refuses.

    Args:
        out: the name that it will have.
        checks_of: gives the checks of a folder; None checks nothing.
    """

    def __init__(self, out: Path, checks_of: Callable[[Path], list[Check]] | None):
        self.out, self._checks_of, self._checks = out, checks_of, [SWITCHED_OFF]

    def __call__(self, folder: Path) -> None:
        """Raises VerificationError where a check fails; it has all of them."""
        if self._checks_of is None:
            return
        make_readable(folder)
        self._checks = self._checks_of(folder)
        refuse_failed(self.out, self._checks)

    def as_json(self) -> list[dict[str, Any]]:
        """Every check as plain values."""
        return [asdict(check) for check in self._checks]


def make_readable(folder: Path) -> None:
    """Every file below gets mode 0644, every folder 0755; what links lead to is left alone."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() else 0o644)


def refuse_failed(out: Path, checks: Sequence[Check]) -> None:
    """Raises VerificationError where one has failed."""
    failed = [check for check in checks if check.status == "failed"]
    if failed:
        lines = [f"{check.name}: {check.detail}" for check in failed]
        raise VerificationError(
            listed(f"{out} was not written: {len(failed)} of {len(checks)} checks failed", lines), checks
        )
