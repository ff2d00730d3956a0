"""A whole installation in a temporary folder: data folder, worker processes, a scripted model, a repository."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import psutil

from cloudagent_mcp.app import App
from cloudagent_mcp.client import LocalClient
from cloudagent_mcp.settings import Settings
from cloudagent_queue.lease import Timers
from cloudagent_queue.sandboxes import open_provider
from tests.support.e2b_server.client import E2bServer

FAST = Timers(
    lease_s=3.0,
    heartbeat_s=0.5,
    let_go_s=2.0,
    signals_s=0.1,
    watch_s=0.2,
    poll_s=0.05,
    stop_grace_s=5.0,
    ring_again_s=1.0,
    sweep_s=0.3,
    drain_s=5.0,
    fetch_s=20.0,
)
"""The product's timers, scaled down."""

WORKER = """
import json, logging, sys
from cloudagent_mcp.app import App
from cloudagent_mcp.settings import Settings
from cloudagent_mcp.worker import work
from cloudagent_queue.lease import Timers
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
given = json.loads(sys.argv[1])
work(App(Settings.read()), concurrency=given["concurrency"], timers=Timers(**given["timers"]))
"""


def until(reached: Callable[[], Any], what: str, seconds: float = 30.0) -> Any:
    """Look again until it is so; what it was then."""
    deadline = time.monotonic() + seconds
    while not (found := reached()):
        assert time.monotonic() < deadline, f"not in {seconds:g} s: {what}"
        time.sleep(0.02)
    return found


