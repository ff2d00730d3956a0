"""Comments on a diff reach the agent that made it, and tasks at work on the same file know of each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cloudagent_mcp.scripted_model import Rule, ScriptedModel
from tests.e2e.test_one_task import FIX
from tests.e2e.test_session_home import last_request, said
from tests.support.scripts import bash, pause, say, use
from tests.support.worlds import World, git, until

MEND = Rule(
    prompt="Use sum",
    turns=(bash("printf 'def add(a, b):\\n    return sum((a, b))\\n' > calc.py"), say("It uses sum() now.")),
)


def test_a_comment_on_a_line_has_the_same_agent_mend_it_in_a_follow_up(world: World, repo: Path) -> None:
    with ScriptedModel([MEND, FIX]) as model:
        world = world.with_model(model.environment())
        world.start_worker()
        with world.client(repo) as client:
            verify = f"{sys.executable} -m unittest -q"
            first = client.call("submit_task", prompt="Fix add please", verify=verify, max_turns=9)["task_id"]
            assert world.wait(client, first)["verdict"] == "passed"
            before = said(last_request(model))
            command = ["task", "comment", first[5:13], "calc.py:2", "Use sum() here.", "--watch"]
            done = subprocess.run(
                [sys.executable, "-m", "cloudagent_mcp", *command],
                cwd=repo,
                env=world.environment,
                capture_output=True,
                text=True,
                timeout=100,
            )
            assert done.returncode == 0 and "goes on from" in done.stdout, done.stdout + done.stderr
            second, *_ = client.call("list_tasks")["tasks"]
            assert second["parent_task_id"] == first and second["verdict"] == "passed"
            assert client.call("get_task", task_id=first)["status"] == "completed"
            diff = client.call("get_task_diff", task_id=second["task_id"])["diff"]
            assert "+    return sum((a, b))" in diff and "-    return a - b" in diff
        # In the same conversation, with the lines that are meant.
        whole = said(last_request(model))
        assert whole[: len(before)] == before and "Fixed add." in whole[len(before)][1]
        (_, told) = whole[len(before) + 1]
        assert "1. calc.py, line 2:" in told and "-2 |-    return a - b" in told
        assert ">      2 |+    return a + b" in told and told.index("return a + b") < told.index("Use sum() here.")


def test_two_tasks_that_change_the_same_file_are_told_of_each_other_while_they_do(
    world: World, repo: Path, tmp_path: Path
) -> None:
    writes = Rule(
        prompt="^Write",
        turns=(use("Write", file_path="{{cwd}}/new.py", content="x\n"), bash(pause(600))),
    )
    runs = Rule(prompt="^Run", turns=(bash(f"echo y > new.py && {pause(600)}"),))
    elsewhere = tmp_path / "worktree"
    git(repo, "worktree", "add", "-q", str(elsewhere))
    with ScriptedModel([writes, runs]) as model:
        world = world.with_model(model.environment())
        # What a command changes is known from a checkpoint alone.
        world.start_worker(checkpoint_s=1.0)
        with world.client(repo) as client, world.client(elsewhere) as beside:
            one = client.call("submit_task", prompt="Write it")["task_id"]
            other = beside.call("submit_task", prompt="Run it")["task_id"]
            for mine, theirs in ((one, other), (other, one)):
                task = until(
                    lambda mine=mine: (found := client.call("get_task", task_id=mine))["overlaps"] and found,
                    "they know of each other",
                )
                assert task["overlaps"] == [{"task_id": theirs, "files": ["new.py"]}]
                assert f"{theirs} also changes `new.py`" in task["next_action"]
            listed = {task["task_id"]: task["overlaps"] for task in client.call("list_tasks")["tasks"]}
            assert listed[one] and listed[other]
            client.call("cancel_task", task_id=one)
            assert world.wait(client, one)["result"]["artifacts"]["files_changed"] == 1
            # What was saved of it would still meet the other's; which is told of nothing that has ended.
            assert client.call("get_task", task_id=one)["overlaps"]
            assert client.call("get_task", task_id=other)["overlaps"] == []
