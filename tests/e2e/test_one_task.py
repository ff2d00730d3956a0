"""A task from submit to apply: the real agent in a real sandbox; only the model's words are scripted."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cloudagent_mcp.client import LocalClient
from cloudagent_mcp.scripted_model import Rule, ScriptedModel, Text, ToolUse, Turn
from cloudagent_storage.records import LOCAL_ACCOUNT
from tests.support.worlds import FAST, World, git, until

TEST = "python3 -m unittest -q"
MISTAKE, MENDED = "return a - b", "return a + b"


@pytest.fixture(params=["local", "e2b"])
def world(world: World, request: pytest.FixtureRequest) -> Iterator[World]:
    """With sandboxes of this machine, and in the cloud."""
    if request.param == "local":
        yield world
        return
    world = world.in_cloud(request.getfixturevalue("cloud"))
    yield world
    world.close()  # before the cloud is cleared for the next test


def bash(command: str) -> ToolUse:
    return ToolUse(name="Bash", input={"command": command, "description": "Work"})


def say(text: str) -> Turn:
    return Turn(blocks=(Text(text=text),))


def do(*blocks: ToolUse | Text) -> Turn:
    return Turn(blocks=blocks)


MEND = ToolUse(name="Edit", input={"file_path": "{{cwd}}/calc.py", "old_string": MISTAKE, "new_string": MENDED})
READ = ToolUse(name="Read", input={"file_path": "{{cwd}}/calc.py"})
FIX = Rule(prompt="Fix add", turns=(do(Text(text="I look first."), READ), do(MEND), do(bash(TEST)), say("Fixed add.")))
STEPS = 6


def step(number: int) -> Turn:
    # A pause that Claude Code's Bash tool does not refuse, so that there is a middle to be killed in.
    return do(bash(f"python3 -c 'import time; time.sleep(0.5)'; echo step-{number} >> steps.txt"))


SLOW = Rule(prompt="Take your time", turns=(*(step(number) for number in range(STEPS)), say("Done slowly.")))
FOREVER = Rule(
    prompt="Never end",
    turns=(do(bash("echo begun > begun.txt; python3 -c 'import time; time.sleep(600)'")), say("Done at last.")),
)


def submit(client: LocalClient, prompt: str, **arguments: Any) -> str:
    return client.call("submit_task", prompt=prompt, **arguments)["task_id"]


def in_phase(client: LocalClient, task_id: str, phase: str) -> None:
    until(lambda: client.call("get_task", task_id=task_id, log_lines=0)["phase"] == phase, f"phase {phase}")


def seen(world: World, client: LocalClient, task_id: str, text: str) -> None:
    until(lambda: any(text in line["message"] for line in world.log(client, task_id)), f"{text!r} in the log")


def assert_whole(lines: list[dict[str, Any]]) -> None:
    """The log has no gap and no duplicate, by its own numbers and by the runner's messages."""
    assert [line["seq"] for line in lines] == list(range(1, len(lines) + 1))


def test_a_working_tree_goes_in_and_a_checked_result_comes_back(world: World, repo: Path) -> None:
    (repo / "notes.txt").write_text("not committed\n")
    (repo / "debug.log").write_text("ignored\n")
    before = git(repo, "status", "--porcelain")
    with ScriptedModel([FIX]) as model:
        world = world.with_model(model.environment())
        world.start_worker()
        with world.client(repo) as client:
            task_id = submit(client, "Fix add please", verify=TEST)
            task = world.wait(client, task_id)
            assert (task["status"], task["verdict"], task["error"]) == ("completed", "passed", None)
            assert task["result"]["summary"] == "Fixed add."
            assert task["result"]["verify"]["exit_code"] == 0
            assert task["result"]["artifacts"]["files_changed"] == 1
            assert task["usage"]["turns"] == 4 and task["usage"]["output_tokens"] > 0
            assert task["branch"] == f"task/{task_id[5:13]}" and task["repository"] == str(repo)
            lines = world.log(client, task_id)
            assert_whole(lines)
            kinds = {line["kind"] for line in lines}
            assert {"status", "text", "tool_use", "tool_result", "usage"} <= kinds
            diff = client.call("get_task_diff", task_id=task_id)
            assert [file["path"] for file in diff["files"]] == ["calc.py"]
            assert "+    return a + b" in diff["diff"]

            assert git(repo, "status", "--porcelain") == before
            dry = client.apply(task_id, dry_run=True)
            assert (dry["outcome"], [file["path"] for file in dry["files"]]) == ("would_apply", ["calc.py"])
            assert MISTAKE in (repo / "calc.py").read_text()
            done = client.apply(task_id)
            assert done["outcome"] == "applied" and MENDED in (repo / "calc.py").read_text()
            assert (repo / "notes.txt").read_text() == "not committed\n"
            client.apply(task_id, undo=True)
            assert MISTAKE in (repo / "calc.py").read_text()
            assert git(repo, "status", "--porcelain") == before
        until(lambda: not world.agent_processes(), "no process of the sandbox is left")
        assert not world.sandboxes()


