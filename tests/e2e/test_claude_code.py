"""The real Claude Code delegates: over stdio, and over HTTP with a header. Only its model's words are scripted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cloudagent_mcp.scripted_model import Rule, ToolUse, Turn
from tests.e2e.test_clients import stop_embedded_worker
from tests.e2e.test_one_task import FIX, MENDED, TEST, say
from tests.support.claude_code import Talk, calls, claude, converse, results, says, tools_called, transcript
from tests.support.git_server import git_server
from tests.support.served import KEY, served
from tests.support.worlds import World, git

DOCUMENT = Path(__file__).parents[2] / "docs" / "clients.md"
TRANSCRIPT = re.compile(r"(?<=<!-- transcript -->\n```\n).*?(?=\n```\n<!-- end of transcript -->)", re.DOTALL)

PROMPT = "Have cloudagent fix add, checked by the tests, and count the lines meanwhile. Apply the fix."
QUESTION = ToolUse(name="mcp__user__ask_user", input={"question": "Do blank lines count?", "choices": ["yes", "no"]})
COUNT = Rule(prompt="Count the lines", turns=(Turn(blocks=(QUESTION,)), say("I counted, and was told: {{result}}")))


def delegation(**where: str) -> Rule:
    """Submit two tasks, wait for any, answer the question of one, read the diff of the other, apply it."""
    return Rule(
        prompt="Have cloudagent",
        turns=(
            calls(
                ("submit_task", {"prompt": "Fix add", "title": "mend", "verify": TEST, **where}),
                ("submit_task", {"prompt": "Count the lines", "title": "count", **where}),
            ),
            calls(("wait_tasks", {"task_ids": ["<mend>", "<count>"], "mode": "any", "timeout_seconds": 50})),
            # Whichever comes first, the question is there by now or soon: a wait ends with it, too.
            calls(("get_task", {"task_id": "<count>", "wait_seconds": 50})),
            calls(("send_message", {"task_id": "<count>", "message": "no"})),
            calls(("wait_tasks", {"task_ids": ["<mend>", "<count>"], "timeout_seconds": 50})),
            calls(("get_task", {"task_id": "<mend>", "wait_seconds": 50})),
            calls(("get_task_diff", {"task_id": "<mend>"})),
            calls(("apply_task", {"task_id": "<mend>"})),
            says("The fix passed the tests, and is in your working tree."),
        ),
    )


def test_claude_code_delegates_two_tasks_over_stdio_and_applies_one(
    world: World, repo: Path, request: pytest.FixtureRequest
) -> None:
    with Talk([delegation(), FIX, COUNT], world) as model:
        world = world.with_model(model.environment())
        claude(world, repo, "mcp", "add", "cloudagent", "--", sys.executable, "-m", "cloudagent_mcp", "mcp")
        listed = claude(world, repo, "mcp", "list")
        assert "cloudagent" in listed and "Connected" in listed
        messages = converse(world, repo, PROMPT)
    stop_embedded_worker(world)
    assert messages[-1]["result"].startswith("The fix passed")
    assert "return a + b" in results(messages, "get_task_diff")[0]
    assert json.loads(results(messages, "apply_task")[0])["outcome"] == "applied"
    assert MENDED in (repo / "calc.py").read_text()
    with world.client(repo) as client:
        tasks = {task["title"]: task for task in client.call("list_tasks")["tasks"]}
    assert {task["status"] for task in tasks.values()} == {"completed"} and tasks["mend"]["verdict"] == "passed"
    assert "no" in tasks["count"]["result"]["summary"]

    document = DOCUMENT.read_text()
    shown = transcript(PROMPT, messages).replace(str(repo), "/home/you/calc")
    if request.config.getoption("--update-snapshots"):
        DOCUMENT.write_text(TRANSCRIPT.sub(lambda _: shown, document))
    else:
        printed = TRANSCRIPT.search(document)
        assert printed is not None
        assert re.findall(r"^● cloudagent - (\w+)", printed[0], re.MULTILINE) == tools_called(messages)


def test_claude_code_delegates_over_http_and_the_command_that_it_is_given_applies_the_result(
    world: World, repo: Path, tmp_path: Path
) -> None:
    git(tmp_path, "clone", "-q", "--bare", str(repo), str(tmp_path / "served" / "calc.git"))
    with git_server(tmp_path / "tls", {"": tmp_path / "served"}) as remote:
        # A caller from elsewhere may not name a host on loopback; the worker's git knows where this one is.
        home = remote.trusted_by(Path(world.environment["HOME"]))
        with (home / ".gitconfig").open("a") as config:
            config.write(f'[url "{remote.address("")}"]\n\tinsteadOf = https://git.example.com/\n')
        with Talk([delegation(repository="https://git.example.com/calc.git"), FIX, COUNT], world) as model:
            world = world.with_model(model.environment())
            world.start_worker()
            with served(world) as url:
                key = ("--header", f"Authorization: Bearer {KEY}")
                claude(world, repo, "mcp", "add", "--transport", "http", "cloudagent", f"{url}/mcp", *key)
                messages = converse(world, repo, PROMPT)
                assert "return a + b" in results(messages, "get_task_diff")[0]
                applied = json.loads(results(messages, "apply_task")[0])
                assert applied["outcome"] == "instructions" and "Nothing was written" in applied["message"]
                assert git(repo, "status", "--porcelain") == ""

                program, *words = applied["command"].split()
                assert program == "ca"
                done = subprocess.run(
                    [sys.executable, "-m", "cloudagent_mcp", *words],
                    cwd=repo,
                    env={**world.environment, "CLOUDAGENT_URL": url, "CLOUDAGENT_API_KEY": KEY},
                    capture_output=True,
                    text=True,
                    timeout=60,
                )
                assert done.returncode == 0, done.stdout + done.stderr
    assert MENDED in (repo / "calc.py").read_text()
