"""By default, a task's agent and its commands reach the model, and nothing else of the machine that they run on."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloudagent_mcp.scripted_model import Rule, ScriptedModel
from tests.support.closed import Host
from tests.support.scripts import bash, say
from tests.support.worlds import World, until


@pytest.mark.parametrize("setting, reached", [(None, False), ("open", True)])
def test_the_hosts_own_services_are_closed_to_a_task_unless_its_operator_opens_them(
    world: World, repo: Path, setting: str | None, reached: bool
) -> None:
    host = Host()
    look = f"curl -s -m 5 http://127.0.0.1:{host.port}"
    rule = Rule(prompt="^Look", turns=(bash(f"{look}/agent || echo closed"), say("Looked.")))
    try:
        with ScriptedModel([rule]) as model:
            world = world.with_model(model.environment())
            if setting is not None:
                world = world.with_model({"SANDBOX_EGRESS": setting})
            world.start_worker()
            with world.client(repo) as client:
                setup, verify = f"{look}/setup || true", f"{look}/verify || true"
                task_id = client.call("submit_task", prompt="Look", setup=setup, verify=verify)["task_id"]
                task = world.wait(client, task_id)
                log = "\n".join(line["message"] for line in world.log(client, task_id))
            assert (task["status"], task["verdict"]) == ("completed", "passed"), log
            until(lambda: not world.agent_processes(), "the proxy is gone with the sandbox")
    finally:
        host.close()
    paths = [line.split()[0] for line in host.seen]
    assert paths == (["/setup", "/agent", "/verify"] if reached else [])
