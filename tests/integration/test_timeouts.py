"""Nothing waits for ever: a Redis or a Postgres that hangs, is gone, or has no room, as callers and workers see it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx2
import psutil
import psycopg2
import pytest

from cloudagent_mcp.operations import THREADS
from cloudagent_mcp.worker import work
from cloudagent_queue.task_queue import TaskQueue
from cloudagent_storage.errors import CloudAgentError, DatabaseBusy, DatabaseUnavailable, QueueUnavailable
from cloudagent_storage.records import LOCAL_ACCOUNT
from cloudagent_storage.store import BRIEF, CONNECTIONS, Store
from tests.support.postgres import PostgresServer
from tests.support.proxy import Proxy
from tests.support.stored import claimed, line, messages, queued
from tests.support.valkey import ValkeyServer
from tests.support.worlds import World, until

MANY = 60
"""More than a process has threads for."""
KEY = "a-key-for-the-tests"


@pytest.fixture
def redis_proxy(valkey: ValkeyServer) -> Iterator[Proxy]:
    valkey.flush()
    with Proxy(valkey.port) as proxy:
        yield proxy


@pytest.fixture
def database(store_url: str, request: pytest.FixtureRequest) -> Iterator[tuple[Proxy, str]]:
    """A proxy in front of a migrated Postgres database, and the address that goes through it."""
    server: PostgresServer = request.getfixturevalue("postgres")
    with Proxy(server.port) as proxy:
        yield proxy, store_url.replace(f":{server.port}/", f":{proxy.port}/")


on_postgres = pytest.mark.parametrize("store_url", ["postgres"], indirect=True)


def redis_url(proxy: Proxy) -> str:
    return f"redis://127.0.0.1:{proxy.port}/0"


def outcome(call: Callable[[], object]) -> tuple[float, CloudAgentError | None]:
    """How long a call took, and the error that it raised."""
    started = time.monotonic()
    try:
        call()
        return time.monotonic() - started, None
    except CloudAgentError as error:
        return time.monotonic() - started, error


def outcomes(call: Callable[[], object], count: int) -> list[tuple[float, CloudAgentError | None]]:
    """The same for many at once, each on a thread of its own."""
    with ThreadPoolExecutor(count) as pool:
        return [future.result() for future in [pool.submit(outcome, call) for _ in range(count)]]


# -- Redis -------------------------------------------------------------------------------------------------------------


def test_a_ring_for_a_redis_that_hangs_fails_in_two_seconds_and_the_next_ones_at_once(redis_proxy: Proxy) -> None:
    queue = TaskQueue(redis_url(redis_proxy))
    queue.put("task_before")
    redis_proxy.mode = "blackhole"
    took, error = outcome(lambda: queue.put("task_x"))
    assert isinstance(error, QueueUnavailable) and took < 4
    assert redis_proxy.swallowed
    for _ in range(20):
        took, error = outcome(lambda: queue.put("task_y"))
        assert isinstance(error, QueueUnavailable) and took < 0.5
    took, error = outcome(queue.check)
    assert isinstance(error, QueueUnavailable) and took < 6
    redis_proxy.mode = "pass"
    until(lambda: outcome(lambda: queue.put("task_after"))[1] is None, "it rings again")
    queue.close()


def test_a_worker_learns_at_its_start_that_redis_hangs(redis_proxy: Proxy) -> None:
    redis_proxy.mode = "blackhole"
    queue = TaskQueue(redis_url(redis_proxy))
    took, error = outcome(queue.check)
    assert isinstance(error, QueueUnavailable) and took < 6
    queue.close()


@pytest.mark.parametrize("fault", ["blackhole", "refuse"])
def test_a_consumer_goes_on_when_redis_is_back(redis_proxy: Proxy, valkey: ValkeyServer, fault: str) -> None:
    consuming, putting = TaskQueue(redis_url(redis_proxy)), TaskQueue(valkey.url)
    seen: list[str] = []
    stopping = threading.Event()
    consumer = threading.Thread(
        target=lambda: consuming.consume(seen.append, concurrency=3, stopping=stopping, grace_s=5)
    )
    consumer.start()
    putting.put("task_before")
    until(lambda: seen == ["task_before"], "it consumes")
    redis_proxy.mode = fault
    if fault == "blackhole":
        until(lambda: redis_proxy.swallowed, "the fault is felt")
    else:
        until(lambda: redis_proxy.connections, "it was connected")
    redis_proxy.mode = "pass"
    # A message that Redis had handed over inside the black hole is lost for good: that is what the sweeper is for.
    until(lambda: putting.put("task_after") or "task_after" in seen, "it consumes again")
    stopping.set()
    consumer.join(15)
    assert not consumer.is_alive()
    for queue in (consuming, putting):
        queue.close()


def test_submits_stay_fast_while_redis_hangs(world: World, redis_proxy: Proxy) -> None:
    world.environment["REDIS_URL"] = redis_url(redis_proxy)
    with world.client() as client:
        client.call("submit_task", prompt="x", repository="none")
        redis_proxy.mode = "blackhole"
        results = outcomes(lambda: client.call("submit_task", prompt="x", repository="none"), 12)
        results += [outcome(lambda: client.call("submit_task", prompt="x", repository="none")) for _ in range(20)]
        assert [error for _, error in results] == [None] * 32
        assert max(took for took, _ in results) < 4 and sorted(took for took, _ in results)[20] < 2.5
    assert redis_proxy.swallowed
    assert world.app().store.tasks.unfinished() == 33


# -- Postgres ----------------------------------------------------------------------------------------------------------


@on_postgres
def test_calls_on_a_postgres_that_hangs_end_and_go_on_when_it_is_back(database: tuple[Proxy, str]) -> None:
    proxy, url = database
    store = Store.open(url, patience=BRIEF)
    task_id = queued(store)
    assert [error for _, error in outcomes(lambda: store.tasks.get(LOCAL_ACCOUNT, task_id), CONNECTIONS)] == (
        [None] * CONNECTIONS
    )
    proxy.mode = "blackhole"
    results = outcomes(lambda: store.tasks.get(LOCAL_ACCOUNT, task_id), MANY)
    assert all(isinstance(error, DatabaseUnavailable) for _, error in results)
    assert max(took for took, _ in results) < 10
    assert proxy.swallowed
    proxy.mode = "pass"
    until(lambda: outcome(store.check)[1] is None, "it answers again")
    assert messages(store, task_id) == ["Queued."]
    store.close()


@on_postgres
def test_a_connection_that_falls_silent_in_the_middle_of_a_statement_is_given_up(
    database: tuple[Proxy, str], store_url: str
) -> None:
    proxy, url = database
    store = Store.open(url, patience=BRIEF)
    task_id = queued(store)
    with locked_tasks(store_url):
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(outcome, lambda: store.tasks.get(LOCAL_ACCOUNT, task_id))
            until(lambda: waiting_for_locks(store_url), "it waits in the server")
            proxy.mode = "blackhole"
            took, error = asked.result(30)
    assert isinstance(error, DatabaseUnavailable) and took < 10
    store.close()


@on_postgres
def test_nobody_waits_in_a_line_for_a_postgres_that_cannot_be_connected_to(database: tuple[Proxy, str]) -> None:
    proxy, url = database
    proxy.mode = "blackhole"
    store = Store.open(url, patience=BRIEF)
    results = outcomes(store.check, MANY)
    assert all(isinstance(error, DatabaseUnavailable) for _, error in results)
    assert max(took for took, _ in results) < 10
    assert proxy.connections >= 1
    proxy.mode = "pass"
    until(lambda: outcome(store.check)[1] is None, "it answers again")
    store.close()


@on_postgres
def test_a_locked_table_holds_up_a_call_for_seconds_only(store_url: str) -> None:
    store = Store.open(store_url, patience=BRIEF)
    task_id = queued(store)
    with locked_tasks(store_url):
        calls = (lambda: store.tasks.get(LOCAL_ACCOUNT, task_id), lambda: queued(store))
        for took, error in [outcome(call) for call in calls]:
            assert isinstance(error, DatabaseUnavailable) and took < 8
    assert outcome(store.check)[1] is None
    store.close()


def test_a_postgres_without_connections_says_so_at_once_and_workers_keep_theirs(postgres: PostgresServer) -> None:
    postgres.execute("CREATE ROLE few LOGIN CONNECTION LIMIT 2")
    name = postgres.create_database()
    postgres.execute(f"ALTER DATABASE {name} OWNER TO few")
    postgres.execute("GRANT ALL ON SCHEMA public TO few", database=name)
    url = postgres.url(name).replace("postgres@", "few@")
    worker = Store.open(url)
    worker.migrate()
    worker.accounts.ensure(LOCAL_ACCOUNT)
    claim = claimed(worker)
    task_id = claim.task.task_id
    taken = psycopg2.connect(url)
    late = Store.open(url, patience=BRIEF)
    took, error = outcome(late.check)
    assert isinstance(error, DatabaseBusy) and error.code == "database_busy" and "max_connections" in error.remedy
    assert took < 2
    beats = outcomes(lambda: worker.tasks.renew(task_id, claim.attempt, lease_s=60), 8)
    beats += outcomes(lambda: worker.events.add(task_id, line(), attempt=claim.attempt), 8)
    assert [error for _, error in beats] == [None] * 16
    taken.close()
    until(lambda: outcome(late.check)[1] is None, "there is a connection again")
    for store in (worker, late):
        store.close()
    postgres.drop_database(name)
    postgres.execute("DROP ROLE few")


def test_a_process_has_a_connection_for_every_thread() -> None:
    assert THREADS == CONNECTIONS


@on_postgres
@pytest.mark.parametrize(("concurrency", "connections"), [(320, 40), (8, CONNECTIONS)])
def test_a_worker_of_many_tasks_has_connections_for_them(
    world: World, store_url: str, concurrency: int, connections: int
) -> None:
    world.environment["DATABASE_URL"] = store_url
    app = world.app()
    at_its_end = threading.Event()
    at_its_end.set()
    work(app, concurrency=concurrency, stopping=at_its_end)
    task_id = queued(app.store)
    with ThreadPoolExecutor(MANY) as pool:
        with locked_tasks(store_url):
            calls = [pool.submit(outcome, lambda: app.store.tasks.get(LOCAL_ACCOUNT, task_id)) for _ in range(MANY)]
            until(lambda: waiting_for_locks(store_url) == connections, "all of them are in use", 8)
        assert [error for _, error in (call.result(30) for call in calls)] == [None] * MANY


@on_postgres
def test_a_server_answers_everybody_while_its_postgres_hangs(
    world: World, database: tuple[Proxy, str], valkey_url: str
) -> None:
    proxy, url = database
    world.environment |= {"DATABASE_URL": url, "REDIS_URL": valkey_url}
    with served(world) as (address, pid), httpx2.Client(headers={"Authorization": f"Bearer {KEY}"}) as http:
        assert http.get(f"{address}/health").status_code == 200
        body = {"prompt": "x", "repository": "none"}
        task_id = http.post(f"{address}/api/v1/tasks", json=body).json()["task_id"]
        proxy.mode = "blackhole"

        def ask(path: str) -> tuple[float, int, str]:
            started = time.monotonic()
            answer = http.get(f"{address}{path}", timeout=60)
            return time.monotonic() - started, answer.status_code, answer.json().get("code", "")

        with ThreadPoolExecutor(MANY + 20) as pool:
            calls = [pool.submit(ask, f"/api/v1/tasks/{task_id}") for _ in range(MANY)]
            until(lambda: proxy.swallowed, "the fault is felt")
            pulses = [pool.submit(ask, "/health") for _ in range(20)]
            pulse = [future.result() for future in pulses]
            answers = [future.result() for future in calls]
        assert {(status, code) for _, status, code in pulse} == {(503, "database_unavailable")}
        assert max(took for took, _, _ in pulse) < 4
        assert {status for _, status, _ in answers} == {503}
        assert {code for _, _, code in answers} <= {"database_unavailable", "database_busy"}
        assert max(took for took, _, _ in answers) < 12
        assert psutil.Process(pid).num_threads() < THREADS + 20
        proxy.mode = "pass"
        until(lambda: ask("/health")[1] == 200, "it is well again")
        assert ask(f"/api/v1/tasks/{task_id}")[1] == 200


@contextmanager
def served(world: World) -> Generator[tuple[str, int]]:
    """A running server's address and process."""
    server = subprocess.Popen(
        [sys.executable, "-m", "cloudagent_mcp", "serve", "--port", "0"],
        env={**world.environment, "ADMIN_API_KEY": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None
    try:
        with server.stdout as printed:
            yield printed.readline().split("MCP at ")[1].split("/mcp ")[0], server.pid
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(20)


@contextmanager
def locked_tasks(url: str) -> Generator[None]:
    """Nobody else reads or writes tasks meanwhile."""
    connection = psycopg2.connect(url)
    connection.cursor().execute("LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE")
    try:
        yield
    finally:
        connection.close()


def waiting_for_locks(url: str) -> int:
    """How many connections do."""
    connection = psycopg2.connect(url)
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_locks WHERE NOT granted")
            row = cursor.fetchone()
            return row[0] if row else 0
    finally:
        connection.close()
