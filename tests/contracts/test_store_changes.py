"""Whoever waits for a task is told at once when it changes."""

from __future__ import annotations

import threading
import time

from cloudagent_storage.records import LOCAL_ACCOUNT, TaskStatus
from cloudagent_storage.store import Store
from tests.support.stored import claimed, line, queued
from tests.support.worlds import until


def told(event: threading.Event) -> float:
    """Seconds until the event is set; cleared for the next."""
    started = time.monotonic()
    assert event.wait(10), "nobody was told"
    event.clear()
    return time.monotonic() - started


def test_a_change_of_another_process_is_told_to_whoever_waits(store: Store, store_url: str) -> None:
    task_id = queued(store)
    elsewhere = Store.open(store_url)
    changed = threading.Event()
    try:
        with store.changes.watch([task_id], changed.set):
            told(changed)  # whatever came before it listened
            claim = claimed(elsewhere, task_id)
            told(changed)
            elsewhere.events.add(task_id, line(), attempt=claim.attempt)
            told(changed)
            elsewhere.tasks.request_cancel(LOCAL_ACCOUNT, task_id)
            told(changed)
            elsewhere.tasks.finish(task_id, claim.attempt, status=TaskStatus.CANCELLED)
            told(changed)
            assert store.changes.prompt
    finally:
        elsewhere.close()


def test_a_change_of_this_very_process_is_told_as_well(store: Store) -> None:
    task_id = queued(store)
    changed = threading.Event()
    with store.changes.watch([task_id], changed.set):
        told(changed)
        claimed(store, task_id)
        told(changed)


def test_whoever_has_left_is_told_nothing_and_another_still_is(store: Store) -> None:
    task_id = queued(store)
    left, stays = threading.Event(), threading.Event()
    with store.changes.watch([task_id], stays.set):
        told(stays)  # from here on it listens
        with store.changes.watch([task_id], left.set):
            store.events.add(task_id, line())
            told(left)
        told(stays)
        left.clear()
        claimed(store, task_id)
        told(stays)
        assert not left.is_set()


def test_after_a_close_it_listens_again_for_whoever_comes(store: Store) -> None:
    task_id = queued(store)
    for _ in range(2):
        changed = threading.Event()
        with store.changes.watch([task_id], changed.set):
            told(changed)
        store.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "changes"]


def test_it_listens_again_after_the_connection_was_cut(postgres_url: str) -> None:
    store = Store.open(postgres_url)
    store.migrate()
    store.accounts.ensure(LOCAL_ACCOUNT)
    task_id = queued(store)
    changed = threading.Event()
    try:
        with store.changes.watch([task_id], changed.set):
            told(changed)
            import psycopg2

            other = psycopg2.connect(postgres_url)
            with other.cursor() as cursor:
                cursor.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND query LIKE 'LISTEN%'"
                )
                assert cursor.fetchall() == [(True,)]
            other.close()
            told(changed)  # something may have been missed
            until(lambda: store.changes.prompt, "it listens again")
            claimed(store, task_id)
            told(changed)
    finally:
        store.close()
