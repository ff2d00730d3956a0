"""What clients may do to a task: go away, be killed, be the real Claude Code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import claude_agent_sdk
import pytest
from mcp import Client, StdioServerParameters

from cloudagent_mcp.embedded import running_worker
from cloudagent_mcp.scripted_model import Rule, ScriptedModel, Text, ToolUse, Turn
from tests.e2e.test_one_task import FIX, MENDED, SLOW, STEPS, TEST
from tests.support.worlds import World, until

CLAUDE = Path(claude_agent_sdk.__file__).parent / "_bundled" / "claude"


def stop_embedded_worker(world: World) -> None:
    found = running_worker(world.home)
    if found is not None and found.pid is not None:
        os.kill(found.pid, signal.SIGTERM)
        until(lambda: running_worker(world.home) is None, "the embedded worker stops")


@pytest.mark.anyio
async def test_a_client_that_is_killed_in_the_middle_does_not_stop_its_task(world: World, repo: Path) -> None:
    with ScriptedModel([SLOW]) as model:
        world = world.with_model(model.environment())
        server = StdioServerParameters(
            command=sys.executable, args=["-m", "cloudagent_mcp", "mcp"], env=world.environment, cwd=repo
        )
        async with Client(server) as client:
            result = await client.call_tool("submit_task", {"prompt": "Take your time"})
            task_id: str = cast("dict[str, Any]", result.structured_content)["task_id"]
            with world.client(repo) as other:
                until(lambda: other.call("get_task", task_id=task_id)["phase"] == "agent", "the agent works")
            children = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True).stdout.split()
            serving = [pid for pid in children if b"mcp" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
            assert len(serving) == 1
            os.kill(int(serving[0]), signal.SIGKILL)
            with world.client(repo) as other:
                task = world.wait(other, task_id)
                assert (task["status"], task["attempt"]) == ("completed", 1)
                calls = [line for line in world.log(other, task_id) if line["kind"] == "tool_use"]
                assert len(calls) == STEPS
    stop_embedded_worker(world)


def test_the_real_claude_code_lists_the_tools_and_delegates_a_task_to_its_end(world: World, repo: Path) -> None:
    """`claude mcp add`, then a conversation whose model is scripted: submit, wait, read the diff, apply."""
    name = "mcp__cloudagent__"
    # {{result}} is what the last tool answered; the task's id is the only one in this data folder, so a list finds it.
    talk = Rule(
        prompt="Delegate this",
        turns=(
            Turn(blocks=(ToolUse(name=f"{name}submit_task", input={"prompt": "Fix add", "verify": TEST}),)),
            Turn(blocks=(ToolUse(name=f"{name}get_task", input={"task_id": "TASK", "wait_seconds": 50}),)),
            Turn(blocks=(ToolUse(name=f"{name}get_task", input={"task_id": "TASK", "wait_seconds": 50}),)),
            Turn(blocks=(ToolUse(name=f"{name}get_task_diff", input={"task_id": "TASK"}),)),
            Turn(blocks=(ToolUse(name=f"{name}apply_task", input={"task_id": "TASK"}),)),
            Turn(blocks=(Text(text="Applied."),)),
        ),
    )
    with TaskIdModel([talk, FIX], world) as model:
        world = world.with_model(model.environment())
        environment = {
            **world.environment,
            "IS_SANDBOX": "1",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_AUTOUPDATER": "1",
        }

        def claude(*words: str) -> str:
            done = subprocess.run(
                [CLAUDE, *words], cwd=repo, env=environment, capture_output=True, text=True, timeout=110
            )
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        claude("mcp", "add", "cloudagent", "--", sys.executable, "-m", "cloudagent_mcp", "mcp")
        listed = claude("mcp", "list")
        assert "cloudagent" in listed and "Connected" in listed
        said = claude(
            *("-p", "Delegate this", "--output-format", "stream-json", "--verbose", "--dangerously-skip-permissions")
        )
        messages = [json.loads(line) for line in said.splitlines()]
        started = next(message for message in messages if message.get("subtype") == "init")
        assert {f"{name}{tool}" for tool in ("submit_task", "get_task", "apply_task")} <= set(started["tools"])
        assert messages[-1]["result"] == "Applied.", said
        assert MENDED in (repo / "calc.py").read_text()
        with world.client(repo) as client:
            task = client.call("list_tasks")["tasks"][0]
            assert (task["status"], task["verdict"]) == ("completed", "passed")
    stop_embedded_worker(world)


class TaskIdModel(ScriptedModel):
    """Says the newest task's id where the script says TASK: a script is written before there is one."""

    def __init__(self, rules: list[Rule], world: World) -> None:
        super().__init__(rules)
        self._world = world

    def choose(self, body: Any) -> Any:
        turn, fault, values = super().choose(body)
        if "TASK" in turn.model_dump_json():
            with self._world.client() as client:
                task_id = client.call("list_tasks", limit=1)["tasks"][0]["task_id"]
            turn = Turn.model_validate_json(turn.model_dump_json().replace("TASK", task_id))
        return turn, fault, values


def test_the_example_delegates_a_task_and_applies_it(world: World, repo: Path) -> None:
    example = Path(__file__).parent.parent.parent / "examples" / "delegate.py"
    with ScriptedModel([FIX]) as model:
        world = world.with_model(model.environment())
        done = subprocess.run(
            [sys.executable, example, "Fix add", "--verify", TEST],
            cwd=repo,
            env=world.environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Fixed add." in done.stdout and "modified calc.py" in done.stdout
        assert MENDED in (repo / "calc.py").read_text()
    stop_embedded_worker(world)