def git(folder: Path, *arguments: str) -> str:
    """Run git as a developer would; what it prints."""
    identity = {"GIT_AUTHOR_NAME": "dev", "GIT_AUTHOR_EMAIL": "dev@localhost"}
    identity |= {"GIT_COMMITTER_NAME": "dev", "GIT_COMMITTER_EMAIL": "dev@localhost"}
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1", **identity}
    done = subprocess.run(["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def make_repository(folder: Path) -> Path:
    """A repository with one commit: `add` is wrong, and its test fails."""
    folder.mkdir(parents=True)
    git(folder, "init", "-q", "-b", "main")
    (folder / "calc.py").write_text("def add(a, b):\n    return a - b\n")
    (folder / "test_calc.py").write_text(
        "import unittest\nimport calc\n\n\nclass T(unittest.TestCase):\n"
        "    def test_add(self):\n        self.assertEqual(calc.add(2, 3), 5)\n"
    )
    (folder / ".gitignore").write_text("__pycache__/\n*.log\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "first")
    return folder


@dataclass
class World:
    """One installation, as its user sees it."""

    home: Path
    environment: dict[str, str]
    timers: Timers = FAST
    cloud: E2bServer | None = None
    """Where its sandboxes are, if not on this machine."""
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list[subprocess.Popen[bytes]])
    apps: list[App] = field(default_factory=list[App])

    def in_cloud(self, cloud: E2bServer) -> World:
        """The same, with its sandboxes there; nobody else uses it meanwhile."""
        variables = {**cloud.environment, "SANDBOX_PROVIDER": "e2b"}
        return replace(self, environment={**self.environment, **variables}, cloud=cloud)

    @property
    def settings(self) -> Settings:
        return Settings.read(self.environment)

    def app(self, folder: Path | None = None) -> App:
        """What a process of this installation works with; closed with the world."""
        app = AppWithoutWorker(self.settings, folder)
        self.apps.append(app)
        return app

    def without_credential(self) -> World:
        """The same, whose user has no credential for any model."""
        return replace(self, environment={k: v for k, v in self.environment.items() if not k.startswith("ANTHROPIC_")})

    def with_model(self, variables: Mapping[str, str]) -> World:
        """The same, whose user has that credential."""
        return replace(self, environment={**self.environment, **variables})

    def start_worker(self, *, concurrency: int = 4, **timers: float) -> subprocess.Popen[bytes]:
        """A worker process of this installation; stopped with the world."""
        given = {"concurrency": concurrency, "timers": asdict(replace(self.timers, **timers))}
        with (self.home / f"worker-{len(self.workers)}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", WORKER, json.dumps(given)],
                env=self.settings.worker_environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.workers.append(process)
        return process

    def kill_worker(self, process: subprocess.Popen[bytes]) -> None:
        """`kill -9`, as the machine would."""
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)

    @contextlib.contextmanager
    def client(self, folder: Path | None = None) -> Generator[LocalClient]:
        """A user's client in this process, that starts no worker of its own."""
        client = LocalClient(AppWithoutWorker(self.settings, folder))
        try:
            yield client
        finally:
            client.close()

    def agent_processes(self) -> list[psutil.Process]:
        """Every living process of any sandbox of this installation."""
        return [process for process, _ in self._agents()]

    def agent_commands(self) -> list[str]:
        """The command line of each of them."""
        return [command for _, command in self._agents()]

    def sandboxes(self) -> list[str]:
        """Every living sandbox of this installation."""
        if self.cloud is not None:
            return [sandbox["id"] for sandbox in self.cloud.living()]
        return [folder.name for folder in (self.home / "sandboxes").glob("sbx_*")]

    def kill_sandbox(self) -> None:
        """Kill the only one there is, from outside."""
        (sandbox_id,) = self.sandboxes()
        if self.cloud is not None:
            self.cloud.vanish(sandbox_id)
        else:
            open_provider("local", data_folder=self.home).connect(sandbox_id).kill()

    def _agents(self) -> list[tuple[psutil.Process, str]]:
        found: list[tuple[psutil.Process, str]] = []
        for process in psutil.process_iter() if self.cloud is None else self._processes_in(self.cloud):
            with contextlib.suppress(psutil.Error, OSError):
                command = " ".join(process.cmdline())
                if self.cloud or str(self.home / "sandboxes") in command or self._in_sandbox(process.pid):
                    found.append((process, command))
        return found

    @staticmethod
    def _processes_in(cloud: E2bServer) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for sandbox in cloud.living():
            with contextlib.suppress(psutil.Error):
                # The first process of a sandbox has its supervisor as its first child; all others are below either.
                found += psutil.Process(sandbox["first_process"]).children(recursive=True)[1:]
        return found

    def _in_sandbox(self, pid: int) -> bool:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        ids = [folder.name for folder in (self.home / "sandboxes").glob("sbx_*")]
        return any(f"CLOUDAGENT_SANDBOX={name}".encode() in environment for name in ids)

    def log(self, client: LocalClient, task_id: str) -> list[dict[str, Any]]:
        """The whole log of a task."""
        lines: list[dict[str, Any]] = []
        while True:
            after = lines[-1]["seq"] if lines else 0
            page = client.call("get_task_logs", task_id=task_id, after=after, limit=1000)
            lines += page["lines"]
            if not page["more"]:
                return lines

    def wait(self, client: LocalClient, task_id: str, seconds: float = 60.0) -> dict[str, Any]:
        """The task once it has ended."""
        ended = until(
            lambda: (task := client.call("get_task", task_id=task_id))["completed_at"] and task,
            "the task ends",
            seconds,
        )
        return cast("dict[str, Any]", ended)

    def close(self) -> None:
        """Stop everything, and leave nothing large behind."""
        for app in self.apps:
            app.close()
        for process in self.workers:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self.workers:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
        if self.cloud is not None:
            self.cloud.clear()
        for name in ("local", "unsafe-process"):
            provider = open_provider(name, data_folder=self.home)
            for info in provider.list({}):
                provider.connect(info.id).kill()
        (self.home / "reserve").unlink(missing_ok=True)


class AppWithoutWorker(App):
    """An app whose tasks wait until the test starts a worker."""

    def __init__(self, settings: Settings, folder: Path | None) -> None:
        super().__init__(settings)
        self._folder = folder

    def ensure_worker(self) -> None:
        """The test starts its own."""

    def local_caller(self) -> Any:
        return replace(super().local_caller(), folder=self._folder)
