"""A submit that is sent again is the same submit, however often and from however many places at once."""

from __future__ import annotations

import threading

import pytest

from cloudagent_storage.errors import CloudAgentError, IdempotencyMismatch
from cloudagent_storage.records import LOCAL_ACCOUNT, EventDraft, Idempotency, TaskSpec
from cloudagent_storage.store import Store

SPEC = TaskSpec(prompt="x", title="x")
ONCE = Idempotency(key="once", digest="d1")
QUEUED = EventDraft(kind="status", message="Queued.")


def test_the_same_key_and_arguments_are_the_same_task_kept_once(store: Store) -> None:
    first = store.tasks.add(LOCAL_ACCOUNT, SPEC, idempotency=ONCE, lines=[QUEUED], blobs={"input": b"bundle"})
    again = store.tasks.add(LOCAL_ACCOUNT, SPEC, idempotency=ONCE, lines=[QUEUED], blobs={"input": b"other"})
    assert again == first == store.tasks.replay(LOCAL_ACCOUNT, ONCE)
    assert store.tasks.list(LOCAL_ACCOUNT).total == 1
    assert len(store.events.list(LOCAL_ACCOUNT, first.task_id).lines) == 1
    assert store.blobs.get(LOCAL_ACCOUNT, first.task_id, "input") == b"bundle"


def test_the_same_key_with_other_arguments_is_an_error_and_keeps_nothing(store: Store) -> None:
    store.tasks.add(LOCAL_ACCOUNT, SPEC, idempotency=ONCE)
    other = Idempotency(key="once", digest="d2")
    with pytest.raises(IdempotencyMismatch):
        store.tasks.replay(LOCAL_ACCOUNT, other)
    with pytest.raises(IdempotencyMismatch):
        store.tasks.add(LOCAL_ACCOUNT, SPEC, idempotency=other)
    assert store.tasks.list(LOCAL_ACCOUNT).total == 1


def test_a_key_belongs_to_its_account_and_tasks_without_one_are_all_different(store: Store) -> None:
    store.accounts.ensure("another")
    mine = store.tasks.add(LOCAL_ACCOUNT, SPEC, idempotency=ONCE)
    assert store.tasks.replay("another", ONCE) is None
    theirs = store.tasks.add("another", SPEC, idempotency=Idempotency(key="once", digest="d2"))
    plain = {store.tasks.add(LOCAL_ACCOUNT, SPEC).task_id for _ in range(3)}
    assert len({mine.task_id, theirs.task_id} | plain) == 5


def test_a_hundred_racing_submits_with_one_key_are_one_task(store: Store, store_url: str) -> None:
    other = Store.open(store_url)
    start = threading.Barrier(20)
    seen: list[str] = []
    failed: list[CloudAgentError] = []

    def submit(number: int) -> None:
        start.wait(20)
        for _ in range(5):
            try:
                task = (store, other)[number % 2].tasks.add(LOCAL_ACCOUNT, SPEC, idempotency=ONCE, lines=[QUEUED])
                seen.append(task.task_id)
            except CloudAgentError as error:
                failed.append(error)

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    other.close()
    assert not failed
    assert len(seen) == 100 and len(set(seen)) == 1
    assert store.tasks.list(LOCAL_ACCOUNT).total == 1
    assert len(store.events.list(LOCAL_ACCOUNT, seen[0]).lines) == 1
