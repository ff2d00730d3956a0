"""The scripted model answers like the Messages API, and picks its words by the newest prompt."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from typing import Any

import pytest

from cloudagent_mcp.scripted_model import Rule, Script, ScriptedModel, Text, Thinking, ToolUse, Turn
from tests.support.scripts import bash, say

GREET = Rule(prompt="^greet", turns=(say("hello"), say("hello again")))


def post(model: ScriptedModel, body: Mapping[str, Any], path: str = "/v1/messages?beta=true") -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", int(model.url.rpartition(":")[2]), timeout=10)
    try:
        connection.request("POST", path, json.dumps(body), {"x-api-key": "k", "Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def ask(model: ScriptedModel, *messages: Mapping[str, Any]) -> dict[str, Any]:
    status, answer = post(model, {"model": "m", "messages": messages})
    assert status == 200
    return json.loads(answer)


def words(answer: Mapping[str, Any]) -> str:
    return "".join(block.get("text", "") for block in answer["content"])


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(*blocks: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def result(text: str) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "t", "content": text}


CALL: dict[str, Any] = {"type": "tool_use", "id": "t", "name": "Bash", "input": {}}


def test_parallel_tools_are_one_answer() -> None:
    rule = Rule(prompt="^go", turns=(bash("one"), say("second"), say("third")))
    with ScriptedModel([rule]) as model:
        answer = ask(model, user("go"), assistant(CALL, CALL), user([result("a"), result("b")]))
    assert words(answer) == "second"


def test_a_new_prompt_starts_at_its_own_first_turn() -> None:
    with ScriptedModel([GREET]) as model:
        history = (user("something"), assistant(CALL), user([result("a")]), assistant({"type": "text", "text": "ok"}))
        assert words(ask(model, *history, user("greet"))) == "hello"


def test_a_message_sent_while_the_agent_works_counts_as_the_newest_prompt() -> None:
    said = "The user sent a new message while you were working:\ngreet\n\nThis is how Claude Code surfaces messages"
    with ScriptedModel([GREET, Rule(prompt="^go", turns=(bash("x"), say("done")))]) as model:
        told = (user("go"), assistant(CALL), user([result("a")]), {"role": "system", "content": said})
        assert words(ask(model, *told)) == "hello"


def test_reminders_and_system_messages_are_no_prompts() -> None:
    reminder = {"type": "text", "text": "<system-reminder>\ngo\n</system-reminder>"}
    with ScriptedModel([GREET]) as model:
        answer = ask(model, user([reminder, {"type": "text", "text": "greet"}]), {"role": "system", "content": "greet"})
        assert words(answer) == "hello"
        assert words(ask(model, user("greet"), assistant(CALL), user([reminder]))) == "hello again"


def test_placeholders_are_filled_in_once() -> None:
    turns = (Turn(blocks=(ToolUse(name="Write", input={"deep": ["{{cwd}}/f", {"x": "{{prompt}}"}]}), Text(text="t"))),)
    echo = Rule(prompt="^tell", turns=(bash("x"), say("{{result}}")))
    with ScriptedModel([Rule(prompt="^where", turns=turns), echo]) as model:
        body = {"system": "# Environment\n - Primary working directory: /w\n", "messages": [user("where {{cwd}}")]}
        answer = json.loads(post(model, body)[1])
        assert answer["content"][0]["input"] == {"deep": ["/w/f", {"x": "where {{cwd}}"}]}
        assert answer["stop_reason"] == "tool_use"
        assert words(ask(model, user("tell"), assistant(CALL), user([result("it was {{cwd}}")]))) == "it was {{cwd}}"


def test_what_no_rule_knows_gets_the_default_and_used_up_turns_end_politely() -> None:
    with ScriptedModel(Script(rules=(GREET,), default=say("no idea"))) as model:
        assert words(ask(model, user("unheard of"))) == "no idea"
        past = [assistant({"type": "text", "text": "x"}), {"role": "system", "content": "-"}]
        assert words(ask(model, user("greet"), *past, *past)) == "Done."


def test_a_stream_says_the_same_as_a_plain_answer() -> None:
    blocks = (Thinking(thinking="hm"), Text(text="one two  three\n"), ToolUse(name="Bash", input={"command": "ls"}))
    rule = Rule(prompt=".", turns=(Turn(blocks=blocks, input_tokens=7, output_tokens=9),))
    with ScriptedModel([rule]) as model:
        body = {"model": "m", "stream": True, "messages": [user("x")]}
        status, data = post(model, body)
        plain = ask(model, user("x"))
    assert status == 200
    events = [json.loads(line[6:]) for line in data.decode().splitlines() if line.startswith("data: ")]
    assert [event["type"] for event in events[:2]] == ["message_start", "content_block_start"]
    assert events[-1]["type"] == "message_stop"
    assert assembled(events) == ["hm", "one two  three\n", {"command": "ls"}]
    assert events[0]["message"]["usage"]["input_tokens"] == 7
    assert events[-2]["usage"]["output_tokens"] == 9
    assert events[-2]["delta"]["stop_reason"] == plain["stop_reason"] == "tool_use"
    assert [block["type"] for block in plain["content"]] == ["thinking", "text", "tool_use"]


def assembled(events: Sequence[Mapping[str, Any]]) -> list[Any]:
    parts: dict[int, str] = {}
    for event in events:
        if event["type"] == "content_block_delta":
            delta = event["delta"]
            part = delta.get("text", delta.get("thinking", delta.get("partial_json", "")))
            parts[event["index"]] = parts.get(event["index"], "") + part
    return [parts[0], parts[1], json.loads(parts[2])]


def test_a_status_is_answered_as_often_as_asked_and_counted() -> None:
    rule = Rule(prompt=".", turns=(Turn(fault=529, times=2, blocks=(Text(text="at last"),)),))
    with ScriptedModel([rule]) as model:
        statuses = [post(model, {"messages": [user("x")]})[0] for _ in range(3)]
        assert statuses == [529, 529, 200]
        assert model.faults == {"529": 2}


def test_a_cut_stream_is_a_broken_answer() -> None:
    rule = Rule(prompt=".", turns=(Turn(fault="cut", times=1, blocks=(Text(text="a b c d e f"),)),))
    with ScriptedModel([rule]) as model:
        body = {"stream": True, "messages": [user("x")]}
        with pytest.raises(HTTPException):
            post(model, body)
        assert b"message_stop" in post(model, body)[1]
        assert model.faults == {"cut": 1}


@pytest.fixture
def threads_before() -> Iterator[set[threading.Thread]]:
    yield set(threading.enumerate())


def test_leaving_ends_what_hangs_and_leaves_no_thread(threads_before: set[threading.Thread]) -> None:
    failed = threading.Event()

    def wait_for_nothing(model: ScriptedModel) -> None:
        try:
            post(model, {"messages": [user("x")]})
        except (HTTPException, OSError):
            failed.set()

    with ScriptedModel([Rule(prompt=".", turns=(Turn(fault="hang"),))]) as model:
        asking = threading.Thread(target=wait_for_nothing, args=(model,))
        asking.start()
        deadline = time.monotonic() + 10
        while not model.faults["hang"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    asking.join(10)
    assert failed.is_set()
    assert set(threading.enumerate()) <= threads_before


def test_tokens_are_counted_and_requests_remembered() -> None:
    with ScriptedModel([]) as model:
        status, answer = post(model, {"messages": [user("x" * 400)]}, "/v1/messages/count_tokens?beta=true")
        assert status == 200
        assert json.loads(answer)["input_tokens"] > 100
        assert model.requests[0].key == "k"
        assert model.requests[0].path.startswith("/v1/messages/count_tokens")


def test_a_script_survives_a_file() -> None:
    fault = Turn(fault=529, times=1, pace_s=0.5, blocks=(Thinking(thinking="?"), Text(text="!")))
    script = Script(rules=(GREET, Rule(prompt="x", turns=(fault, bash("ls")))))
    assert Script.model_validate_json(script.model_dump_json()) == script
