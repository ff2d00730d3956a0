import json
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloudagent_queue.task_queue import TaskQueue
from cloudagent_storage.errors import QueueUnavailable


def until(reached: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture(params=["sqlite", "valkey"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'queue.db'}"
    return request.getfixturevalue("valkey_url")


def test_what_one_queue_puts_another_runs_once(url: str) -> None:
    seen: list[str] = []
    stopping = threading.Event()
    consuming, putting = TaskQueue(url), TaskQueue(url)
    consumer = threading.Thread(
        target=lambda: consuming.consume(seen.append, concurrency=4, stopping=stopping, grace_s=5)
    )
    consumer.start()
    names = [f"task_{number}" for number in range(20)]
    for name in names:
        putting.put(name)
    until(lambda: len(seen) == len(names))
    stopping.set()
    consumer.join(10)
    assert sorted(seen) == sorted(names)
    assert not consumer.is_alive()
    for queue in (consuming, putting):
        queue.close()


def test_messages_survive_until_a_consumer_comes(url: str) -> None:
    queue = TaskQueue(url)
    queue.put("task_early")
    seen: list[str] = []
    stopping = threading.Event()

    def run(task_id: str) -> None:
        seen.append(task_id)
        stopping.set()

    assert queue.consume(run, concurrency=2, stopping=stopping, grace_s=5)
    assert seen == ["task_early"]
    queue.close()


def test_a_consumer_that_does_not_let_go_is_reported_after_the_grace(url: str) -> None:
    queue = TaskQueue(url)
    queue.put("task_stuck")
    stopping, release = threading.Event(), threading.Event()
    stuck: list[threading.Thread] = []

    def run(task_id: str) -> None:
        stuck.append(threading.current_thread())
        stopping.set()
        release.wait(20)

    started = time.monotonic()
    assert not queue.consume(run, concurrency=1, stopping=stopping, grace_s=0.2)
    assert time.monotonic() - started < 10
    release.set()
    stuck[0].join(20)  # it would open the queue's file again
    queue.close()


def test_waiting_consumers_are_woken_by_a_commit_of_another_connection(tmp_path: Path) -> None:
    queue: Any = TaskQueue(f"sqlite:///{tmp_path / 'queue.db'}")
    waker: Any = queue._huey.storage.waker
    waker.wait(waker.generation(), timeout_s=5)  # the first look only learns where the file stands
    seen = waker.generation()
    waiting = [threading.Thread(target=waker.wait, args=(seen,), kwargs={"timeout_s": 60}) for _ in range(3)]
    for thread in waiting:
        thread.start()
    other = TaskQueue(queue.url)
    other.put("task_x")
    for thread in waiting:
        thread.join(20)
        assert not thread.is_alive()
    for opened in (queue, other):
        opened.close()


def test_a_message_is_plain_json(tmp_path: Path) -> None:
    queue = TaskQueue(f"sqlite:///{tmp_path / 'queue.db'}")
    queue.put("task_x")
    queue.close()
    with sqlite3.connect(tmp_path / "queue.db") as database:
        ((message,),) = database.execute("select data from task").fetchall()
    database.close()
    assert json.loads(message)["args"] == ["task_x"]


def test_a_redis_that_is_not_there_is_an_error_in_bounded_time() -> None:
    queue = TaskQueue("redis://127.0.0.1:1/0")
    started = time.monotonic()
    with pytest.raises(QueueUnavailable):
        queue.put("task_x")
    with pytest.raises(QueueUnavailable):
        queue.check()
    assert time.monotonic() - started < 20


def test_an_address_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(QueueUnavailable):
        TaskQueue("amqp://localhost")


def test_a_tick_comes_through_the_queue_and_the_clock_stops_with_the_consumer(url: str) -> None:
    queue = TaskQueue(url)
    stopping, ticked = threading.Event(), threading.Event()

    def tick() -> None:
        ticked.set()
        stopping.set()

    assert queue.consume(lambda _: None, concurrency=1, stopping=stopping, grace_s=20, tick=tick)
    assert ticked.is_set()
    queue.close()


def test_a_consumer_without_a_clock_hears_ticks_of_others_and_does_nothing(url: str) -> None:
    queue: Any = TaskQueue(url)
    queue._huey.enqueue(queue._huey._registry.periodic_tasks[0])
    queue.put("task_after")
    seen: list[str] = []
    stopping = threading.Event()

    def run(task_id: str) -> None:
        seen.append(task_id)
        stopping.set()

    assert queue.consume(run, concurrency=1, stopping=stopping, grace_s=20)
    assert seen == ["task_after"]
    queue.close()
