"""The reward for code that runs: the completion's program in a limited child process, against the row's tests.

What the child may do, and how it is kept to that, is in code_child.py; docs/rewards.md says it in words. No torch.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio.errors import RewardError
from studio.rewards.scoring import Attempt, Score, failed

if TYPE_CHECKING:
    from studio.recipe_training import RewardSettings

CHILD = Path(__file__).with_name("code_child.py")
FENCE = re.compile(r"^```[^\n`]*\n(.*?)^```\s*?$", re.MULTILINE | re.DOTALL)
START_SECONDS = 20.0
"""What the child may take beside the tests' own time, on a busy machine."""


def code(settings: RewardSettings) -> Score:
    """The share of the tests, the recipe's and the row's, that pass after the answer's program; without any, 1 where it
    runs to its end.

    A program that crashes, does not compile, or takes too long gets 0 for the test; a child that cannot be started or
    gives no verdict is an error.
    """

    def scores(attempts: Sequence[Attempt]) -> list[float]:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(score, attempts))

    def score(attempt: Attempt) -> float:
        try:
            passed = run_tests(
                program_of(attempt.answer),
                (*settings.tests, *attempt.row.tests),
                settings.timeout_seconds,
                settings.memory_bytes,
            )["passed"]
        except (OSError, RewardError) as error:
            raise failed(str(error), attempt) from error
        return sum(passed) / len(passed)

    return scores


def program_of(answer: str) -> str:
    """The last fenced block of the answer, or all of it where there is none."""
    blocks = FENCE.findall(answer)
    return str(blocks[-1]) if blocks else answer


def run_tests(program: str, tests: Sequence[str], timeout_seconds: float, memory_bytes: int) -> Mapping[str, Any]:
    """Runs `program` and then each test, every time anew.

    Returns:
        {"passed": [bool of each test, or of the program alone], "protections": as `protections`}.

    Raises:
        RewardError: the child gave no verdict. The fault is not the program's: what that does is a verdict.
    """
    try:
        program.encode()
    except UnicodeEncodeError:
        return {"passed": [False] * max(1, len(tests))}
    with tempfile.TemporaryDirectory(prefix="studio-code-", ignore_cleanup_errors=True) as folder:
        question = {
            "code": program,
            "tests": list(tests),
            "timeout_seconds": timeout_seconds,
            "memory_bytes": memory_bytes,
            "folder": folder,
        }
        return _ask(question, START_SECONDS + timeout_seconds * max(1, len(tests)))


def _ask(question: Mapping[str, Any], seconds: float) -> Mapping[str, Any]:
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", str(CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        env={"LANG": "C.UTF-8", "HOME": question["folder"], "TMPDIR": question["folder"]},
        start_new_session=True,
    )
    try:
        said, errors = child.communicate(json.dumps(question).encode(), timeout=seconds)
    except subprocess.TimeoutExpired:
        raise RewardError(f"the child that runs code gave no verdict within {seconds:.0f} s") from None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if child.returncode:
        last = errors.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        raise RewardError(f"the child that runs code ended with code {child.returncode}: {last[0]}")
    found: Mapping[str, Any] = json.loads(said)
    return found


@cache
def protections() -> Mapping[str, str]:
    """How the child is kept in its corner on this machine: network, processes, disk, files, user.

    Raises:
        RewardError: the child cannot be run here.
    """
    found: Mapping[str, str] = run_tests("pass", (), 5.0, 2**29)["protections"]
    return found


def missing_protections() -> str | None:
    """What this machine's kernel does not allow to take from the code, in words; None where nothing is missing."""
    found = protections()
    missing = []
    if found["network"] != "off":
        missing.append("it can reach the network")
    if found["processes"] != "namespace":
        missing.append("it sees the other processes of its user")
    if found["files"] != "landlock":
        missing.append(f"it can read and write what its user ({found['user']}) can")
    if found["library"] != "reachable":
        missing.append("it cannot import the standard library, which lies where its user cannot read")
    if not missing:
        return None
    return f"code that the model writes is run with limits, but on this machine {', '.join(missing)}"
