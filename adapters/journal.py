"""What a killed process had finished, so that the next one goes on from there.

    .journal.jsonl      in the directory being written: the plan, then one line for each file that is whole

A file counts as finished when its line is there and its bytes still have the sha256 of that line. A journal of another
plan (other sources, other options), or of another version of this code, which may have written other bytes, is worth
nothing, and the directory is emptied.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from adapters.fingerprint import file_sha256

JOURNAL = ".journal.jsonl"
LIBRARIES = ("torch", "bitsandbytes")


class Journal:
    """The journal of one directory.

    Args:
        directory: there, and locked by this process (`adapters.tensor_files.new_directory`).
        plan: everything that the bytes depend on, as JSON values.
    """

    def __init__(self, directory: Path, plan: Any):
        self._file = directory / JOURNAL
        first, self._lines = json.dumps([code_sha256(), plan], sort_keys=True), self._read()
        if not self._lines or self._lines[0] != json.loads(first):
            for path in directory.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            self._lines = []
            self._append(json.loads(first))

    def _read(self) -> list[Any]:
        """Every whole line; the last may be torn."""
        found: list[Any] = []
        try:
            for line in self._file.read_text(encoding="utf-8").splitlines():
                found.append(json.loads(line))
        except (OSError, ValueError):
            pass
        return found

    def _append(self, value: Any) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write("\n" * bool(self._lines) + json.dumps(value))  # a torn line before stays a line of its own
            file.flush()
            os.fsync(file.fileno())
        self._lines.append(value)

    def finished(self, file: Path) -> Any | None:
        """What was recorded of a file that is whole; None where it has to be written."""
        for line in self._lines[1:]:
            if line["file"] == file.name and file.is_file() and file_sha256(file) == line["sha256"]:
                return line["record"]
        return None

    def add(self, file: Path, sha256: str, record: Any) -> None:
        """The file is whole and on the disk."""
        self._append({"file": file.name, "sha256": sha256, "record": record})

    def close(self) -> None:
        """Everything is written."""
        self._file.unlink()


@cache
def code_sha256() -> str:
    """Of what computes the bytes: every module of the core, and the versions of the libraries under it."""
    found = hashlib.sha256()
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found.update(f"{name} {metadata.version(name)}\n".encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        found.update(file.name.encode() + b"\n" + file.read_bytes())
    return found.hexdigest()
