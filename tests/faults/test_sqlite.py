"""SQLite whose file another process keeps locked or whose disk is full, and a worker without room for sandboxes."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cloudagent_storage.errors import DatabaseUnavailable
from tests.support import netns
from tests.support.installation import Installation
from tests.support.worlds import until

MEGABYTE = 1 << 20
LOCK_S = 15.0
"""A call waits ten seconds for the lock, and then says so."""


def command(installation: Installation, *words: str) -> subprocess.CompletedProcess[str]:
    """What a user types, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "cloudagent_mcp", *words],
        env=installation.environment(),
        cwd=installation.home(),
        capture_output=True,
        text=True,
        timeout=60,
    )


def agent_lives(installation: Installation, task_id: str) -> bool:
    """Is the process there that this task's agent said it is?"""
    pid = installation.journal(task_id, "start")[0]["pid"]
    with contextlib.suppress(OSError):
        return b"agent.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def fill(disk: Path) -> Path:
    """Take all the room that is left; the file that holds it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (64 * 1024, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * size)
    return filler


@pytest.mark.full
def test_a_database_that_another_process_keeps_locked_refuses_calls_in_time_and_loses_no_task(
    on_sqlite: Installation,
) -> None:
    installation = on_sqlite
    installation.start_worker()
    tasks = installation.submit_many(2, steps=100, step_s=0.1)
    for task in tasks:
        installation.await_calls(task, 2)
    before = [installation.calls(task) for task in tasks]
    file = installation.database_url.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailable):
            installation.submit(steps=1)
        assert time.monotonic() - began < LOCK_S
        said = command(installation, "task", "cancel", tasks[0])
        assert said.returncode != 0
        assert "Traceback" not in said.stderr + said.stdout
        assert DatabaseUnavailable().message in said.stderr + said.stdout
        assert command(installation, "task", "list").returncode == 0, "who only reads does not wait"
        assert all(map(lambda t, n: installation.calls(t) > n + 20, tasks, before)), "the agents live on"
        holder.execute("ROLLBACK")
    installation.conclude()
    assert len(installation.tasks()) == len(tasks), "what was refused is not there"


def test_a_full_disk_loses_nothing_that_was_committed_and_tasks_end_once_there_is_room(tmp_path: Path) -> None:
    def body() -> None:
        disk = tmp_path / "disk"
        netns.mount_small(disk, 8 * MEGABYTE)
        file = disk / "cloudagent.db"
        with contextlib.closing(Installation.make(tmp_path, database=f"sqlite:///{file}")) as installation:
            worker = installation.start_worker()
            # It writes all the time: what the database has no room for is in the sandbox's own file.
            running = installation.submit(steps=60, step_s=0.1, faults={"events": 20, "pad": 500})
            small = installation.submit(steps=2)
            installation.await_calls(running, 2)
            until(lambda: installation.task(small).status.terminal, "a small task ends")
            filler = fill(disk)
            until(lambda: "has to wait" in worker.log(), "a write found no room")
            calls = installation.calls(running)
            with pytest.raises(DatabaseUnavailable):
                installation.submit(steps=1)
            said = command(installation, "task", "list")
            assert (said.returncode, said.stdout.count("task_")) == (0, 2), "what is there can be read"
            assert installation.calls(running) > calls, "the agent goes on"
            with contextlib.closing(sqlite3.connect(file)) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert set(installation.tasks()) == {running, small}
            filler.unlink()
            later = installation.submit(steps=2)
            installation.conclude()
            with contextlib.closing(sqlite3.connect(file)) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert set(installation.tasks()) == {running, small, later}

    netns.apart(body)


@pytest.mark.full
def test_a_worker_without_room_for_sandboxes_ends_its_tasks_and_runs_others_once_there_is_room(tmp_path: Path) -> None:
    def body() -> None:
        home = tmp_path / "installation" / "a"
        netns.mount_small(home, 16 * MEGABYTE)
        with contextlib.closing(Installation.make(tmp_path)) as installation:
            worker = installation.start_worker()
            running = installation.submit(steps=60, step_s=0.1)
            installation.await_calls(running, 2)
            filler = fill(home)
            during = installation.submit(steps=2)
            until(lambda: installation.task(during).attempt, "the worker goes on to take tasks")
            until(lambda: not agent_lives(installation, running), "the agent finds no room for a file, and dies")
            filler.unlink()
            later = installation.submit(steps=2)
            installation.conclude({running: "any", during: "any"})
            assert worker.alive
            assert installation.task(running).status == "failed"
            assert installation.task(later).status == "completed"

    netns.apart(body)
