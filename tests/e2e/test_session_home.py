"""A conversation that began in a sandbox goes on elsewhere: the real Claude Code on both sides."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cloudagent_mcp.scripted_model import Received, Rule, Script, ScriptedModel
from tests.e2e.test_one_task import FIX, MENDED
from tests.support.claude_code import claude
from tests.support.scripts import bash, pause, say
from tests.support.served import KEY, served
from tests.support.worlds import World, until

MORE = Rule(prompt="Now add a note", turns=(bash("cat calc.py > note.txt"), say("Noted.")))
LOCAL = Rule(prompt="What did you mend", turns=(say("Add, as I said."),))


def said(request: Received) -> list[tuple[str, str]]:
    """Who said what in a conversation, without what Claude Code itself adds to it."""
    found: list[tuple[str, str]] = []
    for message in request.body["messages"]:
        content = message["content"]
        blocks: Sequence[Mapping[str, Any]] = (
            [{"type": "text", "text": content}] if isinstance(content, str) else content
        )
        for block in blocks:
            told = {name: value for name, value in block.items() if name != "cache_control"}
            text = json.dumps(told, sort_keys=True)
            if message["role"] != "system" and "<system-reminder>" not in text:
                found.append((message["role"], text))
    return found


def ca(folder: Path, environment: Mapping[str, str], *words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "cloudagent_mcp", *words, "--json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    return json.loads(done.stdout)


def last_request(model: ScriptedModel) -> Received:
    return [request for request in model.requests if "count_tokens" not in request.path][-1]


def test_a_task_goes_on_from_another_and_both_conversations_come_home_whole(
    world: World, repo: Path, tmp_path: Path
) -> None:
    with ScriptedModel([FIX, MORE, LOCAL]) as model:
        world = world.with_model(model.environment())
        world.start_worker()
        with world.client(repo) as client:
            first = client.call("submit_task", prompt="Fix add please")["task_id"]
            task = world.wait(client, first)
            assert task["status"] == "completed", task
            before = said(last_request(model))
            second = client.call("submit_task", prompt="Now add a note", continue_task_id=first)["task_id"]
            again = world.wait(client, second)
            assert (again["status"], again["parent_task_id"]) == ("completed", first), again
            # The branch: what the first has mended is there, and is part of the result.
            diff = client.call("get_task_diff", task_id=second)
            assert [file["path"] for file in diff["files"]] == ["calc.py", "note.txt"]
            assert f"+    {MENDED}" in diff["diff"].partition("note.txt")[2]
            # The conversation: every turn of the first, its last words, and the new prompt.
            whole = said(last_request(model))
            assert whole[: len(before)] == before and len(whole) == len(before) + 4, (before, whole)
            assert whole[len(before)][0] == "assistant" and "Fixed add." in whole[len(before)][1]
            # Each pays for its own requests alone.
            assert (task["usage"]["turns"], again["usage"]["turns"]) == (4, 2)
            assert again["usage"]["output_tokens"] == 40 and again["usage"]["cost_usd"] < task["usage"]["cost_usd"]

            # The first comes home with its files.
            applied = client.apply(first)
            assert applied["outcome"] == "applied" and MENDED in (repo / "calc.py").read_text()
            line = re.fullmatch(rf"cd {re.escape(str(repo))} && claude --resume ([0-9a-f-]{{36}})", applied["resume"])
            assert line is not None
            answer = claude(world, repo, "--resume", line[1], "-p", "What did you mend?")
            assert answer.strip() == "Add, as I said."
            home = said(last_request(model))
            assert home[: len(before)] == before, "no turn is lost"
            assert [text for _, text in home[len(before) :]] == [
                json.dumps({"text": "Fixed add.", "type": "text"}),
                json.dumps({"text": "What did you mend?", "type": "text"}),
            ]
            # There are turns of our own in it now: the second's, which does not have them, is not written over it.
            (kept,) = (Path(world.environment["HOME"]) / ".claude" / "projects").glob(f"*/{line[1]}.jsonl")
            mine = kept.read_bytes()
            assert client.resume(first, repo)["outcome"] == "already_here"
            environment = {**world.environment, "CLAUDE_CONFIG_DIR": str(tmp_path / "other")}
        with served(world) as url:
            remote = {**environment, "CLOUDAGENT_URL": url, "CLOUDAGENT_API_KEY": KEY}

            assert ca(repo, {**remote, "CLAUDE_CONFIG_DIR": ""}, "task", "resume", second)["code"] == "session_diverged"
            assert kept.read_bytes() == mine
            # Over HTTP, into another folder of Claude Code's and for another directory.
            brought = ca(tmp_path, remote, "task", "resume", second)
            assert brought["outcome"] == "placed" and brought["directory"] == str(tmp_path)
        world.environment["CLAUDE_CONFIG_DIR"] = environment["CLAUDE_CONFIG_DIR"]
        claude(world, tmp_path, "--resume", brought["session_id"], "-p", "What did you mend?")
        home = said(last_request(model))
        assert home[: len(whole)] == whole and len(home) == len(whole) + 2, "no turn is lost"


def test_a_conversation_goes_along_and_a_task_that_goes_on_begins_again_from_there_when_its_sandbox_dies(
    world: World, repo: Path
) -> None:
    slow = Rule(prompt="Now take long", turns=(bash(pause(600)),))
    with ScriptedModel([LOCAL, FIX, slow]) as model:
        world = world.with_model(model.environment())
        world.start_worker()
        with world.client(repo) as client:
            claude(world, repo, "-p", "What did you mend before?")
            mine = said(last_request(model))
            command = ["task", "create", "Fix add please", "--session", "current", "--setup", "echo made > made.txt"]
            task = world.wait(client, ca(repo, world.environment, *command)["task_id"])
            first = task["task_id"]
            assert task["status"] == "completed", task
            before = said(last_request(model))
            assert before[: len(mine)] == mine and "Add, as I said." in before[len(mine)][1], "what was said here"
            assert "Fix add please" in before[len(mine) + 1][1]
            # It comes home beside the one that it parted from.
            assert client.resume(first, repo)["outcome"] == "placed"
            assert len(list(Path(world.environment["HOME"]).glob(".claude/projects/*/*.jsonl"))) == 2
            asked = len(model.requests)
            second = client.call("submit_task", prompt="Now take long", continue_task_id=first, on_interrupt="restart")[
                "task_id"
            ]
            until(lambda: len(model.requests) > asked, "it is at work")
            model.script = Script(rules=(Rule(prompt="Now take long", turns=MORE.turns),))
            world.kill_sandbox()
            task = world.wait(client, second)
            assert task["status"] == "completed", task
            files = [file["path"] for file in client.call("get_task_diff", task_id=second)["files"]]
            assert files == ["calc.py", "made.txt", "note.txt"]
            whole = said(last_request(model))
            assert whole[: len(before)] == before and "Fixed add." in whole[len(before)][1]
            assert "Now take long" in whole[len(before) + 1][1]
