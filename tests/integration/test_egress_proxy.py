"""What a sandbox's proxy bears, and how long it lives."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloudagent_queue.sandboxes import SandboxSpec, network
from cloudagent_queue.sandboxes.bubblewrap import find_bubblewrap
from cloudagent_queue.sandboxes.local import LocalProvider
from cloudagent_storage.errors import InvalidEgress, SandboxUnavailable
from tests.support.closed import (
    ASK,
    Host,
    both_ways,
    closed_provider,
    folder_of,
    has_ended,
    inside,
    make,
    proxy_of,
    statuses,
)
from tests.support.stored import at_once
from tests.support.worlds import until


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    yield made
    made.close()


@pytest.fixture
def provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalProvider]:
    with closed_provider(tmp_path, monkeypatch) as made:
        yield made


# Abuse


def test_clients_that_dawdle_lock_out_neither_another_sandbox_nor_their_own_for_long(
    provider: LocalProvider, host: Host
) -> None:
    dawdle = f"""
import time
held = [socket.create_connection(("127.0.0.1", {network.PROXY_PORT})) for _ in range(300)]
for connection in held:
    connection.sendall(b"GET http")
open("held", "w").close()
time.sleep(600)
"""
    listed = f"127.0.0.1:{host.port}"
    sandbox = make(provider, listed, head_s=1)
    sandbox.start([sandbox.python, "-c", "import socket\n" + dawdle], env={})
    until(lambda: sandbox.run(["test", "-e", "held"], timeout_s=20).exit_code == 0, "the connections are open")
    assert statuses(inside(make(provider, listed), ASK, both_ways(listed))) == ["200", "200"]

    def served() -> bool:
        return statuses(inside(sandbox, ASK, both_ways(listed)))[0] == "200"

    until(served, "the proxy gave the dawdlers up")


def test_a_thousand_connections_at_once_are_each_answered_and_leave_nothing_behind(
    provider: LocalProvider, host: Host
) -> None:
    script = f"""
import collections
held = [socket.create_connection(("127.0.0.1", {network.PROXY_PORT})) for _ in range(1000)]
answers = collections.Counter()
for connection in held:
    try:
        connection.sendall(given[0].encode())
        answers[connection.recv(65536)[9:12].decode()] += 1
    except OSError:
        answers["cut"] += 1
