"""GGUF files are written in a process of its own: what ends it is an error here, and nothing more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adapters.checkpoint import read_index
from adapters.errors import CheckpointError, ExportError
from adapters.export import Options, Source
from adapters.export import gguf_child as child
from adapters.export.gguf import gguf_file, make_gguf
from adapters.export.gguf_child import write_gguf
from adapters.tensor_files import new_directory
from tests.numerics.gguf_models import MODELS

Q4 = Options(quant="Q4_K_M")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    base = tmp_path_factory.mktemp("base") / "llama4"
    MODELS["llama4"].save(base)
    return Source(base, None, "tiny")


def children(pid: int) -> list[int]:
    """Those that run this module's child: other tests of this process may have left helpers of their own."""
    found = (int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [child for child in found if "gguf_child" in command_of(child)]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def refused(source: Source, tmp_path: Path, progress: object = None) -> str:
    """The error of an export whose folder appears only when it is whole."""
    with pytest.raises(ExportError) as error, new_directory(tmp_path / "out") as staged:
        write_gguf(source, staged, Q4, progress)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == [] and children(os.getpid()) == []
    return str(error.value)


def test_it_is_the_file_that_this_process_would_write_and_says_how_far_it_is(source: Source, tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    told: list[tuple[int, int]] = []
    facts = write_gguf(source, tmp_path / "there", Q4, lambda done, total: told.append((done, total)))
    assert facts == make_gguf(source, tmp_path / "here", Q4)
    assert gguf_file(tmp_path / "here").read_bytes() == gguf_file(tmp_path / "there").read_bytes()
    assert told == sorted(told) and len(told) > 10 and told[-1][0] == told[-1][1]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("abort", ("SIGABRT", "GGML_ASSERT(imatrix != NULL) failed")),
        ("memory", ("DefaultCPUAllocator: can't allocate memory", "GB of memory")),
        ("time", ("took over 8 s",)),
    ],
)
def test_an_assertion_of_ggml_and_a_limit_passed_are_errors_of_ours(
    fault: str, said: tuple[str, ...], source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "WRITER", "tests.numerics.faulty_writer")
    monkeypatch.setenv("FAULT", fault)
    if fault == "time":
        monkeypatch.setattr(child, "SECONDS", 8.0)
        monkeypatch.setattr(child, "SECONDS_A_GB", 0.0)
    message = refused(source, tmp_path)
    assert "no GGUF was written" in message and all(words in message for words in said), message


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGKILL])
def test_a_process_that_is_ended_in_the_middle_leaves_nothing(
    number: signal.Signals, source: Source, tmp_path: Path
) -> None:
    def end(done: int, total: int) -> None:
        for pid in children(os.getpid()):
            os.kill(pid, number)

    assert f"was ended by {number.name}" in refused(source, tmp_path, end)


def test_ctrl_c_ends_the_process(source: Source, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "out") as staged:
        write_gguf(source, staged, Q4, interrupt)
    assert list(tmp_path.iterdir()) == [] and children(os.getpid()) == []


def test_the_limit_of_memory_is_that_of_one_matrix(source: Source) -> None:
    largest = max(
        info.size_bytes // (info.shape[0] if len(info.shape) == 3 else 1) for info in read_index(source.base).values()
    )
    fixed = child.PROGRAM_BYTES + child.CORE_BYTES * (os.cpu_count() or 1)
    assert fixed < child._memory_bytes(source) <= fixed + child.COPIES * largest


def test_an_error_of_ours_comes_back_as_it_was(source: Source, tmp_path: Path) -> None:
    base = tmp_path / "qwen3"
    MODELS["qwen3"].save(base)
    info = read_index(base)["model.layers.1.mlp.up_proj.weight"]
    with info.file.open("r+b") as file:
        file.seek(info.start)
        file.write(b"\x00\x00\xc0\x7f")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="problem\\(s\\) in the base weights") as error:
        write_gguf(Source(base, None, "x"), tmp_path / "out", Q4)
    assert error.value.problems == ["blk.1.ffn_up.weight would hold NaN or infinity"]
    with pytest.raises(ExportError, match="'Q4_9' is no GGUF type"):
        write_gguf(source, tmp_path / "out", Options(quant="Q4_9"))


PARENT = """
import json, os, signal, sys
from pathlib import Path
from adapters.export import Options, Source
from adapters.export.gguf_child import write_gguf
def stop(done, total):
    pid = int(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text())
    os.kill(pid, signal.SIGSTOP)
    print(json.dumps(pid), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
write_gguf(Source(Path(sys.argv[1]), None, "x"), Path(sys.argv[2]), Options(quant="Q8_0"), stop)
"""


def test_the_process_does_not_outlive_the_one_that_asked(source: Source, tmp_path: Path) -> None:
    asked = subprocess.run(
        [sys.executable, "-c", PARENT, str(source.base), str(tmp_path)], stdout=subprocess.PIPE, timeout=120
    )
    assert asked.returncode == -signal.SIGKILL
    pid, end = json.loads(asked.stdout), time.monotonic() + 20
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    left = alive(pid)
    if left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "the process that writes is still there"
