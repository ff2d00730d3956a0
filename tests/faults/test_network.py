"""Redis behind a network that swallows every byte: nobody is told, and nothing may wait for an answer for long."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import netns
from tests.support.installation import Installation
from tests.support.proxy import Proxy
from tests.support.valkey import ValkeyServer
from tests.support.worlds import until

SUBMIT_S = 10.0
"""A submit gives up on Redis within this: five seconds for an answer, and its own work."""
CONSUMER_S = 12.0
"""A consumer that could not reach Redis looks again within ten seconds."""


def swallowed(
    installation: Installation, swallow: Callable[[], None], deliver: Callable[[], None], *, submits: int
) -> None:
    """The whole story: tasks run, Redis is swallowed, tasks are submitted, Redis is back."""
    worker = installation.start_worker()
    running = installation.submit_many(2, steps=60, step_s=0.1)
    for task in running:
        installation.await_calls(task, 2)
    swallow()
    taken: list[float] = []
    during: list[str] = []
    for _ in range(submits):
        began = time.monotonic()
        during.append(installation.submit(steps=3))
        taken.append(time.monotonic() - began)
    until(lambda: "sweep: The queue does not answer" in worker.log(), "the worker's sweeper is not answered", 60)
    # Neither whoever runs needs a Redis, nor whoever waits: the worker looks for itself.
    calls = [installation.calls(task) for task in running]
    assert all(count > 2 for count in calls)
    until(lambda: all(installation.journal(task, "start") for task in during), "they start without a Redis", 60)
    deliver()
    installation.conclude()
    assert max(taken) < SUBMIT_S, taken
    assert [installation.attempts(task) for task in running + during] == [1] * (2 + submits)


@pytest.fixture
def proxy(valkey: ValkeyServer) -> Iterator[Proxy]:
    """A way to an empty Redis that can swallow what it carries."""
    valkey.flush()
    with Proxy(valkey.port) as proxy:
        yield proxy


def test_a_hung_redis_bounds_submits_and_keeps_no_task_from_starting(
    proxy: Proxy, make_installation: Callable[..., Installation], postgres_url: str
) -> None:
    installation = make_installation(database=postgres_url, queue=f"redis://127.0.0.1:{proxy.port}/0")
    swallowed(
        installation,
        lambda: setattr(proxy, "mode", "blackhole"),
        lambda: setattr(proxy, "mode", "pass"),
        submits=1,
    )
    assert proxy.swallowed > 0


@pytest.mark.full
def test_a_network_that_drops_every_packet_bounds_submits_and_keeps_no_task_from_starting(tmp_path: Path) -> None:
    def body() -> None:
        server = ValkeyServer()
        with contextlib.ExitStack() as stack:
            stack.callback(server.stop)
            installation = stack.enter_context(contextlib.closing(Installation.make(tmp_path, queue=server.url)))
            swallowed(installation, netns.swallow, netns.deliver, submits=3)

    netns.apart(body)
