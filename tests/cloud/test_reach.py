"""What is gone, and what is only out of reach: the two that must never be mixed up."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloudagent_queue.sandboxes.contract import until
from cloudagent_queue.sandboxes.e2b import E2BProvider, E2BSandbox
from cloudagent_storage.errors import (
    CloudAgentError,
    SandboxError,
    SandboxGone,
    SandboxUnreachable,
)
from tests.support.e2b_server.client import FILES, START, E2bServer, e2b_server

ONE = "/sandboxes/[a-z0-9]+"
"""The path of one sandbox in the control plane."""
PAGE = "<html><h1>404 Not Found</h1><hr>nginx</html>"


def uses_of(sandbox: E2BSandbox) -> list[Callable[[], object]]:
    return [
        sandbox.alive,
        sandbox.stop,
        sandbox.end_processes,
        sandbox.output,
        lambda: sandbox.start(["true"], env={}),
        lambda: sandbox.run(["true"], timeout_s=20),
        lambda: sandbox.read("file", max_bytes=10),
        lambda: sandbox.write("file", b"x"),
        lambda: sandbox.write("file", os.urandom(200_000)),
    ]


def test_a_sandbox_that_vanished_is_gone_in_every_use(server: E2bServer, sandbox: E2BSandbox) -> None:
    assert not sandbox.alive()
    server.vanish(sandbox.id)
    for use in [*uses_of(sandbox), lambda: sandbox.extend(60), sandbox.snapshot]:
        with pytest.raises(SandboxGone):
            use()
    sandbox.kill()


def test_a_sandbox_that_vanishes_under_a_running_call_is_gone(server: E2bServer, sandbox: E2BSandbox) -> None:
    found: list[Exception] = []

    def run() -> None:
        try:
            sandbox.run(["sh", "-c", "echo > begun; sleep 600"], timeout_s=600)
        except CloudAgentError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: sandbox.read("begun", max_bytes=1), "it did not happen")
    server.vanish(sandbox.id)
    thread.join(30)
    assert [type(error) for error in found] == [SandboxGone]


def test_a_sandbox_whose_daemon_does_not_answer_is_out_of_reach_and_not_gone(
    server: E2bServer, provider: E2BProvider, sandbox: E2BSandbox, hasty: None
) -> None:
    server.freeze_sandbox(sandbox.id)
    for use in uses_of(sandbox):
        with pytest.raises(SandboxUnreachable):
            use()
    connected = provider.connect(sandbox.id)  # what needs the control plane alone goes on: orphans can be killed
    server.thaw_sandbox(sandbox.id)
    assert connected.run(["echo", "back"], timeout_s=20).output == "back\n"


def test_a_frozen_service_is_out_of_reach_within_bounds_and_not_gone(
    server: E2bServer, provider: E2BProvider, sandbox: E2BSandbox, hasty: None
) -> None:
    server.freeze()
    try:
        for use in [sandbox.alive, lambda: sandbox.extend(9), lambda: provider.connect(sandbox.id)]:
            with pytest.raises(SandboxUnreachable):
                use()
        with pytest.raises(SandboxUnreachable):
            provider.list({})
    finally:
        server.thaw()
    assert not provider.connect(sandbox.id).alive()


def test_a_service_that_nobody_listens_for_is_out_of_reach(tmp_path: Path, hasty: None) -> None:
    with e2b_server(tmp_path / "server") as short_lived:
        provider = E2BProvider(short_lived.environment)
        sandbox = provider.create(metadata={})
    for use in [sandbox.alive, lambda: provider.connect(sandbox.id), sandbox.kill, lambda: provider.list({})]:
        with pytest.raises(SandboxUnreachable):
            use()


@pytest.mark.parametrize(
    "answer",
    [
        {"status": 500},
        {"status": 502},
        {"status": 503},
        {"status": 429},
        {"status": 404, "body": PAGE},
        {"status": 200, "body": PAGE},
        {"status": 401},
        {"status": 403},
    ],
    ids=lambda answer: f"{answer['status']}{' page' if 'body' in answer else ''}",
)
def test_only_a_clear_answer_of_the_control_plane_makes_a_sandbox_gone(
    server: E2bServer, provider: E2BProvider, sandbox: E2BSandbox, hasty: None, answer: dict[str, Any]
) -> None:
    server.fault("cut", START, count=None)
    control = server.fault("answer", ONE, count=None, **answer)
    for use in [sandbox.alive, lambda: provider.connect(sandbox.id), sandbox.kill, lambda: sandbox.extend(9e9)]:
        with pytest.raises(SandboxUnreachable) as raised:
            use()
        if answer["status"] in (401, 403):
            assert "E2B_API_KEY" in raised.value.remedy
    assert control.fired >= 4
    server.heal()
    assert not sandbox.alive()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 500, 502, 503, 504])
def test_whatever_the_way_into_a_sandbox_answers_it_is_not_gone_while_it_is_listed(
    server: E2bServer, sandbox: E2BSandbox, hasty: None, status: int
) -> None:
    server.fault("answer", f"{START}|{FILES}", status=status, count=None)
    for use in uses_of(sandbox):
        with pytest.raises(SandboxError) as raised:
            use()
        assert not isinstance(raised.value, SandboxGone)
        assert isinstance(raised.value, SandboxUnreachable) or status == 400


def test_a_command_that_does_not_exist_is_no_lost_sandbox(sandbox: E2BSandbox) -> None:
    assert sandbox.run(["no-such-command"], timeout_s=20).exit_code == 127
    assert sandbox.run(["sh", "-c", "exit 126"], timeout_s=20).exit_code == 126
