"""A whole deployment on one machine, made to be broken: hosts, worker and server processes, stand-ins for agents.

A test throws a fault, proves that it fired, and ends in `conclude`: all tasks end, time passes, the oracle looks.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from cloudagent_mcp.client import LocalClient
from cloudagent_mcp.settings import Settings
from cloudagent_queue.lease import Timers
from cloudagent_queue.sandboxes import Provider, open_provider
from cloudagent_storage.records import LOCAL_ACCOUNT, Task
from cloudagent_storage.secrets import generate_key
from cloudagent_storage.store import Store
from tests.support import oracle
from tests.support.e2b_server.client import E2bServer
from tests.support.failpoints import Failpoint
from tests.support.worlds import AppWithoutWorker, until

FAST = Timers(
    lease_s=3.0,
    heartbeat_s=0.5,
    let_go_s=2.0,
    signals_s=0.1,
    watch_s=0.2,
    poll_s=0.05,
    stop_grace_s=3.0,
    ring_again_s=1.0,
    sweep_s=0.3,
    drain_s=5.0,
    fetch_s=20.0,
)
"""The product's timers, scaled down."""
PATIENT = replace(FAST, lease_s=9.0, let_go_s=7.0)
"""For tests in which nobody may lose a lease, however busy the machine is."""

EVERYWHERE = pytest.mark.parametrize("installation", ["sqlite", "postgres", "e2b"], indirect=True)
"""For a test: on each database, and with sandboxes in the cloud."""
EITHER_SANDBOX = pytest.mark.parametrize("installation", ["sqlite", "e2b"], indirect=True)
"""For a test: with sandboxes of this machine and in the cloud, on SQLite."""

ROOT = Path(__file__).parents[2]
ADMIN_KEY = "a key of the tests"


@contextmanager
def connect(url: str) -> Generator[Any]:
    """A connection of the driver's to a database or a queue in SQLite, in autocommit mode, closed at the end."""
    if url.startswith("sqlite:///"):
        connection: Any = sqlite3.connect(url.removeprefix("sqlite:///"), timeout=10, isolation_level=None)
    else:
        connection = psycopg2.connect(url)
        connection.autocommit = True
    try:
        yield connection
    finally:
        connection.close()


