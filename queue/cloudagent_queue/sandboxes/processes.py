"""Processes that outlive the one that started them: found again later, and never mistaken for a stranger.

A process tree has a record, a file of JSON lines that the host owns:

    {"host": "…"}           first, by us: the boot and the pid namespace in which the pids below mean something
    {"child-pid": 4711}     by the launched program itself, so that it is there even if we die right after the start
    {"start-time": 815}     by us: with the pid, what makes a process unmistakable
    {"exit-code": 0}        by bubblewrap, when the started command has ended

From before the start on, the empty file beside it is locked by whoever holds it open: we, then bubblewrap's own
processes. So a record without a lock and without a process belongs to something that is certainly gone. The lock is a
file of its own because its holder inside can be made to hand it over by the agent, who must not write to the record.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from cloudagent_storage.errors import SandboxUnreachable

MARKER = "CLOUDAGENT_SANDBOX"
"""The variable that carries a sandbox's id in the environment of each of its processes."""
KILL_PATIENCE_S = 10.0
"""How long the kernel may take to end processes that were sent SIGKILL."""
OUTPUT_HEAD = 20_000
OUTPUT_TAIL = 40_000
"""How much of a long output is kept, in bytes, from its beginning and its end."""
_POLL_S = 0.005
_LOCK_PATIENCE_S = 1.0

# Runs between fork and the program: limits and signals cannot be set safely in the child of a process with threads.
# Python ignores SIGPIPE, and the worker may ignore or block more; nothing of that may reach an agent.
_LAUNCHER = """
import json, os, resource, signal, sys
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    try:
        signal.signal(number, signal.SIG_DFL)
    except (OSError, ValueError):
        pass
signal.pthread_sigmask(signal.SIG_SETMASK, ())
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
files = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
confinement = json.loads(sys.argv[2])
if confinement is not None:
    try:
        for group in confinement["groups"]:
            with open(group, "w") as procs:
                procs.write("0")
        with open("/proc/self/oom_score_adj", "w") as score:
            score.write("500")
        if confinement["file_bytes"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (confinement["file_bytes"],) * 2)
    except (OSError, ValueError) as error:
        print(f"The limits of the sandbox could not be set: {error}", flush=True)
        os._exit(126)
files = [int(file) for file in sys.argv[1].split(",") if file]
if files:
    os.write(files[0], b'{"child-pid": %d}\\n' % os.getpid())
for file in files:
    os.close(file)
try:
    os.execvp(sys.argv[3], sys.argv[3:])
except OSError as error:
    print(f"{sys.argv[3]}: {error.strerror}", flush=True)
    os._exit(127)
"""

_children: set[subprocess.Popen[bytes]] = set()


@dataclass(frozen=True)
class Confinement:
    """What limits a launched program and all that it starts. Where memory is short, the kernel ends those first."""

    groups: Sequence[str]
    """The `cgroup.procs` of control groups that it enters."""
    file_bytes: int
    """The largest file that it may write; 0 is any."""


