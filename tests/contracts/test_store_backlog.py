"""Which task comes next: fair between accounts, fair within them, begun before new; and where a task stands."""

from __future__ import annotations

import functools
from collections import Counter

import pytest

from cloudagent_storage.errors import TaskNotFound
from cloudagent_storage.records import LOCAL_ACCOUNT, Claim, Priority, TaskSpec, TaskStatus
from cloudagent_storage.store import Store
from tests.support.stored import EXPIRED, ask, at_once, claimed, line, queued


def submit(store: Store, account_id: str = LOCAL_ACCOUNT, priority: Priority = Priority.NORMAL) -> str:
    store.accounts.ensure(account_id)
    return queued(store, account_id=account_id, spec=TaskSpec(prompt="x", title="x", priority=priority))


def next_(
    store: Store, *, place: str = "here", running_max: int | None = None, patience_s: float = 600
) -> Claim | None:
    return store.backlog.claim_next(worker="w", place=place, lease_s=60, running_max=running_max, patience_s=patience_s)


def order(store: Store, count: int) -> list[str]:
    claims = [next_(store) for _ in range(count)]
    return [claim.task.task_id for claim in claims if claim is not None]


def test_whoever_waits_longest_comes_first(store: Store) -> None:
    tasks = [submit(store) for _ in range(3)]
    assert order(store, 3) == tasks
    assert next_(store) is None


def test_a_high_priority_overtakes_what_was_submitted_within_its_head_start(store: Store) -> None:
    low, normal, high = (
        submit(store, priority=priority) for priority in (Priority.LOW, Priority.NORMAL, Priority.HIGH)
    )
    assert order(store, 3) == [high, normal, low]


def test_a_priority_starves_nobody_it_only_counts_as_minutes_of_waiting() -> None:
    assert 0 < Priority.HIGH.head_start_s <= 1800
    assert -1800 <= Priority.LOW.head_start_s < 0


def test_an_account_with_a_thousand_waiting_does_not_keep_another_from_its_first(store: Store) -> None:
    many = [submit(store, "many") for _ in range(20)]
    few = [submit(store, "few") for _ in range(2)]
    assert order(store, 6) == [many[0], few[0], many[1], few[1], many[2], many[3]]


def test_what_was_begun_comes_before_what_is_new(store: Store) -> None:
    submit(store)
    begun = submit(store)
    claimed(store, begun, lease_s=EXPIRED)
    claim = next_(store)
    assert claim is not None and (claim.task.task_id, claim.attempt) == (begun, 2)


def test_an_account_never_has_more_tasks_running_than_it_may_however_many_claim_at_once(store: Store) -> None:
    for account_id in ("one", "two"):
        for _ in range(12):
            submit(store, account_id)
    claims = at_once(*[functools.partial(next_, store, running_max=3) for _ in range(16)])
    running = Counter(claim.account_id for claim in claims if claim is not None)
    assert running == {"one": 3, "two": 3}
    assert next_(store, running_max=3) is None


def test_many_that_claim_at_once_never_get_the_same_task(store: Store) -> None:
    tasks = {submit(store) for _ in range(12)}
    claims = at_once(*[functools.partial(next_, store) for _ in range(16)])
    taken = [claim.task.task_id for claim in claims if claim is not None]
    assert len(taken) == len(set(taken)) and set(taken) <= tasks
    taken += order(store, len(tasks) - len(taken))  # whoever found a row locked may have gone away with nothing
    assert set(taken) == tasks


def test_a_task_of_a_full_account_that_was_begun_is_taken_up_again(store: Store) -> None:
    begun = submit(store)
    claimed(store, begun, lease_s=EXPIRED)
    claim = next_(store, running_max=1)
    assert claim is not None and claim.task.task_id == begun


def test_a_cancelled_task_is_not_taken(store: Store) -> None:
    store.tasks.request_cancel(LOCAL_ACCOUNT, submit(store))
    assert next_(store) is None


def test_a_task_that_was_given_back_with_a_pause_is_left_alone_for_that_long(store: Store) -> None:
    task_id = submit(store)
    claim = claimed(store, task_id)
    store.tasks.release(task_id, claim.attempt, pause_s=30)
    assert next_(store) is None and not store.tasks.due(waited_s=0)
    store.tasks.release(task_id, claimed(store, task_id).attempt)
    assert next_(store) is not None


