"""What runner.py does with the real Claude Code, in a plain folder; only the model's words are scripted."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from cloudagent_mcp.scripted_model import Rule, ScriptedModel, Text, ToolUse, Turn
from cloudagent_queue import runner
from cloudagent_queue.agents.claude import Claude
from cloudagent_queue.sandboxes.local import LocalProvider
from cloudagent_storage.errors import CredentialMissing
from cloudagent_storage.records import TaskSpec
from tests.support.scripts import HANG, STEPS, WRITE_AND_COMMIT, bash, pause, say, use
from tests.support.worlds import until

PATH = "/usr/local/bin:/usr/bin:/bin"


def git(folder: Path, *arguments: str) -> str:
    who = {f"GIT_{role}_{key}": "t" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    env = {"PATH": PATH, "HOME": str(folder), **who}
    return subprocess.run(["git", *arguments], cwd=folder, env=env, check=True, capture_output=True, text=True).stdout


def texts(body: Mapping[str, Any]) -> str:
    """All that a request's messages say."""
    contents = [message["content"] for message in body["messages"]]
    blocks = [block for content in contents for block in ([{"text": content}] if isinstance(content, str) else content)]
    return "\n".join(block.get("text", "") for block in blocks)


class Box:
    """A folder that looks like a sandbox's root, without a wall around it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.repository = root / "repository"
        self.env = {"PATH": PATH, "HOME": str(root / "home"), "LANG": "C.UTF-8", "BOX": str(root)}
        self.runners: list[subprocess.Popen[bytes]] = []
        for folder in ("home", "run/inbox", "repository"):
            (root / folder).mkdir(parents=True)
        shutil.copy(runner.__file__, root / "run" / "runner.py")
        git(self.repository, "init", "-q", "-b", "main")
        (self.repository / "README").write_text("A repository.\n")
        (self.repository / ".gitignore").write_text("*.log\n")
        (self.repository / "kept.log").write_text("tracked, although ignored\n")
        git(self.repository, "add", "-A", "-f")
        git(self.repository, "commit", "-q", "-m", "first")

    def start(self, model: ScriptedModel, prompt: str, **request: Any) -> subprocess.Popen[bytes]:
        whole = {"prompt": prompt, "cwd": "repository", **request}
        (self.root / "run" / "request.json").write_text(json.dumps(whole))
        return self.start_again(model)

    def start_again(self, model: ScriptedModel) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "run/runner.py"],
            cwd=self.root,
            env={**self.env, **model.environment()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.runners.append(process)
        return process

    def run(self, model: ScriptedModel, prompt: str, **request: Any) -> dict[str, Any]:
        process = self.start(model, prompt, **request)
        output, _ = process.communicate(timeout=60)
        assert (process.returncode, output) == (0, b"")
        return self.result()

    def result(self) -> dict[str, Any]:
        return json.loads((self.root / "run" / "result.json").read_bytes())

    def events(self) -> list[dict[str, Any]]:
        path = self.root / "run" / "events.jsonl"
        return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []

    def said(self, kind: str) -> list[str]:
        return [event["message"] for event in self.events() if event["kind"] == kind]

    def tell(self, name: str, **message: Any) -> None:
        part = self.root / "run" / f"{name}.part"
        part.write_text(json.dumps(message))
        part.rename(self.root / "run" / "inbox" / f"{name}.json")

    def session(self) -> dict[str, Any]:
        command = [sys.executable, "run/runner.py", "session"]
        done = subprocess.run(command, cwd=self.root, env=self.env, check=True, capture_output=True)
        assert done.stdout == done.stderr == b""
        return json.loads((self.root / "run" / "session.json").read_bytes())

    def processes(self) -> list[psutil.Process]:
        """Everything alive that was started in this box."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            try:
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and f"BOX={self.root}\0".encode() in Path(f"/proc/{process.pid}/environ").read_bytes():
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def end(self) -> None:
        for process in self.processes():
            process.kill()
        for runner_process in self.runners:
            runner_process.communicate(timeout=10)


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path / "box")
    yield box
    box.end()


