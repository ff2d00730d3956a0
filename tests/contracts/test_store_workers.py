"""Claims, leases and fences, on both databases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import timedelta

import pytest

from cloudagent_storage.errors import LeaseLost, NotNow, TaskNotFound
from cloudagent_storage.records import (
    LOCAL_ACCOUNT,
    Phase,
    Result,
    TaskError,
    TaskStatus,
    Usage,
    Verdict,
    VerifyResult,
    new_id,
)
from cloudagent_storage.store import Store
from cloudagent_storage.store.database import Database
from cloudagent_storage.store.row import find
from cloudagent_storage.store.tasks import Tasks
from tests.support.stored import EXPIRED, ask, at_once, claimed, in_processes, line, messages, queued

FAILED = TaskError(code="agent_error", message="It failed.", remedy="Try again.")
FAILED_VERIFY = VerifyResult(command="make test", exit_code=2, output="lost\n", commit="abc", seconds=1.5)


@contextmanager
def uncommitted(url: str) -> Generator[tuple[ThreadPoolExecutor, Database]]:
    """A transaction that is committed at the end of the block, and a thread beside it.

    What the thread does ought to wait for that end, or not to see it; the short `wait` gives broken code time to hurry.
    """
    database = Database(url)
    with ThreadPoolExecutor(1) as other:
        with database.writing():
            yield other, database
    database.close()


def status(store: Store, task_id: str) -> TaskStatus:
    return store.tasks.get(LOCAL_ACCOUNT, task_id).status


def test_a_claim_carries_what_a_worker_needs(store: Store) -> None:
    task_id = queued(store)
    claim = store.tasks.claim(task_id, worker="worker", lease_s=60)
    assert claim is not None
    assert (claim.attempt, claim.account_id, claim.credentials) == (1, LOCAL_ACCOUNT, b"sealed")
    assert (claim.sandbox_id, claim.sandbox_nonce, claim.log_offset, claim.running_seconds) == (None, None, 0, 0.0)
    assert claim.task.status is TaskStatus.RUNNING and claim.task.started_at is not None
    assert claim.task == store.tasks.get(LOCAL_ACCOUNT, task_id)
    assert not claim.cancel_requested


def test_a_task_that_a_worker_has_is_not_to_be_had(store: Store) -> None:
    claim = claimed(store)
    assert store.tasks.claim(claim.task.task_id, worker="other", lease_s=60) is None
    assert store.tasks.claim(new_id("task"), worker="other", lease_s=60) is None


def test_of_several_workers_on_several_stores_one_gets_the_task(store: Store, store_url: str) -> None:
    other = Store.open(store_url)
    try:
        for _ in range(10):
            task_id = queued(store)
            claims = at_once(
                *(lambda of=of: of.tasks.claim(task_id, worker="worker", lease_s=60) for of in [store, other] * 3)  # noqa: B023
            )
            assert [claim.attempt for claim in claims if claim is not None] == [1]
            assert store.tasks.get(LOCAL_ACCOUNT, task_id).attempt == 1
    finally:
        other.close()


CLAIM_ALL = """
from cloudagent_storage.store import Store
from cloudagent_storage.store.database import Database
from cloudagent_storage.store.row import find
from cloudagent_storage.store.tasks import Tasks
url, *task_ids = sys.argv[1:]
store = Store.open(url)
store.check()
ready()
for task_id in task_ids:
    if store.tasks.claim(task_id, worker="worker", lease_s=60) is not None:
        print(task_id)
