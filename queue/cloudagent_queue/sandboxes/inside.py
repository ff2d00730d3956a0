"""Runs INSIDE a remote sandbox, one process a call: starts, runs, stops, reads and writes there.

This file is copied there and stands alone: standard library only, Python 3.10 or later. It is started as root, so that
it reaches whatever an agent with sudo leaves running, and does everything that touches the agent's files, or is run on
the agent's behalf, as the owner of `HOME`. Every call may be repeated: its answer can be lost on the way, and a second
call with the same token finds what the first one did.

    FOLDER/inside.py, python    this file, and an interpreter that can import claude_agent_sdk
    FOLDER/system.json          the processes that were there before anything of an agent's ran
    FOLDER/started.json         the last started command: its number, who asked for it, its pid and start time
    FOLDER/output.log           what it printed
    FOLDER/runs/<token>/        a command of `run`: its lock is held as long as somebody watches over it
    STAGING/                    large files on their way in or out
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import fcntl
import json
import os
import pwd
import resource
import select
import shutil
import signal
import stat
import sys
import time
import zlib
from collections.abc import Callable, Generator
from typing import Any

FOLDER = "/var/lib/cloudagent"
USER = "user"
HOME = f"/home/{USER}"
ROOT = f"{HOME}/sandbox"
STAGING = f"{HOME}/.cloudagent"
REQUEST = "CLOUDAGENT_REQUEST"
"""The variable that carries a request: unlike a command line, other users cannot read it."""

INLINE_MAX = 1_100_000
"""Up to so many bytes of a file are part of the answer; more are staged, to be fetched as a file."""
OUTPUT_HEAD = 20_000
OUTPUT_TAIL = 40_000
_KILL_PATIENCE_S = 10.0
_KEEP_S = 900.0
"""Long after nobody asks for it again: results and staged files."""
_KERNEL_THREAD = 0x00200000
_SUBREAPER = 36
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class Refused(Exception):
    """What was asked for cannot be done here; the message is for people."""


# -- the calls ---------------------------------------------------------------------------------------------------------


def prepare() -> dict[str, Any]:
    """Make a new sandbox ready: its folders, and a list of the processes that belong to the system."""
    for name in ("runs", "started.json", "output.log"):  # of the sandbox that a template was made from
        path = f"{FOLDER}/{name}"
        if os.path.isdir(path):
            shutil.rmtree(path)
        elif os.path.exists(path):
            os.unlink(path)
    os.makedirs(f"{FOLDER}/runs", mode=0o700)
    _save("system.json", {str(pid): found.start_time for pid, found in _processes().items()})
    owner = os.stat(HOME)
    for folder in (ROOT, f"{ROOT}/home", STAGING):
        os.makedirs(folder, mode=0o700, exist_ok=True)
        os.chown(folder, owner.st_uid, owner.st_gid)
    return {}


def start(command: list[str], env: dict[str, str], token: str, number: int = 1) -> dict[str, Any]:
    """Start a command, each number once and none beside another. Whoever comes with another token is too late."""
    lock = os.open(f"{FOLDER}/started.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    if record := _load("started.json"):
        if record["token"] == token:
            return {"started": True}
        if record.get("number", 1) >= number or _started() is not None:
            return {"started": False}
    home = _check_folder("home", create=True)
    output = os.open(f"{FOLDER}/output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    go, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.close(tell)
        if not os.read(go, 1):
            os._exit(1)  # the one that was to write the record has died: nothing was started
        _execute(command, env, cwd=ROOT, home=home, output=output)
    found = _process(pid)
    # On disk before the command runs: else a second one could be started after a crash.
    about = {"token": token, "number": number, "pid": pid, "start_time": found.start_time if found else None}
    _save("started.json", about)
    os.write(tell, b"g")
    return {"started": True}


def alive() -> dict[str, Any]:
    """Does the started command run?"""
    return {"alive": _started() is not None}


def stop() -> dict[str, Any]:
    """SIGTERM to the started command."""
    if (pid := _started()) is not None:
        _signal(pid, signal.SIGTERM)
    return {}


def run(
    token: str,
    command: list[str],
    env: dict[str, str],
    cwd: str,
    home: str | None,
    timeout_s: float,
    wait_s: float,
) -> dict[str, Any]:
    """Run a command, or go on waiting for it. The answer is {"running": true} when `wait_s` was not enough."""
    _forget_old(f"{FOLDER}/runs")
    folder = f"{FOLDER}/runs/{token}"
    if not os.path.isdir(folder):
        working = _check_folder(cwd)
        own_home = _check_folder(home or "home", create=True)
        # It gets its name when it is locked, so that nobody ever sees it unwatched before the command has ended.
        fresh = f"{folder}.{os.getpid()}"
        os.mkdir(fresh, 0o700)
        lock = os.open(f"{fresh}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            os.rename(fresh, folder)
        except OSError:  # the same call came twice at once
            shutil.rmtree(fresh)
        else:
            if os.fork() == 0:
                _close_all_but(lock)
                _watch_over(folder, command, env, cwd=working, home=own_home, timeout_s=timeout_s)
        os.close(lock)
    deadline, pause = time.monotonic() + wait_s, 0.002
    while True:
        watched = _is_locked(f"{folder}/lock")
        if (result := _load(f"runs/{token}/result.json")) is not None:
            return result
        if not watched:
            # Whoever watched over it was killed, and it with it.
            return {"exit_code": 128 + signal.SIGKILL, "output": ""}
        if time.monotonic() > deadline:
            return {"running": True}
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)


def end_processes() -> dict[str, Any]:
    """End every process that is not the system's, until there is none left."""
    deadline = time.monotonic() + _KILL_PATIENCE_S
    system = _load("system.json") or {}
    while True:
        processes = _processes()
        kept = _ancestors(processes) | _watchers(processes)
        found = [
            pid
            for pid, process in processes.items()
            if pid not in kept and process.state not in "ZX" and system.get(str(pid)) != process.start_time
        ]
        if not found:
            return {}
        if time.monotonic() > deadline:
            raise Refused("The processes of the sandbox do not end.")
        for number in (signal.SIGSTOP, signal.SIGKILL):  # none forks while the others are killed
            for pid in found:
                _signal(pid, number)
        time.sleep(0.005)


