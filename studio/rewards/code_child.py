"""Runs code that a model wrote, in as small a corner of the machine as the kernel gives. Standard library alone.

    python -I -S code_child.py  < {"code": …, "tests": […], "timeout_seconds": …, "memory_bytes": …, "folder": …}
                                > {"passed": [true, …], "protections": {…}}

Three processes. This one leaves the network, sees no other processes and mounts a small file system of its own, where
the kernel allows; the *runner*, process 1 of the new process namespace, runs no foreign code; for each test it forks
the *program*, which gives up its rights and limits itself before it reads a line of what the model wrote, and
everything that is left of it is killed afterwards. A test passes when the program gets to its end, which it says
with an exit status that is drawn anew for every program. Meanwhile this process looks at what all processes of the
program hold together: each by itself is limited by the kernel, all of them are not.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import secrets
import select
import signal
import struct
import sys
import time
from contextlib import suppress

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
)  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 0x20, 0x1000, 0x4000, 1 << 18
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
NOBODY = 65534

DISK_BYTES = 16 * 2**20
LIBRARY = ".python"
OPEN_FILES, PROCESSES = 64, 32
LOOK_SECONDS = 0.02
libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    question = json.load(sys.stdin)
    protections = isolate(question["folder"])
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a cancelled job leaves nothing; isolating resets it
    reading, writing = os.pipe()
    runner = os.fork()
    if not runner:
        os.close(reading)
        _run_all(question, protections, writing)
    os.close(writing)
    said = _said(reading, runner, question["memory_bytes"])
    os.waitpid(runner, 0)
    _kill_left_behind(alone=protections["processes"] == "namespace")
    # nothing said: the program ended its runner, which it can where it shares its processes
    passed = json.loads(said) if said else [False] * max(1, len(question["tests"]))
    json.dump({"passed": passed, "protections": protections}, sys.stdout)
    return 0


def _said(reading: int, runner: int, memory_bytes: int) -> bytes:
    """What the runner says, to its end; programs that hold too much in all are killed meanwhile."""
    said = b""
    while True:
        if not select.select([reading], [], [], LOOK_SECONDS)[0]:
            programs = _below(runner)
            if len(programs) > 1 and sum(map(_held_bytes, programs)) > memory_bytes:
                for program in programs:
                    with suppress(OSError):
                        os.kill(program, signal.SIGKILL)
        elif part := os.read(reading, 2**16):
            said += part
        else:
            os.close(reading)
            return said


def _below(process: int) -> list[int]:
    """All that came from a process and are still there."""
    found = _children(process)
    for child in found:
        found += _children(child)
    return found


def _held_bytes(process: int) -> int:
    """Memory of a process, what it shares with n others counted as an n-th."""
    with suppress(OSError), open(f"/proc/{process}/smaps_rollup") as file:
        return 1024 * sum(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    return 0


# -------------------------------------------------------------------- before the fork


def isolate(folder: str) -> dict[str, str]:
    """Leaves what can be left; says of each protection how it is kept: "no" where the kernel does not allow it."""
    user, group = os.getuid(), os.getgid()
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    own = 0 if user == 0 else CLONE_NEWUSER  # root needs no user namespace: the program becomes nobody
    together = libc.unshare(own | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC) == 0
    if together and own:
        _map_user(user, group)
    network = together or libc.unshare(CLONE_NEWNET) == 0
    mounted = together and _mount(folder)
    library = True
    if user == 0:
        os.chmod(folder, 0o777)
        library = _for_everybody(sys.base_prefix) or (mounted and _bind_library(folder))
    return {
        "network": "off" if network else "no",
        "processes": "namespace" if together else "session",
        "disk": f"{DISK_BYTES} bytes in all" if mounted else f"{DISK_BYTES} bytes a file",
        "files": "landlock" if _landlock_version() > 0 else "permissions",
        "user": "nobody" if user == 0 else "own",
        "library": "reachable" if library else "no",
    }


def _map_user(user: int, group: int) -> None:
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _mount(folder: str) -> bool:
    libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None)
    options = f"size={DISK_BYTES},mode=0777,nr_inodes=4096".encode()
    return bool(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options) == 0)


def _for_everybody(path: str) -> bool:
    """Whether a user without rights can read the folder: not where it lies in root's home."""
    parts = os.path.abspath(path).split("/")
    parents = ["/".join(parts[:end]) or "/" for end in range(1, len(parts) + 1)]
    return all(os.stat(parent).st_mode & 0o001 for parent in parents)


