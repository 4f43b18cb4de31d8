"""The worker: `python -m studio.worker JOB_DIR`, one detached light process per job, without torch.

It holds the job's lock, waits for its turn (one running job per jobs root, first come first served), runs the
training process, and sees to it that the job ends in a written state. SIGTERM cancels. Should the worker itself be
killed, its training process still holds the lock, and the next job waits for it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from studio import job_files as files
from studio.errors import JobError, StudioError
from studio.jobs import Job, list_jobs, open_job
from studio.models import has_gpu

SIGNALS = {signal.SIGTERM, signal.SIGCHLD}
TURN_SECONDS = 0.5
GRACE_SECONDS = 10.0
ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # glibc raises its mmap threshold as tensors come and go, and then keeps freed ones in a heap that only grows: on a
    # CPU the resident peak nearly doubled, and no plan could say by how much. A fixed threshold gives large blocks back
    # at once, for page faults in long batches; numbers in CONTRIBUTING.md.
    "MALLOC_MMAP_THRESHOLD_": str(2 * 1024**2),
    "MALLOC_TRIM_THRESHOLD_": str(128 * 1024**2),
}
"""Of the training process, over what the user has set."""


def work(path: Path | str, command: Sequence[str] | None = None) -> None:
    """Takes the job at `path` from queued to its end; `command` is the training process.

    Raises:
        JobError: another worker has this job, or it is not queued.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # looked at in `_cancelled` alone: no handler runs mid-write
    job = open_job(path)
    _hold_lock(job)
    if (status := job.state().status) != "queued":
        raise JobError(f"{job.name} is {status}; a worker takes queued jobs alone")
    try:
        _run(job, command)
    except Exception as error:
        job.update(status="failed", error={"type": type(error).__name__, "message": f"the worker stopped: {error}"})
        raise


def _run(job: Job, command: Sequence[str] | None) -> None:
    if not _wait_for_turn(job):
        job.update(status="cancelled")
        return
    child = _start(command or launch_command(job))
    cancelled = _wait_for(child)
    _stop_group(child)
    job.wait_until(lambda: not files.lock_holders(job.path / "lock"), GRACE_SECONDS)
    _say(f"the training process ended with exit code {child.returncode}")
    _write_end(job, child.returncode, cancelled)


def launch_command(job: Job) -> list[str]:
    """The training process, started by accelerate as one process on one device."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))
    options = {
        "--config_file": str(_launch_config(job)),
        "--num_processes": "1",
        "--num_machines": "1",
        "--num_cpu_threads_per_process": threads,
        "--mixed_precision": "no",
        "--dynamo_backend": "no",
    }
    flat = [word for pair in options.items() for word in pair]
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # one device, or Trainer would use them all
    device = ["--gpu_ids", first] if has_gpu() else ["--cpu"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*launcher, *flat, *device, "-m", "studio.run_job", str(job.path)]


def _launch_config(job: Job) -> Path:
    """Written into the job so that the user's own accelerate configuration has no say in it."""
    path = job.path / "launch.yaml"
    files.write_atomic(path, "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 1\n")
    return path


def _hold_lock(job: Job) -> None:
    """Standard input is the job's lock: inherited from `submit`, or taken here when started by hand."""
    lock = job.path / "lock"
    if files.holds_as_input(lock):
        return
    try:
        os.dup2(files.open_lock(lock), 0)
    except BlockingIOError:
        raise JobError(f"{job.name} has a living worker already") from None


def _wait_for_turn(job: Job) -> bool:
    """True when the job has become the one running job of its root, False when it was cancelled before."""
    _say("waiting for its turn")
    while not _take_turn(job):
        if _cancelled(TURN_SECONDS):
            return False
    return not _cancelled(0)


def _take_turn(job: Job) -> bool:
    root = job.path.parent
    with files.mutex(root / ".device.lock"):
        if any(_goes_before(other, job) for other in list_jobs(root) if other.path != job.path):
            return False
        job.update(status="running", phase="loading")
        return True


def _goes_before(other: Job, job: Job) -> bool:
    try:
        state = other.state()
    except JobError:  # damaged, or deleted meanwhile
        return False
    if not other.is_alive():
        return False
    if state.status == "queued":
        return (state.created_at, other.name) < (job.state().created_at, job.name)
    return True  # running, or ended and still letting go of the device


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    _say(" ".join(command))
    hidden = {} if has_gpu() else {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **ENVIRONMENT, **hidden}
    return subprocess.Popen(command, stdin=0, env=environment, process_group=0, preexec_fn=_unblock)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _wait_for(child: subprocess.Popen[bytes]) -> bool:
    """Waits for the end of `child`; True if the job was cancelled meanwhile."""
    while child.poll() is None:
        if _cancelled(1.0):
            _say("cancelled")
            return True
    return False


def _cancelled(seconds: float) -> bool:
    """Waits up to `seconds` for SIGTERM; returns early, with False, when a child ends."""
    received = signal.sigtimedwait(SIGNALS, seconds)
    return received is not None and received.si_signo == signal.SIGTERM


def _stop_group(child: subprocess.Popen[bytes]) -> None:
    """Ends what is left of the child's process group: asked first, killed after the grace time."""
    if child.poll() is None:
        _signal_group(child.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while child.poll() is None and time.monotonic() < deadline:
            signal.sigtimedwait({signal.SIGCHLD}, 0.1)
    _signal_group(child.pid, signal.SIGKILL)
    child.wait()


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _write_end(job: Job, exit_code: int, cancelled: bool) -> None:
    if job.state().ended:  # the training process said so itself
        return
    if cancelled:
        job.update(status="cancelled")
        return
    message = "\n".join([_ending(exit_code), "last lines of log.txt:", *job.log_tail(20)])
    job.update(status="failed", error={"type": "TrainingError", "message": message})


def _ending(exit_code: int) -> str:
    if exit_code == 0:
        return "the training process ended without a result"
    if exit_code > 0:
        return f"the training process ended with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    hint = " (often the machine ran out of memory)" if name == "SIGKILL" else ""
    return f"the training process was killed by {name}{hint}"


def _say(text: str) -> None:
    print(f"[worker {time.strftime('%H:%M:%S')}] {text}", flush=True)


def main() -> int:
    try:
        work(sys.argv[1])
        return 0
    except StudioError as error:
        _say(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
