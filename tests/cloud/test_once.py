"""A network at its worst, and each thing that is asked for is still done once and whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest

from cloudagent_queue.sandboxes import e2b as e2b_provider
from cloudagent_queue.sandboxes import inside
from cloudagent_queue.sandboxes.contract import until
from cloudagent_queue.sandboxes.e2b import E2BSandbox
from cloudagent_storage.errors import (
    SandboxError,
    SandboxUnreachable,
)
from tests.support.e2b_server.client import FILES, START, E2bServer


def starts(server: E2bServer) -> int:
    return server.stats()["requests"].get(f"POST {START}", 0)


@pytest.mark.parametrize(
    "kind, after_bytes", [("cut", 0), ("cut", 60), ("hang_after", 0), ("half_close", 30), ("stall", 30)]
)
def test_a_start_whose_answer_is_lost_starts_once(
    server: E2bServer, sandbox: E2BSandbox, monkeypatch: pytest.MonkeyPatch, kind: str, after_bytes: int
) -> None:
    monkeypatch.setattr(e2b_provider, "DATA_S", 3.0)
    fault = server.fault(kind, START, after_bytes=after_bytes)
    sandbox.start(["sh", "-c", "echo ran >> log; sleep 600"], env={})
    assert fault.fired == 1
    until(lambda: sandbox.read("log", max_bytes=10), "it did not happen")
    assert sandbox.alive()
    assert sandbox.read("log", max_bytes=10) == b"ran\n"
    with pytest.raises(SandboxError, match="already"):
        sandbox.start(["true"], env={})


@pytest.mark.parametrize(
    "kind, after_bytes", [("cut", 0), ("cut", 60), ("hang_after", 0), ("half_close", 30), ("stall", 30)]
)
def test_a_command_whose_stream_is_lost_runs_once_and_is_waited_for(
    server: E2bServer, sandbox: E2BSandbox, monkeypatch: pytest.MonkeyPatch, kind: str, after_bytes: int
) -> None:
    monkeypatch.setattr(e2b_provider, "DATA_S", 3.0)
    fault = server.fault(kind, START, after_bytes=after_bytes)
    done = sandbox.run(["sh", "-c", "echo ran >> log; sleep 0.5; echo done; exit 5"], timeout_s=20)
    assert fault.fired == 1
    assert (done.exit_code, done.output) == (5, "done\n")
    assert sandbox.read("log", max_bytes=100) == b"ran\n"


def test_a_command_that_takes_longer_than_a_call_is_waited_for_in_several(
    server: E2bServer, sandbox: E2BSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(e2b_provider, "WAIT_S", 0.2)
    before = starts(server)
    done = sandbox.run(["sh", "-c", "echo ran >> log; sleep 1.5; echo done"], timeout_s=20)
    assert (done.exit_code, done.output) == (0, "done\n")
    assert starts(server) - before >= 3
    assert sandbox.read("log", max_bytes=100) == b"ran\n"


def test_a_start_is_one_short_call(server: E2bServer, sandbox: E2BSandbox) -> None:
    before = starts(server)
    sandbox.start(["sleep", "600"], env={})
    assert starts(server) - before == 1
    assert server.stats()["streams"] == 0


def test_two_processes_that_start_at_once_start_one_agent(server: E2bServer, sandbox: E2BSandbox) -> None:
    script = """
import json, sys
from cloudagent_queue.sandboxes.contract import until
from cloudagent_queue.sandboxes.e2b import E2BProvider
from cloudagent_storage.errors import SandboxError
box = E2BProvider(json.load(sys.stdin)).connect(sys.argv[1])
try:
    box.start(["sh", "-c", "echo ran >> log; sleep 600"], env={})
    print("started")
except SandboxError as error:
    print(error.code)