def test_an_agent_that_writes_and_commits_is_told_of_line_by_line(box: Box) -> None:
    with ScriptedModel([WRITE_AND_COMMIT]) as model:
        result = box.run(model, "Write and commit")
    assert "Say hello" in git(box.repository, "log", "--oneline")
    events = box.events()
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert [event["kind"] for event in events] == [
        *["status", "tool_use", "tool_result", "tool_use", "tool_result", "text", "usage"]
    ]
    messages = [event["message"] for event in events]
    assert messages[0].startswith("Claude Code 2.")
    assert messages[1] == "Write: hello.txt"
    assert messages[3].startswith("Bash: git add hello.txt")
    assert messages[5] == "I wrote hello.txt."
    assert messages[6] == "So far 300 input and 60 output tokens, turns: 3, cost: $0.0024"
    assert events[1]["raw"]["id"] == events[2]["raw"]["tool_use_id"]
    assert all(event["time"].endswith("Z") for event in events)
    usage = {"input_tokens": 300, "output_tokens": 60, "cost_usd": pytest.approx(0.0024), "turns": 3}
    assert result["usage"] == {**usage, "model_ms": result["usage"]["model_ms"]}
    assert events[6]["raw"]["usage"] == result["usage"]
    assert (result["outcome"], result["error"], result["summary"]) == ("completed", None, "I wrote hello.txt.")


def test_events_arrive_while_the_agent_works(box: Box) -> None:
    rule = Rule(prompt="^Slowly", turns=(bash("echo one"), Turn(blocks=(Text(text="a b c d e"),), pace_s=0.4)))
    with ScriptedModel([rule]) as model:
        process = box.start(model, "Slowly")
        until(lambda: "one" in box.said("tool_result"), "the first result")
        assert process.poll() is None
        assert not (box.root / "run" / "result.json").exists()
        process.wait(30)
    assert box.result()["outcome"] == "completed"


def test_a_conversation_goes_on_from_its_files_in_another_place(box: Box, tmp_path: Path) -> None:
    again = Rule(prompt="^What did you", turns=(say("I wrote hello.txt, as I said."),))
    with ScriptedModel([WRITE_AND_COMMIT, again]) as model:
        first = box.run(model, "Write and commit")
        session = box.session()
        other = Box(tmp_path / "other")
        (other.root / "run" / "earlier_session.json").write_text(json.dumps(session))
        used = {"turns": first["usage"]["turns"]}
        second = other.run(model, "What did you write?", resume=session["session_id"], used=used)
        seen = json.dumps(model.requests[-1].body)
    assert session["session_id"] == first["session_id"] == second["session_id"]
    assert list(session["files"]) == [
        f"{path}" for path in session["files"] if path.endswith(f"{first['session_id']}.jsonl")
    ]
    assert "Write and commit" in seen
    assert second["summary"] == "I wrote hello.txt, as I said."
    assert second["usage"]["turns"] == first["usage"]["turns"] + 1
    assert second["usage"]["output_tokens"] > first["usage"]["output_tokens"]


def test_the_limit_on_turns_ends_the_run_with_its_name(box: Box) -> None:
    with ScriptedModel([STEPS]) as model:
        result = box.run(model, "Take steps", max_turns=2)
    assert (result["outcome"], result["error"]["code"]) == ("failed", "max_turns")
    assert result["usage"]["input_tokens"] == 200


def test_the_budget_ends_the_run_with_its_name(box: Box) -> None:
    costly = Turn(blocks=STEPS.turns[0].blocks, input_tokens=200_000, output_tokens=100_000)
    with ScriptedModel([Rule(prompt="^Spend", turns=(costly, costly, say("done")))]) as model:
        result = box.run(model, "Spend", max_budget_usd=1.0)
    assert (result["outcome"], result["error"]["code"]) == ("failed", "budget_exceeded")
    assert result["usage"]["cost_usd"] > 1
    assert result["usage"]["output_tokens"] == 100_000
    assert box.said("error") == [result["error"]["message"]]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_credential_ends_the_run_at_once(box: Box, status: int) -> None:
    with ScriptedModel([Rule(prompt=".", turns=(Turn(fault=status),))]) as model:
        began = time.monotonic()
        result = box.run(model, "Anything")
        assert model.faults[str(status)] == 1
    assert time.monotonic() - began < 20
    assert box.said("error")[-1] == result["error"]["message"]
    assert (result["outcome"], result["error"]["code"]) == ("failed", "credential_rejected")


