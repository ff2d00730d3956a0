"""Connections, migrations and failures, on both databases."""

from __future__ import annotations

import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psycopg2
import pytest
from playhouse.schema_diff import diff_models  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

from cloudagent_storage.errors import CloudAgentError, DatabaseUnavailable
from cloudagent_storage.records import LOCAL_ACCOUNT
from cloudagent_storage.store import PATIENT, Store, database
from cloudagent_storage.store.change import change_held
from tests.support.postgres import PostgresServer
from tests.support.stored import EXPIRED, claimed, in_processes, line, messages, queued

MIGRATE = """
from cloudagent_storage.store import Store
store = Store.open(sys.argv[1])
ready()
store.migrate()
store.accounts.ensure("local")
print("ok")
store.close()
"""


@contextmanager
def locked_tasks(url: str) -> Generator[Callable[[], None]]:
    """Hold what a writer of tasks needs, from outside, until what is yielded is called."""
    if url.startswith("sqlite"):
        connection = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
    else:
        connection = psycopg2.connect(url)
        connection.cursor().execute("LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE")
    try:
        yield connection.rollback
    finally:
        connection.close()


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_processes_that_start_at_once_migrate_once(empty_url: str) -> None:
    assert in_processes(4, MIGRATE, [empty_url]) == ["ok"] * 4
    store = Store.open(empty_url)
    try:
        store.migrate()
        assert messages(store, queued(store)) == ["Queued."]
    finally:
        store.close()


def test_the_migrations_make_the_tables_that_the_code_works_with(store_url: str) -> None:
    opened = database.Database(store_url)
    with opened.reading():
        difference: object = diff_models(opened.tables.tasks._meta.database, opened.tables.all)  # pyright: ignore
    opened.close()
    assert not difference, str(difference)


def test_a_database_file_can_be_read_by_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "new.db"
    store = Store.open(f"sqlite:///{file}")
    store.migrate()
    store.accounts.ensure(LOCAL_ACCOUNT)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("new.db*")}
    store.close()
    modes.pop("new.db.migrate.lock")
    assert modes == {"new.db": 0o600, "new.db-wal": 0o600, "new.db-shm": 0o600}


def test_two_databases_in_one_process_do_not_mix(store: Store, tmp_path: Path) -> None:
    other = Store.open(f"sqlite:///{tmp_path / 'other.db'}")
    try:
        other.migrate()
        other.accounts.ensure(LOCAL_ACCOUNT)
        task_id = queued(store)
        assert store.tasks.unfinished() == 1
        assert other.tasks.unfinished() == 0
        assert queued(other) != task_id
    finally:
        other.close()


@pytest.mark.parametrize(
    "url",
    [
        "mysql://user:hunter2@host/db",
        "hunter2",
        "",
        "sqlite:relative.db",
        "postgresql://user:hunter2@host:notaport:5/db?x",
        "postgresql://user:hunter2@[host/db",
    ],
)
def test_an_address_that_is_none_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(DatabaseUnavailable) as caught:
        Store.open(url).check()
    assert "hunter2" not in str(caught.value.as_dict())


def test_a_database_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for url in (f"sqlite:///{tmp_path / 'file' / 'store.db'}", "postgresql://user:hunter2@127.0.0.1:9/store"):
        store = Store.open(url)
        calls: list[Callable[[], object]] = [store.check, store.migrate, lambda: queued(store)]  # noqa: B023
        for call in calls:
            with pytest.raises(DatabaseUnavailable) as caught:
                call()
            assert "hunter2" not in str(caught.value)
        store.close()


def test_a_file_that_is_no_database_is_unavailable(tmp_path: Path) -> None:
    file = tmp_path / "store.db"
    file.write_bytes(b"not a database" * 1000)
    store = Store.open(f"sqlite:///{file}")
    for call in (store.tasks.unfinished, store.migrate):
        with pytest.raises(DatabaseUnavailable):
            call()
    store.close()


def test_a_writer_who_waits_too_long_for_another_is_told(store_url: str) -> None:
    store = Store.open(store_url, patience=replace(PATIENT, lock_s=1))
    task_id = queued(store)
    with locked_tasks(store_url) as unlock:
        with pytest.raises(DatabaseUnavailable):
            store.events.add(task_id, line())
        unlock()
        store.events.add(task_id, line("after"))
    assert messages(store, task_id) == ["Queued.", "after"]
    store.close()