print(json.dumps(answers))
"""
    listed = f"127.0.0.1:{host.port}"
    sandbox = make(provider, listed)
    assert inside(sandbox, ASK, both_ways(listed))
    proxy = proxy_of(provider, sandbox)
    before = proxy.num_fds()
    answers = inside(sandbox, script, both_ways(listed)[1])
    assert set(answers) <= {"200", "503", "cut"} and sum(answers.values()) == 1000
    assert answers["200"] >= 256
    assert statuses(inside(sandbox, ASK, both_ways(listed))) == ["200", "200"]
    until(lambda: proxy.num_fds() <= before, "every connection is closed")
    assert proxy_of(provider, sandbox).pid == proxy.pid and proxy.memory_info().rss < 150_000_000


def test_what_was_blocked_is_told_once_each_and_only_so_much_of_it(provider: LocalProvider) -> None:
    sandbox = make(provider)
    assert sandbox.blocked() == []
    requests = [request for _ in range(2) for request in both_ways("a.test:80") + both_ways("[2001:db8::1]:443")]
    inside(sandbox, ASK, requests)
    assert sandbox.blocked() == ["a.test:80", "[2001:db8::1]:443"]
    proxy = proxy_of(provider, sandbox)
    proxy.kill()
    until(lambda: has_ended(proxy), "it is dead")
    inside(sandbox, ASK, [both_ways(f"h{number}.test:80")[0] for number in range(300)] + both_ways("a.test:80"))
    blocked = sandbox.blocked()
    assert len(blocked) == len(set(blocked)) == 200
    assert provider.connect(sandbox.id).blocked() == blocked


# The proxy's life

USE_AND_DIE = """
import os, pathlib, signal, sys
from cloudagent_queue.sandboxes import SandboxSpec
from cloudagent_queue.sandboxes.local import LocalProvider
sandbox = LocalProvider(pathlib.Path(sys.argv[1])).create(SandboxSpec(egress=[sys.argv[2]]), metadata={})
sandbox.start(["sh", "-c", 'until [ -e go ]; do sleep 0.02; done; curl -sS "$0" > got', sys.argv[3]], env={})
print(sandbox.id, flush=True)
os.killpg(0, signal.SIGKILL)
"""


def test_the_way_out_outlives_the_worker_and_ends_with_the_sandbox(provider: LocalProvider, host: Host) -> None:
    place = f"127.0.0.1:{host.port}"
    starter = [sys.executable, "-c", USE_AND_DIE, str(provider._folder), place, f"http://{place}/late"]  # pyright: ignore[reportPrivateUsage]
    done = subprocess.run(starter, capture_output=True, text=True, timeout=60, check=False, start_new_session=True)
    assert done.returncode == -9, done.stderr
    adopted = provider.connect(done.stdout.strip())
    proxy = proxy_of(provider, adopted)
    adopted.write("go", b"")
    until(lambda: adopted.read("got", max_bytes=100).startswith(b"served at"), "it is served")
    assert adopted.run(["true"], timeout_s=20).exit_code == 0
    adopted.end_processes()
    assert proxy_of(provider, adopted).pid == proxy.pid and not has_ended(proxy)
    adopted.kill()
    assert has_ended(proxy)


def test_a_proxy_that_died_leaves_no_hole_and_is_there_again_for_the_next_command(
    provider: LocalProvider, host: Host
) -> None:
    place = f"127.0.0.1:{host.port}"
    sandbox = make(provider, place)
    sandbox.start(
        ["sh", "-c", f"echo > begun; until [ -e go ]; do sleep 0.02; done; curl -sS http://{place}/ || echo no > no"],
        env={},
    )
    until(lambda: sandbox.read("begun", max_bytes=1), "it runs")
    first = proxy_of(provider, sandbox)
    first.kill()
    until(lambda: has_ended(first), "it is dead")
    sandbox.write("go", b"")
    until(lambda: sandbox.read("no", max_bytes=10), "the running command has no network")
    assert statuses(inside(sandbox, ASK, both_ways(place))) == ["200", "200"]
    assert proxy_of(provider, sandbox).pid != first.pid


def test_a_proxy_whose_sandbox_was_deleted_behind_its_back_ends_by_itself(
    provider: LocalProvider, tmp_path: Path
) -> None:
    sandbox = make(provider)
    assert sandbox.run(["true"], timeout_s=20).exit_code == 0
    proxy = proxy_of(provider, sandbox)
    folder = folder_of(provider, sandbox)
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    until(lambda: has_ended(proxy), "it ends")


def test_what_one_command_was_given_ends_with_it(provider: LocalProvider, host: Host) -> None:
    sandbox = make(provider, f"127.0.0.1:{host.port}")
    for _ in range(20):
        assert sandbox.run(["true"], timeout_s=20).exit_code == 0
    proxy = proxy_of(provider, sandbox)
    until(lambda: proxy.num_fds() < 16, "the sockets of ended namespaces are closed")


def test_many_commands_at_once_start_one_proxy(provider: LocalProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[network.Network] = []
    start: Callable[[network.Network], None] = vars(network.Network)["_start"]

    def counting(self: network.Network) -> None:
        started.append(self)
        start(self)

    monkeypatch.setattr(network.Network, "_start", counting)
    for number in range(1, 4):
        sandbox = make(provider)
        assert at_once(*[lambda: sandbox.run(["true"], timeout_s=60).exit_code] * 8) == [0] * 8  # noqa: B023
        assert len(started) == number


# Where it cannot be had


def test_where_there_is_no_network_namespace_nothing_is_made_and_the_remedy_is_named(tmp_path: Path) -> None:
    fake = tmp_path / "bwrap"
    real = find_bubblewrap().path
    fake.write_text(f'#!/bin/sh\nfor a in "$@"; do [ "$a" = --unshare-net ] && exit 1; done\nexec {real} "$@"\n')
    fake.chmod(0o755)
    provider = LocalProvider(tmp_path / "sandboxes", bubblewraps=[(str(fake), "fake")])
    assert "cannot limit which hosts" in provider.self_check()
    with pytest.raises(SandboxUnavailable) as refused:
        provider.create(SandboxSpec(egress=["example.com"]), metadata={})
    assert "SANDBOX_EGRESS=open" in refused.value.remedy
    assert provider.list({}) == []
    provider.create(metadata={}).kill()
    both = LocalProvider(tmp_path / "sandboxes", bubblewraps=[(str(fake), "fake"), (real, "real")])
    assert both.self_check().split(";")[0].endswith("(real)")


def test_a_list_that_cannot_be_read_is_refused_before_anything_is_made(provider: LocalProvider) -> None:
    with pytest.raises(InvalidEgress):
        provider.create(SandboxSpec(egress=["https://example.com"]), metadata={})
    assert provider.list({}) == []
