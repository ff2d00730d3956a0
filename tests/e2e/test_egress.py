"""By default, a task's agent and its commands reach the model, and nothing else of the machine that they run on."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloudagent_mcp.scripted_model import Rule, ScriptedModel
from cloudagent_storage.errors import EgressNotAllowed
from cloudagent_storage.records import LOCAL_ACCOUNT
from tests.support.closed import Host
from tests.support.scripts import bash, say
from tests.support.worlds import World, until


@pytest.mark.parametrize("setting, reached", [(None, False), ("open", True)])
def test_the_hosts_own_services_are_closed_to_a_task_unless_its_operator_opens_them(
    world: World, repo: Path, setting: str | None, reached: bool
) -> None:
    host = Host()
    look = f"curl -s -m 5 http://127.0.0.1:{host.port}"
    rule = Rule(prompt="^Look", turns=(bash(f"{look}/agent || curl -s http://intranet.test/ || true"), say("Looked.")))
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
    assert task["result"]["blocked_hosts"] == ([] if reached else ["intranet.test:80"])


def test_a_task_may_ask_for_hosts_as_far_as_its_operator_lets_it(world: World) -> None:
    app = world.app()
    asked = {"prompt": "Look", "repository": "none", "egress": ["Docs.Example.com", "*.example.org"]}
    with ScriptedModel([]) as model:
        mine = world.with_model(model.environment())
        with mine.client() as client:
            task_id = client.call("submit_task", **asked)["task_id"]
        assert app.store.tasks.spec(LOCAL_ACCOUNT, task_id).egress == ("docs.example.com", "*.example.org")
        with mine.with_model({"SANDBOX_EGRESS_TASKS": "none"}).client() as client:
            with pytest.raises(EgressNotAllowed) as refused:
                client.call("submit_task", **asked)
        assert "SANDBOX_EGRESS" in refused.value.remedy
