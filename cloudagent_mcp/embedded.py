"""The embedded worker: a process of its own that the first task starts, and that stops when there is nothing to do.

It outlives the client that started it, so a closed client never kills a task. `worker.lock` is held for its life;
whoever may have to start or stop it does so under `worker.start.lock`, so that a task committed while it is about to
stop is either seen by it or finds the lock free.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from cloudagent_mcp.settings import Settings
from cloudagent_storage.errors import Busy
from cloudagent_storage.store import Store

log = logging.getLogger(__name__)

IDLE_S = 60.0
"""A worker that had nothing to do for this long stops."""
START_S = 10.0
DRAIN_S = 15.0


def ensure_worker(settings: Settings, *, version: str) -> None:
    """Start the embedded worker unless one of this version, or a newer one, runs. An older one is asked to drain."""
    home = settings.cloudagent_home
    with FileLock(home / "worker.start.lock", timeout=START_S):
        if (running := running_worker(home)) is not None:
            if running.pid is None or _release(running.version) >= _release(version):
                return
            # The lock is held, so this pid is that worker; the new one waits for the lock.
            log.info("asking the worker of version %s to drain", running.version)
            os.kill(running.pid, signal.SIGTERM)
        if _is_starting(home):
            return
        # Unbuffered and detached: its own session, no terminal, no pipe of ours that could break.
        with (home / "worker.log").open("ab") as log_file:
            process = subprocess.Popen(
                [sys.executable, "-m", "cloudagent_mcp", "worker", "--embedded"],
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                env=settings.worker_environment,
                cwd=home,
                start_new_session=True,
            )
        (home / "worker.starting").write_text(str(process.pid))
        # Reaped where its parent lives longer than it does.
        threading.Thread(target=process.wait, daemon=True).start()


def _is_starting(home: Path) -> bool:
    """Has somebody just started one, which is about to take the lock? A second would wait, and take its place."""
    try:
        file = home / "worker.starting"
        if time.time() - file.stat().st_mtime > DRAIN_S:
            return False
        os.kill(int(file.read_text()), 0)
    except (OSError, ValueError):
        return False
    return True


@dataclass(frozen=True)
class Running:
    """The worker that holds the lock of a data folder."""

    version: str
    pid: int | None
    """None while it has not said yet."""


def running_worker(home: Path) -> Running | None:
    """The embedded worker of this data folder, or None."""
    lock = FileLock(home / "worker.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        try:
            about = json.loads((home / "worker.json").read_text())
            return Running(str(about["version"]), int(about["pid"]))
        except (OSError, ValueError, KeyError):
            return Running("", None)
    lock.release()
    return None


@contextmanager
def only_worker(home: Path, *, version: str) -> Generator[FileLock]:
    """Be the one embedded worker of this data folder. Raises `Busy` when there is one that does not go away."""
    # An older worker that drains, or one that is idle and about to stop, may hold it for a moment yet.
    # Not bound to a thread: the one that watches for idleness lets go of it.
    lock = FileLock(home / "worker.lock", timeout=DRAIN_S, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise Busy("A worker runs for this data folder already.", remedy="Nothing needs to be done.") from None
    try:
        about = home / "worker.json"
        fresh = about.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps({"version": version, "pid": os.getpid()}))
        fresh.replace(about)
        (home / "worker.starting").unlink(missing_ok=True)
        yield lock
    finally:
        lock.release()


def stop_when_idle(store: Store, lock: FileLock, home: Path, stopping: threading.Event, *, idle_s: float) -> None:
    """Set `stopping` when nothing was to be done for `idle_s`; the lock is let go of in the same moment.

    A schedule that will be due some time is something to be done: nobody else would start its task.
    """

    def busy() -> bool:
        return bool(store.tasks.unfinished() or store.schedules.enabled())

    busy_at = time.monotonic()
    while not stopping.wait(min(1.0, idle_s / 4)):
        if busy():
            busy_at = time.monotonic()
        elif time.monotonic() - busy_at >= idle_s:
            with FileLock(home / "worker.start.lock", timeout=START_S):
                # Again, and now nobody can be between the commit of a task and the look at our lock.
                if not busy():
                    stopping.set()
                    lock.release()


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
