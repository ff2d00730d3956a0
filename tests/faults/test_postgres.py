"""Postgres that dies and comes back, is locked, is full or cuts its clients off: the truth is late, never another."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import psycopg2
import pytest

from cloudagent_storage.errors import DatabaseUnavailable
from tests.support.installation import FAST, Installation
from tests.support.postgres import PostgresServer
from tests.support.worlds import until

PATIENT = replace(FAST, lease_s=10.0, let_go_s=8.0)
"""A lease that outlives the restart of a server on a busy machine."""
LOCK_S = 15.0
"""A call waits ten seconds for a lock, and then says so."""
CUT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}' AND pid <> pg_backend_pid()"


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A Postgres that a test may end, and that keeps what is committed."""
    server = PostgresServer(synchronous_commit="on", max_connections="40")
    yield server
    server.stop()


def submit_somehow(installation: Installation, key: str, *, steps: int) -> str:
    """Submit as a client does that repeats a refused call with the same key; the task's id."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return installation.submit(steps=steps, idempotency_key=key)
        except DatabaseUnavailable:
            assert time.monotonic() < deadline, "no submit was accepted"
            time.sleep(0.2)


def test_after_a_restart_of_postgres_tasks_are_followed_again_before_their_leases_could_run_out(
    make_installation: Callable[..., Installation], server: PostgresServer, valkey_url: str
) -> None:
    installation = make_installation(database=server.url(server.create_database()), queue=valkey_url, timers=PATIENT)
    worker = installation.start_worker()
    tasks = installation.submit_many(3, steps=60, step_s=0.1)
    for task in tasks:
        installation.await_calls(task, 3)
    began = time.monotonic()
    server.go_down()
    with pytest.raises(DatabaseUnavailable):
        installation.submit(steps=1)
    until(lambda: worker.log().count("has to wait: The database does not answer") == 3, "every attempt is interrupted")
    calls = [installation.calls(task) for task in tasks]
    until(lambda: all(map(lambda t, n: installation.calls(t) > n, tasks, calls)), "agents go on")
    server.come_back()
    until(lambda: [installation.attempts(task) for task in tasks] == [2] * 3, "every task is adopted")
    assert time.monotonic() - began < PATIENT.lease_s - PATIENT.heartbeat_s
    installation.conclude()
    assert [installation.column(task, "lost_leases") for task in tasks] == [0] * 3


@pytest.mark.full
def test_tasks_outlive_a_postgres_that_is_down_for_longer_than_their_leases(
    make_installation: Callable[..., Installation], server: PostgresServer, valkey_url: str
) -> None:
    installation = make_installation(database=server.url(server.create_database()), queue=valkey_url)
    worker = installation.start_worker()
    tasks = installation.submit_many(2, steps=100, step_s=0.1)
    short = installation.submit(steps=10)
    for task in [*tasks, short]:
        installation.await_calls(task, 3)
    before = [installation.calls(task) for task in tasks]
    server.go_down()
    time.sleep(installation.timers.lease_s + 2)
    assert worker.log().count("has to wait: The database does not answer") == 3
    assert all(map(lambda t, n: installation.calls(t) > n + 20, tasks, before)), "the agents live on"
    assert installation.journal(short, "end"), "and end by themselves"
    server.come_back()
    installation.conclude()
    assert [len(installation.journal(task, "start")) for task in tasks] == [1] * 2
    assert all(installation.attempts(task) >= 2 for task in tasks)


def test_no_task_is_lost_while_every_connection_is_cut_again_and_again(
    make_installation: Callable[..., Installation], server: PostgresServer, valkey_url: str
) -> None:
    name = server.create_database()
    installation = make_installation(database=server.url(name), queue=valkey_url)
    installation.start_worker(concurrency=8)
    running = installation.submit_many(3, steps=60, step_s=0.1)
    for task in running:
        installation.await_calls(task, 2)
    cut = 0
    during: list[str] = []
    for turn in range(8):
        cut += len(server.execute(CUT.format(name=name)))
        during.append(submit_somehow(installation, f"turn {turn}", steps=4))
        time.sleep(0.6)
    assert cut >= 8
    installation.conclude()
    assert len(set(during)) == 8
    assert len(installation.tasks()) == len(running) + len(during)


@pytest.mark.full
def test_a_table_that_is_locked_for_long_bounds_every_call_and_loses_no_task(
    make_installation: Callable[..., Installation], server: PostgresServer, valkey_url: str
) -> None:
    installation = make_installation(database=server.url(server.create_database()), queue=valkey_url)
    installation.start_worker()
    tasks = installation.submit_many(2, steps=60, step_s=0.1)
    for task in tasks:
        installation.await_calls(task, 2)
    before = [installation.calls(task) for task in tasks]
    with contextlib.closing(psycopg2.connect(installation.database_url)) as holder:
        with holder.cursor() as cursor:
            cursor.execute("LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE")
        for call, arguments in (("submit_task", installation.arguments({"steps": 1}, {})), ("list_tasks", {})):
            with installation.client() as client:
                began = time.monotonic()
                with pytest.raises(DatabaseUnavailable):
                    client.call(call, **arguments)
                assert time.monotonic() - began < LOCK_S, call
        assert all(map(lambda t, n: installation.calls(t) > n + 20, tasks, before)), "the agents live on"
    installation.conclude()
    assert len(installation.tasks()) == len(tasks), "what was refused is not there"


@pytest.mark.full
def test_a_postgres_without_a_free_connection_refuses_submits_and_keeps_leases(
    make_installation: Callable[..., Installation], server: PostgresServer, valkey_url: str
) -> None:
    installation = make_installation(database=server.url(server.create_database()), queue=valkey_url)
    installation.start_worker()
    tasks = installation.submit_many(3, steps=60, step_s=0.1)
    for task in tasks:
        installation.await_calls(task, 10)
    with contextlib.ExitStack() as stack:
        with pytest.raises(psycopg2.OperationalError, match="too many clients"):
            for _ in range(200):
                stack.enter_context(contextlib.closing(psycopg2.connect(installation.database_url)))
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailable):
            installation.submit(steps=1)
        assert time.monotonic() - began < 5
        time.sleep(installation.timers.lease_s + 1)
    installation.conclude()
    assert [installation.column(task, "lost_leases") for task in tasks] == [0] * 3