store.close()
"""


def test_of_several_processes_one_gets_the_task(store: Store, store_url: str) -> None:
    task_ids = [queued(store) for _ in range(40)]
    outputs = in_processes(3, CLAIM_ALL, [store_url, *task_ids])
    assert Counter(task_id for output in outputs for task_id in output.split()) == Counter(task_ids)


def test_of_several_workers_after_an_expired_lease_one_gets_the_task(store: Store) -> None:
    for _ in range(10):
        task_id = claimed(store, lease_s=EXPIRED).task.task_id
        claims = at_once(*[lambda: store.tasks.claim(task_id, worker="worker", lease_s=60)] * 4)  # noqa: B023
        assert [claim.attempt for claim in claims if claim is not None] == [2]


WORKER_WRITES: list[Callable[[Store, str, int], object]] = [
    lambda store, task_id, attempt: store.tasks.renew(task_id, attempt, lease_s=60),
    lambda store, task_id, attempt: store.tasks.signals(task_id, attempt),
    lambda store, task_id, attempt: store.tasks.update(task_id, attempt, phase=Phase.AGENT, sandbox_id="sbx"),
    lambda store, task_id, attempt: store.messages.give_up(task_id, attempt, "q_1", told="No.", line=line()),
    lambda store, task_id, attempt: store.tasks.follow(task_id, attempt, [line()], log_offset=99, lease_s=60),
    lambda store, task_id, attempt: store.tasks.release(task_id, attempt, line=line()),
    lambda store, task_id, attempt: store.tasks.finish(
        task_id, attempt, status=TaskStatus.COMPLETED, result=Result(summary="Done."), events=[line()]
    ),
    lambda store, task_id, attempt: store.events.add(task_id, line(), attempt=attempt),
    lambda store, task_id, attempt: store.blobs.put(task_id, "diff", b"stale", attempt=attempt),
    lambda store, task_id, attempt: store.messages.delivered(task_id, attempt, ["msg_x"]),
]


def everything(store: Store, task_id: str) -> object:
    # The next attempt's claim shows what of a task users do not see.
    return (
        store.tasks.get(LOCAL_ACCOUNT, task_id),
        messages(store, task_id),
        store.blobs.get(LOCAL_ACCOUNT, task_id, "diff"),
        store.tasks.version(LOCAL_ACCOUNT, task_id),
        store.tasks.due(waited_s=0),
    )


@pytest.mark.parametrize("write", WORKER_WRITES)
def test_a_worker_that_lost_its_lease_changes_nothing(store: Store, write: Callable[[Store, str, int], object]) -> None:
    stale = claimed(store, lease_s=EXPIRED)
    task_id = stale.task.task_id
    store.blobs.put(task_id, "diff", b"kept", attempt=stale.attempt)
    owner = claimed(store, task_id)
    before = everything(store, task_id)
    with pytest.raises(LeaseLost):
        write(store, task_id, stale.attempt)
    assert everything(store, task_id) == before
    store.tasks.release(task_id, owner.attempt)
    adopted = claimed(store, task_id)
    assert (adopted.sandbox_id, adopted.log_offset, adopted.attempt) == (None, 0, 3)


@pytest.mark.parametrize("write", WORKER_WRITES)
def test_a_worker_changes_nothing_after_the_end(store: Store, write: Callable[[Store, str, int], object]) -> None:
    claim = claimed(store)
    task_id = claim.task.task_id
    store.tasks.finish(task_id, claim.attempt, status=TaskStatus.FAILED, error=FAILED)
    before = everything(store, task_id)
    with pytest.raises(LeaseLost):
        write(store, task_id, claim.attempt)
    assert everything(store, task_id) == before


@pytest.mark.parametrize("write", WORKER_WRITES)
def test_a_worker_changes_nothing_after_it_gave_the_task_back(
    store: Store, write: Callable[[Store, str, int], object]
) -> None:
    claim = claimed(store)
    task_id = claim.task.task_id
    store.tasks.release(task_id, claim.attempt)
    with pytest.raises(LeaseLost):
        write(store, task_id, claim.attempt)
    assert messages(store, task_id) == ["Queued."]
    assert claimed(store, task_id).attempt == 2


@pytest.mark.parametrize("write", WORKER_WRITES)
def test_a_worker_whose_lease_ran_out_goes_on_while_nobody_else_claimed(
    store: Store, write: Callable[[Store, str, int], object]
) -> None:
    claim = claimed(store, lease_s=EXPIRED)
    write(store, claim.task.task_id, claim.attempt)


def test_a_renewed_lease_is_held(store: Store) -> None:
    claim = claimed(store, lease_s=EXPIRED)
    task_id = claim.task.task_id
    renewals: list[Callable[[float], object]] = [
        lambda seconds: store.tasks.renew(task_id, claim.attempt, lease_s=seconds),
        lambda seconds: store.tasks.update(task_id, claim.attempt, lease_s=seconds),
        lambda seconds: store.tasks.follow(task_id, claim.attempt, [], log_offset=0, lease_s=seconds),
    ]
    for renew in renewals:
        renew(EXPIRED)
        assert store.tasks.due(waited_s=-1) == [task_id]
        renew(60)
        assert store.tasks.due(waited_s=-1) == []
        assert store.tasks.claim(task_id, worker="other", lease_s=60) is None


def test_the_next_attempt_goes_on_where_the_last_one_stopped(store: Store) -> None:
    task_id = queued(store)
    first = claimed(store, task_id, lease_s=EXPIRED)
    store.tasks.begin_sandbox(task_id, first.attempt, nonce="nonce-1", provider="local", place="here")
    store.tasks.update(
        task_id,
        first.attempt,
        phase=Phase.AGENT,
        sandbox_id="sandbox-1",
        base_sha="abc",
        provider="local",
        model="m",
        retries_used=1,
        failed_verify=FAILED_VERIFY,
    )
    store.tasks.follow(
        task_id,
        first.attempt,
        [line("one"), line("two")],
        log_offset=120,
        lease_s=EXPIRED,
        usage=Usage(turns=3, cost_usd=0.25),
        running_seconds=12.5,
    )
    second = claimed(store, task_id)
    assert (second.attempt, second.sandbox_id, second.sandbox_nonce) == (2, "sandbox-1", "nonce-1")
    assert (second.sandbox_place, second.sandbox_losses) == ("here", 0)
    assert (second.log_offset, second.running_seconds, second.credentials) == (120, 12.5, b"sealed")
    assert (second.task.phase, second.task.base_sha, second.task.provider) == (Phase.AGENT, "abc", "local")
    assert (second.task.model, second.task.usage) == ("m", Usage(turns=3, cost_usd=0.25))
    assert (second.task.retries_used, second.failed_verify) == (1, FAILED_VERIFY)
    assert (first.task.retries_used, first.failed_verify) == (0, None)
    assert second.task.started_at == first.task.started_at
    assert messages(store, task_id) == ["Queued.", "one", "two"]


def test_a_question_makes_a_task_wait_and_the_answer_lets_it_run(store: Store) -> None:
    claim = claimed(store)
    task_id = claim.task.task_id
    ask(store, task_id, claim.attempt, "Which one?")
    task = store.tasks.get(LOCAL_ACCOUNT, task_id)
    assert (task.status, task.question) == (TaskStatus.WAITING, "Which one?")
    store.tasks.update(task_id, claim.attempt, phase=Phase.AGENT)
    assert status(store, task_id) is TaskStatus.WAITING
    ask(store, task_id, claim.attempt, None)
    task = store.tasks.get(LOCAL_ACCOUNT, task_id)
    assert (task.status, task.question) == (TaskStatus.RUNNING, None)


def test_a_waiting_task_is_claimed_again_and_ended_like_a_running_one(store: Store) -> None:
    claim = claimed(store)
    task_id = claim.task.task_id
    ask(store, task_id, claim.attempt, lease_s=EXPIRED)
    assert store.tasks.due(waited_s=0) == [task_id]
    again = claimed(store, task_id)
    assert (again.attempt, again.task.status, again.task.question) == (2, TaskStatus.WAITING, "Which one?")
    ended = store.tasks.finish(task_id, again.attempt, status=TaskStatus.CANCELLED)
    assert (ended.status, ended.question) == (TaskStatus.CANCELLED, None)


def test_a_task_whose_third_lease_is_lost_without_progress_is_poisoned(store: Store) -> None:
    task_id = queued(store)
    for attempt in (1, 2, 3):
        assert claimed(store, task_id, lease_s=EXPIRED).attempt == attempt
        store.events.add(task_id, line("Sandbox ready."), attempt=attempt)
    assert store.tasks.claim(task_id, worker="worker", lease_s=60) is None
    task = store.tasks.get(LOCAL_ACCOUNT, task_id)
    assert (task.status, task.attempt) == (TaskStatus.FAILED, 3)
    assert task.error is not None and task.error.code == "poisoned"
    assert task.completed_at is not None and task.phase is None
    assert len(messages(store, task_id)) == 5 and messages(store, task_id)[-1] == task.error.message
    assert store.tasks.claim(task_id, worker="worker", lease_s=60) is None
    assert len(messages(store, task_id)) == 5
    assert store.tasks.due(waited_s=-1) == []


def test_progress_makes_up_for_lost_leases(store: Store) -> None:
    task_id = queued(store)
    for _ in range(2):
        claimed(store, task_id, lease_s=EXPIRED)
    third = claimed(store, task_id, lease_s=EXPIRED)
    store.tasks.follow(task_id, third.attempt, [line()], log_offset=1, lease_s=EXPIRED)
    for attempt in (4, 5):
        claim = claimed(store, task_id, lease_s=EXPIRED)
        assert claim.attempt == attempt
        store.tasks.follow(task_id, attempt, [], log_offset=1, lease_s=EXPIRED)
    assert store.tasks.claim(task_id, worker="worker", lease_s=60) is None
    assert status(store, task_id) is TaskStatus.FAILED


def test_a_task_that_is_given_back_can_be_had_at_once_and_loses_no_lease(store: Store) -> None:
    task_id = queued(store)
    for attempt in range(1, 8):
        claim = claimed(store, task_id)
        assert claim.attempt == attempt
        store.tasks.release(task_id, attempt, line=line(f"stopping {attempt}"))
        assert status(store, task_id) is TaskStatus.RUNNING
        assert store.tasks.due(waited_s=30) == [task_id]
    assert messages(store, task_id)[-1] == "stopping 7"


def test_a_task_that_lost_two_leases_can_be_given_back(store: Store) -> None:
    task_id = queued(store)
    for _ in range(2):
        claimed(store, task_id, lease_s=EXPIRED)
    third = claimed(store, task_id)
    store.tasks.release(task_id, third.attempt)
    fourth = claimed(store, task_id, lease_s=EXPIRED)
    assert fourth.attempt == 4
    assert store.tasks.claim(task_id, worker="worker", lease_s=60) is None
    assert status(store, task_id) is TaskStatus.FAILED


def test_a_cancelled_task_whose_worker_is_gone_is_claimed_to_be_salvaged(store: Store) -> None:
    task_id = claimed(store, lease_s=EXPIRED).task.task_id
    store.tasks.request_cancel(LOCAL_ACCOUNT, task_id)
    assert store.tasks.due(waited_s=0) == [task_id]
    assert claimed(store, task_id).cancel_requested


def test_the_end_of_a_task_is_one_step(store: Store) -> None:
    claim = claimed(store)
    task_id = claim.task.task_id
    store.tasks.update(task_id, claim.attempt, phase=Phase.VERIFY)
    result = Result(summary="Done.\x00")
    task = store.tasks.finish(
        task_id,
        claim.attempt,
        status=TaskStatus.COMPLETED,
        verdict=Verdict.PASSED,
        result=result,
        usage=Usage(input_tokens=5),
        events=[line("Completed.")],
    )
    assert task == store.tasks.get(LOCAL_ACCOUNT, task_id)
    assert (task.status, task.verdict, task.phase) == (TaskStatus.COMPLETED, Verdict.PASSED, None)
    assert task.result == Result(summary="Done.\ufffd") and task.error is None
    assert task.usage == Usage(input_tokens=5)
    assert task.completed_at is not None and task.started_at is not None and task.completed_at >= task.started_at
    assert messages(store, task_id)[-1] == "Completed."
    assert store.tasks.claim(task_id, worker="worker", lease_s=60) is None


def test_a_task_that_has_ended_keeps_no_credentials(store: Store, store_url: str) -> None:
    cancelled, poisoned, finished = queued(store), queued(store), queued(store)
    store.tasks.request_cancel(LOCAL_ACCOUNT, cancelled)
    for _ in range(3):
        claimed(store, poisoned, lease_s=EXPIRED)
    assert store.tasks.claim(poisoned, worker="worker", lease_s=60) is None
    store.tasks.finish(finished, claimed(store, finished).attempt, status=TaskStatus.FAILED, error=FAILED)
    database = Database(store_url)
    with database.reading():
        for task_id in (cancelled, poisoned, finished):
            row = find(database, LOCAL_ACCOUNT, task_id)
            assert (row.credentials, row.owner, row.lease_until) == (None, None, None)
            assert TaskStatus(row.status).terminal
    database.close()


def test_a_task_is_never_finished_into_a_status_that_is_no_end(store: Store) -> None:
    claim = claimed(store)
    for wrong in (TaskStatus.QUEUED, TaskStatus.RUNNING, TaskStatus.WAITING):
        with pytest.raises(ValueError, match="terminal"):
            store.tasks.finish(claim.task.task_id, claim.attempt, status=wrong)
    assert status(store, claim.task.task_id) is TaskStatus.RUNNING


def test_a_claim_and_a_cancel_at_once_leave_one_of_two_states(store: Store) -> None:
    for _ in range(15):
        task_id = queued(store)
        answers = at_once(
            lambda: store.tasks.claim(task_id, worker="worker", lease_s=60),  # noqa: B023
            lambda: store.tasks.request_cancel(LOCAL_ACCOUNT, task_id)[0].status,  # noqa: B023
        )
        if answers[0] is None:
            assert answers[1] is status(store, task_id) is TaskStatus.CANCELLED
        else:
            assert answers[1] is status(store, task_id) is TaskStatus.RUNNING
            assert store.tasks.signals(task_id, 1).cancel_requested
        assert len(messages(store, task_id)) == 2


def test_an_end_and_a_cancel_at_once_leave_one_end(store: Store) -> None:
    for _ in range(15):
        claim = claimed(store)
        task_id = claim.task.task_id
        _, cancel = at_once(
            lambda: store.tasks.finish(task_id, 1, status=TaskStatus.COMPLETED, events=[line("Completed.")]),  # noqa: B023
            lambda: store.tasks.request_cancel(LOCAL_ACCOUNT, task_id),  # noqa: B023
        )
        assert isinstance(cancel, tuple)
        task, changed = cancel
        assert task.status is (TaskStatus.RUNNING if changed else TaskStatus.COMPLETED)
        assert messages(store, task_id)[1:] == (["Cancel requested.", "Completed."] if changed else ["Completed."])
        assert status(store, task_id) is TaskStatus.COMPLETED


def test_of_two_ends_at_once_one_counts(store: Store) -> None:
    def finish(task_id: str, end: TaskStatus) -> str:
        try:
            return store.tasks.finish(task_id, 1, status=end, events=[line(end)]).status
        except LeaseLost:
            return "lost"

    for _ in range(15):
        task_id = claimed(store).task.task_id
        ends = at_once(
            lambda: finish(task_id, TaskStatus.COMPLETED),  # noqa: B023
            lambda: finish(task_id, TaskStatus.FAILED),  # noqa: B023
        )
        (winner,) = [end for end in ends if end != "lost"]
        assert status(store, task_id) == winner
        assert messages(store, task_id) == ["Queued.", winner]


def test_tasks_that_wait_for_a_worker_are_due_once_in_a_while(store: Store) -> None:
    first, second = queued(store), queued(store)
    claimed(store)
    expired = queued(store)
    store.tasks.rung(expired)
    claimed(store, expired, lease_s=EXPIRED)
    cancelled = queued(store)
    store.tasks.request_cancel(LOCAL_ACCOUNT, cancelled)
    rung = queued(store)
    store.tasks.rung(rung)
    assert store.tasks.due(waited_s=30, limit=2) == [first, second]
    assert store.tasks.due(waited_s=30) == [expired]
    assert store.tasks.due(waited_s=30) == []
    assert store.tasks.due(waited_s=-1) == [first, second, expired, rung]


def test_a_sweeper_leaves_alone_what_another_is_about_to_ring_for(store: Store, store_url: str) -> None:
    task_ids = [queued(store) for _ in range(3)]
    with uncommitted(store_url) as (other, database):
        assert Tasks(database).due(waited_s=30) == task_ids
        late = other.submit(store.tasks.due, waited_s=30)
        wait([late], timeout=0.3)
    assert late.result() == []


def test_a_message_to_a_task_that_ends_in_this_moment_is_refused(store: Store, store_url: str) -> None:
    claim = claimed(store)
    task_id = claim.task.task_id
    with uncommitted(store_url) as (other, database):
        Tasks(database).finish(task_id, claim.attempt, status=TaskStatus.COMPLETED)
        late = other.submit(store.messages.add, LOCAL_ACCOUNT, task_id, "hello")
        wait([late], timeout=0.3)
    with pytest.raises(NotNow):
        late.result()


def test_two_sweepers_at_once_never_ring_for_the_same_task(store: Store) -> None:
    task_ids = {queued(store) for _ in range(30)}
    found = at_once(*[lambda: store.tasks.due(waited_s=30)] * 4)
    rung = [task_id for ids in found for task_id in ids]
    assert len(rung) == len(set(rung))
    assert set(rung) | set(store.tasks.due(waited_s=30)) == task_ids


def test_unfinished_counts_what_has_not_ended(store: Store) -> None:
    assert store.tasks.unfinished() == 0
    queued(store)
    claim, waiting = claimed(store), claimed(store)
    ask(store, waiting.task.task_id, waiting.attempt, "Which?")
    assert store.tasks.unfinished() == 3
    store.tasks.finish(claim.task.task_id, claim.attempt, status=TaskStatus.FAILED)
    assert store.tasks.unfinished() == 2


def test_of_an_earlier_sandbox_nothing_is_left_when_a_new_one_is_begun(store: Store) -> None:
    claim = claimed(store, lease_s=EXPIRED)
    task_id = claim.task.task_id
    store.tasks.begin_sandbox(task_id, claim.attempt, nonce="first", provider="local", place="there")
    store.tasks.update(task_id, claim.attempt, sandbox_id="sandbox-1", sandbox_losses=2)
    store.tasks.follow(task_id, claim.attempt, [line("one")], log_offset=120, lease_s=60)
    store.tasks.begin_sandbox(task_id, claim.attempt, nonce="second", provider="local", place=None)
    assert not store.tasks.owns_sandbox(task_id, "sandbox-1", "first")
    assert store.tasks.owns_sandbox(task_id, "", "second")
    store.tasks.release(task_id, claim.attempt)
    again = claimed(store, task_id)
    assert (again.sandbox_id, again.sandbox_nonce, again.sandbox_place, again.log_offset) == (None, "second", None, 0)
    assert again.sandbox_losses == 2
    with pytest.raises(LeaseLost):
        store.tasks.begin_sandbox(task_id, claim.attempt, nonce="late", provider="local", place=None)


def test_a_claim_tells_how_old_the_sandbox_is(store: Store) -> None:
    claim = claimed(store)
    assert claim.sandbox_age_s == 0
    store.tasks.begin_sandbox(claim.task.task_id, claim.attempt, nonce="nonce", provider="local", place=None)
    a_second_later = store.now() + timedelta(seconds=1)
    while store.now() < a_second_later:
        pass
    store.tasks.release(claim.task.task_id, claim.attempt)
    assert 1.0 <= claimed(store, claim.task.task_id, lease_s=3600).sandbox_age_s < 60


def test_blobs_are_kept_together_and_dropped_by_whoever_has_the_task(store: Store) -> None:
    claim = claimed(store)
    task_id = claim.task.task_id
    store.blobs.put_all(task_id, {"checkpoint": b"bundle", "session": b"{}"}, attempt=claim.attempt)
    assert store.blobs.get(LOCAL_ACCOUNT, task_id, "session") == b"{}"
    with pytest.raises(LeaseLost):
        store.blobs.drop(task_id, ["checkpoint"], attempt=claim.attempt + 1)
    assert store.blobs.get(LOCAL_ACCOUNT, task_id, "checkpoint") == b"bundle"
    store.blobs.drop(task_id, ["checkpoint"], attempt=claim.attempt)
    assert store.blobs.get(LOCAL_ACCOUNT, task_id, "checkpoint") is None
    assert store.blobs.get(LOCAL_ACCOUNT, task_id, "session") == b"{}"


def test_a_sandbox_belongs_to_a_task_by_its_id_or_by_the_nonce(store: Store) -> None:
    claim = claimed(store)
    task_id = claim.task.task_id
    assert not store.tasks.owns_sandbox(task_id, "", "")
    store.tasks.begin_sandbox(task_id, claim.attempt, nonce="nonce", provider="local", place=None)
    assert store.tasks.owns_sandbox(task_id, "sandbox", "nonce")
    assert not store.tasks.owns_sandbox(task_id, "sandbox", "other")
    store.tasks.update(task_id, claim.attempt, sandbox_id="sandbox")
    assert store.tasks.owns_sandbox(task_id, "sandbox", "")
    assert not store.tasks.owns_sandbox(task_id, "other", "")
    for wrong in (new_id("task"), "", "task_\x00", "\ud800"):
        assert not store.tasks.owns_sandbox(wrong, "sandbox", "nonce")
    store.tasks.finish(task_id, claim.attempt, status=TaskStatus.COMPLETED)
    assert not store.tasks.owns_sandbox(task_id, "sandbox", "nonce")


def test_a_line_for_a_task_that_does_not_exist_is_refused(store: Store) -> None:
    with pytest.raises(TaskNotFound):
        store.events.add(new_id("task"), line())
