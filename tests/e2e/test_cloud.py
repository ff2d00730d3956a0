"""A whole task in a cloud sandbox: the real agent and the unmodified SDK, against the test server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudagent_mcp.scripted_model import Rule, ScriptedModel, Text, ToolUse, Turn
from tests.support.e2b_server.client import E2bServer, e2b_server
from tests.support.worlds import World, until

TEST = "python3 -m unittest -q"


def bash(command: str) -> Turn:
    return Turn(blocks=(ToolUse(name="Bash", input={"command": command, "description": "Work"}),))


SLOW = Rule(
    prompt="Fix add",
    turns=(
        bash("env > seen.txt; cat /proc/*/environ 2>/dev/null | tr '\\0' '\\n' >> seen.txt"),
        bash("sed -i 's/a - b/a + b/' calc.py"),
        *[bash(f"python3 -c 'import time; time.sleep(0.5)'; echo step-{number} >> steps.txt") for number in range(4)],
        Turn(blocks=(Text(text="Fixed add."),)),
    ),
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[E2bServer]:
    with e2b_server(tmp_path / "e2b", api_key="e2b_canary4711") as running:
        yield running


def test_a_task_in_a_cloud_sandbox_survives_its_worker_and_comes_back_checked(
    world: World, repo: Path, server: E2bServer
) -> None:
    with ScriptedModel([SLOW]) as model:
        world = world.in_cloud(server).with_model(model.environment())
        first = world.start_worker()
        with world.client(repo) as client:
            task_id = client.call("submit_task", prompt="Fix add please", verify=TEST)["task_id"]
            until(
                lambda: any("step-1" in line["message"] for line in world.log(client, task_id)), "the agent is at work"
            )
            world.kill_worker(first)
            world.start_worker()
            task = world.wait(client, task_id)
            log = world.log(client, task_id)
            diff = client.call("get_task_diff", task_id=task_id)["diff"]
    assert (task["status"], task["verdict"]) == ("completed", "passed"), (task["error"], log)
    assert (task["provider"], task["attempt"]) == ("e2b", 2)
    assert "+    return a + b" in diff
    for number in range(4):
        assert diff.count(f"+step-{number}\n") == 1
    assert [line["seq"] for line in log] == list(range(1, len(log) + 1))
    # The key of the account stays with the worker.
    assert "IS_SANDBOX=1" in diff
    assert "canary4711" not in f"{diff}{log}{task}"
    assert "canary4711" not in "".join(path.read_text() for path in world.home.glob("worker-*.log"))
    until(lambda: server.stats()["living"] == 0, "the sandbox is killed")
    assert server.stats()["created"] == 1
