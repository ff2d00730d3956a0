"""A network of its own for a sandbox of this machine: empty, but for the way to a proxy that keeps an allow-list.

The proxy (`egress_proxy.py`) is a process of the host's, one for each sandbox, started when something first runs there
and again whenever it is found dead. In the sandbox's folder:

    egress.sock          where it is told of each new network namespace; nothing inside can see it
    egress_*.record      the record of its process (see processes.py)
    egress.log           why it died, if it did
    blocked.txt          what it refused, a line each

A proxy that dies under a running agent leaves it without a network: the namespace's sockets died with it.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cloudagent_storage
from cloudagent_queue.sandboxes import processes
from cloudagent_queue.sandboxes.egress import AllowList
from cloudagent_queue.sandboxes.egress_proxy import BLOCKED

PROXY_PORT = 61080
"""Of 127.0.0.1 inside. Above the ports that the kernel hands out by itself."""
NO_WAY_OUT = 125
"""The exit code of a command that was not started because its network could not be had."""

_DIAL_S = 20.0
_BLOCKED_BYTES = 100_000
_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")

PROGRAM = "from cloudagent_queue.sandboxes.egress_proxy import main; main()"
"""What the proxy's process runs."""
_SOURCES = (Path(__file__).parents[2], Path(cloudagent_storage.__file__).parents[1])

# The first program in a new network namespace. It becomes the command: the pid and the way to signal it stay the same.
# What it was given to hand the sockets out is closed by then, and worth nothing: the proxy listens to nothing more.
_INSIDE = """
import json, os, signal, socket, sys
control = socket.socket(fileno=int(sys.argv[1]))
bound, listeners = [], []
for host, port in json.loads(sys.argv[2]):
    try:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(512)
    except OSError:
        if not bound:
            raise
        continue  # ::1 where there is no IPv6
    bound.append((host, port))
    listeners.append(listener)
socket.send_fds(control, [json.dumps(bound).encode()], [listener.fileno() for listener in listeners])
control.settimeout(60)
try:
    ready = control.recv(16) == b"ok"
except OSError:
    ready = False
if not ready:
    print("The proxy of the sandbox does not answer.", flush=True)
    os._exit(NO_WAY_OUT)
control.close()
for listener in listeners:
    listener.close()
for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
    signal.signal(number, signal.SIG_DFL)
try:
    os.execvp(sys.argv[3], sys.argv[3:])
except OSError as error:
    print(f"{sys.argv[3]}: {error.strerror}", flush=True)
    os._exit(127)
""".replace("NO_WAY_OUT", str(NO_WAY_OUT))


@dataclass(frozen=True)
class WayOut:
    """What a command needs to be started in a network namespace of its own."""

    control: int
    """A descriptor for its first program."""
    listen: Sequence[tuple[str, int]]

    def wrap(self, command: Sequence[str], *, python: str) -> list[str]:
        """The command, behind the program that opens the way out."""
        return [python, "-I", "-S", "-c", _INSIDE, str(self.control), json.dumps(self.listen), *command]

    def environment(self, env: Mapping[str, str]) -> dict[str, str]:
        """The variables by which programs find the proxy, in place of those that named another."""
        kept = {name: value for name, value in env.items() if name.upper() not in _VARIABLES}
        address = f"http://127.0.0.1:{PROXY_PORT}"
        own = dict.fromkeys(_VARIABLES[:3], address) | {"NO_PROXY": "localhost,127.0.0.1,::1"}
        return {
            **kept,
            **own,
            **{name.lower(): value for name, value in own.items()},
            "NODE_USE_ENV_PROXY": "1",  # Node.js looks at them only when told to
        }


class Network:
    """The network of one sandbox."""

    def __init__(self, folder: Path, egress: Sequence[str], *, marker: str) -> None:
        """Raises `InvalidEgress`."""
        self._folder = folder
        self._marker = marker
        self._listen = [("127.0.0.1", PROXY_PORT), *AllowList(egress).of_this_machine]

    @contextmanager
    def way_out(self, env: Mapping[str, str], *, lasting: bool) -> Generator[WayOut]:
        """The way out for one command. Unless it is lasting, it is closed in the end, whoever may still use it.

        `env` is the command's environment; a proxy that is named there is used for whatever is allowed.
        Raises OSError.
        """
        upper = {name.upper(): value for name, value in sorted(env.items()) if name.upper() in _VARIABLES and value}
        with self._dial_or_start() as control:
            control.send(json.dumps({"lasting": lasting, "upstream": upper}).encode())
            yield WayOut(control.fileno(), self._listen)

    def blocked(self) -> Sequence[str]:
        """What was refused, as `host:port`, each once."""
        try:
            with open(self._folder / BLOCKED, encoding="ascii", errors="replace") as file:
                return file.read(_BLOCKED_BYTES).splitlines()
        except FileNotFoundError:
            return []

    def end(self) -> None:
        """End the proxy. Raises `SandboxUnreachable`."""
        for path in self._folder.glob("egress_*.record"):
            record = processes.Record(path, marker=self._marker)
            record.kill()
            record.remove()

    def _dial_or_start(self) -> socket.socket:
        if (control := self._dial()) is not None:
            return control
        with open(self._folder / "egress.lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (control := self._dial()) is None:  # nobody was faster
                self._start()
                control = self._dial()
        if control is None:
            raise ConnectionRefusedError
        return control

    def _dial(self) -> socket.socket | None:
        """A conversation with the proxy, or None when there is no proxy."""
        control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            control.settimeout(_DIAL_S)
            with self._socket_path() as path:
                control.connect(path)
            control.settimeout(None)  # the program inside shares it
        except (FileNotFoundError, ConnectionRefusedError):
            control.close()
            return None
        except BaseException:
            control.close()
            raise
        return control

    def _start(self) -> None:
        self.end()
        (self._folder / "egress.sock").unlink(missing_ok=True)
        record = processes.Record(self._folder / f"egress_{secrets.token_hex(8)}.record", marker=self._marker)
        # It listens before the proxy runs: who comes meanwhile waits.
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            with self._socket_path() as path:
                listener.bind(path)
            listener.listen(128)
            load = f"import sys; sys.path += sys.argv[1:-1]; {PROGRAM}"
            sources = [str(source) for source in _SOURCES]
            with record.new() as opened, open(self._folder / "egress.log", "ab") as log:
                child = processes.launch(
                    [sys.executable, "-I", "-S", "-c", load, *sources, str(listener.fileno())],
                    env={processes.MARKER: self._marker, "LANG": "C.UTF-8"},
                    output=log,
                    cwd=self._folder,
                    write_pid_to=opened,
                    keep_open=[listener.fileno()],
                )
        processes.let_run(child)
        record.settle(child)

    @contextmanager
    def _socket_path(self) -> Generator[str]:
        """The socket's path. Through a descriptor: a path of a socket has 107 bytes at most."""
        folder = os.open(self._folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield f"/proc/self/fd/{folder}/egress.sock"
        finally:
            os.close(folder)
