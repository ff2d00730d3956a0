"""What is kept of finished tasks, and what is pruned, on both databases."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloudagent_storage.errors import StorageFull, TaskExpired, TaskNotFound
from cloudagent_storage.records import LOCAL_ACCOUNT, Idempotency, TaskSpec, TaskStatus
from cloudagent_storage.store import Store, retention
from tests.support.stored import at_once, claimed, execute, line, messages, queued

SPEC = TaskSpec(prompt="x", title="x")
HOUR = 3600.0
DAY = 24 * HOUR


def finished(store: Store, *, size: int = 1000, lines: int = 3) -> str:
    """A completed task with a log and two blobs, which no compression makes smaller."""
    claim = claimed(store)
    task_id = claim.task.task_id
    data = bytes(range(256)) * 8
    store.blobs.put(task_id, "result", incompressible(size), attempt=claim.attempt)
    store.blobs.put(task_id, "diff", data, attempt=claim.attempt)
    store.events.add(task_id, *[line(f"line {number}") for number in range(lines)], attempt=claim.attempt)
    store.tasks.finish(task_id, claim.attempt, status=TaskStatus.COMPLETED)
    return task_id


def incompressible(size: int) -> bytes:
    import random

    return random.Random(7).randbytes(size)


def aged(url: str, task_id: str, days: int) -> None:
    """Make a task that old."""
    date = f"200{days % 10}-01-01 00:00:00.000" if days >= 1000 else None
    moment = f"'{date}'" if date else _ago(url, days)
    execute(url, f"UPDATE tasks SET completed_at = {moment}, created_at = {moment} WHERE task_id = '{task_id}'")


def _ago(url: str, days: int) -> str:
    if url.startswith("sqlite"):
        return f"strftime('%Y-%m-%d %H:%M:%f', 'now', '-{days} days')"
    return f"now() - interval '{days} days'"


def expired(store: Store, *task_ids: str) -> list[bool]:
    return [store.tasks.get(LOCAL_ACCOUNT, task_id).expired_at is not None for task_id in task_ids]


def rows_of(url: str, task_id: str) -> int:
    """How many rows of other tables belong to a task."""
    return sum(
        int(str(execute(url, f"SELECT count(*) FROM {table} WHERE task_id = '{task_id}'")[0][0]))
        for table in ("events", "blobs", "messages")
    )


def test_what_ended_too_long_ago_is_pruned_and_the_task_itself_stays(store: Store, store_url: str) -> None:
    old, new = finished(store), finished(store)
    aged(store_url, old, 91)
    aged(store_url, new, 89)
    assert store.retention.prune(max_age_s=90 * DAY, max_bytes=None) == 1
    assert expired(store, old, new) == [True, False]
    task = store.tasks.get(LOCAL_ACCOUNT, old)
    assert task.status is TaskStatus.COMPLETED and task.prompt == "Fix the bug."
    assert rows_of(store_url, old) == 0
    assert store.events.tail(LOCAL_ACCOUNT, old, 5).lines == ()
    for read in (
        lambda: store.events.list(LOCAL_ACCOUNT, old),
        lambda: store.blobs.get(LOCAL_ACCOUNT, old, "diff"),
        lambda: store.blobs.get(LOCAL_ACCOUNT, old, "input"),
    ):
        with pytest.raises(TaskExpired):
            read()
    assert len(messages(store, new)) == 4
    assert store.blobs.get(LOCAL_ACCOUNT, new, "result") == incompressible(1000)
    assert store.retention.prune(max_age_s=90 * DAY, max_bytes=None) == 0


def test_only_its_owner_learns_that_a_task_has_expired(store: Store, store_url: str) -> None:
    store.accounts.ensure("other")
    old = finished(store)
    store.retention.prune(max_age_s=0, max_bytes=None)
    for read in (lambda: store.events.list("other", old), lambda: store.blobs.get("other", old, "diff")):
        with pytest.raises(TaskNotFound):
            read()


def test_the_oldest_go_first_until_the_account_is_under_its_size(store: Store, store_url: str) -> None:
    tasks = [finished(store, size=100_000) for _ in range(5)]
    for days, task_id in zip((10, 50, 30, 20, 40), tasks, strict=True):
        aged(store_url, task_id, days)
    assert store.retention.prune(max_age_s=None, max_bytes=220_000) == 3
    assert expired(store, *tasks) == [False, True, True, False, True]
    assert store.retention.prune(max_age_s=None, max_bytes=220_000) == 0


def test_each_account_has_a_size_of_its_own(store: Store, store_url: str) -> None:
    store.accounts.ensure("other")
    theirs = store.tasks.add("other", SPEC, blobs={"input": incompressible(50_000)}).task_id
    claim = claimed(store, theirs)
    store.tasks.finish(theirs, claim.attempt, status=TaskStatus.FAILED)
    mine = finished(store, size=200_000)
    assert store.retention.prune(max_age_s=None, max_bytes=100_000) == 1
    assert expired(store, mine) == [True]
    assert store.tasks.get("other", theirs).expired_at is None


def test_what_has_not_ended_is_never_touched(store: Store, store_url: str) -> None:
    running, waiting = claimed(store).task.task_id, queued(store)
    store.blobs.put(running, "input", incompressible(50_000), attempt=1)
    for task_id in (running, waiting):
        execute(store_url, f"UPDATE tasks SET created_at = '2001-01-01 00:00:00.000' WHERE task_id = '{task_id}'")
    assert store.retention.prune(max_age_s=0, max_bytes=1) == 0
    assert store.blobs.get(LOCAL_ACCOUNT, running, "input") == incompressible(50_000)
    assert messages(store, waiting) == ["Queued."]


def test_no_limits_keep_everything(store: Store, store_url: str) -> None:
    old = finished(store)
    aged(store_url, old, 5000)
    assert store.retention.prune(max_age_s=None, max_bytes=None) == 0
    assert len(messages(store, old)) == 4


def test_a_long_log_is_deleted_in_small_steps_and_a_crash_between_two_is_made_up_for(
    store: Store, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "LINES_AT_ONCE", 10)
    old = finished(store, lines=95)
    asked = iter(range(8))
    assert store.retention.prune(max_age_s=0, max_bytes=None, go_on=lambda: next(asked, None) is not None) == 1
    left = rows_of(store_url, old)
    assert 0 < left < 98
    with pytest.raises(TaskExpired):
        store.events.list(LOCAL_ACCOUNT, old)
    assert store.retention.prune(max_age_s=None, max_bytes=None) == 0
    assert rows_of(store_url, old) == 0


def test_many_who_prune_at_once_expire_no_more_than_one_would(store_url: str) -> None:
    stores = [Store.open(store_url) for _ in range(4)]
    tasks = [finished(stores[0], size=50_000) for _ in range(60)]
    at_once(*[lambda store=store: store.retention.prune(max_age_s=None, max_bytes=20 * 51_000) for store in stores])
    kept = [task_id for task_id, gone in zip(tasks, expired(stores[0], *tasks), strict=True) if not gone]
    assert kept == tasks[40:]
    for store in stores:
        store.retention.prune(max_age_s=None, max_bytes=None)
        store.close()
    assert sum(rows_of(store_url, task_id) for task_id in tasks[:40]) == 0


def test_an_idempotency_key_is_forgotten_after_a_week(store: Store, store_url: str) -> None:
    key = Idempotency(key="k", digest="d")
    first, other = store.tasks.add(LOCAL_ACCOUNT, SPEC, idempotency=key).task_id, queued(store)
    aged(store_url, first, 6)
    store.retention.prune(max_age_s=None, max_bytes=None)
    assert store.tasks.add(LOCAL_ACCOUNT, SPEC, idempotency=key).task_id == first
    aged(store_url, first, 8)
    store.retention.prune(max_age_s=None, max_bytes=None)
    assert store.tasks.add(LOCAL_ACCOUNT, SPEC, idempotency=key).task_id not in (first, other)


def test_a_file_gives_back_to_the_disk_what_was_deleted(tmp_path: Path) -> None:
    file = tmp_path / "store.db"
    store = Store.open(f"sqlite:///{file}")
    store.migrate()
    store.accounts.ensure(LOCAL_ACCOUNT)
    for _ in range(4):
        finished(store, size=2_000_000)
    execute(f"sqlite:///{file}", "PRAGMA wal_checkpoint(TRUNCATE)")
    before = file.stat().st_size
    store.retention.prune(max_age_s=0, max_bytes=None)
    execute(f"sqlite:///{file}", "PRAGMA wal_checkpoint(TRUNCATE)")
    assert before > 8_000_000 and file.stat().st_size < 1_000_000
    assert execute(f"sqlite:///{file}", "PRAGMA integrity_check") == [("ok",)]
    store.close()


def test_a_full_database_refuses_new_tasks_and_loses_nothing(tmp_path: Path) -> None:
    """SQLite's own limit of pages is the real engine's "database or disk is full", for whoever runs this test."""
    store = Store.open(f"sqlite:///{tmp_path / 'store.db'}")
    store.migrate()
    store.accounts.ensure(LOCAL_ACCOUNT)
    store.keep_reserve()
    reserve = tmp_path / "reserve"
    assert reserve.stat().st_blocks * 512 >= 60_000_000
    kept = finished(store)
    limit_pages(store, extra=20)
    with pytest.raises(StorageFull) as refused:
        for _ in range(100):
            store.tasks.add(LOCAL_ACCOUNT, SPEC, blobs={"input": incompressible(50_000)})
    assert refused.value.code == "storage_full" and "RETENTION_MB" in refused.value.remedy
    assert reserve.stat().st_size == 0
    assert len(messages(store, kept)) == 4
    limit_pages(store, extra=10_000)
    assert store.tasks.get(LOCAL_ACCOUNT, queued(store)).status is TaskStatus.QUEUED
    assert reserve.stat().st_size == 64_000_000
    assert execute(f"sqlite:///{tmp_path / 'store.db'}", "PRAGMA integrity_check") == [("ok",)]
    store.close()


def limit_pages(store: Store, *, extra: int) -> None:
    """Let the file grow by so many pages. It holds for a connection, and one thread has always the same."""
    database = store._database  # pyright: ignore[reportPrivateUsage]
    with database.reading():
        run = database._peewee.execute_sql  # pyright: ignore
        ((pages,),) = run("PRAGMA page_count").fetchall()
        run(f"PRAGMA max_page_count = {pages + extra}").fetchall()
