"""Jobs: one directory each, one process tree each, and no state but what is on disk.

    JOB/recipe.yaml  plan.json  placement.json  state.json  metrics.jsonl  log.txt  result.json  lock
        placement_profile.safetensors  profile.safetensors  profile_after.safetensors  delta_norms.json  pictures/
        checkpoints/  adapter/

    submit(recipe) ──▶ worker (detached) ──▶ accelerate launch ──▶ studio.run_job
                       queued ──▶ running ──▶ succeeded | failed | cancelled
                       lost: not ended, and no living process holds JOB/lock

Whoever reads a job reads files: the command line, the browser and a second terminal see the same, before and after
any of them, or the job itself, was killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from studio import job_files as files
from studio.errors import JobError, OutputExistsError

if TYPE_CHECKING:
    from adapters.router_profile import RouterProfile
    from studio.plan import Plan
    from studio.recipe import Recipe

Status = Literal["queued", "running", "succeeded", "failed", "cancelled", "lost"]
ENDED: tuple[Status, ...] = ("succeeded", "failed", "cancelled", "lost")
POLL_SECONDS = 0.05
CLEAR_UP_SECONDS = 30.0
LOST = "its processes are gone without a last word: killed, or the machine restarted (log.txt may say more)"


class JobFailure(BaseModel):
    """Why a job did not succeed: the name of the error's class, and its message."""

    model_config = ConfigDict(frozen=True)

    type: str
    message: str


