"""A server that speaks E2B's protocols on loopback with real processes, for tests; and the switches of its faults."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import guarded

START_S = 20.0
API_KEY = "e2b_" + "0123456789abcdef" * 2
_ROOT = Path(__file__).parents[3]

CREATE = "(/v2)?/sandboxes"
"""The path of a create. A `path` of a fault is a regular expression for the whole path."""
START = "/process.Process/Start"
CONNECT = "/process.Process/Connect"
FILES = "/files"
ANY = ".*"


@dataclass(frozen=True)
class Fault:
    """A fault that was switched on."""

    server: E2bServer
    name: str

    @property
    def fired(self) -> int:
        """How often it has really hit."""
        return self.server.stats()["faults"][self.name]


class E2bServer:
    """A running server. It ends when this process does, however that may be, and its sandboxes with it."""

    def __init__(self, folder: Path, *, port: int = 0, **settings: Any) -> None:
        """Start one; `settings` are those of `control.Settings`. The folder is deleted at the end."""
        folder.mkdir(parents=True, exist_ok=True)
        self.api_key: str = settings.setdefault("api_key", API_KEY)
        command = ["/usr/bin/env", f"PYTHONPATH={_ROOT}", sys.executable, "-m", "tests.support.e2b_server"]
        command += ["--folder", str(folder), "--port", str(port), "--settings", json.dumps(settings)]
        self._guard = guarded.start(folder, command)
        self._frozen = False
        found = _first_line(folder / "log")
        self.pid: int = found["pid"]
        self.port: int = found["port"]
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def options(self) -> dict[str, Any]:
        """What the SDK wants to be called with."""
        return {"api_url": self.url, "sandbox_url": self.url, "api_key": self.api_key}

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point the product's provider `e2b` at it."""
        return self.environment_of("e2b")

    def environment_of(self, provider: str) -> dict[str, str]:
        """Those that point one of the product's providers at it, be it `e2b` or `novita`."""
        prefix = provider.upper()
        return {
            f"{prefix}_API_KEY": self.api_key,
            f"{prefix}_API_URL": self.url,
            f"{prefix}_SANDBOX_URL": self.url,
        }

    def fault(self, kind: str, path: str = ANY, **how: Any) -> Fault:
        """Let something happen to the next requests whose whole path fits; the first fault that fits takes a request.

        answer        the status, `headers` and `body` given are answered, and nothing is done
        answer_after  it is done, and then the status is answered
        hang          nothing is done or answered
        hang_after    it is done, and nothing is answered
        delay         it is done `seconds` later
        cut           after `after_bytes` of the answer, the connection is reset
        half_close    after `after_bytes`, the server ends its half of the connection, and no more comes
        stall         after `after_bytes`, no more comes, and the connection stays
        trickle       the answer comes with `bytes_per_s`

        `count` says how often (None for always), `skip` how many requests are spared before, `method` and `sandbox`
        which ones it is for.
        """
        return Fault(self, self._call("POST", "/_faults", {"kind": kind, "path": path, **how})["name"])

    def rate_limit(self, path: str = CREATE, *, retry_after_s: int | None = 1, **how: Any) -> Fault:
        """429, with or without Retry-After."""
        headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
        return self.fault("answer", path, status=429, headers=headers, **how)

    def heal(self) -> None:
        """No more faults."""
        self._call("DELETE", "/_faults")

    def change(self, **settings: Any) -> None:
        """Change settings (see `control.Settings`) for what is asked from now on."""
        self._call("POST", "/_settings", settings)

    def stats(self) -> dict[str, Any]:
        """`requests` by method and path, sandboxes `created` and `living`, open `streams`, how often `faults` fired."""
        return self._call("GET", "/_stats")

    def sandboxes(self) -> list[dict[str, Any]]:
        """Every sandbox that there was: `id`, `alive`, `asked` (at its create), `timeouts`, `network`, `home`,
        `first_process`, `started_at`, `ended_at`."""
        return self._call("GET", "/_sandboxes")

    def sandbox(self, sandbox_id: str) -> dict[str, Any]:
        return next(sandbox for sandbox in self.sandboxes() if sandbox["id"] == sandbox_id)

    def living(self) -> list[dict[str, Any]]:
        """Those of the `sandboxes` that live."""
        return [sandbox for sandbox in self.sandboxes() if sandbox["alive"]]

    def clear(self) -> None:
        """No fault, no sandbox, and the settings that it was started with: for whoever uses it next."""
        if self._frozen:
            self.thaw()
        self.heal()
        self._call("DELETE", "/_settings")
        for sandbox in self.living():
            self.vanish(sandbox["id"])

    def builds(self) -> list[dict[str, Any]]:
        """Every build of a template: `requested`, `started` (with its steps), `status`, `uploads`."""
        return self._call("GET", "/_builds")

    def fail_next_build(self, *, step: int, message: str) -> None:
        self._call("POST", "/_builds/fail", {"step": step, "message": message})

    def vanish(self, sandbox_id: str) -> None:
        """Kill a sandbox behind its owner's back."""
        self._call("POST", f"/_sandboxes/{sandbox_id}/vanish")

    def freeze_sandbox(self, sandbox_id: str) -> None:
        """Stop all that runs in it, its envd too: requests to it wait."""
        self._call("POST", f"/_sandboxes/{sandbox_id}/freeze")

    def thaw_sandbox(self, sandbox_id: str) -> None:
        self._call("POST", f"/_sandboxes/{sandbox_id}/thaw")

    def freeze(self) -> None:
        """Stop the server itself: connections are made, and nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)
        self._frozen = True

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)
        self._frozen = False

    def stop(self) -> None:
        if self._frozen:
            self.thaw()
        guarded.stop(self._guard)

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or b"null")


@contextlib.contextmanager
def e2b_server(folder: Path, **settings: Any) -> Generator[E2bServer]:
    """A server for the length of a `with`."""
    server = E2bServer(folder, **settings)
    try:
        yield server
    finally:
        server.stop()


def _first_line(log: Path) -> dict[str, Any]:
    deadline = time.monotonic() + START_S
    while not (line := log.read_text()).endswith("\n") or not line.startswith("{"):
        assert time.monotonic() < deadline, f"the server does not start: {line}"
        time.sleep(0.01)
    return json.loads(line.splitlines()[0])
