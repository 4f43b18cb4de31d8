"""Exports run in a process of their own, so that the app itself never loads torch: one at a time, for every page alike.

Exports.start(request) ─▶ process ─▶ Exports.now() says how far it is ─▶ its folder, or why there is none
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Literal

import studio
from studio import ExportRequest, JobError, StudioError, VerificationError

SECONDS_TO_END = 20.0
"""To clear up in, before a cancelled process is killed."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One export, as far as it is.

    Attributes:
        stage: "" until it has begun; since: when that was. done, total: bytes; total 0 where it is not known.
        error: why it failed. checks: then all that were made, if it came that far.
    """

    request: ExportRequest
    started_at: float
    status: Literal["running", "cancelling", "succeeded", "failed", "cancelled"] = "running"
    stage: str = ""
    since: float = 0.0
    done: int = 0
    total: int = 0
    error: str = ""
    checks: list[Row] = field(default_factory=list)
    ended_at: float | None = None

    @property
    def ended(self) -> bool:
        return self.status in ("succeeded", "failed", "cancelled")

    def seconds_left(self, now: float) -> float | None:
        """To the end of this stage, at its speed so far; None where that is not known."""
        return (now - self.since) * (self.total - self.done) / self.done if self.done and self.total else None


class Exports:
    """The export that runs, or the last that ran. Its process ends with the app."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._run: Run | None = None
        self._child: BaseProcess

    def now(self) -> Run | None:
        return self._run

    def start(self, request: ExportRequest) -> None:
        """Starts an export, whose plan has been made.

        Raises:
            JobError: another one is running.
        """
        with self._lock:
            if self._run and not self._run.ended:
                raise JobError(f"{self._run.request.out.name} is being exported; one export runs at a time")
            context = multiprocessing.get_context("spawn")
            here, there = context.Pipe(duplex=False)
            child = context.Process(target=_export, args=(request, there), daemon=True)
            child.start()
            there.close()
            self._run, self._child = Run(request, time.time()), child
        threading.Thread(target=self._follow, args=(here, child), daemon=True).start()

    def cancel(self) -> None:
        """Ends the export that runs; nothing of it is left."""
        with self._lock:
            if self._run is None or self._run.status != "running":
                return
            self._run = replace(self._run, status="cancelling")
            self._child.terminate()
        threading.Thread(target=_make_sure, args=(self._child,), daemon=True).start()

    def _follow(self, pipe: Connection, child: BaseProcess) -> None:
        """Takes what the process says, to its end, whatever that is."""
        said: Row = {}
        with suppress(EOFError, OSError):  # OSError: killed in mid-message
            while "status" not in said:
                said = pipe.recv()
                self._change(said)
        child.join(SECONDS_TO_END)
        if "status" not in said:
            self._change(_killed(child.exitcode))

    def _change(self, said: Row) -> None:
        with self._lock:
            assert self._run is not None
            if self._run.status == "cancelling" and said.get("status") == "failed":
                said = {"status": "cancelled"}
            now = {"ended_at": time.time()} if "status" in said else {}
            if said.get("stage", self._run.stage) != self._run.stage:
                now = {"since": time.time()}
            self._run = replace(self._run, **{**said, **now})


def _make_sure(child: BaseProcess) -> None:
    child.join(SECONDS_TO_END)
    if child.is_alive():
        child.kill()


def _killed(code: int | None) -> Row:
    hint = " (often the machine ran out of memory)" if code == -signal.SIGKILL else ""
    return {"status": "failed", "error": f"the process that exports ended with exit code {code}{hint}"}


def _export(request: ExportRequest, pipe: Connection) -> None:
    """In the child: everything that it has to say goes through the pipe. SIGTERM is Ctrl-C, which clears up."""
    signal.signal(signal.SIGTERM, _interrupt)
    os.setsid()  # Ctrl-C in the app's terminal ends the app, and that ends this process

    def told(stage: str, done: int, total: int) -> None:
        pipe.send({"stage": stage, "done": done, "total": total})

    try:
        studio.export(request, told)
        pipe.send({"status": "succeeded"})
    except VerificationError as error:
        pipe.send({"status": "failed", "error": str(error), "checks": [asdict(check) for check in error.checks]})
    except StudioError as error:
        pipe.send({"status": "failed", "error": str(error)})
    except KeyboardInterrupt:
        pipe.send({"status": "cancelled"})
    except Exception as error:
        traceback.print_exc()
        pipe.send({"status": "failed", "error": f"{type(error).__name__}: {error}"})


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
