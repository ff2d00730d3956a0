"""An agent asks its user: the real Claude Code in a real sandbox; only the model's words are scripted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cloudagent_mcp.client import LocalClient
from cloudagent_mcp.scripted_model import Rule, ScriptedModel
from tests.support.scripts import bash, say, use
from tests.support.worlds import World, until

ASK = Rule(
    prompt="Choose a licence",
    turns=(
        bash("echo begun > begun.txt"),
        use("mcp__user__ask_user", question="Which licence?", choices=["MIT", "GPL"]),
        bash("echo 'chosen: {{result}}' > LICENSE"),
        say("Done."),
    ),
)


def waiting(client: LocalClient, task_id: str) -> dict[str, Any]:
    """The task, once its agent asks."""
    return until(
        lambda: (task := client.call("get_task", task_id=task_id))["status"] == "waiting" and task, "it asks", 60
    )


def chosen(client: LocalClient, task_id: str) -> str:
    """What the agent made of the answer."""
    diff = client.call("get_task_diff", task_id=task_id, path="LICENSE")["diff"]
    return diff.partition("+chosen: ")[2].strip()


def test_the_task_waits_for_its_user_and_the_agent_goes_on_with_the_answer(world: World, repo: Path) -> None:
    with ScriptedModel([ASK]) as model:
        world = world.with_model(model.environment())
        world.start_worker()
        with world.client(repo) as client:
            task_id = client.call("submit_task", prompt="Choose a licence")["task_id"]
            task = waiting(client, task_id)
            assert (task["question"], task["asked"]["choices"]) == ("Which licence?", ["MIT", "GPL"])
            assert task["asked"]["question_id"] in task["next_action"]
            (pending,) = client.call("list_pending_questions")["questions"]
            assert (pending["task_id"], pending["question"]) == (task_id, "Which licence?")

            def ca(*words: str) -> str:
                command = [sys.executable, "-m", "cloudagent_mcp", *words]
                done = subprocess.run(command, cwd=repo, env=world.environment, capture_output=True, text=True)
                assert done.returncode == 0, done.stdout + done.stderr
                return done.stdout

            assert "Which licence?" in ca("task", "show", task_id) and "GPL" in ca("task", "questions")
            assert json.loads(ca("task", "send", task_id, "MIT", "--json"))["answered"] is True
            task = world.wait(client, task_id)
            assert (task["status"], task["question"]) == ("completed", None)
            assert chosen(client, task_id) == "MIT"
            assert task["result"]["artifacts"]["files_changed"] == 2
            kinds = [line["kind"] for line in world.log(client, task_id)]
            assert kinds.count("question") == kinds.count("answer") == 1
        last = json.dumps(model.requests[-1].body["messages"])
        assert "MIT" in last, "the model's next turn sees the answer"


def test_a_worker_that_is_killed_while_the_task_waits_costs_nothing(world: World, repo: Path) -> None:
    with ScriptedModel([ASK]) as model:
        world = world.with_model(model.environment())
        worker = world.start_worker()
        with world.client(repo) as client:
            task_id = client.call("submit_task", prompt="Choose a licence")["task_id"]
            question = waiting(client, task_id)["asked"]["question_id"]
            world.kill_worker(worker)
            client.call("send_message", task_id=task_id, message="GPL", question_id=question)
            world.start_worker()
            task = world.wait(client, task_id)
            assert (task["status"], task["attempt"]) == ("completed", 2)
            assert chosen(client, task_id) == "GPL"


def test_the_session_of_a_sandbox_that_died_while_the_task_waited_asks_again(world: World, repo: Path) -> None:
    resumed = Rule(
        prompt="Your sandbox came to its end",
        turns=(
            use("mcp__user__ask_user", question="Once more: which licence?"),
            bash("echo 'chosen: {{result}}' > LICENSE"),
            say("Done."),
        ),
    )
    with ScriptedModel([resumed, ASK]) as model:
        world = world.with_model(model.environment())
        world.start_worker()
        with world.client(repo) as client:
            task_id = client.call("submit_task", prompt="Choose a licence")["task_id"]
            first = waiting(client, task_id)
            until(
                lambda: any("Kept a checkpoint" in line["message"] for line in world.log(client, task_id)),
                "its work is kept",
            )
            world.kill_sandbox()
            again = until(
                lambda: (task := waiting(client, task_id))["question"] != first["question"] and task, "it asks again"
            )
            assert again["question"].startswith("Once more")
            assert client.call("send_message", task_id=task_id, message="MIT")["answered"]
            task = world.wait(client, task_id)
            assert (task["status"], chosen(client, task_id)) == ("completed", "MIT")
            assert task["result"]["artifacts"]["files_changed"] == 2, "what was there before the question is kept"