@pytest.mark.full("e2b")
def test_what_the_agent_saw_of_the_tree_is_what_was_there(world: World, repo: Path) -> None:
    (repo / "calc.py").write_text("def add(a, b):\n    return a - b  # changed, not committed\n")
    (repo / "new.txt").write_text("untracked\n")
    (repo / "debug.log").write_text("TOKEN=hunter2hunter2, ignored\n")
    look = Rule(
        prompt="Look", turns=(do(bash("cat calc.py new.txt; ls -A; git status --porcelain; git log --oneline")),)
    )
    with ScriptedModel([look]) as model:
        world = world.with_model(model.environment())
        world.start_worker()
        with world.client(repo) as client:
            task_id = submit(client, "Look around")
            assert world.wait(client, task_id)["status"] == "completed"
            raw = json.dumps(client.call("get_task_logs", task_id=task_id, raw=True, limit=1000))
            assert "changed, not committed" in raw and "untracked" in raw
            assert "debug.log" not in raw and "hunter2" not in raw


@pytest.mark.full("e2b")
def test_the_same_on_postgres_and_redis(world: World, repo: Path, postgres_url: str, valkey_url: str) -> None:
    world.environment.update(DATABASE_URL=postgres_url, REDIS_URL=valkey_url)
    with ScriptedModel([SLOW]) as model:
        world = world.with_model(model.environment())
        first = world.start_worker()
        with world.client(repo) as client:
            task_id = submit(client, "Take your time", verify="test -s steps.txt")
            seen(world, client, task_id, "step-1")
            world.kill_worker(first)
            world.start_worker()
            task = world.wait(client, task_id)
            assert (task["status"], task["verdict"], task["attempt"]) == ("completed", "passed", 2)
            assert_whole(world.log(client, task_id))
        assert not list(world.home.glob("*.db"))
        assert len([request for request in model.requests if "count_tokens" not in request.path]) == STEPS + 1


@pytest.mark.full("e2b")
def test_a_failed_verify_is_a_completed_task_with_a_failed_verdict(world: World, repo: Path) -> None:
    with ScriptedModel([FIX]) as model:
        world = world.with_model(model.environment())
        world.start_worker()
        with world.client(repo) as client:
            task = world.wait(client, submit(client, "Fix add", verify="echo what went wrong; exit 3"))
            assert (task["status"], task["verdict"]) == ("completed", "failed")
            checked = task["result"]["verify"]
            assert checked["seconds"] >= 0 and checked["commit"]
            assert {**checked, "seconds": None, "commit": None} == {
                "command": "echo what went wrong; exit 3",
                "exit_code": 3,
                "output": "what went wrong\n",
                "seconds": None,
                "commit": None,
                "tries": 1,
            }


@pytest.mark.full("e2b")
def test_a_task_without_a_repository_starts_from_an_empty_one(world: World) -> None:
    write = Rule(
        prompt="Write", turns=(do(ToolUse(name="Write", input={"file_path": "{{cwd}}/hello.txt", "content": "hi\n"})),)
    )
    with ScriptedModel([write]) as model:
        world = world.with_model(model.environment())
        world.start_worker()
        with world.client() as client:
            task_id = submit(client, "Write a file", repository="none")
            task = world.wait(client, task_id)
            assert task["status"] == "completed" and task["verdict"] == "unverified"
            assert client.call("get_task_diff", task_id=task_id)["files"][0]["path"] == "hello.txt"