"""
    children = [
        subprocess.Popen([sys.executable, "-c", script, sandbox.id], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    given = json.dumps(server.environment).encode()
    ends = sorted(child.communicate(given, timeout=60)[0].decode().strip() for child in children)
    assert ends == ["sandbox_error", "sandbox_error", "started"]
    assert sandbox.read("log", max_bytes=100) == b"ran\n"


def test_whoever_starts_waits_for_another_one_that_is_starting(server: E2bServer, sandbox: E2BSandbox) -> None:
    hold = f"import fcntl, os, time; f = open('{inside.FOLDER}/started.lock', 'w'); fcntl.flock(f, fcntl.LOCK_EX)\n"
    hold += "open('held', 'w').write('x')\nwhile not os.path.exists('release'): time.sleep(0.01)"
    holder = threading.Thread(target=lambda: sandbox.run([sandbox.python, "-c", hold], timeout_s=60))
    holder.start()
    until(lambda: sandbox.read("held", max_bytes=1), "nobody holds the lock")
    ends: list[str] = []

    def begin() -> None:
        try:
            sandbox.start(["sh", "-c", "echo ran >> log"], env={})
            ends.append("started")
        except SandboxError:
            ends.append("refused")

    starters = [threading.Thread(target=begin) for _ in range(2)]
    for thread in starters:
        thread.start()
    until(lambda: server.stats()["streams"] == 3, "somebody did not wait")
    for _ in range(5):  # longer than a start that waits for nobody
        assert not sandbox.alive() and not ends
    sandbox.write("release", b"x")
    for thread in [*starters, holder]:
        thread.join(30)
    assert sorted(ends) == ["refused", "started"]


def test_a_started_command_keeps_nothing_open_of_those_who_started_it(server: E2bServer, sandbox: E2BSandbox) -> None:
    request: dict[str, object] = {"do": "start", "command": ["sleep", "600"], "env": {}, "token": "t"}
    done = sandbox._attach().commands.run(  # pyright: ignore[reportPrivateUsage]
        f"exec 9>&1; exec {inside.FOLDER}/python -I -S {inside.FOLDER}/inside.py",
        envs={inside.REQUEST: json.dumps(request)},
        timeout=15,
    )
    assert json.loads(done.stdout) == {"started": True}
    assert sandbox.alive()


def test_a_file_whose_upload_is_cut_is_whole_or_not_there(server: E2bServer, sandbox: E2BSandbox) -> None:
    data = os.urandom(3_000_000)
    fault = server.fault("cut", FILES, method="POST")
    sandbox.write("file", data)
    assert fault.fired == 1
    assert sandbox.read("file", max_bytes=10**7) == data


def test_a_download_that_is_cut_is_taken_again(server: E2bServer, sandbox: E2BSandbox) -> None:
    data = os.urandom(3_000_000)
    sandbox.write("file", data)
    for kind in ("cut", "half_close"):
        fault = server.fault(kind, FILES, method="GET", after_bytes=1_000_000)
        assert sandbox.read("file", offset=7, max_bytes=2_500_000) == data[7:2_500_007]
        assert fault.fired == 1


def test_a_download_of_a_byte_a_second_is_given_up(
    server: E2bServer, sandbox: E2BSandbox, hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(e2b_provider, "SLOWEST_BYTES_PER_S", 10_000_000)
    data = os.urandom(3_000_000)
    sandbox.write("file", data)
    fault = server.fault("trickle", FILES, method="GET", bytes_per_s=1)
    with pytest.raises(SandboxUnreachable):
        sandbox.read("file", max_bytes=10**7)
    assert fault.fired >= 1


def test_large_files_do_not_travel_through_commands(server: E2bServer, sandbox: E2BSandbox) -> None:
    data = os.urandom(20_000_000)
    before = server.stats()["requests"]
    sandbox.write("file", data)
    assert sandbox.read("file", max_bytes=10**8) == data
    after = server.stats()["requests"]
    assert after[f"POST {START}"] - before[f"POST {START}"] == 2
    assert after[f"POST {FILES}"] - before.get(f"POST {FILES}", 0) == 1
    assert after[f"GET {FILES}"] - before.get(f"GET {FILES}", 0) == 1