def test_a_task_that_poisons_its_workers_is_passed_over_for_the_next(store: Store) -> None:
    poison, other = submit(store), submit(store)
    for _ in range(3):
        claimed(store, poison, lease_s=EXPIRED)
    claim = next_(store)
    assert claim is not None and claim.task.task_id == other
    assert store.tasks.get(LOCAL_ACCOUNT, poison).status is TaskStatus.FAILED
    assert [task.task_id for task in store.backlog.overview().dead_letters] == [poison]


# -- places ----------------------------------------------------------------------------------------------------------


def in_a_sandbox_at(store: Store, place: str) -> str:
    claim = claimed(store, submit(store))
    store.tasks.begin_sandbox(claim.task.task_id, claim.attempt, nonce="nonce", provider="local", place=place)
    store.tasks.update(claim.task.task_id, claim.attempt, sandbox_id="sbx")
    store.tasks.release(claim.task.task_id, claim.attempt)
    return claim.task.task_id


def test_a_task_whose_sandbox_is_elsewhere_is_left_to_the_workers_there(store: Store) -> None:
    task_id = in_a_sandbox_at(store, "there")
    store.workers.report("w2", place="there", version="1", concurrency=1, swept=True)
    assert next_(store, place="here") is None
    claim = next_(store, place="there")
    assert claim is not None and (claim.task.task_id, claim.sandbox_place) == (task_id, "there")


def test_when_nobody_of_that_place_was_heard_of_for_long_another_may_end_the_task(store: Store) -> None:
    in_a_sandbox_at(store, "there")
    store.workers.report("w2", place="there", version="1", concurrency=1, swept=True)
    assert next_(store, place="here", patience_s=600) is None
    assert next_(store, place="here", patience_s=-1) is not None


# -- what people are told --------------------------------------------------------------------------------------------


def test_a_place_in_the_queue_counts_what_will_be_taken_before(store: Store) -> None:
    for _ in range(3):
        submit(store, "many")
    mine = submit(store)
    second = submit(store)
    place = store.backlog.place_of(LOCAL_ACCOUNT, mine)
    assert place is not None and place.position == 2  # the other account's first, and then this
    place = store.backlog.place_of(LOCAL_ACCOUNT, second)
    assert place is not None and place.position == 4
    taken = order(store, 4)
    assert (taken.index(mine), taken.index(second)) == (1, 3)
    assert store.backlog.place_of(LOCAL_ACCOUNT, mine) is None  # it runs
    with pytest.raises(TaskNotFound):
        store.backlog.place_of("many", mine)


def test_without_a_worker_nobody_is_told_when_a_task_starts(store: Store) -> None:
    place = store.backlog.place_of(LOCAL_ACCOUNT, submit(store))
    assert place is not None and place.starts_in_seconds is None and "none is running" in place.waiting_for


def test_an_estimate_comes_from_how_long_the_last_tasks_took_and_is_absent_without_any(store: Store) -> None:
    store.workers.report("w", place="here", version="1", concurrency=1, swept=False)
    running = claimed(store)
    task_id = submit(store)
    place = store.backlog.place_of(LOCAL_ACCOUNT, task_id)
    assert place is not None and place.starts_in_seconds == 0 and place.waiting_for == "a worker that is free"
    store.tasks.renew(running.task.task_id, 1, lease_s=60)
    assert len(store.workers.list()) == 1


def test_a_full_account_is_told_that_it_waits_for_its_own(store: Store) -> None:
    store.workers.report("w", place="here", version="1", concurrency=10, swept=False)
    claimed(store, submit(store))
    place = store.backlog.place_of(LOCAL_ACCOUNT, submit(store), running_max=1)
    assert place is not None and "it may have 1 running" in place.waiting_for


def test_the_overview_shows_what_waits_what_runs_where_and_the_last_sweep(store: Store) -> None:
    store.workers.report("w", place="here", version="7", concurrency=3, swept=True)
    running = claimed(store)
    store.tasks.follow(running.task.task_id, 1, [line()], log_offset=1, lease_s=60)
    ask(store, running.task.task_id, 1, None)
    submit(store)
    seen = store.backlog.overview()
    assert [(account.account_id, account.queued, account.running) for account in seen.accounts] == [
        (LOCAL_ACCOUNT, 1, 1)
    ]
    assert [(task.task_id, task.attempt, task.worker) for task in seen.running] == [(running.task.task_id, 1, "worker")]
    assert [(worker.name, worker.version, worker.concurrency) for worker in seen.workers] == [("w", "7", 3)]
    assert seen.last_sweep_at is not None and not seen.dead_letters
    store.workers.leave("w")
    assert not store.backlog.overview().workers