def test_a_pool_without_a_free_connection_is_unavailable_and_recovers(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "CONNECTIONS", 1)
    store = Store.open(store_url, patience=replace(PATIENT, pool_s=1, lock_s=1))
    task_id = queued(store)
    answers: list[CloudAgentError | None] = []

    def write() -> None:
        try:
            store.events.add(task_id, line("waited"))
            answers.append(None)
        except CloudAgentError as error:
            answers.append(error)

    with locked_tasks(store_url) as unlock:
        threads = [threading.Thread(target=write) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: answers)
        unlock()
        for thread in threads:
            thread.join()
    assert any(isinstance(answer, DatabaseUnavailable) for answer in answers)
    assert messages(store, task_id) == ["Queued.", *["waited"] * answers.count(None)]
    store.check()
    store.close()


def test_many_threads_share_few_connections(store: Store) -> None:
    task_id = queued(store)
    threads = [threading.Thread(target=store.events.add, args=(task_id, line())) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(messages(store, task_id)) == 61


def test_a_store_connects_again_after_the_server_dropped_its_connections(
    postgres: PostgresServer, postgres_url: str
) -> None:
    store = Store.open(postgres_url)
    store.migrate()
    store.accounts.ensure(LOCAL_ACCOUNT)
    claim = claimed(store)
    name = postgres_url.rpartition("/")[2]
    drop = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
    assert postgres.execute(drop)
    store.tasks.renew(claim.task.task_id, claim.attempt, lease_s=60)
    store.close()


def test_a_connection_that_is_dropped_in_a_transaction_leaves_nothing_behind(
    postgres: PostgresServer, postgres_url: str
) -> None:
    store = Store.open(postgres_url)
    store.migrate()
    store.accounts.ensure(LOCAL_ACCOUNT)
    task_id = queued(store)
    waiting = "wait_event_type = 'Lock'"
    failures: list[CloudAgentError] = []
    recovered: list[str] = []

    def write() -> None:
        try:
            store.events.add(task_id, line("lost"))
        except CloudAgentError as error:
            failures.append(error)
        # The same thread again: nothing of the broken transaction may stick to it.
        store.events.add(task_id, line("kept"))
        recovered.extend(messages(store, task_id))

    thread = threading.Thread(target=write)
    with locked_tasks(postgres_url) as unlock:
        thread.start()
        until(lambda: postgres.execute(f"SELECT 1 FROM pg_stat_activity WHERE {waiting}"))
        assert postgres.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {waiting}")
        until(lambda: failures)
        unlock()
    thread.join()
    assert [type(failure) for failure in failures] == [DatabaseUnavailable]
    assert recovered == ["Queued.", "kept"]
    store.close()


def test_a_writer_that_stops_in_a_transaction_does_not_keep_its_row(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "idle_in_transaction_session_timeout" in database.SERVER_SETTINGS
    monkeypatch.setitem(database.SERVER_SETTINGS, "idle_in_transaction_session_timeout", "1s")
    stopped = database.Database(postgres_url)
    store = Store.open(postgres_url)
    store.migrate()
    store.accounts.ensure(LOCAL_ACCOUNT)
    claim = claimed(store, lease_s=EXPIRED)
    written, go_on = threading.Event(), threading.Event()
    failures: list[CloudAgentError] = []

    def write_and_stop() -> None:
        try:
            with stopped.writing():
                change_held(stopped, claim.task.task_id, claim.attempt, lines=[line("lost")])
                written.set()
                go_on.wait()
        except CloudAgentError as error:
            failures.append(error)

    thread = threading.Thread(target=write_and_stop)
    thread.start()
    written.wait()
    assert claimed(store, claim.task.task_id).attempt == 2
    go_on.set()
    thread.join()
    assert [type(failure) for failure in failures] == [DatabaseUnavailable]
    assert messages(store, claim.task.task_id) == ["Queued."]
    stopped.close()
    store.close()


def test_a_closed_store_leaves_no_connection(postgres: PostgresServer, postgres_url: str) -> None:
    store = Store.open(postgres_url)
    store.check()
    name = postgres_url.rpartition("/")[2]
    sql = f"SELECT pid FROM pg_stat_activity WHERE datname = '{name}'"
    assert postgres.execute(sql)
    store.close()
    until(lambda: not postgres.execute(sql))
    store.check()
    store.close()
