"""The whole way there and back, with the real Claude Code on both sides and its user at the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from cloudagent_mcp.scripted_model import Rule, ScriptedModel
from tests.e2e.test_session_home import last_request, said
from tests.support.claude_code import claude
from tests.support.git_repos import files_of
from tests.support.scripts import bash, say, use
from tests.support.worlds import World, until

TEST = "python3 -m unittest -q"
PLAN = Rule(prompt="^What is wrong", turns=(say("add subtracts; I would have a task mend it."),))
FIRST_TRY = Rule(
    prompt="^Mend it",
    turns=(
        use("mcp__user__ask_user", question="May I write to calc.py?", choices=["yes", "no"]),
        bash("sed -i 's/a - b/a * b/' calc.py"),
        say("It multiplies now, since you said {{result}}."),
    ),
)
SECOND_TRY = Rule(
    prompt="handed over was checked.*AssertionError", turns=(bash("sed -i 's/a [*] b/a + b/' calc.py"), say("It adds."))
)
LATER = Rule(prompt="^What did you do", turns=(say("I mended add, at the second try."),))


def test_from_a_talk_and_a_dirty_tree_to_a_verified_result_a_talk_that_goes_on_and_back(
    world: World, repo: Path
) -> None:
    (repo / "calc.py").write_text("# mine, not committed\n" + (repo / "calc.py").read_text())
    (repo / "notes.txt").write_text("nor is this\n")
    before = files_of(repo)
    with ScriptedModel([SECOND_TRY, PLAN, FIRST_TRY, LATER]) as model:
        world = world.with_model(model.environment())
        world.start_worker()

        def ca(*words: str) -> dict[str, Any]:
            command = [sys.executable, "-m", "cloudagent_mcp", "task", *words, "--json"]
            done = subprocess.run(command, cwd=repo, env=world.environment, capture_output=True, text=True, timeout=110)
            assert done.returncode == 0, done.stdout + done.stderr
            return json.loads(done.stdout)

        assert "add subtracts" in claude(world, repo, "-p", "What is wrong here?")
        task_id = ca("create", "Mend it", "--session", "current", "--verify", TEST, "--retries", "1")["task_id"]
        asked: dict[str, Any] = until(
            lambda: (task := ca("show", task_id))["status"] == "waiting" and task, "it asks", 60
        )
        assert asked["question"] == "May I write to calc.py?" and task_id in asked["next_action"]
        assert ca("send", task_id, "yes, the file is yours")["answered"] is True
        ca("wait", task_id)
        task = ca("show", task_id)
        assert (task["status"], task["verdict"], task["retries_used"]) == ("completed", "passed", 1), task
        in_the_sandbox = said(last_request(model))
        heard = json.dumps(in_the_sandbox)
        for words in ("What is wrong here?", "add subtracts", "Mend it", "yes, the file is yours", "AssertionError"):
            assert words in heard, words

        previewed = ca("apply", task_id, "--dry-run")
        assert previewed["outcome"] == "would_apply" and files_of(repo) == before
        applied = ca("apply", task_id, "--preview", previewed["preview"])
        assert applied["outcome"] == "applied" and [file["path"] for file in applied["files"]] == ["calc.py"]
        assert (repo / "calc.py").read_text() == "# mine, not committed\ndef add(a, b):\n    return a + b\n"

        session = re.search(r"claude --resume ([0-9a-f-]{36})$", applied["resume"])
        assert session is not None
        assert "at the second try" in claude(world, repo, "--resume", session[1], "-p", "What did you do?")
        at_home = said(last_request(model))
        assert at_home[: len(in_the_sandbox)] == in_the_sandbox, "no turn is lost"
        assert [text for _, text in at_home[len(in_the_sandbox) :]] == [
            json.dumps({"text": text, "type": "text"}) for text in ("It adds.", "What did you do?")
        ]
        assert ca("undo", task_id)["outcome"] == "undone"
    assert files_of(repo) == before
