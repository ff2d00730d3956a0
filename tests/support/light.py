"""What a worker of a benchmark leaves out, put in by name as the `hook` of `Installation.start_worker`.

`end_at_once` keeps the claim, the lease and the finish of a task, and nothing between them. `in_process` keeps the
whole life of a task but git, and has its sandboxes and agents in the worker's own memory, so that a thousand of them
are a thousand of the product's own threads, leases and log readers, and no process is beside them.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cloudagent_queue import agents, attempt, repository
from cloudagent_queue import sandboxes as sandbox_kinds
from cloudagent_queue.agents import EVENTS, RESULT
from cloudagent_queue.follow import Ending
from cloudagent_queue.sandboxes import PLAIN, CommandResult, SandboxInfo, SandboxSpec, Watched
from cloudagent_storage.records import Claim, TaskSpec, TaskStatus
from cloudagent_storage.store.backlog import Backlog
from tests.support.standin import StandIn

CLAIMS = "claims.txt"
LINE_S = "LIGHT_LINE_S"
"""The variable that says how many seconds an agent in memory takes for a line of its log."""


def note_claims(given: Mapping[str, Any]) -> None:
    """Write the task and the machine's monotonic time of every claim into the journal's folder, see `claims`."""
    file = os.open(Path(given["journal"]) / CLAIMS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    claim_next = Backlog.claim_next

    def noting(self: Backlog, **arguments: Any) -> Claim | None:
        claim = claim_next(self, **arguments)
        if claim is not None:
            os.write(file, f"{claim.task.task_id} {time.monotonic()}\n".encode())
        return claim

    Backlog.claim_next = noting


def claims(journal: Path) -> dict[str, float]:
    """When each task was claimed first."""
    found: dict[str, float] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (journal / CLAIMS).read_text().splitlines():
            task_id, at = line.split()
            found.setdefault(task_id, float(at))
    return found


def end_at_once(given: Mapping[str, Any]) -> None:
    """A task completes as soon as it is claimed, or once its prompt's `gate` is in the journal's folder."""
    note_claims(given)
    journal = Path(given["journal"])

    def work(self: attempt.Attempt, *, again_after: Ending | None = None) -> Ending:
        gate = json.loads(self.spec.prompt).get("gate")
        while gate and not (journal / gate).exists():
            self.lease.check()
            time.sleep(0.02)
        return Ending(TaskStatus.COMPLETED)

    attempt.Attempt.work = work


class LightSandbox:
    """In memory alone. Its agent says a line every `LIGHT_LINE_S` since the sandbox was made, which its id tells."""

    python = "python"
    root = "/light"
    resources = None
    remark = None

    def __init__(self, sandbox_id: str) -> None:
        self.id = sandbox_id
        self.stopped = threading.Event()
        self._made = float(sandbox_id.split("_")[1])
        self._line_s = float(os.environ.get(LINE_S, "1"))

    def start(self, command: Sequence[str], *, env: Mapping[str, str], number: int = 1) -> None: ...

    def alive(self) -> bool:
        return not self.stopped.is_set()

    def run(self, command: Sequence[str], *, timeout_s: float, **_: Any) -> CommandResult:
        raise AssertionError("nothing runs in memory")

    def read(self, path: str, *, offset: int = 0, max_bytes: int) -> bytes:
        if path == RESULT and self.stopped.is_set():
            return b'{"outcome": "stopped"}'
        if path != EVENTS:
            return b""
        # Lines are of one length, so that an offset tells which one comes next.
        line = b'{"kind": "text", "level": "info", "message": "' + b"." * 200 + b'"}\n'
        said = int((time.monotonic() - self._made) / self._line_s)
        return (line * (said - offset // len(line)))[:max_bytes]

    def watch(self, path: str, *, offset: int, max_bytes: int, wait_s: float) -> Watched:
        deadline = time.monotonic() + wait_s
        while True:
            alive = self.alive()
            data = self.read(path, offset=offset, max_bytes=max_bytes)
            if data or not alive or time.monotonic() >= deadline:
                return Watched(data, alive)
            self.stopped.wait(0.1)

    def write(self, path: str, data: bytes) -> None: ...

    def output(self, *, max_bytes: int = 40_000) -> bytes:
        return b""

    def extend(self, seconds: float) -> None: ...

    def blocked(self) -> Sequence[str]:
        return ()

    def snapshot(self) -> str | None:
        return None

    def stop(self) -> None:
        self.stopped.set()

    def end_processes(self) -> None:
        self.stopped.set()

    def kill(self) -> None:
        self.stopped.set()


class LightProvider:
    name = "unsafe-process"
    session_cap_s = None
    template = None
    place = None

    def __init__(self, folder: Path) -> None: ...

    def create(self, spec: SandboxSpec = PLAIN, *, metadata: Mapping[str, str]) -> LightSandbox:
        return LightSandbox(f"light_{time.monotonic()}_{metadata['nonce']}")

    def connect(self, sandbox_id: str) -> LightSandbox:
        return LightSandbox(sandbox_id)

    def list(self, metadata: Mapping[str, str]) -> Sequence[SandboxInfo]:
        return ()

    def forget(self, template: str) -> None: ...

    def self_check(self) -> str:
        return "in memory"


class LightAgent(StandIn):
    def install(self, sandbox: Any, spec: TaskSpec, **_: Any) -> None: ...

    def start(self, sandbox: Any, *, env: Mapping[str, str], number: int = 1) -> None: ...

    def tell(self, sandbox: Any, message_id: str, message: Mapping[str, Any]) -> None:
        sandbox.stop()


def in_process(given: Mapping[str, Any]) -> None:
    """Sandboxes and agents in memory, and a repository that is neither checked out nor saved."""
    note_claims(given)
    agents.AGENTS = {"claude": (__name__, LightAgent.__name__)}
    sandbox_kinds.PROVIDERS = {"unsafe-process": sandbox_kinds.Entry(__name__, LightProvider.__name__)}

    def check_out(*_: Any, **__: Any) -> str:
        return "0" * 40

    def collect(*_: Any, **__: Any) -> None:
        return None

    repository.check_out = check_out
    repository.checkpoint = collect
    repository.collect = collect
