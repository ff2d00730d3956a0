"""Redis that forgets, stops, is full or swallows every byte: it is only a doorbell, and every task is in its row."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.installation import Installation
from tests.support.valkey import ValkeyServer
from tests.support.worlds import until

SUBMIT_S = 10.0
"""A submit that cannot reach Redis gives up on it within this: the time to connect and the time for an answer."""
CONSUMER_S = 12.0
"""A consumer that could not reach Redis looks again within ten seconds."""
QUEUE = "huey.redis.cloudagent"


@pytest.fixture
def valkey_of_its_own() -> Iterator[ValkeyServer]:
    """A Redis that a test may end."""
    server = ValkeyServer()
    yield server
    server.stop()


@pytest.fixture
def installed(
    make_installation: Callable[..., Installation], postgres_url: str, valkey_of_its_own: ValkeyServer
) -> Installation:
    """An installation on Postgres and that Redis."""
    return make_installation(database=postgres_url, queue=valkey_of_its_own.url)


def started_after(installation: Installation, task_ids: list[str], began: float) -> float:
    """The longest that any of these tasks took to start, from `began` on, by the machine's monotonic time."""
    return max(installation.journal(task_id, "start")[0]["at"] for task_id in task_ids) - began


def test_a_redis_that_forgets_its_messages_delays_tasks_by_one_ring_and_no_more(
    installed: Installation, valkey_of_its_own: ValkeyServer
) -> None:
    installed.start_worker(concurrency=2)
    busy = [installed.submit(steps=3, faults={"gate": "go"}) for _ in range(2)]
    for task in busy:
        installed.await_calls(task, 2)
    queued = installed.submit_many(6, steps=2)
    until(lambda: all(installed.column(task, "rung_at") for task in queued), "the sweeper has rung for each")
    assert valkey_of_its_own.execute("LLEN", QUEUE) >= len(queued)
    valkey_of_its_own.flush()
    assert valkey_of_its_own.execute("LLEN", QUEUE) == 0
    # Both threads are busy, so that the messages of the sweeper's next ring can be counted.
    began = time.monotonic()
    until(lambda: valkey_of_its_own.execute("LLEN", QUEUE) >= len(queued), "the sweeper has rung for each again")
    assert time.monotonic() - began < installed.timers.ring_again_s + installed.timers.sweep_s + 5
    installed.open_gate("go")
    installed.conclude()
    assert [installed.attempts(task) for task in busy + queued] == [1] * 8


@pytest.mark.full
def test_tasks_are_submitted_and_started_while_redis_is_down_and_it_comes_back_empty(
    installed: Installation, valkey_of_its_own: ValkeyServer
) -> None:
    worker = installed.start_worker(concurrency=6)
    running = installed.submit_many(2, steps=60, step_s=0.1)
    for task in running:
        installed.await_calls(task, 2)
    valkey_of_its_own.go_down()
    taken: list[float] = []
    during: list[str] = []
    for _ in range(4):
        began = time.monotonic()
        during.append(installed.submit(steps=3))
        taken.append(time.monotonic() - began)
    before = [installed.calls(task) for task in running]
    until(lambda: "the queue was not told" in worker.log() or "sweep:" in worker.log(), "the worker noticed")
    until(lambda: all(map(lambda t, n: installed.calls(t) > n + 3, running, before)), "running tasks go on")
    until(lambda: all(installed.journal(task, "start") for task in during), "they start without a Redis", 60)
    valkey_of_its_own.come_back()
    assert valkey_of_its_own.execute("LLEN", QUEUE) == 0
    installed.conclude()
    assert max(taken) < SUBMIT_S
    assert [installed.attempts(task) for task in running + during] == [1] * 6


@pytest.mark.full
def test_a_redis_without_memory_takes_no_message_and_loses_no_task(
    installed: Installation, valkey_of_its_own: ValkeyServer
) -> None:
    worker = installed.start_worker()
    running = installed.submit_many(2, steps=40, step_s=0.1)
    for task in running:
        installed.await_calls(task, 2)
    valkey_of_its_own.execute("SET", "filler", "x" * 2_000_000)
    valkey_of_its_own.execute("CONFIG", "SET", "maxmemory", "1mb")
    during = installed.submit_many(3, steps=3)
    until(lambda: "sweep: The queue does not answer" in worker.log(), "Redis refuses a message")
    assert [installed.task(task).status for task in during] == ["queued"] * 3
    valkey_of_its_own.execute("DEL", "filler")
    valkey_of_its_own.execute("CONFIG", "SET", "maxmemory", "0")
    began = time.monotonic()
    installed.conclude()
    assert started_after(installed, during, began) < installed.timers.ring_again_s + installed.timers.sweep_s + 20
    assert [installed.attempts(task) for task in running + during] == [1] * 5