@pytest.mark.parametrize("fault", [529, "cut"])
def test_a_passing_fault_of_the_model_is_survived(box: Box, fault: Any) -> None:
    turn = Turn(fault=fault, times=1, blocks=(Text(text="Here I am."),))
    with ScriptedModel([Rule(prompt=".", turns=(bash("true"), turn))]) as model:
        result = box.run(model, "Anything")
        assert model.faults[str(fault)] == 1
    assert (result["outcome"], result["summary"]) == ("completed", "Here I am.")


def test_a_model_that_fails_for_good_ends_in_a_readable_error(box: Box) -> None:
    box.env["CLAUDE_CODE_MAX_RETRIES"] = "1"
    with ScriptedModel([Rule(prompt=".", turns=(Turn(fault=500),))]) as model:
        result = box.run(model, "Anything")
    assert (result["outcome"], result["error"]["code"]) == ("failed", "agent_error")
    assert "500" in result["error"]["message"]
    assert any("500" in line for line in box.said("status"))


def test_a_session_that_does_not_exist_ends_in_a_readable_error(box: Box) -> None:
    nothing: dict[str, Any] = {"session_id": "00000000-0000-4000-8000-000000000000", "files": {}}
    (box.root / "run" / "earlier_session.json").write_text(json.dumps(nothing))
    with ScriptedModel([STEPS]) as model:
        result = box.run(model, "Take steps", resume=nothing["session_id"])
    assert (result["outcome"], result["error"]["code"]) == ("failed", "agent_error")
    assert "No conversation found" in result["error"]["message"]


def test_a_claude_code_that_dies_ends_in_a_readable_error(box: Box) -> None:
    with ScriptedModel([HANG]) as model:
        process = box.start(model, "Hang")
        until(lambda: model.faults["hang"], "the hang")
        next(process for process in box.processes() if process.name() == "claude").kill()
        assert process.wait(20) == 0
    assert (box.result()["outcome"], box.result()["error"]["code"]) == ("failed", "agent_error")
    assert "exit code" in box.said("error")[-1]
    assert box.result()["session_id"]


def test_a_request_that_makes_no_sense_still_gets_a_result(box: Box) -> None:
    with ScriptedModel([]) as model:
        result = box.run(model, "Anything", cwd="nowhere")
        assert (result["outcome"], result["error"]["code"]) == ("failed", "agent_error")
        (box.root / "run" / "result.json").unlink()
        (box.root / "run" / "request.json").write_text("{")
        assert box.start_again(model).wait(30) == 0
    assert box.result()["error"]["code"] == "agent_error"


def test_a_later_run_has_a_result_of_its_own_and_obeys_no_stop_of_an_earlier_one(box: Box) -> None:
    with ScriptedModel([STEPS]) as model:
        first = box.run(model, "Take steps")
        box.tell("stop", kind="stop", reason="it has little time", number=1)
        assert box.run(model, "Take steps once more", number=2, result="run/second.json") == first
    assert json.loads((box.root / "run" / "second.json").read_bytes())["outcome"] == "completed"


@pytest.mark.parametrize("how", ["inbox", "SIGTERM"])
def test_an_agent_whose_model_hangs_can_be_stopped(box: Box, how: str) -> None:
    with ScriptedModel([HANG]) as model:
        process = box.start(model, "Hang")
        until(lambda: model.faults["hang"], "the hang")
        asked = time.monotonic()
        if how == "inbox":
            box.tell("stop", kind="stop", reason="time is up")
        else:
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert time.monotonic() - asked < 8
        assert box.result()["outcome"] == "stopped"
        assert box.processes() == []
    assert (box.repository / "draft.txt").read_text() == "unfinished\n"