@pytest.mark.full("e2b")
def test_a_killed_worker_costs_nothing_the_next_one_goes_on_in_the_same_sandbox(world: World, repo: Path) -> None:
    with ScriptedModel([SLOW]) as model:
        world = world.with_model(model.environment())
        first = world.start_worker()
        with world.client(repo) as client:
            task_id = submit(client, "Take your time")
            seen(world, client, task_id, "step-1")
            world.kill_worker(first)
            world.start_worker()
            task = world.wait(client, task_id)
            assert (task["status"], task["attempt"]) == ("completed", 2)
            lines = world.log(client, task_id)
            assert_whole(lines)
            calls = [line["message"] for line in lines if line["kind"] == "tool_use"]
            assert [f"step-{number}" in call for number, call in enumerate(calls)] == [True] * STEPS
            assert (
                "+step-0\n+step-1\n+step-2\n+step-3\n+step-4\n+step-5"
                in client.call("get_task_diff", task_id=task_id)["diff"]
            )
        # Not one call of the model was made again.
        assert len([request for request in model.requests if "count_tokens" not in request.path]) == STEPS + 1


@pytest.mark.full("e2b")
def test_a_stopped_worker_hands_over_within_seconds_and_no_lease_is_lost(world: World, repo: Path) -> None:
    with ScriptedModel([SLOW]) as model:
        world = world.with_model(model.environment())
        first = world.start_worker()
        with world.client(repo) as client:
            task_id = submit(client, "Take your time")
            seen(world, client, task_id, "step-0")
            asked = time.monotonic()
            first.send_signal(signal.SIGTERM)
            assert first.wait(15) == 0
            assert time.monotonic() - asked < 10
            world.start_worker()
            task = world.wait(client, task_id)
            assert (task["status"], task["attempt"]) == ("completed", 2)
            assert_whole(world.log(client, task_id))
        assert len([request for request in model.requests if "count_tokens" not in request.path]) == STEPS + 1


@pytest.mark.full("e2b")
def test_a_worker_that_was_frozen_past_its_lease_changes_nothing_when_it_wakes(world: World, repo: Path) -> None:
    with ScriptedModel([SLOW]) as model:
        world = world.with_model(model.environment())
        first = world.start_worker()
        with world.client(repo) as client:
            task_id = submit(client, "Take your time")
            seen(world, client, task_id, "step-0")
            first.send_signal(signal.SIGSTOP)
            world.start_worker()
            until(lambda: client.call("get_task", task_id=task_id)["attempt"] == 2, "the task is claimed again")
            first.send_signal(signal.SIGCONT)
            task = world.wait(client, task_id)
            assert (task["status"], task["attempt"]) == ("completed", 2)
            # Longer than its lease: whatever the first worker would still do, it has done by now.
            settled = time.monotonic() + world.timers.lease_s + 1
            until(lambda: time.monotonic() > settled, "it has settled")
            assert_whole(world.log(client, task_id))
            assert client.call("get_task", task_id=task_id) == task
            until(lambda: "attempt 1 lets go" in (world.home / "worker-0.log").read_text(), "the first one noticed")


@pytest.mark.full("e2b")
def test_two_workers_never_run_one_task_however_often_it_is_rung_for(world: World, repo: Path) -> None:
    with ScriptedModel([SLOW]) as model:
        world = world.with_model(model.environment())
        with world.client(repo) as client:
            task_id = submit(client, "Take your time")
            queue = world.app().queue
            for _ in range(20):
                queue.put(task_id)
            world.start_worker()
            world.start_worker()
            for _ in range(20):
                queue.put(task_id)
            task = world.wait(client, task_id)
            assert (task["status"], task["attempt"]) == ("completed", 1)
        assert len([request for request in model.requests if "count_tokens" not in request.path]) == STEPS + 1


