"""Three models try the same task: the real Claude Code in three sandboxes; only the models' words are scripted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from cloudagent_mcp.scripted_model import Rule, ScriptedModel
from tests.support.scripts import bash, say
from tests.support.served import KEY, served
from tests.support.worlds import World, git

TEST = "python3 -m unittest -q"
MODELS = ["claude-opus-4-5", "claude-sonnet-4-5", "claude-haiku-4-5"]
MEND = "sed -i 's/a - b/a + b/' calc.py"
RULES = [
    # Right, and more than was asked for; wrong; right, and no more.
    Rule(prompt="Fix add", model="opus", turns=(bash(f"{MEND}; seq 50 > notes.txt"), say("Fixed, with notes."))),
    Rule(prompt="Fix add", model="sonnet", turns=(bash("sed -i 's/a - b/a * b/' calc.py"), say("Fixed, I think."))),
    Rule(prompt="Fix add", model="haiku", turns=(bash(MEND), say("Fixed."))),
]


def test_the_best_of_three_models_is_found_compared_and_applied(world: World, repo: Path, tmp_path: Path) -> None:
    with ScriptedModel(RULES) as model:
        world = world.with_model(model.environment())
        world.start_worker()
        with world.client(repo) as client:
            asked = {"prompt": "Fix add", "models": MODELS, "verify": TEST, "max_budget_usd": 3.0}
            parent = client.call("submit_task", **asked, idempotency_key="once")
            assert parent["best_of"] == 3
            assert client.call("submit_task", **asked, idempotency_key="once")["task_id"] == parent["task_id"]
            task = world.wait(client, parent["task_id"])
            assert (task["status"], task["verdict"], task["result"]["summary"]) == ("completed", "passed", "Fixed.")
            table = [(found["model"], found["rank"], found["verdict"]) for found in task["candidates"]]
            assert table == [(MODELS[2], 1, "passed"), (MODELS[0], 2, "passed"), (MODELS[1], 3, "failed")]
            best = task["candidates"][0]
            assert task["best"] == {"candidate": 3, "task_id": best["task_id"]}
            assert "candidate 3 is the best of 3" in task["next_action"].lower()
            each = [client.call("get_task", task_id=found["task_id"]) for found in task["candidates"]]
            assert task["usage"]["cost_usd"] == sum(found["usage"]["cost_usd"] for found in each) > 0
            assert {found["branch"] for found in each} == {f"task/{found['task_id'][5:13]}" for found in each}
            assert task["branch"] == best["task_id"].replace("task_", "task/")[:13] == each[0]["branch"]
            budgets = [world.app().store.tasks.spec("local", found["task_id"]).max_budget_usd for found in each]
            assert budgets == [1.0] * 3
            assert [found["task_id"] for found in client.call("list_tasks")["tasks"]] == [parent["task_id"]]

            files = [file["path"] for file in client.call("get_task_diff", task_id=parent["task_id"])["files"]]
            assert files == ["calc.py"]
            other = client.call("get_task_diff", task_id=parent["task_id"], candidate=1)
            assert [file["path"] for file in other["files"]] == ["calc.py", "notes.txt"]

            def ca(*words: str, **more: str) -> str:
                command = [sys.executable, "-m", "cloudagent_mcp", "task", *words]
                environment = {**world.environment, **more}
                done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True)
                assert done.returncode == 0, done.stdout + done.stderr
                return done.stdout

            shown = ca("show", parent["task_id"])
            assert all(name in shown for name in MODELS) and "rank" in shown
            with served(world) as url:
                there = {
                    "CLOUDAGENT_URL": url, "CLOUDAGENT_API_KEY": KEY, "CLOUDAGENT_HOME": str(tmp_path / "elsewhere")
                }  # fmt: skip
                patch = ca("diff", parent["task_id"], "--candidate", "2", **there)
                assert "+    return a * b" in patch
                done = json.loads(ca("apply", parent["task_id"], "--candidate", "1", "--json", **there))
                assert done["outcome"] == "applied" and (repo / "notes.txt").exists() and done["resume"]
                ca("undo", parent["task_id"], **there)
                assert git(repo, "status", "--porcelain") == ""
                assert each[1]["task_id"][5:13] in ca("show", each[1]["task_id"][5:13], **there)
            applied = json.loads(ca("apply", parent["task_id"], "--json"))
            assert applied["task_id"] == best["task_id"] and git(repo, "status", "--porcelain") == "M calc.py"
            resumed = json.loads(ca("resume", parent["task_id"], "--candidate", "2", "--json"))
            assert resumed["turns"] > 0

            following = client.call("submit_task", prompt="Fix add", continue_task_id=parent["task_id"])
            task = world.wait(client, following["task_id"])
            assert (task["status"], task["parent_task_id"]) == ("completed", parent["task_id"])
            assert task["model"] == MODELS[2] and task["candidate"] is None
            said = json.dumps(model.requests[-1].body["messages"])
            assert "Fixed." in said and "Fixed, with notes." not in said
