"""Runs INSIDE a sandbox of the test server, as the parent of all its commands; nothing but the standard library.

Its one argument is the number of an inherited socket to the server, which keeps messages apart: JSON both ways, with
file descriptors beside it, so that neither a command's output nor a file's content passes through here. Each request
has an `id` and gets one reply of that id; `{"exited": pid, "status": wait status}` comes by itself. A long message is
in a memory file.

bubblewrap's first process ends the sandbox when this one ends, and this one ends when the server does.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import stat
import sys

TYPE_CHECKING = False  # typing itself takes long to import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

LONG = 50_000


def send(to: socket.socket, message: dict[str, Any], files: Sequence[int] = ()) -> None:
    data = json.dumps(message).encode()
    if len(data) > LONG:
        memory = os.memfd_create("message")
        os.write(memory, data)  # a memory file takes all at once
        os.lseek(memory, 0, os.SEEK_SET)
        try:
            _send(to, b"", [memory, *files])
        finally:
            os.close(memory)
    else:
        _send(to, data, files)


def _send(to: socket.socket, data: bytes, files: Sequence[int]) -> None:
    to.sendmsg([b"+" + data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else [])


def receive(source: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """A message and its files; None at the end. Raises BlockingIOError where there is none yet."""
    data, files, _, _ = socket.recv_fds(source, LONG + 1, 8)
    if not data:
        return None
    for file in files:
        os.set_inheritable(file, False)  # a command that had one of another's would keep that one from ending
    if data == b"+":
        with open(files.pop(0), "rb") as memory:
            return json.load(memory), files
    return json.loads(data[1:]), files


class Supervisor:
    def __init__(self, server: socket.socket) -> None:
        self.server = server
        self.poll = select.poll()
        self.poll.register(server, select.POLLIN)
        self.children: dict[int, int] = {}  # pid by pidfd

    def run(self) -> None:
        send(self.server, {"ready": os.getpid()})
        while True:
            for ready, _ in self.poll.poll():
                if ready == self.server.fileno():
                    if (message := receive(self.server)) is None:
                        return
                    self.serve(*message)
                else:
                    self.reap(ready)

    def serve(self, request: dict[str, Any], files: list[int]) -> None:
        given: list[int] = []
        try:
            reply: dict[str, Any] = getattr(self, "do_" + request["do"])(request, files, given)
        except OSError as error:
            reply = {"errno": error.errno, "error": f"{error.strerror}: {request.get('path', '')}"}
        finally:
            for file in files:
                os.close(file)
        send(self.server, {"id": request["id"], **reply}, given)
        for file in given:
            os.close(file)

    def reap(self, pidfd: int) -> None:
        pid = self.children.pop(pidfd)
        self.poll.unregister(pidfd)
        os.close(pidfd)
        send(self.server, {"exited": pid, "status": os.waitpid(pid, 0)[1]})

    def do_ping(self, request: dict[str, Any], files: list[int], given: list[int]) -> dict[str, Any]:
        return {}

    def do_start(self, request: dict[str, Any], files: list[int], given: list[int]) -> dict[str, Any]:
        if not os.path.isdir(request["path"]):
            raise FileNotFoundError(2, "No such directory")
        pid = os.fork()
        if pid == 0:
            try:
                os.chdir(request["path"])
                for target, file in enumerate(files):
                    os.dup2(file, target)
                for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and what it starts would, too
                    signal.signal(number, signal.SIG_DFL)
                os.execvpe(request["argv"][0], request["argv"], request["env"])
            except OSError as error:
                os.write(2, f"{request['argv'][0]}: {error.strerror}\n".encode())
            finally:
                os._exit(127)
        pidfd = os.pidfd_open(pid)
        self.children[pidfd] = pid
        self.poll.register(pidfd, select.POLLIN)
        return {"pid": pid}

    def do_signal(self, request: dict[str, Any], files: list[int], given: list[int]) -> dict[str, Any]:
        os.kill(request["pid"], request["signal"])
        return {}

    def do_open(self, request: dict[str, Any], files: list[int], given: list[int]) -> dict[str, Any]:
        """For reading; what could block is not opened."""
        found = os.stat(request["path"])
        if not stat.S_ISDIR(found.st_mode):
            given.append(os.open(request["path"], os.O_RDONLY | os.O_NONBLOCK))
        return {"directory": stat.S_ISDIR(found.st_mode), "size": found.st_size}

    def do_create(self, request: dict[str, Any], files: list[int], given: list[int]) -> dict[str, Any]:
        os.makedirs(os.path.dirname(request["path"]), exist_ok=True)
        given.append(os.open(request["path"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK, 0o666))
        return {}

    def do_stat(self, request: dict[str, Any], files: list[int], given: list[int]) -> dict[str, Any]:
        return {"entry": entry(request["path"])}

    def do_list(self, request: dict[str, Any], files: list[int], given: list[int]) -> dict[str, Any]:
        path: str = request["path"]
        root = os.path.realpath(path, strict=True)
        found: list[dict[str, Any]] = []
        for folder, folders, names in os.walk(root):
            for name in sorted(folders + names):
                with contextlib.suppress(FileNotFoundError):
                    found.append(entry(os.path.join(folder, name)))
            if folder[len(root) :].count("/") + 1 >= request["depth"]:
                folders.clear()
        return {"entries": found} if os.path.isdir(root) else {"errno": 20, "error": "path is not a directory"}

    def do_make_dir(self, request: dict[str, Any], files: list[int], given: list[int]) -> dict[str, Any]:
        os.makedirs(request["path"])
        return {"entry": entry(request["path"])}

    def do_remove(self, request: dict[str, Any], files: list[int], given: list[int]) -> dict[str, Any]:
        if os.path.isdir(request["path"]) and not os.path.islink(request["path"]):
            shutil.rmtree(request["path"])
        else:
            with contextlib.suppress(FileNotFoundError):  # as envd has it
                os.unlink(request["path"])
        return {}

    def do_move(self, request: dict[str, Any], files: list[int], given: list[int]) -> dict[str, Any]:
        os.makedirs(os.path.dirname(request["to"]), exist_ok=True)
        os.rename(request["path"], request["to"])
        return {"entry": entry(request["to"])}


def entry(path: str) -> dict[str, Any]:
    """What envd tells of a file; of a link, what it leads to."""
    itself = os.lstat(path)
    target = os.path.realpath(path) if stat.S_ISLNK(itself.st_mode) else None
    found = os.stat(path) if target is not None and os.path.exists(path) else itself
    kind = {stat.S_IFREG: "FILE_TYPE_FILE", stat.S_IFDIR: "FILE_TYPE_DIRECTORY", stat.S_IFLNK: "FILE_TYPE_SYMLINK"}
    return {
        "name": os.path.basename(path),
        "path": path,
        "type": kind.get(stat.S_IFMT(found.st_mode), "FILE_TYPE_UNSPECIFIED"),
        "size": found.st_size,
        "mode": stat.S_IMODE(found.st_mode),
        "permissions": stat.filemode(found.st_mode),
        "owner": "user",
        "group": "user",
        "modified": found.st_mtime_ns,
        "target": target,
    }


if __name__ == "__main__":
    os.set_inheritable(int(sys.argv[1]), False)
    Supervisor(socket.socket(fileno=int(sys.argv[1]))).run()