def test_a_tool_that_runs_is_ended_by_a_stop(box: Box) -> None:
    rule = Rule(prompt=".", turns=(bash(f"touch {box.root}/begun && {pause(600)}"), say("never")))
    with ScriptedModel([rule]) as model:
        process = box.start(model, "Anything")
        until((box.root / "begun").exists, "the tool runs")
        box.tell("stop", kind="stop", reason="cancelled")
        assert process.wait(20) == 0
        assert box.processes() == []
    assert box.result()["outcome"] == "stopped"
    assert box.result()["usage"]["input_tokens"] == 100


def test_a_second_runner_refuses_and_touches_nothing(box: Box) -> None:
    with ScriptedModel([HANG]) as model:
        box.start(model, "Hang")
        until(lambda: model.faults["hang"], "the hang")
        before = box.events()
        second = box.start_again(model)
        output, _ = second.communicate(timeout=20)
        assert second.returncode == runner.ALREADY_RUNNING
        assert output == b"Another runner is at work in this sandbox.\n"
        assert box.events() == before
        assert not (box.root / "run" / "result.json").exists()


def test_a_runner_that_finds_a_result_leaves_it_alone(box: Box) -> None:
    with ScriptedModel([WRITE_AND_COMMIT]) as model:
        box.run(model, "Write and commit")
        before, events, asked = box.result(), box.events(), len(model.requests)
        assert box.start_again(model).wait(20) == 0
        assert (box.result(), box.events(), len(model.requests)) == (before, events, asked)


def test_what_a_killed_runner_wrote_can_be_read_and_is_continued(box: Box) -> None:
    with ScriptedModel([HANG, WRITE_AND_COMMIT]) as model:
        process = box.start(model, "Hang")
        until(lambda: model.faults["hang"], "the hang")
        process.kill()
        process.wait(10)
        before = box.events()
        assert [event["kind"] for event in before] == ["status", "tool_use", "tool_result"]
        assert box.session()["files"]
        with (box.root / "run" / "events.jsonl").open("ab") as file:
            file.write(b'{"seq": 4, "half')
        box.run(model, "Write and commit")
    events = box.events()
    assert events[:3] == before
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))


def test_a_killed_runners_agent_is_gone_before_another_begins(box: Box) -> None:
    counting = tuple(bash(pause(0.3, f"echo >> {box.root}/count")) for _ in range(100))
    with ScriptedModel([Rule(prompt="^Count", turns=counting), Rule(prompt="^Look", turns=(say("seen"),))]) as model:
        process = box.start(model, "Count")
        until((box.root / "count").exists, "the agent counts")
        process.kill()
        process.wait(10)
        left = box.processes()
        assert left
        result = box.run(model, "Look")
        assert result["outcome"] == "completed"
        assert not any(orphan.is_running() and orphan.status() != psutil.STATUS_ZOMBIE for orphan in left)


def test_a_message_sent_while_the_agent_works_is_answered(box: Box) -> None:
    work = Rule(prompt="^Work", turns=(bash(f"touch {box.root}/begun && {pause(1.5)}"), say("worked")))
    also = Rule(prompt="^Also", turns=(say("And that too."),))
    with ScriptedModel([work, also]) as model:
        process = box.start(model, "Work")
        until((box.root / "begun").exists, "the tool runs")
        box.tell("msg_b", kind="message", text="Also do that")
        assert process.wait(30) == 0
    assert box.said("user") == ["Also do that"]
    assert box.result()["summary"] == "And that too."
    assert (box.root / "run" / "inbox" / "msg_b.json.read").exists()


