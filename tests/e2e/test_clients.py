"""What clients may do to a task: go away, be killed; and the programs in `examples/`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from mcp import Client, StdioServerParameters

from cloudagent_mcp.embedded import running_worker
from cloudagent_mcp.scripted_model import ScriptedModel
from tests.e2e.test_one_task import FIX, MENDED, SLOW, STEPS, TEST
from tests.support.worlds import World, until


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