@pytest.mark.full("e2b-queued", "e2b-setup", "e2b-agent")
@pytest.mark.parametrize("phase", ["queued", "setup", "agent", "verify"])
def test_a_cancel_in_any_phase_ends_in_cancelled_with_the_work_saved(world: World, repo: Path, phase: str) -> None:
    slow = "python3 -c 'import time; time.sleep(600)'"
    with ScriptedModel([FOREVER, FIX]) as model:
        world = world.with_model(model.environment())
        with world.client(repo) as client:
            if phase != "queued":
                world.start_worker()
            prompt = "Never end" if phase == "agent" else "Fix add"
            task_id = submit(
                client, prompt, setup=slow if phase == "setup" else None, verify=slow if phase == "verify" else None
            )
            if phase == "agent":
                seen(world, client, task_id, "begun.txt")
                until(lambda: any("time.sleep" in command for command in world.agent_commands()), "it runs")
            elif phase != "queued":
                in_phase(client, task_id, phase)
            asked = time.monotonic()
            assert client.call("cancel_task", task_id=task_id)["changed"]
            task = world.wait(client, task_id)
            assert time.monotonic() - asked < 15
            assert (task["status"], task["error"]["code"]) == ("cancelled", "cancelled_by_user")
            assert not client.call("cancel_task", task_id=task_id)["changed"]
            saved = {"agent": "begun.txt", "verify": "calc.py"}.get(phase)
            if saved is not None:
                files = client.call("get_task_diff", task_id=task_id)["files"]
                assert [file["path"] for file in files] == [saved]
            until(lambda: not world.agent_processes(), "no process is left")
            until(lambda: not world.sandboxes(), "no sandbox is left")


@pytest.mark.full("e2b")
def test_a_cancel_while_the_repository_is_fetched_ends_in_cancelled(world: World) -> None:
    with socket.socket() as silent, ScriptedModel([FIX]) as model:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        world = world.with_model(model.environment())
        world.start_worker()
        with world.client() as client:
            task_id = submit(client, "Fix add", repository=f"https://127.0.0.1:{silent.getsockname()[1]}/x.git")
            in_phase(client, task_id, "repository")
            asked = time.monotonic()
            client.call("cancel_task", task_id=task_id)
            task = world.wait(client, task_id)
            assert (task["status"], task["error"]["code"]) == ("cancelled", "cancelled_by_user")
            assert time.monotonic() - asked < 15 < FAST.fetch_s
        assert not model.requests


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ({"timeout_minutes": 0.2}, "timed_out"),
        ({"max_turns": 2}, "max_turns"),
        ({"max_budget_usd": 0.001}, "budget_exceeded"),
    ],
)
@pytest.mark.full("e2b")
def test_a_task_at_its_limit_fails_with_the_work_saved(
    world: World, repo: Path, limits: dict[str, Any], code: str
) -> None:
    with ScriptedModel([SLOW, FOREVER]) as model:
        world = world.with_model(model.environment())
        world.start_worker()
        with world.client(repo) as client:
            task_id = submit(client, "Never end" if code == "timed_out" else "Take your time", **limits)
            task = world.wait(client, task_id)
            assert (task["status"], task["error"]["code"]) == ("failed", code)
            assert task["error"]["remedy"] and task["verdict"] is None
            assert [file["path"] for file in client.call("get_task_diff", task_id=task_id)["files"]] in (
                ["steps.txt"],
                ["begun.txt"],
            )


@pytest.mark.full("e2b")
def test_an_agent_that_says_nothing_is_ended_as_idle(world: World, repo: Path) -> None:
    hang = Rule(prompt="Hang", turns=(do(bash("echo x > x.txt")), Turn(fault="hang")))
    with ScriptedModel([hang]) as model:
        world = world.with_model(model.environment())
        world.start_worker(idle_s=8.0)
        with world.client(repo) as client:
            task_id = submit(client, "Hang")
            task = world.wait(client, task_id)
            assert (task["status"], task["error"]["code"]) == ("failed", "idle")
            assert client.call("get_task_diff", task_id=task_id)["files"][0]["path"] == "x.txt"
            until(lambda: not world.agent_processes(), "no process is left")


@pytest.mark.full("e2b")
def test_a_rejected_credential_fails_at_once_with_the_remedy(world: World, repo: Path) -> None:
    refuse = Rule(prompt="Refused", turns=(Turn(fault=401),))
    with ScriptedModel([refuse]) as model:
        world = world.with_model(model.environment())
        world.start_worker()
        with world.client(repo) as client:
            task = world.wait(client, submit(client, "Refused"), seconds=30)
            assert task["error"]["code"] == "credential_rejected" and "ANTHROPIC_API_KEY" in task["error"]["remedy"]


