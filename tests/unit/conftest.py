"""A recipe that can be planned, and jobs whose training process is a few lines of Python."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from studio import job_files as files
from studio.jobs import Job, create_job, list_jobs, start_worker
from studio.plan import Plan, make_plan
from studio.recipe import Recipe, parse_recipe

ROW = '{"prompt": "2 + 2 =", "completion": "4"}\n'
CHILD = "import sys, time, os, signal; from studio.jobs import open_job; job = open_job({path!r})\n"
SLEEPING = "job.update(phase='training'); time.sleep(600)"


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text(ROW * 4)
    return path


@pytest.fixture(scope="session")
def any_plan(data_file: Path) -> Plan:
    return make_plan(recipe_at(data_file, data_file.parent / "unused"))


def recipe_at(data: Path, output: Path) -> Recipe:
    return parse_recipe(f"data: {{train: '{data}', eval: '{data}'}}\noutput: {{dir: '{output}'}}\n")


class Jobs:
    """Makes jobs under one root and ends what is left of them."""

    def __init__(self, root: Path, data: Path, plan: Plan):
        self.root, self.data, self.plan = root, data, plan

    def recipe(self, name: str = "job") -> Recipe:
        return recipe_at(self.data, self.root / name)

    def make(self, name: str = "job", overwrite: bool = False) -> Job:
        """A queued job without a worker: lost."""
        job, lock = create_job(self.recipe(name), self.plan, {}, overwrite=overwrite)
        os.close(lock)
        return job

    def start(self, child: str, name: str = "job", grace_seconds: float = 5.0) -> Job:
        """A job with a real worker whose training process runs the Python code `child`, with `job` in scope."""
        job, lock = self.create(name)
        self.launch(job, lock, child, grace_seconds)
        return job

    def create(self, name: str = "job") -> tuple[Job, int]:
        """A queued job and its lock, for `launch`."""
        return create_job(self.recipe(name), self.plan, {})

    def launch(self, job: Job, lock: int, child: str, grace_seconds: float = 5.0, turn_seconds: float = 0.05) -> None:
        """Starts the worker of a job from `create`."""
        command = [sys.executable, "-c", CHILD.format(path=str(job.path)) + child]
        worker = (
            f"import studio.worker as w; w.GRACE_SECONDS = {grace_seconds}; w.TURN_SECONDS = {turn_seconds}; "
            f"w.work({str(job.path)!r}, {command!r})"
        )
        start_worker(job, lock, [sys.executable, "-c", worker])

    def running(self, child: str = SLEEPING, name: str = "job", grace_seconds: float = 5.0) -> Job:
        """As `start`, once its training process has said that it trains."""
        job = self.start(child, name, grace_seconds)
        wait_for(lambda: job.state().phase == "training", job)
        return job

    def end_all(self) -> None:
        for job in list_jobs(self.root):
            for pid in files.lock_holders(job.path / "lock"):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def jobs(tmp_path: Path, data_file: Path, any_plan: Plan) -> Iterator[Jobs]:
    made = Jobs(tmp_path / "runs", data_file, any_plan)
    yield made
    made.end_all()


def wait_for(condition: Callable[[], bool], job: Job, timeout_seconds: float = 20.0) -> None:
    """Polls until `condition` holds; fails with the job's state and log where it does not in time."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not in {timeout_seconds} s: {job.state()}\n" + "\n".join(job.log_tail()))
        time.sleep(0.02)


def wait_for_end(job: Job) -> str:
    wait_for(lambda: job.state().ended, job)
    return job.state().status
