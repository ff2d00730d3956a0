"""A cancel at every moment of a task's life, while all is well and while something fails: one end, never left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import pytest

from cloudagent_mcp.client import LocalClient
from cloudagent_storage.errors import DatabaseUnavailable
from tests.support.failpoints import Failpoint
from tests.support.installation import EITHER_SANDBOX, EVERYWHERE, Installation
from tests.support.postgres import PostgresServer
from tests.support.valkey import ValkeyServer
from tests.support.worlds import until

STEPS = 6
MOMENTS: list[tuple[str, float]] = [
    ("submitted", 0.0),
    *(("claimed", number * 0.06) for number in range(8)),
    *((f"step {number}", 0.03) for number in range(STEPS)),
    *(("end", number * 0.04) for number in range(8)),
    ("terminal", 0.0),
]
"""When a task is cancelled: what has happened, and how many seconds after that."""


@dataclass
class Seen:
    """Every status that a task was ever seen in, in order, without repetitions."""

    statuses: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    @contextmanager
    def looking(self, installation: Installation) -> Generator[None]:
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(0.02):
                with suppress(DatabaseUnavailable):
                    for task_id, task in installation.tasks().items():
                        statuses = self.statuses.setdefault(task_id, [])
                        if not statuses or statuses[-1] != task.status:
                            statuses.append(task.status.value)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def cancel_somehow(client: LocalClient, task_id: str) -> bool:
    """Cancel as a client does that repeats a refused call. Did it change anything?"""
    deadline = time.monotonic() + 60
    while True:
        try:
            return client.call("cancel_task", task_id=task_id)["changed"]
        except DatabaseUnavailable:
            assert time.monotonic() < deadline, "no cancel was accepted"
            time.sleep(0.1)


def await_moment(installation: Installation, task_id: str, what: str) -> None:
    """Until it has happened, or can happen no more."""

    def reached() -> bool:
        with suppress(DatabaseUnavailable):
            status = installation.task(task_id).status
            if status.terminal or (what == "claimed" and status == "running"):
                return True
        if what.startswith("step "):
            return installation.calls(task_id) > int(what.removeprefix("step "))
        return what == "submitted" or (what == "end" and bool(installation.journal(task_id, "end")))

    until(reached, f"{task_id}: {what}", 90)


def cancelled_at_every_moment(installation: Installation, fault: Callable[[], None]) -> None:
    """Tasks of which each is cancelled at another moment of its life, twice, while `fault` happens."""
    seen = Seen()
    with installation.client() as client, seen.looking(installation), ThreadPoolExecutor(len(MOMENTS) + 1) as pool:

        def one(task_id: str, what: str, then_s: float) -> tuple[str, bool, bool]:
            await_moment(installation, task_id, what)
            time.sleep(then_s)
            return task_id, cancel_somehow(client, task_id), cancel_somehow(client, task_id)

        for what, _ in MOMENTS:
            # Whoever is cancelled at its work has enough of it for two restarts of whatever fails.
            steps = STEPS if what in ("end", "terminal") else 240
            arguments = installation.arguments({"steps": steps, "step_s": 0.25}, {})
            installation.accepted.append(client.call("submit_task", **arguments)["task_id"])
        told = [pool.submit(one, task_id, *at) for task_id, at in zip(installation.accepted, MOMENTS, strict=True)]
        until(lambda: sum(map(installation.calls, installation.accepted)), "an agent works")
        fault()
        answers = [answer.result() for answer in told]
        installation.conclude(dict.fromkeys(installation.accepted, "any"))
    ends: dict[str, str] = {task_id: task.status.value for task_id, task in installation.tasks().items()}
    for task_id, first, second in answers:
        statuses = seen.statuses[task_id]
        last = next(number for number, status in enumerate(statuses) if status in ("completed", "cancelled", "failed"))
        assert statuses[last:] == [ends[task_id]], f"{task_id} was {statuses}"
        assert not (first and second), f"{task_id} was cancelled twice"
        assert ends[task_id] in ("completed", "cancelled"), (
            f"{installation.task(task_id)}\n{installation.log(task_id)}\n{installation.story()}"
        )
    started = {task_id for task_id in ends if installation.journal(task_id, "start")}
    cancelled = {task_id for task_id, status in ends.items() if status == "cancelled"}
    assert cancelled - started, "some were cancelled before their agent started"
    assert cancelled & started, "some were cancelled while their agent worked"
    assert started - cancelled, "some had ended"


@pytest.mark.full("e2b")
@EITHER_SANDBOX
def test_a_cancelled_task_is_cancelled_also_when_its_worker_dies_as_the_agent_has_stopped(
    installation: Installation,
) -> None:
    dies = Failpoint("cloudagent_queue.attempt:Attempt.save")
    worker = installation.start_worker(failpoints=[dies])
    task = installation.submit(steps=100)
    installation.await_calls(task, 2)
    with installation.client() as client:
        assert client.call("cancel_task", task_id=task)["changed"]
    worker.wait()
    assert installation.fired(dies)
    assert installation.journal(task, "end")[0]["outcome"] == "stopped"
    installation.start_worker()
    installation.conclude({task: "cancelled"})


@pytest.mark.full
@EVERYWHERE
def test_a_cancel_at_any_moment_leads_to_one_end(installation: Installation) -> None:
    installation.start_worker(concurrency=8)
    cancelled_at_every_moment(installation, lambda: None)


@pytest.mark.full
@EVERYWHERE
def test_a_cancel_leads_to_one_end_while_workers_are_killed(installation: Installation) -> None:
    worker = installation.start_worker(concurrency=8)

    def fault() -> None:
        nonlocal worker
        for _ in range(2):
            worker.kill()
            worker = installation.start_worker(concurrency=8)
            time.sleep(1.0)

    cancelled_at_every_moment(installation, fault)


@pytest.mark.full
def test_a_cancel_leads_to_one_end_while_redis_is_down(
    make_installation: Callable[..., Installation], postgres_url: str
) -> None:
    server = ValkeyServer()
    try:
        installation = make_installation(database=postgres_url, queue=server.url)
        installation.start_worker(concurrency=8)

        def fault() -> None:
            server.go_down()
            time.sleep(1.0)
            server.come_back()

        cancelled_at_every_moment(installation, fault)
    finally:
        server.stop()


@pytest.mark.full
def test_a_cancel_leads_to_one_end_while_postgres_restarts(
    make_installation: Callable[..., Installation], valkey_url: str
) -> None:
    server = PostgresServer(synchronous_commit="on")
    try:
        installation = make_installation(database=server.url(server.create_database()), queue=valkey_url)
        installation.start_worker(concurrency=8)

        def fault() -> None:
            for _ in range(2):
                server.go_down()
                time.sleep(0.5)
                server.come_back()
                time.sleep(0.5)

        cancelled_at_every_moment(installation, fault)
    finally:
        server.stop()