@pytest.mark.full("e2b")
def test_a_set_up_that_fails_ends_the_task_before_any_model_is_asked(world: World, repo: Path) -> None:
    with ScriptedModel([FIX]) as model:
        world = world.with_model(model.environment())
        world.start_worker()
        with world.client(repo) as client:
            task_id = submit(client, "Fix add", setup="echo no such package; exit 7")
            task = world.wait(client, task_id)
            assert task["error"]["code"] == "setup_failed" and "7" in task["error"]["message"]
            assert any("no such package" in line["message"] for line in world.log(client, task_id))
        assert not model.requests


@pytest.mark.full("e2b")
def test_the_conversation_and_the_files_go_on_in_another_sandbox_when_the_first_dies(world: World, repo: Path) -> None:
    go_on = Rule(prompt="Your sandbox came to its end", turns=(do(bash("echo ended >> begun.txt")), say("Went on.")))
    with ScriptedModel([go_on, FOREVER]) as model:
        world = world.with_model(model.environment())
        world.start_worker(checkpoint_s=0.5)
        with world.client(repo) as client:
            task_id = submit(client, "Never end", verify="printf 'begun\\nended\\n' | cmp - begun.txt")
            seen(world, client, task_id, "Bash: echo begun")
            store = world.app().store
            until(lambda: store.blobs.get(LOCAL_ACCOUNT, task_id, "checkpoint"), "a checkpoint of the file")
            world.kill_sandbox()
            task = world.wait(client, task_id)
            assert (task["status"], task["verdict"]) == ("completed", "passed"), task
            assert task["result"]["summary"] == "Went on."
            lines = world.log(client, task_id)
            assert_whole(lines)
            assert "The sandbox died. The task goes on in a new one." in [line["message"] for line in lines]
            said = json.dumps(model.requests[-1].body["messages"])
            assert "Never end" in said and "Your sandbox came to its end" in said, "it remembers what was said before"


@pytest.mark.full("e2b")
def test_an_agent_whose_process_dies_fails_the_task_instead_of_hanging(world: World, repo: Path) -> None:
    with ScriptedModel([FOREVER]) as model:
        world = world.with_model(model.environment())
        world.start_worker()
        with world.client(repo) as client:
            task_id = submit(client, "Never end")
            seen(world, client, task_id, "begun.txt")
            for process in world.agent_processes():
                with contextlib.suppress(psutil.NoSuchProcess):  # the first takes the others with it
                    process.kill()
            task = world.wait(client, task_id)
            assert (task["status"], task["error"]["code"]) == ("failed", "interrupted")


@pytest.mark.full("e2b")
def test_the_credential_is_in_no_log_diff_session_or_process_list(world: World, repo: Path) -> None:
    secret = "sk-ant-canary-9f8e7d6c5b4a"
    leak = Rule(
        prompt="Leak",
        turns=(
            do(bash("env; env | base64 -w0; echo; env > leaked.txt; python3 -c 'import time; time.sleep(1)'")),
            say(f"The key is {secret}."),
        ),
    )
    with ScriptedModel([leak]) as model:
        world = world.with_model({**model.environment(), "ANTHROPIC_API_KEY": secret})
        world.start_worker()
        with world.client(repo) as client:
            task_id = submit(client, "Leak")
            seen(world, client, task_id, "base64")
            commands = world.agent_commands()
            assert commands and secret not in "".join(commands)
            task = world.wait(client, task_id)
            assert model.requests[0].key is not None and secret in model.requests[0].key
            everything = json.dumps(
                [
                    task,
                    client.call("get_task_logs", task_id=task_id, raw=True, limit=1000),
                    client.call("get_task_diff", task_id=task_id),
                ]
            )
            session = world.app().store.blobs.get("local", task_id, "session")
            assert session is not None
            everything += session.decode() + "".join(log.read_text() for log in world.home.glob("*.log"))
            assert "[redacted]" in everything
            assert secret not in everything