def read(path: list[str], offset: int, max_bytes: int, token: str) -> dict[str, Any]:
    """A part of a regular file, in the answer or staged under `token`."""
    _become_agent()
    nothing = {"data": _packed(b"")}
    try:
        with _open_folder(path[:-1]) as folder:
            file = os.open(path[-1], _FILE_FLAGS, dir_fd=folder)
    except (OSError, IndexError):
        return nothing
    about = os.fstat(file)
    if not stat.S_ISREG(about.st_mode):
        return nothing
    with os.fdopen(file, "rb", buffering=0) as stream:
        size = min(max_bytes, about.st_size - offset)
        if size <= INLINE_MAX:
            return {"data": _packed(_read_range(file, offset, min(max_bytes, INLINE_MAX)))}
        os.makedirs(STAGING, mode=0o700, exist_ok=True)
        _forget_old(STAGING)
        stream.seek(offset)
        staged = f"{STAGING}/{token}"
        with open(staged, "wb") as copy:
            left = size
            while left > 0 and (chunk := stream.read(min(left, 1 << 20))):
                copy.write(chunk)
                left -= len(chunk)
        return {"staged": staged, "size": size - left}


def watch(path: list[str], offset: int, max_bytes: int, token: str, wait_s: float) -> dict[str, Any]:
    """What `read` answers, once there is something, the started command has ended, or `wait_s` are over."""
    deadline = time.monotonic() + wait_s
    while True:
        running = _started() is not None
        with _as_agent():
            grown = _size(path) > offset
        if grown or not running or time.monotonic() >= deadline:
            return {"alive": running, **read(path, offset, max_bytes, token)}
        time.sleep(0.05)


def write(path: list[str], data: str | None, staged: str | None) -> dict[str, Any]:
    """Put a file in place at once: `data`, or one that was uploaded before."""
    _become_agent()
    fresh = f".{os.getpid()}-{time.monotonic_ns()}.new"
    with _open_folder(path[:-1], create=True) as folder:
        try:
            if staged is not None:
                # A second name, not a move: when the answer is lost, this comes again.
                os.link(f"{STAGING}/{staged}", fresh, dst_dir_fd=folder, follow_symlinks=False)
            else:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                with os.fdopen(os.open(fresh, flags, 0o600, dir_fd=folder), "wb") as stream:
                    stream.write(_unpacked(data or ""))
            os.rename(fresh, path[-1], src_dir_fd=folder, dst_dir_fd=folder)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(fresh, dir_fd=folder)
            raise
    return {}