def _bind_library(folder: str) -> bool:
    """Shows the interpreter's library, read-only, in a place that the program's user can reach."""
    place = f"{folder}/{LIBRARY}".encode()
    os.mkdir(place)
    if libc.mount(sys.base_prefix.encode(), place, None, MS_BIND | MS_REC, None):
        return False
    libc.mount(None, place, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID, None)
    loaded = [module.__path__ for module in list(sys.modules.values()) if hasattr(module, "__path__")]
    for paths in (sys.path, *loaded):
        paths[:] = [entry.replace(sys.base_prefix, os.fsdecode(place), 1) for entry in paths]
    return True


# -------------------------------------------------------------------- the runner


def _run_all(question: dict, protections: dict[str, str], writing: int) -> None:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    alone = protections["processes"] == "namespace"
    passed = [_run(question, test, alone, writing) for test in question["tests"] or [None]]
    os.write(writing, json.dumps(passed).encode())
    os._exit(0)


def _run(question: dict, test: str | None, alone: bool, writing: int) -> bool:
    """Whether the code, and then the test, got to their end in time."""
    at_the_end = 1 + secrets.randbelow(255)
    program = os.fork()
    if not program:
        os.close(writing)
        try:
            _confine(question, alone)
        except BaseException:
            os._exit(0)
        _execute(question["code"], test, at_the_end)
    status = _wait(program, question["timeout_seconds"])
    with suppress(ProcessLookupError):
        os.killpg(program, signal.SIGKILL)
    _kill_left_behind(alone)
    return status is not None and os.waitstatus_to_exitcode(status) == at_the_end


def _wait(program: int, seconds: float) -> int | None:
    """The wait status of the program; None where it took too long and was killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(program, os.WNOHANG)
        if found:
            return status
        time.sleep(0.002)
    os.kill(program, signal.SIGKILL)
    os.waitpid(program, 0)
    return None


def _kill_left_behind(alone: bool) -> None:
    """Ends what the program started: all processes of the namespace; else those that came down to this one."""
    while True:
        if alone and os.getpid() == 1:
            with suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        for child in _children():
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children(process: int | None = None) -> list[int]:
    """Of a process, this one where none is named: what any of its threads has forked."""
    found: list[int] = []
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{process or 'self'}/task"):
            with suppress(OSError), open(f"/proc/{process or 'self'}/task/{thread}/children") as file:
                found += map(int, file.read().split())
    return found


# -------------------------------------------------------------------- the program


def _confine(question: dict, alone: bool) -> None:
    os.setsid()
    os.chdir(question["folder"])
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.closerange(3, 256)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    processes = PROCESSES if alone or os.getuid() == 0 else _threads_of_user() + PROCESSES
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))  # none of those that a user namespace gives
    _landlock(question["folder"])
    cpu = int(question["timeout_seconds"]) + 1
    for limit, most in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, question["memory_bytes"]),
        (resource.RLIMIT_FSIZE, DISK_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))


def _threads_of_user() -> int:
    """What RLIMIT_NPROC counts of this user already."""
    found = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.stat(f"/proc/{name}").st_uid == os.getuid():
                found += len(os.listdir(f"/proc/{name}/task"))
    return found


def _execute(code: str, test: str | None, at_the_end: int) -> None:
    scope: dict[str, object] = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        exec(compile(code, "<completion>", "exec"), scope)
        if test is not None:
            exec(compile(test, "<test>", "exec"), scope)
    except SystemExit as error:
        os._exit(at_the_end if test is None and not error.code else 0)
    except BaseException:
        os._exit(0)
    os._exit(at_the_end)


# -------------------------------------------------------------------- Landlock: files below a few folders alone

READ_FILE, READ_DIR, EXECUTE, WRITE_FILE = 1 << 2, 1 << 3, 1 << 0, 1 << 1
ALL_OF_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}
READABLE = ("/usr", "/lib", "/lib64", "/bin", "/dev/urandom", "/etc/localtime", sys.prefix, sys.base_prefix)


def _landlock_version() -> int:
    return max(0, int(libc.syscall(444, None, 0, 1)))


def _landlock(folder: str) -> None:
    """Reads below the interpreter and the system's libraries, writes below `folder`, and nothing else."""
    version = _landlock_version()
    if not version:
        return
    every = ALL_OF_VERSION[min(3, version)]
    rules = libc.syscall(444, struct.pack("Q", every), 8, 0)
    for path in READABLE:
        _allow(rules, path, READ_FILE | READ_DIR | EXECUTE)
    _allow(rules, "/dev/null", READ_FILE | WRITE_FILE)
    _allow(rules, folder, every)
    if libc.syscall(446, rules, 0):
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(rules)


def _allow(rules: int, path: str, access: int) -> None:
    if not os.path.exists(path):
        return
    if not os.path.isdir(path):
        access &= ~READ_DIR
    at = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if libc.syscall(445, rules, 1, struct.pack("=Qi", access, at), 0):
        raise OSError(ctypes.get_errno(), f"landlock_add_rule {path}")
    os.close(at)


if __name__ == "__main__":
    sys.exit(main())
