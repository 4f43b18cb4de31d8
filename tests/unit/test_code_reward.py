"""The child that runs code: what passes, what it may not do, that it ends, and what is left of it (nothing)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from studio.data import Example, Message
from studio.errors import RewardError
from studio.recipe_training import RewardSettings
from studio.rewards import REWARDS, Attempt
from studio.rewards import programs as code_reward
from studio.rewards.programs import CHILD, missing_protections, program_of, protections, run_tests

MEMORY = 2**28
SYSTEM_PYTHON = "/usr/bin/python3"


def passed(program: str, *tests: str, seconds: float = 5.0) -> list[bool]:
    found: list[bool] = run_tests(program, tests, seconds, MEMORY)["passed"]
    return found


def test_the_reward_is_the_share_of_tests_that_pass() -> None:
    settings = RewardSettings(function="code")
    tests = ("assert f(2) == 4", "assert f(0) == 0", "assert f(3) == 9", "f(None)")
    row = Example((Message("user", "square"),), (Message("assistant", "-"),), tests=tests)
    completions = [
        "<think>```python\nboom\n```</think>Here:\n```python\ndef f(x): return x * x\n```\nDone.",
        "def f(x): return 2 * x",
        "def f(x: return",
        "no code at all",
    ]
    values = REWARDS["code"].build(settings)([Attempt(text, row) for text in completions])
    assert values == [0.75, 0.5, 0, 0]


def test_without_tests_the_program_has_to_come_to_its_end() -> None:
    assert passed("x = 1") == passed("raise SystemExit(0)") == passed("raise SystemExit") == [True]
    assert passed("raise SystemExit(3)") == passed("1 / 0") == passed("(") == passed("import numpy") == [False]
    assert run_tests("'\ud800'", (), 5, MEMORY)["passed"] == [False]


@pytest.mark.parametrize("leaves", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "exit()"])
def test_leaving_before_the_test_does_not_pass_it(leaves: str) -> None:
    assert passed(leaves, "assert False", "pass") == [False, False]


def test_every_test_starts_anew() -> None:
    count = "open('seen', 'a').write('x')\nn = 0\ndef f():\n    global n\n    n += 1\n    return n"
    assert passed(count, "assert f() == 1", "assert f() == 1") == [True, True]


def test_the_standard_library_can_be_imported() -> None:
    names = "socket decimal statistics fractions dataclasses heapq tempfile unicodedata csv sqlite3"
    assert protections()["library"] == "reachable"
    assert passed("\n".join(f"import {name}" for name in names.split())) == [True]


def test_only_the_last_fenced_block_is_run() -> None:
    assert program_of("a\n```\nfirst\n```\nb\n```python\nsecond\n```\n") == "second\n"
    assert program_of("no fence") == "no fence"


FORBIDDEN = {
    "memory": f"x = bytearray({MEMORY})",
    "a large file": f"open('x', 'wb').write(bytes({17 * 2**20}))",
    "many open files": "files = [open(f'x{i}', 'w') for i in range(100)]",
    "many processes": "import os, time\nfor _ in range(200):\n if not os.fork():\n  time.sleep(9)\n  os._exit(0)",
    "memory of many processes": (
        "import os, threading, time\n"
        "def hold():\n"
        "    if not os.fork():\n"
        f"        x = b'1' * {MEMORY // 8}\n"
        "        time.sleep(2)\n"
        "        os._exit(0)\n"
        "for _ in range(8):\n"
        "    hold()\n"
        "for _ in range(8):\n"
        "    thread = threading.Thread(target=hold); thread.start(); thread.join()\n"
        "time.sleep(2)"
    ),
    "killing its runner": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "raising its limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "its standard input": "assert input() is not None",
}  # fmt: skip
WHERE_THE_KERNEL_ALLOWS = {
    "network": ("network", "off", "import socket\nsocket.socket(2, 2).sendto(b'x', ('192.0.2.1', 9))"),
    "its own machine": ("network", "off", "import socket\nsocket.create_connection(('127.0.0.1', PORT), timeout=1)"),
    "reading the account list": ("files", "landlock", "open('/etc/passwd').read()"),
    "reading this repository": ("files", "landlock", f"open({str(CHILD)!r}).read()"),
    "writing beside it": ("files", "landlock", "open('/tmp/studio-code-escape', 'w')"),
    "seeing other processes": ("processes", "namespace", "import os\nassert os.getpid() > 1000"),
    "many small files": ("disk", "16777216 bytes in all", "for i in range(40): open(str(i), 'wb').write(bytes(2**20))"),
}  # fmt: skip


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_the_limits_forbid_fails(what: str) -> None:
    assert passed(FORBIDDEN[what], seconds=10) == [False]


@pytest.mark.parametrize("what", WHERE_THE_KERNEL_ALLOWS)
def test_what_the_kernel_shuts_off_fails(what: str) -> None:
    import socket

    part, state, program = WHERE_THE_KERNEL_ALLOWS[what]
    if protections()[part] != state:
        pytest.skip(f"this kernel does not give {part}: {state}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = program.replace("PORT", str(server.getsockname()[1]))
        assert passed(program) == [False]
    assert not Path("/tmp/studio-code-escape").exists()


def test_a_program_that_never_ends_is_killed_with_its_children_and_its_folder(tmp_path: Path) -> None:
    mark = f"left{os.getpid()}"
    program = (
        "import os, sys, time\n"
        "for _ in range(2):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        if os.fork() == 0:\n"
        "            import ctypes\n"
        f"            ctypes.CDLL(None).prctl(15, b'{mark}')\n"  # PR_SET_NAME
        "            open('named', 'w').write('x')\n"
        "            time.sleep(60)\n"
        "        os._exit(0)\n"
        "while not os.path.exists('named'):\n"
        "    time.sleep(0.01)\n"
        "time.sleep(60)\n"
    )
    begun = time.monotonic()
    before = set(Path("/tmp").glob("studio-code-*"))
    assert passed(program, seconds=1.5) == [False]
    assert time.monotonic() - begun < 15
    assert mark not in _process_names()
    assert set(Path("/tmp").glob("studio-code-*")) <= before


def test_nothing_is_left_where_the_job_itself_is_killed() -> None:
    mark = f"kill{os.getpid()}"
    program = f"import ctypes, time; ctypes.CDLL(None).prctl(15, b'{mark}'); time.sleep(60)"
    script = f"from studio.rewards.programs import run_tests; run_tests({program!r}, (), 60.0, 2**28)"
    job = subprocess.Popen([sys.executable, "-c", script])
    try:
        wait_until(lambda: mark in _process_names())
    finally:
        job.kill()
        job.wait()
    wait_until(lambda: mark not in _process_names())


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {seconds} s"
        time.sleep(0.02)


def _process_names() -> set[str]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            found.add(path.read_text(errors="replace").strip())
    return found


WITHOUT = """
import ctypes, runpy, sys
real = ctypes.CDLL
class Kernel:
    def __init__(self, *given, **named): self._libc = real(*given, **named)
    def unshare(self, flags): return -1
    def syscall(self, number, *rest): return -1 if number in (444, 445, 446) else self._libc.syscall(number, *rest)
    def __getattr__(self, name): return getattr(self._libc, name)
