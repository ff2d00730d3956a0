"""A question outlives whatever dies while the task waits, and its answer arrives exactly once."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from cloudagent_storage.errors import QuestionClosed
from cloudagent_storage.records import LOCAL_ACCOUNT, TaskStatus
from tests.support.failpoints import Failpoint
from tests.support.installation import EITHER_SANDBOX, EVERYWHERE, PATIENT, Installation
from tests.support.worlds import until

MESSAGES = "cloudagent_storage.store.messages:Messages"


def ask(installation: Installation, **arguments: object) -> str:
    """A task whose agent asks something before its third step, once that can be seen."""
    task = installation.submit(steps=4, faults={"ask_at": 2, **arguments})
    await_question(installation, task)
    return task


def await_question(installation: Installation, task: str) -> str:
    """The id of its open question."""

    def question() -> str | None:
        asked = installation.task(task).asked
        return asked.question_id if asked is not None else None

    return until(question, "the question is seen", 60)


def answer(installation: Installation, task: str, text: str = "this", **arguments: str) -> bool:
    with installation.client() as client:
        return client.call("send_message", task_id=task, message=text, **arguments)["answered"]


def told(installation: Installation, task: str) -> list[tuple[str, bool]]:
    """What its agents were told, and whether that was no answer to an open question."""
    return [(line["text"], line["late"]) for line in installation.journal(task, "told")]


def kinds(installation: Installation, task: str, kind: str) -> int:
    lines = installation.store.events.list(LOCAL_ACCOUNT, task, limit=1000).lines
    return sum(line.kind == kind for line in lines)


@pytest.mark.full("postgres", "e2b")
@EVERYWHERE
def test_a_question_outlives_its_worker_and_is_answered_while_there_is_none(installation: Installation) -> None:
    worker = installation.start_worker()
    task = ask(installation)
    worker.kill()
    assert installation.task(task).status is TaskStatus.WAITING
    assert answer(installation, task)
    assert installation.task(task).status is TaskStatus.RUNNING
    installation.start_worker()
    installation.conclude()
    assert told(installation, task) == [("this", False)]
    assert (kinds(installation, task, "question"), kinds(installation, task, "answer")) == (1, 1)
    assert installation.attempts(task) > 1


@pytest.mark.full("e2b")
@EITHER_SANDBOX
def test_a_question_is_still_open_for_the_worker_that_adopts_the_task(installation: Installation) -> None:
    worker = installation.start_worker()
    task = ask(installation)
    question = await_question(installation, task)
    worker.kill()
    installation.start_worker()
    until(lambda: installation.attempts(task) == 2, "the other worker has it", 60)
    seen = installation.task(task)
    assert (seen.status, seen.question) == (TaskStatus.WAITING, "Which one?")
    assert answer(installation, task, question_id=question)
    installation.conclude()
    assert told(installation, task) == [("this", False)]


@EVERYWHERE
@pytest.mark.full("after", "e2b")
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_answer_arrives_once_though_the_worker_dies_as_it_hands_it_on(installation: Installation, when: str) -> None:
    dies = Failpoint(f"{MESSAGES}.delivered", when)
    worker = installation.start_worker(failpoints=[dies])
    task = ask(installation, gate="go")
    assert answer(installation, task)
    worker.wait()
    assert installation.fired(dies)
    installation.start_worker()
    until(lambda: installation.attempts(task) == 2, "the other worker has it", 60)
    until(lambda: not installation.store.tasks.signals(task, 2).messages, "it has handed on what there was", 60)
    installation.open_gate("go")
    installation.conclude()
    assert told(installation, task) == [("this", False)]
    assert kinds(installation, task, "answer") == 1


@EVERYWHERE
@pytest.mark.full("postgres", "e2b")
def test_a_question_that_was_read_as_the_worker_died_is_there_once(installation: Installation) -> None:
    dies = Failpoint("cloudagent_storage.store.tasks:Tasks.follow", "after", 3)
    worker = installation.start_worker(failpoints=[dies])
    task = installation.submit(steps=4, step_s=0.5, faults={"ask_at": 2})
    worker.wait()
    assert installation.fired(dies)
    installation.start_worker()
    await_question(installation, task)
    assert answer(installation, task)
    installation.conclude()
    assert (told(installation, task), kinds(installation, task, "question")) == ([("this", False)], 1)


@EVERYWHERE
@pytest.mark.full("postgres", "e2b")
def test_a_drain_while_a_task_waits_keeps_its_question(installation: Installation) -> None:
    installation.timers = PATIENT
    worker = installation.start_worker()
    task = ask(installation)
    assert worker.stop() < 10
    assert installation.task(task).status is TaskStatus.WAITING
    installation.start_worker()
    until(lambda: installation.attempts(task) == 2, "the other worker has it", 60)
    assert answer(installation, task)
    installation.conclude()
    assert (told(installation, task), installation.column(task, "lost_leases")) == ([("this", False)], 0)


@EVERYWHERE
@pytest.mark.full("postgres", "e2b")
def test_a_task_is_cancelled_while_it_waits(installation: Installation) -> None:
    installation.start_worker()
    task = ask(installation)
    with installation.client() as client:
        assert client.call("cancel_task", task_id=task)["changed"]
    installation.conclude({task: "cancelled"})
    ended = installation.task(task)
    assert (ended.question, ended.asked) == (None, None)
    assert ended.result is not None and ended.result.artifacts is not None and ended.result.artifacts.files_changed == 2


@pytest.mark.full("sqlite")
@EITHER_SANDBOX
def test_the_question_of_a_sandbox_that_dies_is_void_and_the_next_agent_asks_anew(installation: Installation) -> None:
    task = installation.submit(steps=4, faults={"ask_at": 2})
    assert not answer(installation, task, "Use tabs.")
    installation.start_worker()
    first = await_question(installation, task)
    until(lambda: any("Kept a checkpoint" in line for line in installation.log(task)), "its work is kept at once", 60)
    installation.kill_sandbox()
    until(lambda: len(installation.journal(task, "asked")) == 2, "it is asked again", 60)
    until(lambda: await_question(installation, task) != first, "the second question is seen", 60)
    with pytest.raises(QuestionClosed):
        answer(installation, task, question_id=first)
    assert answer(installation, task, "that")
    installation.conclude()
    assert told(installation, task) == [("Use tabs.", True), ("that", False)]


def test_waiting_counts_toward_no_limit(on_sqlite: Installation) -> None:
    on_sqlite.timers = replace(on_sqlite.timers, idle_s=4.0, idle_in_tool_s=4.0)
    on_sqlite.start_worker()
    task = on_sqlite.submit(steps=4, faults={"ask_at": 2}, timeout_minutes=0.1)
    await_question(on_sqlite, task)
    asked = time.monotonic()
    until(lambda: time.monotonic() - asked > 9 or on_sqlite.task(task).status.terminal, "longer than either limit")
    assert on_sqlite.task(task).status is TaskStatus.WAITING
    assert answer(on_sqlite, task)
    on_sqlite.conclude()
    assert on_sqlite.column(task, "running_seconds") < 5


@pytest.mark.full
def test_an_agent_that_asks_without_end_runs_out_of_time(on_sqlite: Installation) -> None:
    on_sqlite.start_worker(hook="tests.support.standin:who_asks_has_no_time_for_it")
    task = on_sqlite.submit(steps=4, faults={"ask_at": 2}, timeout_minutes=0.1)
    await_question(on_sqlite, task)
    on_sqlite.conclude({task: "timed_out"})


def test_an_agent_that_was_answered_has_its_limits_again(on_sqlite: Installation) -> None:
    on_sqlite.start_worker(idle_s=3.0)
    task = on_sqlite.submit(steps=4, faults={"ask_at": 2, "hang_at": 3})
    await_question(on_sqlite, task)
    assert answer(on_sqlite, task)
    on_sqlite.conclude({task: "idle"})


@pytest.mark.parametrize("installation", ["sqlite", "postgres"], indirect=True)
@pytest.mark.full("postgres")
def test_an_agent_whose_question_nobody_answers_is_told_to_decide_by_itself(installation: Installation) -> None:
    installation.start_worker(question_s=2.0)
    task = installation.submit(steps=4, faults={"ask_at": 2})
    installation.conclude()
    ((text, late),) = told(installation, task)
    assert "Decide by yourself" in text and not late
    assert kinds(installation, task, "answer") == 1
    assert any("Nobody has answered" in line for line in installation.log(task))


def test_what_is_said_before_the_agent_starts_reaches_it(on_sqlite: Installation) -> None:
    task = on_sqlite.submit(steps=4, faults={"gate": "go"})
    assert not answer(on_sqlite, task, "Use tabs.")
    on_sqlite.start_worker()
    until(lambda: told(on_sqlite, task), "it is told", 60)
    assert not answer(on_sqlite, task, "And mind the gap.")
    until(lambda: len(told(on_sqlite, task)) == 2, "it is told that as well", 60)
    on_sqlite.open_gate("go")
    on_sqlite.conclude()
    assert [text for text, _ in told(on_sqlite, task)] == ["Use tabs.", "And mind the gap."]