def launch(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    output: int | IO[bytes],
    cwd: Path | str = "/",
    write_pid_to: OpenRecord | None = None,
    keep_open: Sequence[int] = (),
    confinement: Confinement | None = None,
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, without input, core dumps or inherited signal handling."""
    record = [] if write_pid_to is None else [write_pid_to.file, write_pid_to.lock]
    arguments = [
        ",".join(str(file) for file in record),
        json.dumps(None if confinement is None else asdict(confinement)),
    ]
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _LAUNCHER, *arguments, *command],
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=[*keep_open, *record],
    )


def let_run(child: subprocess.Popen[bytes]) -> None:
    """Leave a child running. It is reaped by a later `reap` if it ends before this process does."""
    _children.add(child)


def reap() -> None:
    """Free the process table of children that have ended."""
    for child in list(_children):
        if child.poll() is not None:
            _children.discard(child)


@dataclass(frozen=True)
class OpenRecord:
    """Two descriptors: what is known is appended to one; while any process has the other, the record is locked."""

    file: int
    lock: int


@dataclass(frozen=True)
class Record:
    """What is known of one process tree; see the module's text."""

    path: Path
    marker: str
    """The value of `MARKER` in the environment of its processes."""

    @contextmanager
    def new(self) -> Generator[OpenRecord]:
        """A record of which nothing came yet, open and locked; it does not exist after an exception.

        Who dies in here, before the launched program has written its pid, has started nothing: the next one may.
        Raises FileExistsError when something was started, or is just being started.
        """
        lock = self._lock()
        try:
            if "child-pid" in self.read():
                raise FileExistsError
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                os.write(file, json.dumps({"host": _host()}).encode() + b"\n")
                yield OpenRecord(file, lock)
            except Exception:
                self.remove()
                raise
            finally:
                os.close(file)
        finally:
            os.close(lock)

    def remove(self) -> None:
        """Forget the process, which is gone or was never started."""
        self.path.unlink(missing_ok=True)
        self._lock_path.unlink(missing_ok=True)

    @property
    def _lock_path(self) -> Path:
        return self.path.with_suffix(".lock")

    def _lock(self) -> int:
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            file = os.open(self._lock_path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file).st_nlink:
                    return file
            except BlockingIOError:
                # Whoever looks whether the process lives holds the lock for a moment, too.
                if "child-pid" in self.read() or time.monotonic() > deadline:
                    os.close(file)
                    raise FileExistsError from None
            os.close(file)
            time.sleep(_POLL_S)

    def settle(self, child: subprocess.Popen[bytes]) -> bool:
        """Wait until the launched program has written its pid, and note its start time. False if it ended before."""
        deadline = time.monotonic() + KILL_PATIENCE_S
        while "child-pid" not in (seen := self.read()):
            if child.poll() is not None and "child-pid" not in self.read():
                return False
            if time.monotonic() > deadline:
                return True  # a very busy machine: the lock tells that it lives
            time.sleep(_POLL_S)
        # Being the child or a child of it proves who it is. The marker does not yet: during an exec it cannot be read.
        stat = _stat(seen["child-pid"])
        if stat is not None and child.pid in (seen["child-pid"], stat.parent):
            with open(self.path, "ab") as file:
                file.write(json.dumps({"start-time": stat.start_time}).encode() + b"\n")
        return True

    def read(self) -> dict[str, Any]:
        """All that the record says."""
        seen: dict[str, Any] = {}
        with suppress(FileNotFoundError):
            for line in self.path.read_bytes().splitlines():
                with suppress(ValueError):  # a line that is being written
                    seen |= json.loads(line)
        return seen

    def alive(self) -> bool:
        """Does the started command run, or is it about to? Raises `SandboxUnreachable` when that cannot be seen."""
        seen = self.read()
        if "exit-code" in seen:
            return False
        if "child-pid" in seen and seen.get("host") == _host():
            with self.process() as process:
                return process is not None
        return self._held(seen)

    @contextmanager
    def process(self) -> Generator[tuple[int, int] | None]:
        """The pid and a pidfd of the recorded process, or None when it is gone."""
        seen = self.read()
        pid = seen.get("child-pid")
        if pid is None or seen.get("host") != _host():
            yield None
            return
        with open_process(pid) as pidfd:
            yield (pid, pidfd) if pidfd is not None and self._is_the_same(pid, seen.get("start-time")) else None

    def kill(self) -> None:
        """End the process, and with it its pid namespace. Returns when it is gone.

        Raises `SandboxUnreachable` when it does not end, or runs where this process cannot signal it.
        """
        deadline = time.monotonic() + KILL_PATIENCE_S
        while True:
            with self.process() as process:
                if process is not None:
                    kill_and_wait(process[1], deadline)
            reap()
            # Held without a process: it is being started, or bubblewrap's outer process is about to end.
            if process is None and not self._held(self.read()):
                return
            if time.monotonic() > deadline:
                raise SandboxUnreachable("The processes of the sandbox do not end.")
            time.sleep(_POLL_S)

    def _held(self, seen: Mapping[str, Any]) -> bool:
        try:
            file = os.open(self._lock_path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except PermissionError:  # by whoever got hold of the lock inside; a plain file of ours otherwise
            self._lock_path.chmod(0o600)
            return self._held(seen)
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if seen.get("host", _host()) != _host():
                raise SandboxUnreachable("The sandbox runs on another host.") from None
            return True
        finally:
            os.close(file)
        return False

    def _is_the_same(self, pid: int, start_time: int | None) -> bool:
        stat = _stat(pid)
        if stat is None or stat.state in "ZX":
            return False
        # The start time cannot be forged. The marker can, by code that controls the process; it only counts where we
        # died before we could note the start time.
        return _is_marked(pid, self.marker) if start_time is None else stat.start_time == start_time


@dataclass(frozen=True)
class Starts:
    """The commands that were started in a sandbox, one after the other: each number once, and none beside another."""

    folder: Path
    marker: str

    def record(self, number: int) -> Record:
        """Of the command with that number, from 1."""
        return Record(self.folder / ("started.jsonl" if number == 1 else f"started_{number}.jsonl"), self.marker)

    @property
    def last(self) -> Record:
        """Of the newest one."""
        return self.record(max(self._numbers(), default=1))

    @contextmanager
    def new(self, number: int) -> Generator[OpenRecord]:
        """As `Record.new`. Raises FileExistsError also where an earlier command runs, or there was a later one."""
        with self.record(number).new() as opened:
            # Only now that whoever starts another one sees ours.
            others = [other for other in self._numbers() if other != number]
            if any(other > number or self.record(other).alive() for other in others):
                raise FileExistsError
            yield opened

    def _numbers(self) -> list[int]:
        names = [path.stem.partition("_")[2] for path in self.folder.glob("started*.jsonl")]
        return [int(name or 1) for name in names]


class BoundedOutput:
    """What a child prints to a pipe: its beginning and its end."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe.fileno()
        os.set_blocking(self._pipe, False)
        self._head = bytearray()
        self._tail = bytearray()
        self._left_out = 0

    def follow(self, child: subprocess.Popen[bytes], deadline: float) -> bool:
        """Read until the child ends. False when a monotonic deadline comes first."""
        with open_process(child.pid) as pidfd:
            waiting = select.poll()
            waiting.register(self._pipe, select.POLLIN)
            if pidfd is not None:
                waiting.register(pidfd, select.POLLIN)
            while child.poll() is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                ready = dict(waiting.poll(left * 1000))
                if self._pipe in ready and not self._read():
                    waiting.unregister(self._pipe)
        return True

    def drain(self) -> None:
        """Take what is left in the pipe."""
        while self._read():
            pass

    def text(self) -> str:
        middle = f"\n[... {self._left_out} bytes left out ...]\n".encode() if self._left_out else b""
        return (self._head + middle + self._tail).decode(errors="replace")

    def _read(self) -> bool:
        try:
            chunk = os.read(self._pipe, 1 << 16)
        except BlockingIOError:
            return False
        room = OUTPUT_HEAD - len(self._head)
        self._head += chunk[:room]
        self._tail += chunk[room:]
        surplus = max(0, len(self._tail) - OUTPUT_TAIL)
        self._left_out += surplus
        del self._tail[:surplus]
        return bool(chunk)


@contextmanager
def open_process(pid: int) -> Generator[int | None]:
    """A pidfd, or None when there is no such process. What is learnt of the pid while it is open holds for it."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def kill_and_wait(pidfd: int, deadline: float) -> None:
    """SIGKILL, and wait for the end until a monotonic deadline."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    waiting = select.poll()  # select() cannot take descriptors above 1023
    waiting.register(pidfd, select.POLLIN)
    waiting.poll(max(0.0, deadline - time.monotonic()) * 1000)


def kill_marked(marker: str, *, name: str = MARKER) -> None:
    """End every process that carries the marker in its environment, however often it forks meanwhile.

    Raises `SandboxUnreachable` when they do not end.
    """
    deadline = time.monotonic() + KILL_PATIENCE_S
    clean_looks = 0
    while clean_looks < 2:  # a process in the middle of an exec shows no environment
        clean_looks += 1
        for pid in _pids():
            with open_process(pid) as pidfd:
                if pidfd is not None and _is_marked(pid, marker, name=name):
                    clean_looks = 0
                    kill_and_wait(pidfd, deadline)
        reap()
        if time.monotonic() > deadline:
            raise SandboxUnreachable("The processes of the sandbox do not end.")


def terminate(pidfd: int) -> None:
    """SIGTERM."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)


def terminate_first_child(parent: int) -> bool:
    """SIGTERM to the oldest child of the first process of a pid namespace: the command. False if there is none yet."""
    children = [(stat.inner_pid, pid) for pid in _pids() if (stat := _stat(pid)) and stat.parent == parent]
    for _, pid in sorted(children)[:1]:
        with open_process(pid) as pidfd:
            if pidfd is not None and (stat := _stat(pid)) and stat.parent == parent:
                terminate(pidfd)
                return True
    return False


@dataclass(frozen=True)
class _Stat:
    state: str
    parent: int
    start_time: int
    inner_pid: int
    """Its pid in its own pid namespace."""


def _stat(pid: int) -> _Stat | None:
    try:
        # The name in the second field may hold spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        status = Path(f"/proc/{pid}/status").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    inner = next((line.split()[-1] for line in status.splitlines() if line.startswith(b"NSpid:")), b"0")
    return _Stat(state=fields[0].decode(), parent=int(fields[1]), start_time=int(fields[19]), inner_pid=int(inner))


def _is_marked(pid: int, marker: str, *, name: str = MARKER) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # gone, or of another user
        return False
    return f"{name}={marker}".encode() in environment.split(b"\0")


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


@cache
def _host() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