def is_locked(file: Path) -> bool:
    """Does another process write to this SQLite file just now?"""
    connection = sqlite3.connect(file, timeout=0.2, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
        return False
    except sqlite3.OperationalError:
        return True
    finally:
        connection.close()


class Process:
    """A process of the installation, in a process group of its own."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path, files: Sequence[Path]) -> None:
        """`files` are SQLite's, shared with other processes."""
        self.name = name
        self._files = files
        self.process = process
        self.pid = process.pid
        self._log = log

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def log(self) -> str:
        """All that it has printed."""
        return self._log.read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL to the whole process group, and wait."""
        self._signal(signal.SIGKILL)
        self.process.wait(20)

    def freeze(self) -> None:
        """SIGSTOP to the whole process group, and wait until it stands still.

        Not in the middle of a transaction on a SQLite file: there it would stop all others too, which is another fault.
        """
        while True:
            self._signal(signal.SIGSTOP)
            until(self.is_frozen, "it is frozen")
            if not any(is_locked(file) for file in self._files):
                return
            self.thaw()

    def is_frozen(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def thaw(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def stop(self, number: int = signal.SIGTERM, *, within: float = 30.0) -> float:
        """Ask it to end, as an operator does; the seconds that it took."""
        started = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(within)
        return time.monotonic() - started

    def wait(self, seconds: float = 30.0) -> int:
        """Until it has ended by itself; its return code, which is minus the number of a signal that ended it."""
        return self.process.wait(seconds)

    def _signal(self, number: int) -> None:
        # Not reaped yet, or known to be gone: its id cannot be another's.
        if self.process.poll() is None:
            os.killpg(self.pid, number)


@dataclass
class Installation:
    """One deployment on one database and queue. Tests use `make`."""

    folder: Path
    database_url: str
    queue_url: str
    timers: Timers
    provider: str
    cloud: E2bServer | None = None
    """Where the sandboxes are, if not on its hosts."""
    encryption_key: str = field(default_factory=generate_key)
    accepted: list[str] = field(default_factory=list[str])
    """The ids of all tasks whose submit was answered."""
    processes: list[Process] = field(default_factory=list[Process])
    hosts: set[str] = field(default_factory=set[str])

    @classmethod
    def make(
        cls,
        folder: Path,
        *,
        database: str = "sqlite",
        queue: str | None = None,
        timers: Timers = FAST,
        provider: str = "unsafe-process",
        cloud: E2bServer | None = None,
    ) -> Installation:
        """`database` is the address of an empty Postgres, or "sqlite"; `queue` that of a Redis, or None for a file.

        With a `cloud` its sandboxes are there, of the provider `e2b`, and nobody else uses it meanwhile.
        """
        folder = folder / "installation"
        (folder / "journal").mkdir(parents=True)
        made = cls(
            folder,
            f"sqlite:///{folder / 'cloudagent.db'}" if database == "sqlite" else database,
            queue or f"sqlite:///{folder / 'queue.db'}",
            timers,
            provider if cloud is None else "e2b",
            cloud,
        )
        if cloud is not None:
            cloud.change(shared_folder=str(made.journal_folder))
        made.store = Store.open(made.database_url)
        made.store.migrate()
        made.store.accounts.ensure(LOCAL_ACCOUNT)
        return made

    def __post_init__(self) -> None:
        self.journal_folder = self.folder / "journal"
        self.store: Store

    # -- processes -------------------------------------------------------------------------------------------------

    def home(self, host: str = "a") -> Path:
        """The data folder of a host."""
        home = self.folder / host
        home.mkdir(mode=0o700, exist_ok=True)
        self.hosts.add(host)
        return home

    def environment(self, host: str = "a") -> dict[str, str]:
        """What the processes of a host are given."""
        home = self.home(host)
        user = home / "user"
        user.mkdir(exist_ok=True)
        return {
            "CLOUDAGENT_HOME": str(home),
            "HOME": str(user),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "DATABASE_URL": self.database_url,
            "QUEUE_URL": self.queue_url,
            "ENCRYPTION_KEY": self.encryption_key,
            "ADMIN_API_KEY": ADMIN_KEY,
            "SANDBOX_PROVIDER": self.provider,
            **(self.cloud.environment if self.cloud is not None else {}),
            "ANTHROPIC_API_KEY": "sk-ant-test-0123456789abcdef",
        }

    def start(
        self,
        role: str,
        *,
        host: str = "a",
        failpoints: Sequence[Failpoint] = (),
        env: Mapping[str, str] | None = None,
        **given: Any,
    ) -> Process:
        """Start a process of the product's with what `started.py` puts around it; `hook` names one function more."""
        given |= {
            "journal": str(self.journal_folder),
            "failpoints": [asdict(failpoint) for failpoint in failpoints],
            "abandoned_s": self.timers.lease_s,
        }
        name = f"{role}-{len(self.processes)}"
        log = self.folder / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.started", role, json.dumps(given)],
                env={**self.environment(host), **(env or {})},
                cwd=self.home(host),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        started = Process(name, process, log, self.sqlite_files())
        self.processes.append(started)
        return started

    def start_worker(
        self,
        host: str = "a",
        *,
        concurrency: int = 4,
        failpoints: Sequence[Failpoint] = (),
        env: Mapping[str, str] | None = None,
        hook: str | None = None,
        **timers: float,
    ) -> Process:
        """A worker process that is ready; `timers` change those of the installation for it alone."""
        worker = self.start(
            "worker",
            host=host,
            failpoints=failpoints,
            env=env,
            hook=hook,
            concurrency=concurrency,
            timers=asdict(replace(self.timers, **timers)),
        )
        until(lambda: "takes up to" in worker.log() or not worker.alive, f"{worker.name} is ready", 60)
        # With a failpoint it may have died of its first task already.
        assert "takes up to" in worker.log(), worker.log()
        return worker

    def start_server(
        self,
        host: str = "a",
        *,
        port: int = 0,
        failpoints: Sequence[Failpoint] = (),
        env: Mapping[str, str] | None = None,
    ) -> tuple[Process, str]:
        """An HTTP server on a free port, or on the port of one that died; the process and its URL."""
        server = self.start("server", host=host, failpoints=failpoints, env=env, port=port)
        until(lambda: "cloudagent serves" in server.log() or not server.alive, "the server is ready", 60)
        assert server.alive, server.log()
        return server, server.log().split("MCP at ", 1)[1].split("/mcp", 1)[0]

    # -- tasks -----------------------------------------------------------------------------------------------------

    @contextmanager
    def client(self, host: str = "a") -> Generator[LocalClient]:
        """A user's client in this process; it starts no worker."""
        client = LocalClient(AppWithoutWorker(Settings.read(self.environment(host)), None))
        try:
            yield client
        finally:
            client.close()

    @staticmethod
    def arguments(prompt: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What `submit_task` takes: a prompt for the stand-in, and the rest."""
        return {"repository": "none", "timeout_minutes": 5, "prompt": json.dumps(prompt), **arguments}

    def submit(self, *, steps: int = 10, step_s: float = 0.1, faults: Mapping[str, Any] = {}, **arguments: Any) -> str:
        """Submit a task; its id. `faults` is what else the stand-in's prompt may hold, see `standin_program.py`."""
        with self.client() as client:
            prompt = {"steps": steps, "step_s": step_s, **faults}
            task_id = client.call("submit_task", **self.arguments(prompt, arguments))["task_id"]
        self.accepted.append(task_id)
        return task_id

    def submit_many(self, count: int, **arguments: Any) -> list[str]:
        return [self.submit(**arguments) for _ in range(count)]

    def start_submit(
        self,
        tasks: Sequence[Mapping[str, Any]],
        *,
        failpoints: Sequence[Failpoint] = (),
        env: Mapping[str, str] | None = None,
    ) -> Process:
        """Submit from a process of its own, which prints an id a line; `tasks` are what `arguments` makes."""
        return self.start("submit", failpoints=failpoints, env=env, tasks=list(tasks))

    def sqlite_files(self) -> list[Path]:
        urls = (self.database_url, self.queue_url)
        return [Path(url.removeprefix("sqlite:///")) for url in urls if url.startswith("sqlite:///")]

    def tasks(self) -> dict[str, Task]:
        """Every task in the database, accepted or not."""
        found: dict[str, Task] = {}
        cursor: str | None = None
        while True:
            page = self.store.tasks.list(LOCAL_ACCOUNT, candidates=True, limit=100, cursor=cursor)
            found |= {task.task_id: task for task in page.tasks}
            if (cursor := page.next_cursor) is None:
                return found

    def task(self, task_id: str) -> Task:
        return self.store.tasks.get(LOCAL_ACCOUNT, task_id)

    def attempts(self, task_id: str) -> int:
        """How often it was claimed."""
        return self.task(task_id).attempt

    def column(self, task_id: str, name: str) -> Any:
        """A column of its row that no record shows, such as `lost_leases`."""
        with connect(self.database_url) as connection:
            cursor = connection.cursor()
            cursor.execute(f"SELECT {name} FROM tasks WHERE task_id = '{task_id}'")
            return cursor.fetchone()[0]

    def log(self, task_id: str) -> list[str]:
        """The messages of its whole log."""
        return [line.message for line in self.store.events.list(LOCAL_ACCOUNT, task_id, limit=1_000_000).lines]

    def journal(self, task_id: str, what: str | None = None) -> list[dict[str, Any]]:
        """What its agents have noted, all or one kind; see `standin_program.py`."""
        try:
            lines = (self.journal_folder / f"{task_id}.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        found: list[dict[str, Any]] = [json.loads(line) for line in lines]
        return [line for line in found if what in (None, line["what"])]

    def open_gate(self, name: str) -> None:
        """Let the agents pass whose prompt has this `gate`."""
        (self.journal_folder / name).touch()

    def calls(self, task_id: str) -> int:
        """How many steps its agents have taken."""
        return len(self.journal(task_id, "call"))

    def await_calls(self, task_id: str, count: int = 1, seconds: float = 60) -> None:
        """Until its agent has taken so many steps."""
        until(lambda: self.calls(task_id) >= count, f"{task_id} has taken {count} steps", seconds)

    def fired(self, failpoint: Failpoint) -> bool:
        """Has it acted?"""
        return (self.journal_folder / "fired" / failpoint.name).exists()

    def providers(self) -> dict[str, Provider]:
        """The sandbox provider of each host."""
        env = None if self.cloud is None else self.cloud.environment
        return {host: open_provider(self.provider, data_folder=self.home(host), env=env) for host in sorted(self.hosts)}

    def kill_sandbox(self, host: str = "a") -> None:
        """Kill the only sandbox there is, from outside, as a provider does that has lost a machine."""
        if self.cloud is not None:
            (alive,) = self.cloud.living()
            self.cloud.vanish(alive["id"])
            return
        provider = self.providers()[host]
        (found,) = provider.list({})
        provider.connect(found.id).kill()

    # -- the end ---------------------------------------------------------------------------------------------------

    def wait_all(self, seconds: float = 90.0) -> None:
        """Until every task has ended."""

        def unfinished() -> list[Task]:
            return [task for task in self.tasks().values() if not task.status.terminal]

        deadline = time.monotonic() + seconds
        while left := unfinished():
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"not ended in {seconds:g} s: "
                    + "; ".join(f"{task.task_id} {task.status} {task.phase} attempt {task.attempt}" for task in left)
                    + "\n"
                    + self.story()
                )
            time.sleep(0.1)

    def settle(self) -> None:
        """Wait longer than a lease and all that may follow its end: whatever writes late has written by then."""
        time.sleep(self.timers.lease_s + 2 * self.timers.sweep_s + 1.0)

    def check(self, ended: Mapping[str, str] | None = None) -> None:
        """The oracle. `ended` says which tasks did not complete: "cancelled", an error's code, or "any".

        A worker must be alive on every host that had sandboxes, as it is who removes what is left over.
        Raises AssertionError with all that is wrong.
        """
        if wrong := oracle.wrong_with(self, ended or {}):
            raise AssertionError("\n".join(["The oracle found:", *wrong, self.story()]))

    def conclude(self, ended: Mapping[str, str] | None = None, *, seconds: float = 90.0) -> None:
        """All tasks end, late writers have their time, and the oracle finds nothing."""
        self.wait_all(seconds)
        self.settle()
        self.check(ended)

    def story(self) -> str:
        """What is needed to find out what happened."""
        parts = [f"-- {path.name} --\n{path.read_text()}" for path in sorted(self.journal_folder.glob("*.jsonl"))]
        for process in self.processes:
            parts.append(f"-- {process.name}, {'alive' if process.alive else process.process.returncode} --")
            parts.append(process.log()[-6000:])
        return "\n".join(parts)[-40_000:]

    def close(self) -> None:
        """End all that was started."""
        for process in self.processes:
            process.kill()
            if process.process.stdin is not None:
                process.process.stdin.close()
        if self.cloud is not None:
            self.cloud.clear()
        else:
            for provider in self.providers().values():
                for info in provider.list({}):
                    provider.connect(info.id).kill()
        oracle.kill_leftovers(self)
        self.store.close()
