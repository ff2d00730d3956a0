"""Sandboxes with an allow-list, as tests of egress make them, and what is in the host's network to be reached."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from cloudagent_queue.sandboxes import Sandbox, SandboxSpec, network
from cloudagent_queue.sandboxes.local import LocalProvider
from tests.support import named_hosts

ABOVE = Path(__file__).parents[2]


class Host:
    """A web server of this machine, on all its addresses, that says who came."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        seen = self.seen

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                seen.append(f"{self.path} {self.headers.get('Host')}")
                body = f"served at {self.connection.getsockname()[0]}\n{self.headers}".encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None: ...

        class Server(ThreadingHTTPServer):
            request_queue_size = 1024

            def handle_error(self, request: object, client_address: object) -> None:
                """A client that goes away is no news."""

        self.server = Server(("0.0.0.0", 0), Handler)
        self.port: int = self.server.server_port
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


@contextmanager
def closed_provider(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[LocalProvider]:
    """A provider whose proxies resolve the names that `make` says."""
    monkeypatch.setattr(network, "PROGRAM", named_hosts.PROGRAM)
    monkeypatch.setattr(network, "_SOURCES", (ABOVE, ABOVE / "queue", ABOVE / "storage"))
    made = LocalProvider(folder / "data" / "sandboxes")
    yield made
    for left in made.list({}):
        made.connect(left.id).kill()


def make(
    provider: LocalProvider, *egress: str, names: dict[str, list[list[str]]] | None = None, **more: Any
) -> Sandbox:
    sandbox = provider.create(SandboxSpec(egress=egress), metadata={})
    (folder_of(provider, sandbox) / "names.json").write_text(json.dumps({"names": names or {}, **more}))
    return sandbox


def folder_of(provider: LocalProvider, sandbox: Sandbox) -> Path:
    return provider._folder / sandbox.id  # pyright: ignore[reportPrivateUsage]


def proxy_of(provider: LocalProvider, sandbox: Sandbox) -> psutil.Process:
    """The living proxy's process."""
    (record,) = folder_of(provider, sandbox).glob("egress_*.record")
    pids = [json.loads(line)["child-pid"] for line in record.read_text().splitlines() if "child-pid" in line]
    return psutil.Process(pids[0])


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def inside(sandbox: Sandbox, script: str, *arguments: object, **more: Any) -> Any:
    """What a script in the sandbox prints, as JSON."""
    given = [json.dumps(argument) for argument in arguments]
    head = "import json, os, socket, sys, time\ngiven = [json.loads(argument) for argument in sys.argv[1:]]\n"
    done = sandbox.run([sandbox.python, "-c", head + script, *given], timeout_s=90, **more)
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


CONNECT = """
def attempt(host, port):
    try:
        with socket.create_connection((host, port), timeout=5) as connection:
            connection.sendall(b"GET /raw HTTP/1.0\\r\\n\\r\\n")
            return connection.recv(100).decode()[:15]
    except OSError as error:
        return type(error).__name__
print(json.dumps([attempt(*target) for target in given[0]]))
"""

# Speaks to the proxy as no library would: what is sent is what is asked for, byte by byte.
ASK = f"""
def ask(request):
    with socket.create_connection(("127.0.0.1", {network.PROXY_PORT}), timeout=30) as connection:
        connection.sendall(request.encode("utf-8", "surrogateescape"))
        answer = b""
        while b"\\r\\n\\r\\n" not in answer and (chunk := connection.recv(65536)):
            answer += chunk
        if answer.startswith(b"HTTP/1.1 200 Connection") and not request.startswith("GET"):
            connection.sendall(b"GET /tunnel HTTP/1.0\\r\\nHost: x\\r\\n\\r\\n")
            answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
        return answer.decode()
def outcome(request):
    try:
        return ask(request)
    except OSError:
        return "HTTP/1.1 cut"
print(json.dumps([outcome(request) for request in given[0]]))
"""


def both_ways(place: str) -> list[str]:
    """The two requests that would bring a place's page out of the proxy."""
    return [
        f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n\r\n",
        f"GET http://{place}/plain HTTP/1.1\r\nHost: x\r\n\r\n",
    ]


def statuses(answers: list[str]) -> list[str]:
    return [answer[9:12] for answer in answers]


def own_addresses() -> list[str]:
    """This machine's addresses in its networks."""
    return [
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == socket.AF_INET and not entry.address.startswith("127.")
    ]