def test_messages_sent_with_the_last_answer_are_not_lost(box: Box) -> None:
    """They are read while the first answer is being said, and that answers neither of them."""
    rules = [Rule(prompt="^Start", turns=(Turn(blocks=(Text(text="a b c d e f g h"),), pace_s=0.1),))]
    rules += [Rule(prompt="First|Second", turns=(say("heard: {{prompt}}"),))]
    with ScriptedModel(rules) as model:
        process = box.start(model, "Start")
        until(lambda: model.requests, "the first request")
        box.tell("msg_z", kind="message", text="First")
        box.tell("msg_a", kind="message", text="Second")
        assert process.wait(30) == 0
        heard = texts(model.requests[-1].body)
    assert box.said("user") == ["First", "Second"]
    assert heard.index("First") < heard.index("Second")
    assert box.result()["summary"].startswith("heard: ")
    assert "Second" in box.result()["summary"]


def test_a_message_that_comes_just_after_the_answer_keeps_the_ear_open_for_another(box: Box) -> None:
    def wait_for(name: str) -> Turn:
        return bash(f"touch {box.root}/at_{name}; until test -e {box.root}/{name}; do python3 -c ''; done")

    file = box.root / "run" / "runner.py"
    file.write_text(file.read_text().replace("POLL_S = 0.25", "POLL_S = 1.5"))
    rules = [Rule(prompt="^Start", turns=(wait_for("go"), say("started")))]
    rules += [
        Rule(prompt="^First", turns=(wait_for("go_on"), say("first"))),
        Rule(prompt="^Second", turns=(say("second"),)),
    ]
    with ScriptedModel(rules) as model:
        process = box.start(model, "Start")
        until((box.root / "at_go").exists, "the agent works")
        box.tell("broken", kind="message")
        until(lambda: box.said("error"), "the inbox was looked at")
        (box.root / "go").touch()
        until(lambda: box.said("usage"), "the answer, before the inbox is looked at again")
        box.tell("msg_1", kind="message", text="First")
        until((box.root / "at_go_on").exists, "the agent works on the message")
        box.tell("msg_2", kind="message", text="Second")
        until(lambda: "Second" in box.said("user"), "the other message is heard")
        (box.root / "go_on").touch()
        assert process.wait(30) == 0
    assert box.result()["summary"] == "second"


def test_a_message_put_twice_reaches_the_agent_once(box: Box) -> None:
    work = Rule(prompt="^Work", turns=(bash(f"touch {box.root}/begun && {pause(1.5)}"), say("worked")))
    with ScriptedModel([work, Rule(prompt="^Also", turns=(say("yes"),))]) as model:
        process = box.start(model, "Work")
        until((box.root / "begun").exists, "the tool runs")
        box.tell("msg_1", kind="message", text="Also")
        until((box.root / "run" / "inbox" / "msg_1.json.read").exists, "the message was read")
        box.tell("msg_1", kind="message", text="Also")
        (box.root / "run" / "inbox" / "broken.json").write_text("[")
        assert process.wait(30) == 0
    assert box.said("user") == ["Also"]
    assert box.said("error") == ["A message could not be read."]
    assert box.result()["outcome"] == "completed"


@pytest.mark.parametrize("kind", ["agent", "command"])
def test_work_in_the_background_is_waited_for(box: Box, kind: str) -> None:
    """There are two results then, and the first is not the end."""
    agent = {
        "description": "look",
        "prompt": "Sub: look",
        "subagent_type": "general-purpose",
        "run_in_background": True,
    }
    start = use("Agent", **agent) if kind == "agent" else bash(pause(1.5), run_in_background=True)
    main = Rule(prompt="^Delegate", turns=(start, say("It has begun."), say("It is finished.")))
    sub = Rule(prompt="^Sub", turns=(bash(pause(1.5)), say("looked")))
    with ScriptedModel([main, sub]) as model:
        result = box.run(model, "Delegate")
    assert result["summary"] == "It is finished."
    assert len(box.said("usage")) == 2
    usage = [event["raw"]["usage"] for event in box.events() if event["kind"] == "usage"]
    assert all(later["input_tokens"] > earlier["input_tokens"] for earlier, later in pairwise(usage))
    assert result["usage"] == usage[-1]
    assert result["usage"]["input_tokens"] == 100 * len(model.requests)


