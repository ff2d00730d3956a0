"""One sandbox: a folder, and a bubblewrap with a supervisor in it for as long as the sandbox lives."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from cloudagent_queue.sandboxes.bubblewrap import Bubblewrap, isolation
from tests.support.e2b_server import supervisor

USER = "user"
HOME = "/home/user"
BARE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PATH_WITH_AGENT = f"{Path(sys.executable).parent}:{BARE_PATH}"
"""Its `python3` is this interpreter, which has the agent's library."""

_SUPERVISOR_INSIDE = "/run/supervisor.py"


class Refused(Exception):
    """The kernel's word on an operation inside, such as ENOENT."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(message)
        self.errno = errno


class Gone(Exception):
    """The sandbox ended."""


class Isolated:
    """A supervisor in a bubblewrap, and the conversation with it."""

    def __init__(self, folder: Path, bubblewrap: Bubblewrap, *, hidden: Path, shared: str | None = None) -> None:
        self.folder = folder
        self.gone = asyncio.Event()
        self.ended_at: float | None = None
        self.exits: dict[int, asyncio.Future[int]] = {}
        """The wait status of each started process, by pid."""
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._replies: dict[Any, asyncio.Future[tuple[dict[str, Any], list[int]]]] = {}
        (folder / "home").mkdir(parents=True, exist_ok=True)
        self._socket, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        users = _in_memory(f"root:x:0:0::/root:/bin/bash\n{USER}:x:1000:1000::{HOME}:/bin/bash\n")
        groups = _in_memory(f"root:x:0:\n{USER}:x:1000:\n")
        arguments = ["--bind", str(folder / "home"), HOME, *isolation(hidden=hidden), "--uid", "1000", "--gid", "1000"]
        arguments += ["--ro-bind-data", str(users), "/etc/passwd", "--ro-bind-data", str(groups), "/etc/group"]
        arguments += ["--ro-bind", supervisor.__file__, _SUPERVISOR_INSIDE, "--chdir", HOME]
        arguments += ["--die-with-parent", *(["--bind", shared, shared] if shared is not None else [])]
        python = [sys.executable, "-I", "-S", _SUPERVISOR_INSIDE, str(inside.fileno())]
        # In this thread: a sandbox dies with the thread that has started it.
        self._outer = subprocess.Popen(
            [bubblewrap.path, *arguments, "--", *python],
            env={"PATH": BARE_PATH, "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            pass_fds=(inside.fileno(), users, groups),
        )
        inside.close()
        for file in (users, groups):
            os.close(file)
        self._socket.setblocking(False)
        self._loop.add_reader(self._socket.fileno(), self._receive)
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._pidfd = os.pidfd_open(self._outer.pid)
        self._loop.add_reader(self._pidfd, self._ended)

    async def ready(self) -> None:
        """Returns when commands can be started. Raises `Gone`."""
        await self._ready

    async def ask(self, do: str, *files: int, **request: Any) -> tuple[dict[str, Any], list[int]]:
        """Have the supervisor do something; the answer and the open files that come with it.

        Raises `Refused` and `Gone`. While the sandbox is frozen, it waits.
        """
        number = next(self._numbers)
        reply = self._replies[number] = self._loop.create_future()
        try:
            while not self.gone.is_set():
                try:
                    supervisor.send(self._socket, {"id": number, "do": do, **request}, files)
                    break
                except BlockingIOError:  # frozen, and much was asked already
                    await asyncio.sleep(0.02)
                except OSError:
                    await self.gone.wait()
            if self.gone.is_set():
                raise Gone
            answer, given = await reply
        finally:
            self._replies.pop(number, None)
        if "errno" in answer:
            raise Refused(answer["errno"], answer["error"])
        return answer, given

    async def start(self, argv: Sequence[str], env: Mapping[str, str], cwd: str, files: Sequence[int]) -> int:
        answer, _ = await self.ask("start", *files, argv=list(argv), env=dict(env), path=cwd)
        return answer["pid"]

    def freeze(self) -> None:
        """Stop every process in there."""
        for _ in range(3):  # those that were started meanwhile, too
            for process in self._processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)

    async def copy_home(self, target: Path) -> None:
        """A copy of its files as they are at one moment."""
        self.freeze()
        try:
            await asyncio.to_thread(copy_files, self.folder / "home", target)
        finally:
            self.thaw()

    async def kill(self) -> None:
        """End every process in there, and forget its files."""
        self.end()
        await self.gone.wait()
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)

    def end(self) -> None:
        """Kill the first process of the namespace, and with it all others."""
        for process in psutil.Process(self._outer.pid).children() if not self.gone.is_set() else []:
            process.kill()

    def first_process(self) -> int | None:
        """The host's pid of the namespace's first process."""
        return next((process.pid for process in self._processes()), None)

    def _processes(self) -> list[psutil.Process]:
        return [] if self.gone.is_set() else psutil.Process(self._outer.pid).children(recursive=True)

    def _receive(self) -> None:
        while True:
            try:
                found = supervisor.receive(self._socket)
            except BlockingIOError:
                return
            except OSError:
                found = None
            if found is None:
                self._loop.remove_reader(self._socket.fileno())
                return
            message, files = found
            if "ready" in message:
                if not self._ready.done():
                    self._ready.set_result(None)
            elif "exited" in message:
                self.exit_of(message["exited"]).set_result(message["status"])
            elif reply := self._replies.get(message["id"]):
                if not reply.done():
                    reply.set_result((message, files))
            else:
                for file in files:
                    os.close(file)

    def exit_of(self, pid: int) -> asyncio.Future[int]:
        """Has the wait status when that process ended; known from its start on, even where it ended at once."""
        return self.exits.setdefault(pid, self._loop.create_future())

    def _ended(self) -> None:
        self._receive()
        self._loop.remove_reader(self._pidfd)
        self._loop.remove_reader(self._socket.fileno())
        self._outer.wait()
        os.close(self._pidfd)
        self._socket.close()
        self.ended_at = time.time()
        self.gone.set()
        for future in [*self._replies.values(), *self.exits.values(), self._ready]:
            if not future.done():
                future.set_exception(Gone())
                future.exception()  # nobody may be waiting


def copy_files(source: Path, target: Path) -> None:
    """All of a folder, whatever kind of file is in it."""
    target.mkdir(parents=True)
    subprocess.run(["cp", "-a", f"{source}/.", target], check=True)


def _in_memory(content: str) -> int:
    file = os.memfd_create("e2b_server", os.MFD_CLOEXEC)
    os.write(file, content.encode())
    os.lseek(file, 0, os.SEEK_SET)
    return file
