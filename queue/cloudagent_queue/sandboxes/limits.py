"""How much the processes of a sandbox of this machine may take together: memory, processes, disk.

Memory and processes are limited by control groups, where this process may make some; see cgroups(7). A sandbox has one
in each hierarchy, beside or below the group that the worker is in, so that the worker's own limits hold for it, too,
where they can. They outlive the worker. In the sandbox's folder:

    groups.json          where they are; written before they are made, so that whoever deletes the sandbox finds them

The disk is watched by a process of its own; see disk_watch.py.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cloudagent_queue.sandboxes import processes
from cloudagent_storage.errors import SandboxUnreachable

VARIABLES = ("SANDBOX_MEMORY_MB", "SANDBOX_PIDS", "SANDBOX_DISK_MB")
MB = 1_000_000

_CONTROLS = {
    "memory": ("memory.max", "memory.limit_in_bytes"),
    "pids": ("pids.max",),
    "cpu": ("cpu.weight", "cpu.shares"),
}
"""What a group can control, and the files of the second and the first version of control groups that tell so."""
_REMOVE_PATIENCE_S = 5.0
_POLL_S = 0.005

# The first program inside, where there is no control group: a limit that is set here counts the processes of this user
# namespace alone; set outside, it would count all that the user has. See getrlimit(2) and user_namespaces(7).
_FEW_PROCESSES = """
import os, resource, signal, sys
number = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NPROC, (number, number))
for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
    signal.signal(number, signal.SIG_DFL)
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    print(f"{sys.argv[2]}: {error.strerror}", flush=True)
    os._exit(127)
"""


@dataclass(frozen=True)
class Limits:
    """What one sandbox may take; 0 is without limit."""

    memory_mb: int = 4096
    """Files in its /tmp are in memory, too."""
    pids: int = 1024
    """Processes and threads."""
    disk_mb: int = 20_000
    """Of its folder; also of any single file."""

    @classmethod
    def read(cls, env: Mapping[str, str]) -> Limits:
        """As the operator's variables say, which were checked when they were read."""
        names = ("memory_mb", "pids", "disk_mb")
        return cls(**{name: int(env[key]) for name, key in zip(names, VARIABLES, strict=True) if env.get(key)})

    @classmethod
    def kept(cls, about: Mapping[str, Any]) -> Limits:
        """Those that a sandbox was made with."""
        return cls(**about["limits"]) if "limits" in about else NO_LIMITS

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    def description(self) -> str:
        """What of it holds on this machine."""
        here = controls()
        can = {
            f"{self.memory_mb} MB of memory": bool(self.memory_mb) and "memory" in here,
            f"{self.pids} processes": bool(self.pids) and ("pids" in here or self.wraps()),
            f"{self.disk_mb} MB of disk": bool(self.disk_mb),
        }
        holds = ", ".join(what for what, possible in can.items() if possible) or "none"
        missing = [
            what
            for what, wanted, possible in (
                ("memory", self.memory_mb, "memory" in here),
                ("processes", self.pids, "pids" in here or self.wraps()),
            )
            if wanted and not possible
        ]
        if not missing:
            return f"limits: {holds}"
        return f"limits: {holds}; cannot limit {' and '.join(missing)}, as no control group can be made here"

    def wraps(self) -> bool:
        """Is the number of processes limited from inside? The kernel exempts root from that kind of limit."""
        return bool(self.pids) and "pids" not in controls() and os.geteuid() != 0

    def wrap(self, command: Sequence[str], *, python: str) -> list[str]:
        """The command, behind the program that limits the number of processes from inside, where that is needed."""
        if not self.wraps():
            return list(command)
        return [python, "-I", "-S", "-c", _FEW_PROCESSES, str(self.pids), *command]


NO_LIMITS = Limits(memory_mb=0, pids=0, disk_mb=0)


@dataclass(frozen=True)
class Place:
    """A control group below which this process may make others."""

    folder: Path
    controls: frozenset[str]
    """Of memory, pids and cpu. In a group of their own, a thousand busy processes have the processor time of one."""