def test_a_prompt_arrives_whole_and_never_on_a_command_line(box: Box) -> None:
    needle = "needle-7c1e"
    prompt = f"Echo '\"`{needle}` \\ $(touch {box.root}/pwned)\n--version\n\t@README 🙂\n" + "x" * 100_000
    turns = (bash(f"touch {box.root}/begun && {pause(600)}"),)
    with ScriptedModel([Rule(prompt="^Echo", turns=turns)]) as model:
        process = box.start(model, prompt, system_append="Remember the needle-7c1e.")
        until((box.root / "begun").exists, "the tool runs")
        lines = [line for process in box.processes() for line in process.cmdline()]
        body = model.requests[0].body
        process.terminate()
        process.wait(20)
    assert any("append-system-prompt-file" in line for line in lines)
    assert not any(needle in line for line in lines)
    assert prompt in texts(body)
    assert "Remember the needle-7c1e." in json.dumps(body["system"])
    assert not (box.root / "pwned").exists()


def test_the_repository_instructs_the_agent_as_it_does_at_home(box: Box) -> None:
    (box.repository / "CLAUDE.md").write_text("Always say please.\n")
    with ScriptedModel([Rule(prompt=".", turns=(say("please"),))]) as model:
        box.run(model, "Anything")
        assert "Always say please." in json.dumps(model.requests[0].body)


def test_long_and_odd_output_stays_readable(box: Box) -> None:
    odd = bash("printf 'first\\n\\000\\355\\240\\200\\n'; python3 -c 'print(\"y\" * 300000)'")
    answer = "w" * 30_000
    call = ToolUse(name="Write", input={"file_path": "{{cwd}}/big", "content": "z" * 300_000})
    with ScriptedModel([Rule(prompt=".", turns=(odd, Turn(blocks=(call,)), say(answer)))]) as model:
        result = box.run(model, "Anything")
    lines = (box.root / "run" / "events.jsonl").read_bytes().splitlines()
    assert max(map(len, lines)) < 900_000
    assert len(result["summary"]) == len(box.said("text")[0]) == 10_000
    assert all(len(line) < 210 for line in box.said("tool_result") + box.said("tool_use"))
    big = next(event for event in box.events() if event["message"] == "Write: big")
    assert set(big["raw"]) == {"id", "cut"}


# -- the agent, as the worker sees it ----------------------------------------------------------------------------------


def test_without_a_credential_nothing_is_started() -> None:
    agent = Claude()
    for env in ({}, {"ANTHROPIC_API_KEY": ""}, {"ANTHROPIC_BASE_URL": "http://x"}, {"CLAUDE_CODE_USE_BEDROCK": "0"}):
        with pytest.raises(CredentialMissing):
            agent.check_credential(env)
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "CLAUDE_CODE_OAUTH_TOKEN", "CLAUDE_CODE_USE_VERTEX"):
        agent.check_credential({name: "1"})


def test_every_secret_of_the_environment_is_named() -> None:
    env: Mapping[str, str] = {
        "ANTHROPIC_API_KEY": "key-key-key",
        "CLAUDE_CODE_OAUTH_TOKEN": "token-token",
        "AWS_SECRET_ACCESS_KEY": "aws-aws-aws",
        "AWS_BEARER_TOKEN_BEDROCK": "bedrock-bedrock",
        "ANTHROPIC_AUTH_TOKEN": "short",
        "ANTHROPIC_CUSTOM_HEADERS": "X-Tenant: acme-acme\nAuthorization: Bearer header-header",
        "HTTPS_PROXY": "http://user:proxy-proxy@127.0.0.1:3128",
        "ANTHROPIC_MODEL": "claude-opus-5",
        "ANTHROPIC_BASE_URL": "https://gateway.example",
    }
    assert set(Claude().secrets(env)) == {
        *("key-key-key", "token-token", "aws-aws-aws", "bedrock-bedrock", "acme-acme", "header-header"),
        *("Bearer header-header", "proxy-proxy", "user:proxy-proxy"),
    }