class JobState(BaseModel):
    """What state.json says, times in unix seconds. The status lost is never written, it is found out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: Status = "queued"
    phase: str = "queued"
    step: int = 0
    total_steps: int = 0
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None
    error: JobFailure | None = None

    @property
    def ended(self) -> bool:
        return self.status in ENDED


class Job:
    """A job directory. Making a Job touches nothing; `open_job` checks that there is one."""

    def __init__(self, path: Path | str):
        self.path = Path(os.path.abspath(path))
        self.name = self.path.name

    def __repr__(self) -> str:
        return f"Job({str(self.path)!r})"

    # ---------------------------------------------------------------- reading

    def recipe(self) -> Recipe:
        """The recipe as it was submitted, complete and with absolute paths."""
        from studio.recipe import load_recipe

        return load_recipe(self.path / "recipe.yaml")

    def plan(self) -> Plan:
        """The plan as it was made at submission."""
        from studio.plan import Plan

        try:
            return Plan.model_validate_json((self.path / "plan.json").read_text(encoding="utf-8"))
        except (OSError, ValidationError) as error:
            raise JobError(f"{self.path / 'plan.json'} cannot be read: {error}") from None

    def state(self) -> JobState:
        """Where the job stands now; lost if it has not ended and none of its processes lives.

        Raises:
            JobError: state.json is missing or damaged.
        """
        state = self._written_state()
        if state.ended or self.is_alive():
            return state
        state = self._written_state()  # it may have ended between the two looks
        if state.ended:
            return state
        return state.model_copy(update={"status": "lost", "error": JobFailure(type="JobError", message=LOST)})

    def is_alive(self) -> bool:
        """Whether the worker or any process of its training run lives."""
        return files.is_held(self.path / "lock")

    def metrics(self) -> list[dict[str, Any]]:
        """Every row of metrics.jsonl so far."""
        return files.read_json_lines(self.path / "metrics.jsonl")

    def result(self) -> dict[str, Any] | None:
        """What the finished run wrote, or None before that."""
        try:
            result: dict[str, Any] = files.read_json(self.path / "result.json")
            return result
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise JobError(f"{self.path / 'result.json'} cannot be read: {error}") from None

    def log_tail(self, count: int = 40) -> list[str]:
        """The last `count` lines of log.txt."""
        return files.tail(self.path / "log.txt", count)

    # ---------------------------------------------------------------- writing, for the job's own processes

    def update(self, **changes: Any) -> JobState:
        """state.json with `changes` in it, durable on return; sets started_at and ended_at with the status.

        Raises:
            JobError: the job has ended, and an end is final.
        """
        before = self._written_state()
        status = changes.get("status", before.status)
        if before.ended and status != before.status:
            raise JobError(f"{self.name} has already {before.status}; it cannot become {status}")
        now = time.time()
        if status == "running" and before.started_at is None:
            changes.setdefault("started_at", now)
        if status in ENDED and before.ended_at is None:
            changes.setdefault("ended_at", now)
        after = JobState.model_validate({**before.model_dump(), **changes})
        files.write_atomic(self.path / "state.json", after.model_dump_json(indent=2))
        return after

    def log_metrics(self, row: dict[str, Any]) -> None:
        """One row more in metrics.jsonl, readable at once."""
        files.append_line(self.path / "metrics.jsonl", files.to_json(row))

    def write_result(self, result: dict[str, Any]) -> None:
        """result.json, durable on return."""
        files.write_atomic(self.path / "result.json", files.to_json(result, indent=2))

    # ---------------------------------------------------------------- ending

    def cancel(self, timeout_seconds: float = 30.0) -> JobState:
        """Ends a queued or running job and waits until its processes are gone. The cancelled state is returned.

        Raises:
            JobError: it has ended already, or its processes cannot be reached from here.
        """
        state = self.state()
        if state.status == "cancelled":
            return state
        if state.ended:
            raise JobError(f"{self.name} cannot be cancelled: it has {_ended_as(state.status)}")
        ends = (self._end_processes(number, timeout_seconds) for number in (signal.SIGTERM, signal.SIGKILL))
        if not any(ends):
            raise JobError(f"{self.name} did not end within {timeout_seconds:.0f} seconds of being killed")
        if not self._written_state().ended:  # the worker was killed before it could say so
            self.update(status="cancelled")
        return self.state()

    def wait_until(self, condition: Callable[[], bool], timeout_seconds: float) -> bool:
        """Waits until `condition` holds; False if it still does not after `timeout_seconds`."""
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _end_processes(self, number: int, timeout_seconds: float) -> bool:
        """Signals the worker, which stops its children, and all of them once the worker is gone; True when all are."""
        told: set[int] = set()

        def gone() -> bool:
            if not self.is_alive():
                return True
            for pid in self._to_signal(everyone=number == signal.SIGKILL) - told:
                told.add(pid)
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            return False

        return self.wait_until(gone, timeout_seconds)

    def _to_signal(self, everyone: bool) -> set[int]:
        holders = files.lock_holders(self.path / "lock")
        if not holders and self.is_alive():
            raise JobError(f"{self.name} runs as another user or in another container; cancel it from there")
        workers = {pid for pid in holders if _leads_session(pid)}
        return set(holders) if everyone or not workers else workers

    def _written_state(self) -> JobState:
        try:
            return JobState.model_validate(files.read_json(self.path / "state.json"))
        except FileNotFoundError:
            raise JobError(f"{self.path} is no job: it has no state.json") from None
        except (OSError, ValueError) as error:
            raise JobError(f"{self.path / 'state.json'} cannot be read: {error}") from None


def submit(recipe: Recipe, *, overwrite: bool = False, extra: Mapping[str, str] | None = None) -> Job:
    """Checks the data, makes the plan, makes the job directory and starts its worker, which outlives the caller.

    Args:
        extra: further files of the job directory, name → text.

    Raises:
        DataError, LayoutError, CheckpointError, TargetError, ProfileError: nothing was written.
        OutputExistsError: the output directory exists; with `overwrite`, it is not an ended job's directory.
    """
    from studio.data import both_rows
    from studio.defaults import settled
    from studio.placing import placement_record, plan_placement
    from studio.plan import make_plan, recipe_base
    from studio.profile import find_profile

    rows, _ = both_rows(recipe)
    check_output(recipe.output.dir, overwrite)
    base = recipe_base(recipe)
    recipe = settled(recipe, base, rows)
    profile = find_profile(recipe) if base.moe else None
    plan = make_plan(recipe, profile=profile)
    record = placement_record(recipe, base, plan_placement(recipe, base, profile), profile)
    job, lock = create_job(recipe, plan, record, profile=profile, overwrite=overwrite, extra=extra)
    start_worker(job, lock)
    return job


def open_job(path: Path | str) -> Job:
    """The job in the directory `path`.

    Raises:
        JobError: there is no job, or its state.json is damaged.
    """
    job = Job(path)
    if not _is_job(job.path):
        there = ", ".join(str(other.path.name) for other in list_jobs(job.path.parent)[:8])
        hint = f"jobs there: {there}" if there else "no jobs there; studio run RECIPE makes one"
        raise JobError(f"{path} is no job directory ({hint})")
    job.state()
    return job


def list_jobs(root: Path | str) -> list[Job]:
    """The jobs in the directory `root`, newest first. A root that does not exist holds none.

    A directory whose state.json is damaged is passed over; `open_job` says what is wrong with it.
    """
    root = Path(root)
    if not root.is_dir():
        return []
    paths = [path for path in root.iterdir() if not path.name.startswith(".") and _is_job(path)]
    created = {path: at for path in paths if (at := _created_at(Job(path))) is not None}
    return [Job(path) for path in sorted(created, key=lambda path: (created[path], path.name), reverse=True)]


def check_output(path: Path, overwrite: bool) -> None:
    """Refuses an output directory that exists, unless `overwrite` is given and it is an ended job's, or empty.

    Raises:
        OutputExistsError
    """
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise OutputExistsError(f"{path} exists already; give another output.dir, or --overwrite to replace it")
    empty = path.is_dir() and not any(path.iterdir())
    if path.is_symlink() or not (empty or _is_job(path)):
        raise OutputExistsError(f"{path} is no job directory (no state.json and recipe.yaml), it is never overwritten")
    if not empty and not _is_over(Job(path)):
        raise OutputExistsError(f"{path} is a job that has not ended; cancel it first: studio jobs cancel {path}")


def create_job(
    recipe: Recipe,
    plan: Plan,
    placement: dict[str, Any],
    *,
    profile: RouterProfile | None = None,
    overwrite: bool = False,
    extra: Mapping[str, str] | None = None,
) -> tuple[Job, int]:
    """A complete queued job at `recipe.output.dir` and the descriptor that holds its lock.

    Args:
        placement: `studio.placing.placement_record` of the recipe; the training process attaches what it says.
        profile: what that was chosen by, kept beside it.
        extra: further files, name → text.

    Built beside and renamed, so that no half-made job is ever seen; a job that is replaced is renamed aside first and
    deleted last.
    """
    target = recipe.output.dir
    unique = uuid.uuid4().hex[:8]
    staging, aside = (target.with_name(f".{target.name}.{kind}-{unique}") for kind in ("new", "old"))
    lock: int | None = None
    try:
        lock = _fill(staging, recipe, plan, placement)
        for name, text in (extra or {}).items():
            files.write_atomic(staging / name, text)
        if profile is not None:
            profile.save(staging / "placement_profile.safetensors")
        _put_in_place(staging, target, aside, overwrite)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        if isinstance(error, OSError):
            raise JobError(f"the job directory {target} cannot be made: {error.strerror or error}") from None
        raise
    shutil.rmtree(aside, ignore_errors=True)
    return Job(target), lock


def start_worker(job: Job, lock: int, command: Sequence[str] | None = None) -> None:
    """Starts the worker of `job` in its own session, with the lock as its standard input, and lets go of the lock."""
    command = command or [sys.executable, "-m", "studio.worker", str(job.path)]
    try:
        with (job.path / "log.txt").open("ab") as log:
            safe = {**os.environ, "PYTHONSAFEPATH": "1"}  # a random.py in the working directory is not the library's
            worker = subprocess.Popen(command, stdin=lock, stdout=log, stderr=log, env=safe, start_new_session=True)
    except OSError as error:
        job.update(status="failed", error={"type": "JobError", "message": f"the worker did not start: {error}"})
        raise JobError(f"the worker of {job.name} did not start: {error}") from None
    finally:
        os.close(lock)
    threading.Thread(target=worker.wait, daemon=True).start()  # so that no zombie stays in a long-lived caller


def _fill(folder: Path, recipe: Recipe, plan: Plan, placement: dict[str, Any]) -> int:
    from studio.recipe import recipe_to_yaml

    state = JobState(created_at=time.time(), total_steps=plan.total_steps)
    folder.mkdir(parents=True)
    files.write_atomic(folder / "recipe.yaml", recipe_to_yaml(recipe))
    files.write_atomic(folder / "plan.json", plan.model_dump_json(indent=2))
    files.write_atomic(folder / "placement.json", files.to_json(placement, indent=2))
    files.write_atomic(folder / "state.json", state.model_dump_json(indent=2))
    return files.open_lock(folder / "lock")


def _put_in_place(staging: Path, target: Path, aside: Path, overwrite: bool) -> None:
    check_output(target, overwrite)
    if target.exists():
        target.rename(aside)
    try:
        staging.rename(target)
    except BaseException:
        if aside.exists():
            aside.rename(target)
        raise
    files.fsync_directory(target.parent)


def _is_over(job: Job) -> bool:
    """Whether a job has no processes left; one that has just ended gets the time to clear up."""
    return not job.is_alive() or (job.state().ended and job.wait_until(lambda: not job.is_alive(), CLEAR_UP_SECONDS))


def _is_job(path: Path) -> bool:
    return (path / "state.json").is_file() and (path / "recipe.yaml").is_file()


def _created_at(job: Job) -> float | None:
    try:
        return job._written_state().created_at
    except JobError:
        return None


def _ended_as(status: Status) -> str:
    return "lost its processes" if status == "lost" else status


def _leads_session(pid: int) -> bool:
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return False
