"""What a GGUF export says where its tools are not installed, and that they are pinned by hash."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WITHOUT = """
import sys
from pathlib import Path
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import adapters.export as export
from adapters.errors import ExportError
try:
    export.EXPORTERS["gguf"].write(export.Source(Path("."), None, "x"), Path("."), export.Options())
except ExportError as error:
    print("REFUSED", error)
"""


def test_without_the_package_the_one_command_is_named() -> None:
    program = WITHOUT.format(package="gguf")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert "REFUSED GGUF needs the package gguf" in done.stdout and "make export-tools" in done.stdout, done.stderr


@pytest.mark.parametrize("package", ["gguf", "xllamacpp"])
def test_the_tools_are_pinned_by_hash_and_alike(package: str) -> None:
    tools, constraints = (ROOT / name for name in ("export-tools.txt", "constraints.txt"))
    pinned = re.search(rf"^{package}==(\S+) \\\n(    --hash=sha256:[0-9a-f]{{64}}( \\)?\n)+", tools.read_text(), re.M)
    assert pinned is not None
    assert f"\n{package}=={pinned[1]}\n" in constraints.read_text()
    assert "--require-hashes -r export-tools.txt" in (ROOT / "Makefile").read_text()