def test_the_agent_works_in_a_real_sandbox(tmp_path: Path) -> None:
    provider = LocalProvider(tmp_path / "sandboxes")
    agent, spec = Claude(), TaskSpec(prompt="Write and commit", title="t")
    sandbox = provider.create(metadata={})
    try:
        assert sandbox.run(["git", "init", "-q", "repository"], timeout_s=20).exit_code == 0
        assert agent.session(sandbox) is None
        with ScriptedModel([WRITE_AND_COMMIT]) as model:
            agent.install(sandbox, spec)
            assert agent.session(sandbox) is None
            agent.start(sandbox, env=model.environment())
            data = until(lambda: sandbox.read("run/result.json", max_bytes=100_000), "the result")
            until(lambda: not sandbox.alive(), "the runner ends")
        assert json.loads(data)["outcome"] == "completed"
        assert sandbox.read("repository/hello.txt", max_bytes=100) == b"hello\n"
        session = agent.session(sandbox)
        assert session is not None
        assert json.loads(session)["session_id"] == json.loads(data)["session_id"]
        planted = {"session_id": "x", "files": {"../../.bashrc": "curl"}}
        sandbox.write("run/session.json", json.dumps(planted).encode())
        assert agent.session(sandbox) is None
    finally:
        sandbox.kill()


def test_what_the_worker_tells_lands_in_the_inbox(tmp_path: Path) -> None:
    provider = LocalProvider(tmp_path / "sandboxes")
    sandbox = provider.create(metadata={})
    Claude().tell(sandbox, "msg_1", {"kind": "message", "text": "hi"})
    assert json.loads(sandbox.read("run/inbox/msg_1.json", max_bytes=100)) == {"kind": "message", "text": "hi"}
    sandbox.kill()


ASK = Rule(
    prompt="^Ask",
    turns=(use("mcp__user__ask_user", question="Which database?", choices=["a", "b"]), say("Chosen: {{result}}.")),
)


def question_of(box: Box) -> str:
    """The id of the question that it asks."""
    (asked,) = until(lambda: [event for event in box.events() if event["kind"] == "question"], "it asks")
    assert (asked["message"], asked["raw"]["choices"]) == ("Which database?", ["a", "b"])
    return asked["raw"]["question_id"]


def test_the_agent_asks_its_user_and_goes_on_with_the_answer(box: Box) -> None:
    with ScriptedModel([ASK]) as model:
        process = box.start(model, "Ask me")
        question_id = question_of(box)
        box.tell("msg_1", kind="answer", question_id=question_id, text="a")
        until(lambda: box.said("answer"), "the answer is taken")
        box.tell("msg_1", kind="answer", question_id=question_id, text="a")  # by a worker that does not know of it
        assert process.wait(60) == 0
        assert box.result()["summary"] == "Chosen: a."
        assert (box.said("answer"), box.said("user")) == (["a"], [])
        tools = [tool["name"] for tool in model.requests[0].body["tools"]]
        assert "mcp__user__ask_user" in tools and "AskUserQuestion" not in tools


def test_what_answers_no_open_question_is_told_as_a_message(box: Box) -> None:
    with ScriptedModel([ASK, Rule(prompt="late words", turns=(say("Heard."),))]) as model:
        process = box.start(model, "Ask me")
        question_id = question_of(box)
        box.tell("msg_1", kind="answer", question_id="q_of_another_sandbox", text="late words")
        until(lambda: box.said("user"), "it is logged as a message")
        assert box.said("answer") == []
        box.tell("msg_2", kind="answer", question_id=question_id, text="b")
        assert process.wait(60) == 0
        assert box.said("user") == ["late words"] and box.said("answer") == ["b"]


def test_an_agent_that_waits_for_an_answer_obeys_a_stop(box: Box) -> None:
    with ScriptedModel([ASK]) as model:
        process = box.start(model, "Ask me")
        question_of(box)
        box.tell("stop", kind="stop", reason="Enough.")
        assert process.wait(30) == 0
        assert box.result()["outcome"] == "stopped"
        assert not box.processes()
        assert box.said("answer") == ["(The agent waits no longer.)"]
