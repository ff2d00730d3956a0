"""A whole task in a cloud sandbox: the real agent and the unmodified SDK, against the test server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import e2b
import pytest

from cloudagent_mcp.client import LocalClient
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
SET_UP = "echo setting up; (cat uv.lock; od -An -N8 -tx1 /dev/urandom) > made.log"
LOOK = Rule(prompt="^Look", turns=(bash("cp made.log seen.txt"), Turn(blocks=(Text(text="Looked."),))))


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


def kept_templates(world: World) -> list[str]:
    return [kept.template for kept in world.app().store.templates.unused("e2b", for_s=-60)]


def snapshots(server: E2bServer) -> list[str]:
    return [found.snapshot_id for found in e2b.Sandbox.list_snapshots(**server.options).next_items()]


def ended(world: World, client: LocalClient, task_id: str) -> tuple[list[str], str]:
    """What the log of a completed task says, and what its agent saw of the set-up."""
    task = world.wait(client, task_id, 90)
    said = [line["message"] for line in world.log(client, task_id)]
    assert task["status"] == "completed", (task["error"], said)
    diff: str = client.call("get_task_diff", task_id=task_id)["diff"]
    return said, "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] == "+" and line[1] != "+")


def test_a_set_up_runs_once_for_its_lock_file_and_again_when_what_was_kept_has_vanished(
    world: World, repo: Path, server: E2bServer
) -> None:
    with ScriptedModel([LOOK]) as model:
        variables = {**model.environment(), **server.environment, "SANDBOX_PROVIDER": "e2b"}
        world = replace(world, environment={**world.environment, **variables})
        worker = world.start_worker()
        with world.client(repo) as client:
            tasks: list[str] = []

            def run(**arguments: str) -> tuple[list[str], str]:
                asked = {"prompt": "Look around", "setup": SET_UP, **arguments}
                tasks.append(client.call("submit_task", **asked)["task_id"])
                return ended(world, client, tasks[-1])

            (repo / "uv.lock").write_text("one\n")
            said, first = run()
            assert "setting up\n" in said and first.startswith("one\n")
            (kept,) = kept_templates(world)

            said, second = run()
            assert "setting up\n" not in said and "The set-up was done before: its sandbox was kept." in said
            assert second == first
            assert server.sandboxes()[-1]["asked"]["templateID"] == kept

            (repo / "uv.lock").write_text("two\n")
            said, third = run()
            assert "setting up\n" in said and third.startswith("two\n")
            assert len(kept_templates(world)) == 2
            (newer,) = set(kept_templates(world)) - {kept}

            # What an agent has made is no part of a set-up that others are given.
            assert "other\n" in run(continue_task_id=tasks[0], setup="echo other")[0]
            assert set(kept_templates(world)) == {kept, newer}

            assert e2b.Sandbox.delete_snapshot(newer, **server.options)
            body = '{"code": 400, "message": "no snapshots on this plan"}'
            refused = server.fault("answer", "/sandboxes/.*/snapshots", status=400, body=body)
            said, fourth = run()
            assert "setting up\n" in said and fourth.startswith("two\n") and fourth != third
            assert refused.fired == 1
            assert kept_templates(world) == snapshots(server) == [kept]

            # What was kept began as another template.
            world.kill_worker(worker)
            world.environment["SANDBOX_TEMPLATE"] = "base"
            world.start_worker()
            assert "setting up\n" in run()[0]


def test_of_two_set_ups_that_are_kept_at_once_the_one_that_nobody_is_given_any_more_is_deleted(
    world: World, repo: Path, server: E2bServer
) -> None:
    with ScriptedModel([LOOK]) as model:
        variables = {**model.environment(), **server.environment, "SANDBOX_PROVIDER": "e2b"}
        world = replace(world, environment={**world.environment, **variables})
        world.start_worker()
        with world.client(repo) as client:
            setup = "until [ -e go.log ]; do python3 -c 'import time; time.sleep(0.05)'; done; echo x > made.log"
            tasks: list[str] = [
                client.call("submit_task", prompt="Look around", setup=setup)["task_id"] for _ in range(2)
            ]
            until(
                lambda: all(client.call("get_task", task_id=task)["phase"] == "setup" for task in tasks), "both set up"
            )
            assert snapshots(server) == []
            for sandbox in server.sandboxes():
                (Path(sandbox["home"]) / "sandbox/repository/go.log").touch()
            for task in tasks:
                ended(world, client, task)
            assert snapshots(server) == kept_templates(world) and len(snapshots(server)) == 1
