"""The HTTP server dies while a client waits for its answer."""

from __future__ import annotations

import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest

from cloudagent_mcp.client import HttpClient
from cloudagent_mcp.settings import Settings
from cloudagent_storage.errors import ServerUnreachable
from tests.support.failpoints import Failpoint
from tests.support.installation import ADMIN_KEY, PATIENT, Installation
from tests.support.worlds import until


@contextmanager
def client_of(installation: Installation, url: str) -> Generator[HttpClient]:
    environment = {**installation.environment(), "CLOUDAGENT_URL": url, "CLOUDAGENT_API_KEY": ADMIN_KEY}
    client = HttpClient(Settings.read(environment))
    try:
        yield client
    finally:
        client.close()


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


@pytest.mark.full("before")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_submit_that_is_repeated_after_the_server_died_is_one_task(installation: Installation, when: str) -> None:
    point = Failpoint("cloudagent_storage.store.tasks:Tasks.add", when)
    server, url = installation.start_server(failpoints=[point])
    installation.start_worker()
    arguments = installation.arguments({"steps": 3}, {"idempotency_key": "once"})
    with client_of(installation, url) as client:
        with pytest.raises(ServerUnreachable):
            client.call("submit_task", **arguments)
        assert server.wait() == -signal.SIGKILL and installation.fired(point)
        assert len(installation.tasks()) == (0 if when == "before" else 1)
        installation.start_server(port=port_of(url))
        answers = [client.call("submit_task", **arguments) for _ in range(3)]
    assert [answer["replayed"] for answer in answers] == [when == "after", True, True]
    installation.accepted += {answer["task_id"] for answer in answers}
    assert len(installation.accepted) == len(installation.tasks()) == 1
    installation.conclude()


@pytest.mark.full("postgres")
def test_who_follows_a_log_goes_on_at_the_next_line_when_the_server_is_back(installation: Installation) -> None:
    server, url = installation.start_server()
    installation.start_worker()
    task = installation.submit(steps=60, step_s=0.1, faults={"events": 3, "pad": 50})
    lines: list[dict[str, Any]] = []
    refused = deaths = 0
    with client_of(installation, url) as client:
        ended, deadline = False, time.monotonic() + 90
        while not ended:
            assert time.monotonic() < deadline
            try:
                ended = client.call("get_task", task_id=task, log_lines=0)["completed_at"] is not None
                page = client.call("get_task_logs", task_id=task, after=lines[-1]["seq"] if lines else 0, limit=7)
                lines += page["lines"]
                ended = ended and not page["more"]
            except ServerUnreachable:
                refused += 1
                if not server.alive:
                    server, _ = installation.start_server(port=port_of(url))
            if deaths < 2 and len(lines) >= 20 * (deaths + 1):
                server.kill()
                deaths += 1
    assert deaths == 2 and refused >= 2
    assert [line["seq"] for line in lines] == list(range(1, len(lines) + 1))
    assert [line["message"] for line in lines] == installation.log(task)
    said = [line["message"] for line in lines if line["kind"] == "text"]
    assert said == [f"step {step}" + "." * 50 for step in range(60) for _ in range(3)]
    installation.conclude()


@pytest.mark.full
def test_a_worker_and_its_task_do_not_notice_that_the_server_died(on_sqlite: Installation) -> None:
    on_sqlite.timers = PATIENT
    server, url = on_sqlite.start_server()
    on_sqlite.start_worker()
    with client_of(on_sqlite, url) as client:
        arguments = on_sqlite.arguments({"steps": 4, "gate": "go"}, {})
        on_sqlite.accepted.append(task := client.call("submit_task", **arguments)["task_id"])
        on_sqlite.await_calls(task)
        server.kill()
        on_sqlite.open_gate("go")
        until(lambda: on_sqlite.task(task).status.terminal, "the task ends")
    on_sqlite.conclude()
    assert on_sqlite.attempts(task) == 1
