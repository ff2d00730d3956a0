"""Questions of agents, and the one message that is the answer to each, on both databases."""

from __future__ import annotations

import pytest

from cloudagent_storage.errors import LeaseLost, QuestionClosed, TaskEnded, TaskNotFound
from cloudagent_storage.records import LOCAL_ACCOUNT, Question, Task, TaskStatus
from cloudagent_storage.store import Store
from tests.support.stored import EXPIRED, ask, at_once, claimed, line, messages, queued


def task(store: Store, task_id: str) -> Task:
    return store.tasks.get(LOCAL_ACCOUNT, task_id)


def waiting(store: Store) -> tuple[str, int]:
    """A task whose agent asks something: its id and its attempt."""
    claim = claimed(store)
    ask(store, claim.task.task_id, claim.attempt)
    return claim.task.task_id, claim.attempt


def test_a_question_is_seen_with_its_choices_and_since_when(store: Store) -> None:
    task_id, _ = waiting(store)
    seen = task(store, task_id)
    assert (seen.status, seen.question) == (TaskStatus.WAITING, "Which one?")
    assert seen.asked is not None and (seen.asked.question_id, seen.asked.choices) == ("q_1", ("this", "that"))
    assert seen.asked.asked_at is not None and abs((store.now() - seen.asked.asked_at).total_seconds()) < 30


def test_the_first_answer_closes_the_question_and_the_task_runs(store: Store) -> None:
    task_id, attempt = waiting(store)
    answer = store.messages.add(LOCAL_ACCOUNT, task_id, "this")
    assert answer.answers == "q_1"
    seen = task(store, task_id)
    assert (seen.status, seen.question, seen.asked) == (TaskStatus.RUNNING, None, None)
    more = store.messages.add(LOCAL_ACCOUNT, task_id, "this")
    assert more.answers is None
    assert store.tasks.signals(task_id, attempt).messages == (answer, more)


def test_of_many_answers_at_once_one_is_the_answer(store: Store) -> None:
    for _ in range(5):
        task_id, _ = waiting(store)
        said = at_once(*[lambda: store.messages.add(LOCAL_ACCOUNT, task_id, "this")] * 6)  # noqa: B023
        assert [message.answers for message in said].count("q_1") == 1


def test_an_answer_to_a_named_question_is_never_that_to_the_next(store: Store) -> None:
    task_id, attempt = waiting(store)
    answer = store.messages.add(LOCAL_ACCOUNT, task_id, "this", question_id="q_1")
    store.messages.delivered(task_id, attempt, [answer.message_id])
    then = Question(question_id="q_2", text="And then?")
    store.tasks.follow(task_id, attempt, [], log_offset=2, lease_s=60, question=then)
    assert store.messages.add(LOCAL_ACCOUNT, task_id, "this", question_id="q_1") == answer, "said twice, it is one"
    with pytest.raises(QuestionClosed):
        store.messages.add(LOCAL_ACCOUNT, task_id, "that", question_id="q_1")
    assert task(store, task_id).question == "And then?"
    assert store.tasks.signals(task_id, attempt).messages == ()
    store.tasks.finish(task_id, attempt, status=TaskStatus.COMPLETED)
    assert store.messages.add(LOCAL_ACCOUNT, task_id, "this", question_id="q_1") == answer
    with pytest.raises(TaskEnded):
        store.messages.add(LOCAL_ACCOUNT, task_id, "that", question_id="q_2")


def test_a_question_and_its_answer_outlive_the_worker(store: Store) -> None:
    claim = claimed(store)
    task_id = claim.task.task_id
    ask(store, task_id, claim.attempt, lease_s=EXPIRED)
    again = claimed(store, task_id, lease_s=EXPIRED)
    assert (again.task.status, again.task.question) == (TaskStatus.WAITING, "Which one?")
    assert again.question_age_s < 30
    answer = store.messages.add(LOCAL_ACCOUNT, task_id, "this")
    third = claimed(store, task_id)
    assert (third.task.status, third.task.asked) == (TaskStatus.RUNNING, None)
    assert store.tasks.signals(task_id, third.attempt).messages == (answer,)
    store.messages.delivered(task_id, third.attempt, [answer.message_id])
    assert store.tasks.signals(task_id, third.attempt).messages == ()


def test_a_question_is_void_in_another_sandbox_and_after_the_end(store: Store) -> None:
    task_id, attempt = waiting(store)
    store.tasks.begin_sandbox(task_id, attempt, nonce="sbx", provider="local", place=None)
    assert (task(store, task_id).status, task(store, task_id).question) == (TaskStatus.RUNNING, None)
    with pytest.raises(QuestionClosed):
        store.messages.add(LOCAL_ACCOUNT, task_id, "this", question_id="q_1")
    ask(store, task_id, attempt)
    ended = store.tasks.finish(task_id, attempt, status=TaskStatus.FAILED)
    assert (ended.question, ended.asked) == (None, None)


def test_a_question_that_nobody_answers_is_given_up_once(store: Store) -> None:
    task_id, attempt = waiting(store)
    for _ in range(2):
        store.messages.give_up(task_id, attempt, "q_1", told="Decide.", line=line("Nobody answered."))
    assert (task(store, task_id).status, task(store, task_id).question) == (TaskStatus.RUNNING, None)
    (told,) = store.tasks.signals(task_id, attempt).messages
    assert (told.text, told.answers) == ("Decide.", "q_1")
    assert messages(store, task_id).count("Nobody answered.") == 1
    with pytest.raises(QuestionClosed):
        store.messages.add(LOCAL_ACCOUNT, task_id, "this", question_id="q_1")


def test_an_answer_in_the_last_moment_wins_over_giving_up(store: Store) -> None:
    task_id, attempt = waiting(store)
    answer = store.messages.add(LOCAL_ACCOUNT, task_id, "this")
    store.messages.give_up(task_id, attempt, "q_1", told="Decide.", line=line("Nobody answered."))
    assert store.tasks.signals(task_id, attempt).messages == (answer,)
    assert "Nobody answered." not in messages(store, task_id)
    with pytest.raises(LeaseLost):
        store.messages.give_up(task_id, attempt + 1, "q_1", told="Decide.", line=line())


def test_the_pending_questions_are_an_accounts_own_oldest_first(store: Store) -> None:
    store.accounts.ensure("other")
    theirs = claimed(store, queued(store, account_id="other"))
    ask(store, theirs.task.task_id, theirs.attempt)
    first, attempt = waiting(store)
    second, _ = waiting(store)
    answered, _ = waiting(store)
    store.messages.add(LOCAL_ACCOUNT, answered, "this")
    found = store.messages.pending(LOCAL_ACCOUNT, limit=10)
    assert [(question.task_id, question.question, question.question_id) for question in found] == [
        (first, "Which one?", "q_1"),
        (second, "Which one?", "q_1"),
    ]
    assert [question.task_id for question in store.messages.pending(LOCAL_ACCOUNT, limit=1)] == [first]
    store.tasks.release(first, attempt)
    assert len(store.messages.pending(LOCAL_ACCOUNT, limit=10)) == 2, "also while no worker has the task"
    with pytest.raises(TaskNotFound):
        store.messages.add(LOCAL_ACCOUNT, theirs.task.task_id, "this")


def test_a_waiting_task_takes_its_accounts_place_as_a_running_one_does(store: Store) -> None:
    waiting(store)
    queued(store)
    claim = store.backlog.claim_next(worker="w", place="here", lease_s=60, running_max=1)
    assert claim is None