def output(max_bytes: int) -> dict[str, Any]:
    """The end of what the started command printed."""
    try:
        file = os.open(f"{FOLDER}/output.log", _FILE_FLAGS)
    except FileNotFoundError:
        return {"data": _packed(b"")}
    return {"data": _packed(_read_range(file, max(0, os.fstat(file).st_size - max_bytes), max_bytes))}


CALLS: dict[str, Callable[..., dict[str, Any]]] = {
    call.__name__: call for call in (prepare, start, alive, stop, run, end_processes, read, watch, write, output)
}


def main() -> None:
    request = json.loads(os.environ.pop(REQUEST))
    try:
        answer = CALLS[request.pop("do")](**request)
    except Refused as refused:
        answer = {"refused": str(refused)}
    except OSError as error:
        answer = {"refused": f"That is not possible in the sandbox: {os.strerror(error.errno or 0)}."}
    sys.stdout.write(f"\n{json.dumps(answer)}\n")


# -- running things ----------------------------------------------------------------------------------------------------


def _watch_over(folder: str, command: list[str], env: dict[str, str], *, cwd: str, home: str, timeout_s: float) -> None:
    """Run a command to its end, end all that it left, and write down how it ended."""
    os.setsid()
    me = _process(os.getpid())
    _save(f"{folder}/watcher.json", {"pid": os.getpid(), "start_time": me.start_time if me else None})
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # whoever asked is not to wait for us to close them
        os.dup2(null, stream)
    # Whatever loses its parent becomes our child, however it tried to get away.
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        _execute(command, env, cwd=cwd, home=home, output=writing)
    os.close(writing)
    os.set_blocking(reading, False)
    deadline = time.monotonic() + timeout_s
    kept = _Kept(reading)
    status: int | None = None
    waiting = select.poll()
    waiting.register(reading, select.POLLIN)
    waiting.register(os.pidfd_open(child), select.POLLIN)
    while status is None and (left := deadline - time.monotonic()) > 0:
        ready = dict(waiting.poll(min(left, 1.0) * 1000))
        if reading in ready and not kept.take():
            waiting.unregister(reading)
        status = _reap().get(child)
    _end_descendants()
    while kept.take():
        pass
    exit_code = None if status is None else os.waitstatus_to_exitcode(status)
    if exit_code is not None and exit_code < 0:
        exit_code = 128 - exit_code
    _save(f"{folder}/result.json", {"exit_code": exit_code, "output": kept.text()})
    os._exit(0)


def _execute(command: list[str], env: dict[str, str], *, cwd: str, home: str, output: int) -> None:
    """Become the command, as the agent's user and with nothing of ours but `output`. Never returns."""
    try:
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        _close_all_but()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        files = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        user = _become_agent()
        os.umask(0o022)
        os.chdir(cwd)
        default = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": home,
            "LANG": "C.UTF-8",
            "TMPDIR": "/tmp",
            "USER": user,
            "IS_SANDBOX": "1",  # the Claude CLI works as root only where it is told that this is a sandbox
        }
        os.execvpe(command[0], command, {**default, **env})
    except OSError as error:
        os.write(1, f"{command[0]}: {os.strerror(error.errno or 0)}\n".encode(errors="replace"))
    finally:
        os._exit(127)


def _close_all_but(*kept: int) -> None:
    """Let go of what we inherited: the daemon that started us may wait until nobody has our output open."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _become_agent() -> str:
    """Give up root for good; the name of who we are then."""
    owner = os.stat(HOME)
    try:
        name = pwd.getpwuid(owner.st_uid).pw_name
    except KeyError:
        name = USER
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.initgroups(name, owner.st_gid)
        os.setgid(owner.st_gid)
        os.setuid(owner.st_uid)
    return name


@contextlib.contextmanager
def _as_agent() -> Generator[None]:
    owner = os.stat(HOME)
    if os.geteuid() != 0 or owner.st_uid == 0:
        yield
        return
    os.setegid(owner.st_gid)
    os.seteuid(owner.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


class _Kept:
    """What comes out of a pipe: its beginning and its end."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self._head = bytearray()
        self._tail = bytearray()
        self._left_out = 0

    def take(self) -> bool:
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

    def text(self) -> str:
        middle = f"\n[... {self._left_out} bytes left out ...]\n".encode() if self._left_out else b""
        return (bytes(self._head) + middle + bytes(self._tail)).decode(errors="replace")