class Groups:
    """The control groups of one sandbox."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        """`folder` is the sandbox's; its name, which nothing else has, is the groups', too."""
        self._record = folder / "groups.json"
        self._made: list[Path] = []
        self._name = f"cloudagent_{folder.name}"
        self._limits = limits

    def make(self) -> list[str]:
        """See to it that they exist; the files into which a process writes itself to be in them. Raises OSError."""
        paths = _recorded(self._record)
        if paths is None or not all(path.parent.is_dir() for path in paths):
            # The group of a worker that is gone may have gone with it: then nothing of the sandbox runs either.
            paths = [place.folder / self._name for place in places()]
            draft = self._record.with_name(f".groups_{secrets.token_hex(8)}")
            draft.write_text(json.dumps([str(path) for path in paths]))
            draft.rename(self._record)
        self._made = paths
        for path in paths:
            path.mkdir(exist_ok=True)
            _set_limits(path, self._limits)
        return [str(path / "cgroup.procs") for path in paths]

    def remove(self, moved_to: Path | None = None) -> None:
        """End whatever is in them, and remove them. Raises `SandboxUnreachable` when that does not end.

        `moved_to` is the sandbox's folder where it has another name by now.
        """
        record = self._record if moved_to is None else moved_to / self._record.name
        for path in _recorded(record) or self._made:
            _remove(path, self._name)

    def met(self) -> list[str]:
        """What there was too little of, a sentence each."""
        met: list[str] = []
        if killed := self._count("oom_kill", "memory.events", "memory.oom_control"):
            were = "process was" if killed == 1 else "processes were"
            most = f"{self._limits.memory_mb} MB of memory"
            met.append(f"The sandbox used up its {most}, and {killed} {were} killed (SANDBOX_MEMORY_MB).")
        if self._count("max", "pids.events"):
            met.append(f"The sandbox had {self._limits.pids} processes, and got no more (SANDBOX_PIDS).")
        return met

    def _count(self, key: str, *names: str) -> int:
        for path in _recorded(self._record) or ():
            for name in names:
                with suppress(OSError):
                    for line in (path / name).read_text().splitlines():
                        if line.startswith(f"{key} "):
                            return int(line.split()[1])
        return 0


def _recorded(record: Path) -> list[Path] | None:
    try:
        return [Path(path) for path in json.loads(record.read_text())]
    except (FileNotFoundError, NotADirectoryError):
        return None


def controls() -> frozenset[str]:
    """What can be limited by control groups here, of memory, pids and cpu."""
    return frozenset[str]().union(*(place.controls for place in places()))


@cache
def places() -> Sequence[Place]:
    """Where this process may make control groups. Each was tried out: permissions alone do not tell."""
    found: list[Place] = []
    for own, top, unified in _own_groups():
        # In the second version a group with processes in it has no limited groups below: the nearest one above is
        # taken, which systemd, for one, lends to its user.
        for folder in (own, *own.parents) if unified else (own,):
            if not folder.is_relative_to(top):
                break
            if unified:
                for control in ("memory", "pids"):
                    with suppress(OSError):
                        (folder / "cgroup.subtree_control").write_text(f"+{control}")
            able = _try_out(folder)
            if able & {"memory", "pids"} or (able and not unified):
                found.append(Place(folder, able))
                break
    return found


def _own_groups() -> Iterator[tuple[Path, Path, bool]]:
    """The groups that this process is in, the top of each one's hierarchy, and whether it is of the second version."""
    mounts: dict[str, tuple[str, str]] = {}
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            left, _, right = line.partition(" - ")
            kind, _, options = right.split(" ", 2)
            root, point = left.split()[3:5]
            for name in [""] if kind == "cgroup2" else options.split(",") if kind == "cgroup" else []:
                mounts.setdefault(name, (root, point))
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            name = names.split(",")[0]
            if (name == "" or name in _CONTROLS) and name in mounts:
                root, point = mounts[name]
                if Path(path).is_relative_to(root):
                    yield Path(point) / Path(path).relative_to(root), Path(point), name == ""


def _try_out(folder: Path) -> frozenset[str]:
    """What a new group in a folder limits; empty when none can be made or entered."""
    name = f"cloudagent_try_{secrets.token_hex(8)}"
    group = folder / name
    try:
        group.mkdir()
    except OSError:
        return frozenset()
    try:
        able = frozenset(
            control for control, files in _CONTROLS.items() if any((group / file).exists() for file in files)
        )
        _set_limits(group, Limits())
        enter = ["/bin/sh", "-c", 'echo 0 > "$1"', "sh", str(group / "cgroup.procs")]
        entered = subprocess.run(enter, env={}, capture_output=True, timeout=10, check=False).returncode == 0
        return able if entered else frozenset()
    except (OSError, subprocess.TimeoutExpired):
        return frozenset()
    finally:
        with suppress(SandboxUnreachable):
            _remove(group, name)


def _set_limits(group: Path, limits: Limits) -> None:
    memory = limits.memory_mb * MB
    for name, value in {
        "memory.max": memory,
        "memory.swap.max": 0 if memory else None,
        "memory.limit_in_bytes": memory,
        "memory.memsw.limit_in_bytes": memory,  # with what is swapped out
        "pids.max": limits.pids,
    }.items():
        if value is not None and (value or name == "memory.swap.max") and (group / name).exists():
            (group / name).write_text(str(value))


def _remove(group: Path, name: str) -> None:
    deadline = time.monotonic() + _REMOVE_PATIENCE_S
    while group.is_dir():
        with suppress(FileNotFoundError):
            for pid in (group / "cgroup.procs").read_text().split():
                with processes.open_process(int(pid)) as pidfd:
                    if pidfd is not None and _is_in(int(pid), name):
                        processes.kill_and_wait(pidfd, deadline)
        processes.reap()
        try:
            group.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > deadline:
                raise SandboxUnreachable("The processes of the sandbox do not end.") from None
            time.sleep(_POLL_S)


def _is_in(pid: int, name: str) -> bool:
    """Looked at while a pidfd is open: the pid may have become another's since it was listed."""
    try:
        return f"/{name}\n" in Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return False
