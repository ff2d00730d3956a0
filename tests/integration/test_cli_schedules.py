"""`ca schedule` as a person types it, in a process of its own: here, and as a client of a server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from cloudagent_mcp.embedded import running_worker
from tests.support.worlds import World, until


@pytest.fixture(params=["here", "server"])
def user(request: pytest.FixtureRequest, world: World, tmp_path: Path) -> Generator[World]:
    """Somebody who types `ca`."""
    if request.param == "here":
        yield world
    else:
        with subprocess.Popen(
            [sys.executable, "-m", "cloudagent_mcp", "serve", "--port", "0"],
            env={**world.environment, "ADMIN_API_KEY": "a-key-for-the-tests"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as server:
            try:
                assert server.stdout is not None
                url = server.stdout.readline().split("REST at ")[1].strip().removesuffix("/api/v1")
                home = tmp_path / "of the user"
                home.mkdir()
                environment = {"PATH": os.environ["PATH"], "HOME": str(home), "CLOUDAGENT_HOME": str(home)}
                yield World(home, {**environment, "CLOUDAGENT_URL": url, "CLOUDAGENT_API_KEY": "a-key-for-the-tests"})
            finally:
                server.send_signal(signal.SIGTERM)
                server.wait(15)
    if found := running_worker(world.home):
        found = until(lambda: (now := running_worker(world.home)) and now.pid and now, "the worker says who it is")
        os.kill(found.pid, signal.SIGTERM)
        until(lambda: running_worker(world.home) is None, "the worker has stopped")


def ca(world: World, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cloudagent_mcp", "schedule", *words]
    return subprocess.run(command, env=world.environment, cwd=world.home, capture_output=True, text=True, timeout=60)


def test_a_schedule_is_made_and_kept_from_the_command_line(user: World) -> None:
    made = ca(
        *(user, "create", "nightly", "0 3 * * 1-5", "Run the tests.", "--timezone", "Europe/Berlin"),
        *("--repository", "none", "--verify", "pytest -q", "--tag", "night", "--json"),
    )
    assert made.returncode == 0, made.stderr
    schedule = json.loads(made.stdout)
    assert (schedule["task"]["verify"], schedule["task"]["tags"], len(schedule["next_due_at"])) == (
        *("pytest -q", ["night"]),
        3,
    )
    schedule_id = schedule["schedule_id"]
    assert json.loads(ca(user, "list", "--json").stdout)["schedules"] == [schedule]
    row = ca(user, "list").stdout.split("\t")
    assert row[:4] == [schedule_id, "enabled", "0 3 * * 1-5", "Europe/Berlin"] and row[5] == "nightly\n"
    for name in ("nightly", schedule_id, schedule_id[:10], schedule_id[4:9]):
        assert json.loads(ca(user, "show", name, "--json").stdout) == schedule

    changed = json.loads(ca(user, "update", "nightly", "--cron", "0 4 * * *", "--prompt", "Lint.", "--json").stdout)
    assert (changed["cron"], changed["task"]["prompt"], changed["task"]["verify"]) == (
        "0 4 * * *",
        "Lint.",
        "pytest -q",
    )
    assert "paused" in ca(user, "pause", "nightly").stdout
    assert "next due" in ca(user, "resume", "nightly").stdout
    ran = json.loads(ca(user, "run", "nightly", "--json").stdout)
    shown = ca(user, "show", "nightly").stdout
    assert "submitted" in shown and ran["run"]["task_id"] in shown and "\x1b" not in shown
    task_list = [sys.executable, "-m", "cloudagent_mcp", "task", "list", "--schedule", "nightly", "--json"]
    listed = subprocess.run(task_list, env=user.environment, capture_output=True, text=True, timeout=60, check=True)
    assert [task["task_id"] for task in json.loads(listed.stdout)["tasks"]] == [ran["run"]["task_id"]]
    subprocess.run(
        [sys.executable, "-m", "cloudagent_mcp", "task", "cancel", ran["run"]["task_id"]],
        env=user.environment, capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    assert "is deleted" in ca(user, "delete", "nightly").stdout
    assert ca(user, "list").stdout == ""


def test_what_cannot_be_is_a_sentence_with_a_remedy(user: World) -> None:
    create = ("create", "n", "0 3 * * *", "x", "--repository", "none")
    assert ca(user, *create).returncode == 0 == ca(user, *create).returncode
    for words, code in (
        (("show", "nobody"), "schedule_not_found"),
        (("delete", "n"), "ambiguous_id"),
        (("create", "n", "@daily", "x"), "invalid_cron"),
        (("create", "n", "0 0 30 2 *", "x"), "never_fires"),
        (("create", "n", "0 0 * * *", "x", "--timezone", "Mars/X"), "unknown_timezone"),
    ):
        done = ca(user, *words)
        assert done.returncode == 2 and f"({code})" in done.stderr and "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 2
    assert ca(user, "create", "n").returncode == 2


def test_a_schedule_starts_the_worker_that_will_fire_it(world: World) -> None:
    assert running_worker(world.home) is None
    try:
        assert ca(world, "create", "n", "0 3 1 1 *", "x", "--repository", "none").returncode == 0
        found = until(lambda: (now := running_worker(world.home)) and now.pid and now, "the worker runs")
        os.kill(found.pid, signal.SIGTERM)
        until(lambda: running_worker(world.home) is None, "the worker has stopped")
        # As after a restart of the machine.
        assert ca(world, "list").returncode == 0
        until(lambda: (now := running_worker(world.home)) and now.pid, "the worker runs again")
    finally:
        # While a schedule is enabled it would run for good.
        if (left := running_worker(world.home)) is not None and left.pid is not None:
            os.kill(left.pid, signal.SIGTERM)
            until(lambda: running_worker(world.home) is None, "the worker has stopped")