# -- processes ---------------------------------------------------------------------------------------------------------


class _Process:
    def __init__(self, fields: list[bytes]) -> None:
        self.state = fields[0].decode()
        self.parent = int(fields[1])
        self.kernel = bool(int(fields[6]) & _KERNEL_THREAD)
        self.start_time = int(fields[19])


def _process(pid: int) -> _Process | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name in the second field may hold spaces and parentheses.
            return _Process(file.read().rpartition(b")")[2].split())
    except (FileNotFoundError, ProcessLookupError):
        return None


def _processes() -> dict[int, _Process]:
    seen = {int(name): _process(int(name)) for name in os.listdir("/proc") if name.isdecimal()}
    return {pid: process for pid, process in seen.items() if process is not None and not process.kernel}


def _ancestors(processes: dict[int, _Process]) -> set[int]:
    """We, and all above us: the provider's daemon and what started it."""
    found, pid = {1}, os.getpid()
    while pid in processes and pid not in found:
        found.add(pid)
        pid = processes[pid].parent
    return found


def _watchers(processes: dict[int, _Process]) -> set[int]:
    """Those that watch over a command of `run`: they tell how it ended, and then end by themselves."""
    found: set[int] = set()
    for entry in os.scandir(f"{FOLDER}/runs"):
        record = _load(f"{entry.path}/watcher.json")
        if record and (process := processes.get(record["pid"])) and process.start_time == record["start_time"]:
            found.add(record["pid"])
    return found


def _started() -> int | None:
    """The pid of the started command while it runs."""
    record = _load("started.json")
    if record is None:
        return None
    process = _process(record["pid"])
    if process is None or process.state in "ZX" or process.start_time != record["start_time"]:
        return None
    return record["pid"]


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _reap() -> dict[int, int]:
    ended: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = found[1]
    return ended


def _end_descendants() -> None:
    deadline = time.monotonic() + _KILL_PATIENCE_S
    while time.monotonic() < deadline:
        _reap()
        processes = _processes()
        below, size = {os.getpid()}, 0
        while len(below) > size:
            size = len(below)
            below |= {pid for pid, process in processes.items() if process.parent in below}
        below = {pid for pid in below - {os.getpid()} if processes[pid].state not in "ZX"}
        if not below:
            return
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in below:
                _signal(pid, number)
        time.sleep(0.002)


# -- files -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open_folder(parts: list[str], *, create: bool = False) -> Generator[int]:
    """A descriptor of a folder below ROOT, reached through no symlink."""
    folder = os.open(ROOT, _FOLDER_FLAGS)
    try:
        for part in parts:
            if create:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o700, dir_fd=folder)
            inner = os.open(part, _FOLDER_FLAGS, dir_fd=folder)
            os.close(folder)
            folder = inner
        yield folder
    finally:
        os.close(folder)


def _check_folder(path: str, *, create: bool = False) -> str:
    parts = [part for part in path.split("/") if part not in ("", ".")]
    try:
        with _as_agent(), _open_folder(parts, create=create):
            return "/".join([ROOT, *parts])
    except OSError:
        raise Refused("The sandbox has no such folder.") from None


def _size(path: list[str]) -> int:
    """Of a regular file; 0 for whatever else is there."""
    try:
        with _open_folder(path[:-1]) as folder:
            about = os.stat(path[-1], dir_fd=folder, follow_symlinks=False)
    except (OSError, IndexError):
        return 0
    return about.st_size if stat.S_ISREG(about.st_mode) else 0


def _read_range(file: int, offset: int, max_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < max_bytes and (chunk := os.pread(file, min(max_bytes - len(data), 1 << 20), offset + len(data))):
        data += chunk
    return bytes(data)


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 1)).decode()


def _unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def _load(name: str) -> dict[str, Any] | None:
    with contextlib.suppress(FileNotFoundError), open(os.path.join(FOLDER, name), "rb") as file:
        return json.load(file)
    return None


def _save(name: str, content: dict[str, Any]) -> None:
    path = os.path.join(FOLDER, name)
    with open(f"{path}.new", "w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.rename(f"{path}.new", path)


def _is_locked(path: str) -> bool:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def _forget_old(folder: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > _KEEP_S:
                    if entry.is_dir(follow_symlinks=False):
                        if not _is_locked(f"{entry.path}/lock"):
                            shutil.rmtree(entry.path)
                    else:
                        os.unlink(entry.path)


if __name__ == "__main__":
    main()
