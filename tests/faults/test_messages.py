"""A queue that says everything several times, in any order, and things that nobody has said."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import redis

from cloudagent_queue.task_queue import QUEUE_NAME, TASK_NAME, TaskQueue
from cloudagent_storage.records import new_id
from tests.support.installation import PATIENT, Installation, connect
from tests.support.worlds import until

NAME = f"cloudagent_queue.task_queue.{TASK_NAME}"
"""As huey writes it."""


def message(args: list[Any], **more: Any) -> bytes:
    return json.dumps({"id": new_id("msg"), "name": NAME, "args": args, **more}).encode()


GARBAGE = [
    b"",
    b"\x00\xff\xfe garbage",
    b"\x80\x05\x95.",  # the beginning of a pickle
    b"null",
    b"[]",
    b"{}",
    b'"task"',
    b"[" * 100_000,
    message([], name="no such task"),
    message([], name=None),
    message([]),
    message(["one", "two"]),
    message([17]),
    message([None]),
    message([{"task_id": "x"}]),
    message([["task_" + "a" * 26]]),
    message([""]),
    message(["task_\x00"]),
    message(["task_\ud800"]),
    message(["task_" + "a" * 1_000_000]),
    message(["'; DROP TABLE tasks; --"]),
]
UNREADABLE = 10
"""So many of them are nothing that names what is to be run; the rest ask for it with an impossible task."""


def put_raw(installation: Installation, data: bytes) -> None:
    """Put bytes into the queue as whoever can write to it may."""
    if installation.queue_url.startswith("sqlite:///"):
        with connect(installation.queue_url) as connection:
            connection.execute("INSERT INTO task (queue, data, priority) VALUES (?, ?, 0)", (QUEUE_NAME, data))
    else:
        with redis.Redis.from_url(installation.queue_url) as client:  # pyright: ignore[reportUnknownMemberType]
            client.lpush(f"huey.redis.{QUEUE_NAME}", data)


def waiting(queue: TaskQueue) -> int:
    return int(queue.check().rpartition(", ")[2].split()[0])


def test_each_message_arrives_six_times_in_any_order_and_each_task_is_started_once(installation: Installation) -> None:
    installation.timers = PATIENT
    queue = TaskQueue(installation.queue_url)
    ended = installation.submit(steps=1, step_s=0)
    installation.start_worker()
    installation.wait_all()
    tasks = installation.submit_many(4, steps=8)
    messages = [*tasks, ended, new_id("task")] * 5
    random.Random(31).shuffle(messages)
    for task_id in messages[:10]:
        queue.put(task_id)
    installation.start_worker()
    for task in tasks:
        installation.await_calls(task, 2)
    for task_id in messages[10:]:
        queue.put(task_id)
    until(lambda: waiting(queue) == 0, "every message is taken")
    queue.close()
    installation.conclude()
    assert [installation.attempts(task) for task in [ended, *tasks]] == [1] * 5


@pytest.mark.full("postgres")
def test_what_is_no_message_harms_no_worker_and_no_task(installation: Installation) -> None:
    installation.timers = PATIENT
    worker = installation.start_worker(concurrency=2)
    queue = TaskQueue(installation.queue_url)
    for data in GARBAGE[:UNREADABLE]:
        put_raw(installation, data)
    task = installation.submit(steps=4)
    for data in GARBAGE[UNREADABLE:]:
        put_raw(installation, data)
    later = installation.submit(steps=4)
    until(lambda: waiting(queue) == 0, "every message is taken", 60)
    queue.close()
    installation.conclude()
    assert worker.log().count("Error reading from queue") == UNREADABLE
    assert worker.log().count(f"Executing {NAME}") >= len(GARBAGE) - UNREADABLE + 2
    assert worker.alive and [installation.attempts(each) for each in (task, later)] == [1, 1]
    # Both of its threads still work.
    both = installation.submit_many(2, steps=2, faults={"gate": "go"})
    for each in both:
        installation.await_calls(each)
    installation.open_gate("go")
    installation.conclude()
