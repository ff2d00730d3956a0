"""What the runner wrote is hostile: it may say anything, and in any shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from cloudagent_queue.agents import EVENTS, RESULT
from cloudagent_queue.follow import CHUNK, LogReader, read_result
from cloudagent_queue.redact import Redactor
from cloudagent_storage.records import EventDraft, Level, Question, TaskStatus, Usage

SECRET = "sk-secret-0123456789"


class Files:
    """The only part of a sandbox that reading needs."""

    def __init__(self, content: Mapping[str, bytes]) -> None:
        self.content = dict(content)

    def read(self, path: str, *, offset: int = 0, max_bytes: int) -> bytes:
        return self.content.get(path, b"")[offset : offset + max_bytes]

    def limits_met(self) -> list[str]:
        return []


def reader(log: bytes) -> tuple[LogReader, Files]:
    files = Files({EVENTS: log})
    return LogReader(0, Redactor([SECRET])), files


def read(log: LogReader, files: Files) -> list[EventDraft]:
    """What is new in the log's file."""
    return log.take(files.read(EVENTS, offset=log.offset, max_bytes=CHUNK))


def event(kind: str = "text", message: str = "hi", **fields: Any) -> bytes:
    return json.dumps({"kind": kind, "message": message, **fields}).encode() + b"\n"


def result(content: Any) -> Any:
    sandbox: Any = Files({RESULT: content if isinstance(content, bytes) else json.dumps(content).encode()})
    return read_result(sandbox)


def test_only_whole_lines_are_taken_and_each_once() -> None:
    whole = event(message="one") + event(message="two")
    log, files = reader(whole[:-3])
    assert [draft.message for draft in read(log, files)] == ["one"]
    assert read(log, files) == [] and not log.moved
    files.content[EVENTS] = whole + event(message="three")
    assert [draft.message for draft in read(log, files)] == ["two", "three"]
    assert log.offset == len(files.content[EVENTS])


@pytest.mark.parametrize(
    "line",
    [
        b"not json\n",
        b"[]\n",
        b"null\n",
        b'{"kind": "text"}\n',
        b'{"kind": "root", "message": "x"}\n',
        b'{"kind": ["text"], "message": "x"}\n',
        b'{"kind": "text", "level": "loud", "message": "x"}\n',
        b"\xff\xfe\x00\n",
        b"[" * 20_000 + b"\n",
        b'{"a":' * 20_000 + b"\n",
    ],
)
def test_a_line_that_is_no_event_is_kept_as_a_warning_and_the_log_goes_on(line: bytes) -> None:
    log, files = reader(line + event(message="after"))
    first, second = read(log, files)
    assert (first.kind, first.level) == ("stderr", Level.WARNING)
    assert second.message == "after"


def test_a_line_longer_than_a_chunk_is_left_out_and_said_to_be() -> None:
    log, files = reader(b"x" * (CHUNK + 10) + b"\n" + event(message="after"))
    assert "too long" in read(log, files)[0].message
    assert read(log, files)[-1].message == "after"


def test_secrets_are_taken_out_of_messages_raw_parts_and_unreadable_lines() -> None:
    log, files = reader(event(message=f"key {SECRET}", raw={"deep": [SECRET]}) + f"broken {SECRET}\n".encode())
    for draft in read(log, files):
        assert SECRET not in draft.model_dump_json()
        assert "[redacted]" in draft.message


def test_a_time_that_is_nonsense_is_dropped() -> None:
    log, files = reader(event(time="1999-01-01T00:00:00Z") + event(time="soon") + event(time=5))
    assert [draft.timestamp for draft in read(log, files)] == [None, None, None]


def test_a_tool_call_is_open_until_its_result_comes() -> None:
    log, files = reader(event("tool_use", raw={"id": "a"}) + event("tool_use", raw={"id": "b"}))
    read(log, files)
    assert log.tool_running
    files.content[EVENTS] += event("tool_result", raw={"tool_use_id": "a"})
    read(log, files)
    assert log.tool_running
    files.content[EVENTS] += event("tool_result", raw={"tool_use_id": "b"})
    read(log, files)
    assert not log.tool_running


def test_the_newest_usage_counts_and_a_forged_one_does_not() -> None:
    log, files = reader(event("usage", raw={"usage": {"turns": 2, "cost_usd": 0.5}}))
    read(log, files)
    assert log.usage(Usage()).turns == 2
    files.content[EVENTS] += event("usage", raw={"usage": {"turns": "many"}}) + event("usage", raw={"usage": {}})
    read(log, files)
    assert log.usage(Usage()).turns == 2


def test_no_result_is_no_end() -> None:
    sandbox: Any = Files({})
    assert read_result(sandbox) is None


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 50_000, {}, {"outcome": "won"}, {"error": "x"}])
def test_a_result_that_makes_no_sense_is_a_failed_agent(content: Any) -> None:
    ending = result(content)
    assert ending.status is TaskStatus.FAILED and ending.error.code == "agent_error"
    assert ending.error.message and ending.error.remedy


def test_an_agent_cannot_report_an_error_that_is_the_workers_to_find() -> None:
    ending = result({"outcome": "failed", "error": {"code": "cancelled_by_user", "message": "x"}})
    assert ending.error.code == "agent_error"


def test_a_result_is_bounded() -> None:
    ending = result({"outcome": "completed", "summary": "x" * 500_000, "model": "m" * 1000, "usage": {"turns": 1}})
    assert ending.status is TaskStatus.COMPLETED
    assert len(ending.summary) == 20_000 and len(ending.model) == 100


def test_a_question_is_open_until_an_answer_is_read() -> None:
    log, files = reader(event("question", "Which?", raw={"question_id": "q_1", "choices": ["a", "b"]}))
    read(log, files)
    assert log.question == Question(question_id="q_1", text="Which?", choices=("a", "b"))
    files.content[EVENTS] += event("text", "Meanwhile")
    read(log, files)
    assert log.question is not None
    files.content[EVENTS] += event("answer", "a", raw={"question_id": "q_1"})
    read(log, files)
    assert log.question is None and log.asked == 1


@pytest.mark.parametrize("question_id", [None, 5, "", "Q 1", "../x", "q" * 41, ["q"], "q\n"])
def test_a_question_without_a_usable_id_cannot_be_answered_and_makes_nobody_wait(question_id: Any) -> None:
    log, files = reader(event("question", "Which?", raw={"question_id": question_id}))
    assert [draft.kind for draft in read(log, files)] == ["question"]
    assert log.question is None


def test_a_question_is_cut_to_what_a_person_can_choose_from_and_holds_no_secret() -> None:
    odd: list[Any] = [
        "",
        " ",
        7,
        None,
        "same",
        "same",
        f"the key is {SECRET}",
        *("x" * 500 + str(n) for n in range(50)),
    ]
    log, files = reader(event("question", "W" * 9000, raw={"question_id": "q_1", "choices": odd}))
    read(log, files)
    assert log.question is not None
    assert len(log.question.text) == 4000 and len(log.question.choices) <= 10
    assert max(map(len, log.question.choices)) <= 100 and SECRET not in "".join(log.question.choices)
    assert len(set(log.question.choices)) == len(log.question.choices)
