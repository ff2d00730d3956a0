"""Sandboxes on this machine: bubblewrap around ordinary processes, or, when an operator says so, nothing around them.

A sandbox is a folder of the host's:

    <id>/meta.json       metadata; a folder of this name always has one
    <id>/started*.jsonl  the records of the started commands (see processes.py), run_*.jsonl those of `run`; *.lock
    <id>/output.log      what the started command printed
    <id>/root/           all that the processes inside can write to
    <id>/egress…         where there is a list of hosts that may be reached (see network.py)
    <id>/groups.json, disk.json    of its limits (see limits.py and disk_watch.py)

Isolation is that of Linux namespaces: the kernel is shared with the host, and so is the network where no such list is
asked for.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from cloudagent_queue.sandboxes import (
    PLAIN,
    CommandResult,
    Resources,
    SandboxInfo,
    SandboxSpec,
    Watched,
    disk_watch,
    place_of,
    processes,
    safe_files,
)
from cloudagent_queue.sandboxes.bubblewrap import (
    Bubblewrap,
    find_bubblewrap,
    in_memory,
    isolation,
    library_path,
    own_network,
    socket_filter,
)
from cloudagent_queue.sandboxes.egress import parse_rule
from cloudagent_queue.sandboxes.limits import MB, NO_LIMITS, Groups, Limits
from cloudagent_queue.sandboxes.network import Network, WayOut
from cloudagent_storage.errors import SandboxError, SandboxGone, SandboxUnavailable, SandboxUnreachable
from cloudagent_storage.records import new_id

SANDBOX_PATH = f"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:{Path(sys.executable).parent}"
"""The interpreter that comes along is last: only a machine without a Python of its own needs it."""
INSIDE_ROOT = "/sandbox"

NO_SUCH_COMMAND = 127
"""The exit code of a command that cannot be executed, as shells have it."""

_RUN_MARKER = "CLOUDAGENT_RUN"
_ABANDONED_AFTER_S = 3600.0
_STOP_PATIENCE_S = 2.0
_LOOK_AGAIN_S = 0.1


class LocalSandbox(ABC):
    """A sandbox of this machine. What surrounds its processes is said by the two classes below."""

    python = sys.executable
    resources: Resources | None = None
    remark: str | None = None

    def __init__(self, folder: Path) -> None:
        self.id = folder.name
        self._folder = folder
        self._files = folder / "root"
        self._starts = processes.Starts(folder, marker=self.id)
        self.root = str(self._files)

    def start(self, command: Sequence[str], *, env: Mapping[str, str], number: int = 1) -> None:
        self._check_exists()
        home = self._path_inside(safe_files.check_folder(self._files, "home", create=True))
        try:
            environment = self._environment(env, home=home)
            with (
                self._starts.new(number) as record,
                open(self._folder / "output.log", "ab") as output,
                self._way_out(environment, lasting=True) as way_out,
            ):
                child = self._launch(
                    command, record, env=environment, cwd="", output=output, run_id=None, way_out=way_out
                )
        except FileExistsError:
            raise SandboxError("That command was started already, or another one runs.") from None
        except OSError as error:
            self._check_exists()
            raise SandboxUnreachable("The host could not start a process in the sandbox.") from error
        processes.let_run(child)
        if not self._starts.record(number).settle(child):
            raise SandboxUnavailable

    def alive(self) -> bool:
        processes.reap()
        self._check_exists()
        return self._starts.last.alive()

    def run(
        self,
        command: Sequence[str],
        *,
        timeout_s: float,
        env: Mapping[str, str] | None = None,
        cwd: str = ".",
        home: str | None = None,
    ) -> CommandResult:
        """Run a command to its end; whatever it leaves running ends with it.

        Raises `SandboxError` when `cwd` or `home` is no folder below the root.
        """
        self._check_exists()
        met_before = self.limits_met()
        deadline = time.monotonic() + timeout_s
        cwd = safe_files.check_folder(self._files, cwd)
        home = self._path_inside(safe_files.check_folder(self._files, home or "home", create=True))
        run_id = secrets.token_hex(8)
        environment = self._environment(env or {}, home=home)
        run = processes.Record(self._folder / f"run_{run_id}.jsonl", marker=self.id)
        with ExitStack() as until_the_end:
            try:
                with run.new() as record:
                    way_out = until_the_end.enter_context(self._way_out(environment, lasting=False))
                    child = self._launch(
                        command,
                        record,
                        env=environment,
                        cwd=cwd,
                        output=subprocess.PIPE,
                        run_id=run_id,
                        way_out=way_out,
                    )
            except OSError as error:
                self._check_exists()
                raise SandboxUnreachable("The host could not start a process in the sandbox.") from error
            assert child.stdout is not None
            until_the_end.enter_context(child.stdout)
            output = processes.BoundedOutput(child.stdout)
            try:
                run.settle(child)
                in_time = output.follow(child, deadline)
            finally:
                processes.let_run(child)  # reaped later, should ending it fail
                self._end_run(run, run_id)
                child.kill()  # where somebody killed the sandbox meanwhile, its record is gone
                exit_code = child.wait()
                if not self._folder.exists():
                    self._remove_groups()  # nobody else knows of them any more
                ended = run.read()
                run.remove()
            output.drain()
        text = output.text()
        if exit_code != 0 and (met := [line for line in self.limits_met() if line not in met_before]):
            text = "\n".join([text, *met])
        if not in_time:
            return CommandResult(exit_code=None, output=text)
        if not self._began(ended):
            self._check_exists()
            # Nothing of the sandbox's ran, so these are the words of bubblewrap.
            if not output.text().startswith("bwrap: execvp "):
                raise SandboxError("The command could not be started in the sandbox.")
            exit_code = NO_SUCH_COMMAND
        return CommandResult(exit_code=exit_code if exit_code >= 0 else 128 - exit_code, output=text)

    def output(self, *, max_bytes: int = 40_000) -> bytes:
        """The end of what the started command printed, and the limits that it ran into. Untrusted."""
        met = "".join(f"\n{line}" for line in self.limits_met()).encode()[:max_bytes]
        try:
            with open(self._folder / "output.log", "rb") as file:
                size = file.seek(0, os.SEEK_END)
                room = max_bytes - len(met)
                file.seek(max(0, size - room))
                return file.read(room) + met
        except FileNotFoundError:
            self._check_exists()
            return b""

    def read(self, path: str, *, offset: int = 0, max_bytes: int) -> bytes:
        return safe_files.read(self._files, path, offset=offset, max_bytes=max_bytes)

    def watch(self, path: str, *, offset: int, max_bytes: int, wait_s: float) -> Watched:
        deadline = time.monotonic() + wait_s
        while True:
            alive = self.alive()
            data = self.read(path, offset=offset, max_bytes=max_bytes)
            left = deadline - time.monotonic()
            if data or not alive or left <= 0:
                return Watched(data, alive)
            time.sleep(min(_LOOK_AGAIN_S, left))

    def write(self, path: str, data: bytes) -> None:
        safe_files.write(self._files, path, data)

    def extend(self, seconds: float) -> None:
        """Nothing to ask for: a sandbox of this machine stays until it is killed."""
        self._check_exists()

    def blocked(self) -> Sequence[str]:
        return ()

    def limits_met(self) -> Sequence[str]:
        return ()

    def snapshot(self) -> str | None:
        return None

    def end_processes(self) -> None:
        self._check_exists()
        self._end_all()

    def kill(self) -> None:
        self._end_all()
        self._end_proxy()
        # Before the folder, which says where they are; and once more for a command that was just being started.
        self._remove_groups()
        gone = self._folder.with_name(f".gone_{self.id}")
        with suppress(FileNotFoundError):
            self._folder.rename(gone)
            self._remove_groups(gone)
        # From here on nobody finds it; what a crash or a failing disk leaves of it is removed by `list`.
        with suppress(OSError):
            safe_files.remove_tree(gone)

    @abstractmethod
    def stop(self) -> None: ...

    @abstractmethod
    def _launch(
        self,
        command: Sequence[str],
        record: processes.OpenRecord,
        *,
        env: Mapping[str, str],
        cwd: str,
        output: int | IO[bytes],
        run_id: str | None,
        way_out: WayOut | None,
    ) -> subprocess.Popen[bytes]:
        """Start a process in the sandbox; without a `run_id` it outlives us."""

    @contextmanager
    def _way_out(self, env: Mapping[str, str], *, lasting: bool) -> Generator[WayOut | None]:
        """What a command needs for a network of its own; None where it shares the host's."""
        yield None

    def _began(self, ended: Mapping[str, Any]) -> bool:
        """Did the command of a record get as far as running?"""
        return True

    def _end_run(self, run: processes.Record, run_id: str) -> None:
        run.kill()

    def _end_all(self) -> None:
        for path in self._folder.glob("*.jsonl"):
            processes.Record(path, marker=self.id).kill()

    def _end_proxy(self) -> None:
        """End what lives outside for this sandbox alone."""
        return

    def _remove_groups(self, moved_to: Path | None = None) -> None:
        """Remove what limits its processes; also from where its folder was moved to."""
        return

    def _environment(self, env: Mapping[str, str], *, home: str) -> dict[str, str]:
        whole = {
            "PATH": SANDBOX_PATH,
            "HOME": home,
            "LANG": "C.UTF-8",
            "TMPDIR": "/tmp",
            "IS_SANDBOX": "1",  # the Claude CLI works as root only where it is told that this is a sandbox
            **env,
            processes.MARKER: self.id,
        }
        if any(not name or "=" in name or "\0" in name + value for name, value in whole.items()):
            raise SandboxError("A variable of the environment has an impossible name or value.")
        return whole

    def _path_inside(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def _check_exists(self) -> None:
        if not self._folder.is_dir():
            raise SandboxGone


class BubblewrapSandbox(LocalSandbox):
    """Own user, pid, ipc and uts namespaces, and of the host's files only what is named here, read-only.

    With a list of hosts, a network namespace, too.
    """

    def __init__(
        self, folder: Path, bubblewrap: Callable[[], Bubblewrap], *, egress: Sequence[str] | None, limits: Limits
    ) -> None:
        super().__init__(folder)
        self._limits = limits
        self._groups = Groups(folder, limits)
        self.root = INSIDE_ROOT
        self._bubblewrap = bubblewrap
        self._network = None if egress is None else Network(folder, egress, marker=self.id)

    def blocked(self) -> Sequence[str]:
        self._check_exists()
        return () if self._network is None else self._network.blocked()

    def limits_met(self) -> Sequence[str]:
        ended = disk_watch.said_of(self._folder)
        return [*self._groups.met(), *([] if ended is None else [ended])]

    def _end_proxy(self) -> None:
        if self._network is not None:
            self._network.end()

    def _remove_groups(self, moved_to: Path | None = None) -> None:
        self._groups.remove(moved_to)

    def _confine(self) -> processes.Confinement:
        """Raises OSError, and `SandboxGone` when it was deleted meanwhile."""
        disk_watch.ensure(self._folder.parent)
        groups = self._groups.make()
        if not self._folder.is_dir():  # whoever deletes it looks for groups once more after this
            self._groups.remove()
            raise SandboxGone
        return processes.Confinement(groups, file_bytes=self._limits.disk_mb * MB)

    def stop(self) -> None:
        # The first process of a pid namespace ignores SIGTERM and passes nothing on: the command must get it itself.
        self._check_exists()
        deadline = time.monotonic() + _STOP_PATIENCE_S
        started = self._starts.last
        while started.alive() and time.monotonic() < deadline:
            with started.process() as process:
                if process is not None and processes.terminate_first_child(process[0]):
                    return
            time.sleep(0.01)  # bubblewrap has not come as far as the command yet

    def _began(self, ended: Mapping[str, Any]) -> bool:
        return "exit-code" in ended

    @contextmanager
    def _way_out(self, env: Mapping[str, str], *, lasting: bool) -> Generator[WayOut | None]:
        if self._network is None:
            yield None
        else:
            with self._network.way_out(env, lasting=lasting) as way_out:
                yield way_out

    def _launch(
        self,
        command: Sequence[str],
        record: processes.OpenRecord,
        *,
        env: Mapping[str, str],
        cwd: str,
        output: int | IO[bytes],
        run_id: str | None,
        way_out: WayOut | None,
    ) -> subprocess.Popen[bytes]:
        if way_out is not None:
            env, command = way_out.environment(env), way_out.wrap(command, python=self.python)
        command = self._limits.wrap(command, python=self.python)
        uid, gid = os.geteuid(), os.getegid()
        user = "root" if uid == 0 else "agent"
        passwd = f"{user}:x:{uid}:{gid}::{self._path_inside('home')}:/bin/sh\n"
        with (
            in_memory(passwd) as users,
            in_memory(f"{user}:x:{gid}:\n") as groups,
            in_memory(socket_filter() or b"") as sockets,
        ):
            arguments = [
                *isolation(hidden=self._folder.parent.parent),
                *["--ro-bind-data", str(users), "/etc/passwd", "--ro-bind-data", str(groups), "/etc/group"],
                *["--bind", str(self._files), INSIDE_ROOT],
                *["--chdir", self._path_inside(cwd)],
                # bubblewrap's outer process writes the record; it, and the first one inside, keep the lock.
                *["--json-status-fd", str(record.file), "--sync-fd", str(record.lock)],
                *([] if run_id is None else ["--die-with-parent"]),
                *([] if way_out is None else own_network(sockets)),
            ]
            library = library_path()
            for name, value in (env if library is None else {"PYTHONPATH": library, **env}).items():
                arguments += ["--setenv", name, value]
            # Through a descriptor: process lists are public. bubblewrap itself runs without the caller's variables,
            # which could make the host's loader load something.
            with in_memory("".join(f"{argument}\0" for argument in arguments)) as file:
                return processes.launch(
                    [self._bubblewrap().path, "--args", str(file), "--", *command],
                    env={processes.MARKER: self.id, "LANG": "C.UTF-8"},
                    output=output,
                    confinement=self._confine(),
                    keep_open=(
                        *(file, record.file, record.lock, users, groups),
                        *(() if way_out is None else (sockets, way_out.control)),
                    ),
                )


class UnsafeProcessSandbox(LocalSandbox):
    """No isolation at all: processes of this user, recognised by a variable in their environment."""

    def stop(self) -> None:
        self._check_exists()
        with self._starts.last.process() as process:
            if process is not None:
                processes.terminate(process[1])

    def _end_run(self, run: processes.Record, run_id: str) -> None:
        run.kill()
        processes.kill_marked(run_id, name=_RUN_MARKER)

    def _end_all(self) -> None:
        super()._end_all()
        processes.kill_marked(self.id)

    def _launch(
        self,
        command: Sequence[str],
        record: processes.OpenRecord,
        *,
        env: Mapping[str, str],
        cwd: str,
        output: int | IO[bytes],
        run_id: str | None,
        way_out: WayOut | None,
    ) -> subprocess.Popen[bytes]:
        if run_id is not None:
            env = {**env, _RUN_MARKER: run_id}
        return processes.launch(command, env=env, output=output, cwd=self._path_inside(cwd), write_pid_to=record)


class _FolderProvider(ABC):
    """What both providers of this module share: a folder with one folder per sandbox in it."""

    name: str
    session_cap_s: float | None = None
    template: str | None = None

    def __init__(self, folder: Path, limits: Limits = NO_LIMITS) -> None:
        self._folder = folder.absolute()
        self._limits = limits

    @property
    def place(self) -> str:
        return place_of(self._folder.parent)

    def create(self, spec: SandboxSpec = PLAIN, *, metadata: Mapping[str, str]) -> LocalSandbox:
        self.self_check()
        egress = None if spec.egress is None else self._check_egress(spec.egress)
        sandbox_id = new_id("sbx")
        about = {
            "provider": self.name,
            "created": datetime.now(UTC).isoformat(),
            "metadata": dict(metadata),
            "egress": egress,
            "limits": self._limits.as_dict(),
        }
        # Renamed when complete, so that a folder of a sandbox's name always has its metadata.
        fresh = self._folder / f".new_{sandbox_id}"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            fresh.mkdir(mode=0o700)
            (fresh / "root").mkdir(mode=0o700)
            (fresh / "meta.json").write_text(json.dumps(about))
            return self._sandbox(fresh.rename(self._folder / sandbox_id), about)
        except OSError as error:
            raise SandboxUnavailable(
                "The data folder takes no new sandbox.",
                remedy="Check CLOUDAGENT_HOME: its owner, its permissions and the free space on its disk.",
            ) from error

    def connect(self, sandbox_id: str) -> LocalSandbox:
        about = self._about(self._folder / sandbox_id) if disk_watch.SANDBOX_ID.fullmatch(sandbox_id) else None
        if about is None:
            raise SandboxGone
        if about["provider"] != self.name:
            raise SandboxUnreachable("The sandbox belongs to another provider.")
        return self._sandbox(self._folder / sandbox_id, about)

    def list(self, metadata: Mapping[str, str]) -> Sequence[SandboxInfo]:
        found: list[SandboxInfo] = []
        if not self._folder.is_dir():
            return found
        for folder in sorted(self._folder.iterdir()):
            if not disk_watch.SANDBOX_ID.fullmatch(folder.name):
                _remove_abandoned(folder)
            elif (about := self._about(folder)) and about["provider"] == self.name:
                if metadata.items() <= about["metadata"].items():
                    found.append(SandboxInfo(id=folder.name, metadata=about["metadata"]))
        return found

    def forget(self, template: str) -> None:
        return  # nothing was kept: `snapshot` makes none

    @abstractmethod
    def self_check(self) -> str: ...

    @abstractmethod
    def _sandbox(self, folder: Path, about: Mapping[str, Any]) -> LocalSandbox: ...

    def _check_egress(self, egress: Sequence[str]) -> list[str] | None:
        """The list as it will be kept; None where none can be. Raises `InvalidEgress` and `SandboxUnavailable`."""
        return [str(parse_rule(entry)) for entry in egress]

    def _about(self, folder: Path) -> dict[str, Any] | None:
        with suppress(FileNotFoundError):
            return json.loads((folder / "meta.json").read_text())
        return None


class LocalProvider(_FolderProvider):
    """Sandboxes made by bubblewrap."""

    name = "local"

    def __init__(
        self,
        folder: Path,
        env: Mapping[str, str] | None = None,
        *,
        bubblewraps: Sequence[tuple[str, str]] | None = None,
    ) -> None:
        """`bubblewraps` are the programs to try, as (path, origin); left out, the system's and the bundled one."""
        super().__init__(folder, Limits.read(env or {}))
        self._candidates = bubblewraps
        self._found: Bubblewrap | None = None

    def self_check(self) -> str:
        found = self._bubblewrap()
        hosts = "" if found.own_network else "; cannot limit which hosts are reached"
        return f"{found.description}{hosts}; {self._limits.description()}"

    def _bubblewrap(self) -> Bubblewrap:
        if self._found is None:
            self._found = find_bubblewrap(self._candidates)
        return self._found

    def _check_egress(self, egress: Sequence[str]) -> list[str] | None:
        if not self._bubblewrap().own_network:
            raise SandboxUnavailable(
                "This machine gives a sandbox no network of its own, so that no list of allowed hosts could be kept.",
                remedy="Let unprivileged user namespaces configure a network (in a container, its seccomp and AppArmor "
                "profiles decide), or let agents reach every host, this machine included: SANDBOX_EGRESS=open.",
            )
        return super()._check_egress(egress)

    def _sandbox(self, folder: Path, about: Mapping[str, Any]) -> LocalSandbox:
        limits = Limits.kept(about)
        return BubblewrapSandbox(folder, self._bubblewrap, egress=about.get("egress"), limits=limits)


class UnsafeProcessProvider(_FolderProvider):
    """No sandbox: ordinary processes of this user. Only for a machine that one can afford to lose."""

    name = "unsafe-process"

    def __init__(self, folder: Path, env: Mapping[str, str] | None = None) -> None:
        """No variable has a meaning here."""
        super().__init__(folder)

    def self_check(self) -> str:
        if sys.platform != "linux":
            raise SandboxUnavailable(
                "Agents cannot run as plain processes on this operating system yet.",
                remedy="Run cloudagent on Linux, for example in a virtual machine, or use a remote sandbox provider.",
            )
        return "no sandbox: agents run as processes of this user, and reach every host that it can reach"

    def _check_egress(self, egress: Sequence[str]) -> list[str] | None:
        super()._check_egress(egress)
        return None

    def _sandbox(self, folder: Path, about: Mapping[str, Any]) -> LocalSandbox:
        return UnsafeProcessSandbox(folder)


def _remove_abandoned(folder: Path) -> None:
    """Remove a sandbox that was half made or half deleted when its worker died. After an hour nobody is at it."""
    if folder.name.startswith((".new_sbx_", ".gone_sbx_")):
        with suppress(OSError):
            if time.time() - folder.lstat().st_ctime > _ABANDONED_AFTER_S:
                safe_files.remove_tree(folder)