ctypes.CDLL = Kernel
sys.argv = [sys.argv[1]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_kernel_that_gives_nothing_is_said_plainly_and_the_limits_still_hold(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A kernel without namespaces and without Landlock, as some containers have it."""
    wrapper = tmp_path / "without.py"
    wrapper.write_text(WITHOUT)
    real: Any = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        return real([*command[:-1], str(wrapper), command[-1]], **options)

    monkeypatch.setattr(code_reward.subprocess, "Popen", start)
    protections.cache_clear()
    try:
        said = missing_protections()
        assert said is not None
        assert "network" in said and "processes" in said and "read and write" in said
        test_the_reward_is_the_share_of_tests_that_pass()
        test_a_program_that_never_ends_is_killed_with_its_children_and_its_folder(tmp_path)
        for what in ("memory", "memory of many processes", "a large file", "many open files", "raising its limits"):
            assert passed(FORBIDDEN[what]) == [False]
    finally:
        protections.cache_clear()


@pytest.mark.skipif(os.getuid() != 0 or not Path(SYSTEM_PYTHON).exists(), reason="needs root to become another user")
def test_a_user_who_is_not_root_gets_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a user namespace of its own, with an interpreter that every user can read."""
    real: Any = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        folder = Path(options["env"]["HOME"])
        folder.chmod(0o777)
        child = folder / "child.py"
        child.write_text(CHILD.read_text())
        nobody = {"user": 65534, "group": 65534, "extra_groups": []}
        return real([SYSTEM_PYTHON, *command[1:-1], str(child)], **nobody, **options)

    monkeypatch.setattr(code_reward.subprocess, "Popen", start)
    found = run_tests(
        "def f(): return 1", ["assert f() == 1", "assert f() == 2", "open('x', 'w').write('x')"], 5, MEMORY
    )
    assert found["passed"] == [True, False, True]
    assert found["protections"]["user"] == "own"
    if found["protections"]["network"] == "off":
        assert passed("import socket\nsocket.socket(2, 2).sendto(b'x', ('192.0.2.1', 9))") == [False]
    assert passed(FORBIDDEN["many processes"], seconds=10) == [False]
    rights = "import ctypes, struct\nfound = ctypes.create_string_buffer(24)\n"
    rights += "ctypes.CDLL(None).capget(struct.pack('Ii', 0x20080522, 0), found)\nassert found.raw == bytes(24)"
    assert passed(rights) == [True]


def test_a_child_that_cannot_be_run_is_an_error_and_not_a_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_reward, "CHILD", CHILD.with_name("none.py"))
    row = Example((Message("user", "the prompt"),), (Message("assistant", "-"),))
    with pytest.raises(RewardError, match=r"the child that runs code ended with code 2.*prompt 'the prompt'"):
        REWARDS["code"].build(RewardSettings(function="code"))([Attempt("x = 1", row)])
