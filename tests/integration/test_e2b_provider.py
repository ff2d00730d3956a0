"""The cloud provider where the network, the service and the agent are at their worst.

What it does when all is well is in tests/contracts/test_sandbox.py.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudagent_queue.sandboxes import PROVIDERS, SandboxSpec, e2b_api, inside
from cloudagent_queue.sandboxes import e2b as e2b_provider
from cloudagent_queue.sandboxes.contract import until
from cloudagent_queue.sandboxes.e2b import E2BProvider, E2BSandbox, NovitaProvider
from cloudagent_storage.errors import (
    CloudAgentError,
    ProviderBusy,
    SandboxError,
    SandboxGone,
    SandboxUnavailable,
    SandboxUnreachable,
)
from tests.support.e2b_server.client import CREATE, FILES, START, E2bServer, e2b_server

ONE = "/sandboxes/[a-z0-9]+"
"""The path of one sandbox in the control plane."""
PAGE = "<html><h1>404 Not Found</h1><hr>nginx</html>"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[E2bServer]:
    with e2b_server(tmp_path_factory.mktemp("e2b") / "server") as running:
        yield running


@pytest.fixture(autouse=True)
def healthy(server: E2bServer, provider: E2BProvider) -> Iterator[None]:
    """No test leaves a fault or a sandbox to the next one."""
    yield
    server.heal()
    for info in provider.list({}):
        provider.connect(info.id).kill()


@pytest.fixture
def provider(server: E2bServer) -> E2BProvider:
    return E2BProvider(server.environment)


@pytest.fixture
def sandbox(provider: E2BProvider) -> E2BSandbox:
    return provider.create(metadata={"task": "1"})


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for what does not answer."""
    monkeypatch.setattr(e2b_provider, "DATA_S", 1.0)
    monkeypatch.setattr(e2b_api, "CONTROL_S", 1.0)
    monkeypatch.setattr(e2b_api, "KILL_S", 0.0)
    monkeypatch.setattr(e2b_provider, "TRY_AGAIN_WITHIN_S", 0.0)


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


def starts(server: E2bServer) -> int:
    return server.stats()["requests"].get(f"POST {START}", 0)


# -- gone, or out of reach ---------------------------------------------------------------------------------------------


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


# -- each thing once ---------------------------------------------------------------------------------------------------


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


# -- making sandboxes --------------------------------------------------------------------------------------------------


def test_a_create_says_what_the_sandbox_is_to_be(server: E2bServer, provider: E2BProvider) -> None:
    open_box = provider.create(metadata={"task": "é ü"})
    closed = provider.create(SandboxSpec(egress=()), metadata={})
    some = provider.create(SandboxSpec(egress=("packages.example.org", "api.example.com:8443", "*.example.net")), metadata={})
    asked = server.sandbox(open_box.id)["asked"]
    assert asked["timeout"] == 3600
    assert asked["metadata"]["task"] == "é ü"
    assert asked["allow_internet_access"] is True and not asked.get("network")
    assert asked["secure"] is True
    assert not asked.get("envVars")
    assert server.sandbox(closed.id)["asked"]["allow_internet_access"] is False
    network = server.sandbox(some.id)["asked"]["network"]
    assert sorted(network["allowOut"]) == ["*.example.net", "api.example.com", "packages.example.org"]
    assert network["denyOut"] == ["0.0.0.0/0"]
    assert open_box.resources is not None and (open_box.resources.cpus, open_box.resources.memory_mb) == (2, 512)
    assert [info.metadata for info in provider.list({"task": "é ü"})] == [{"task": "é ü"}]


@pytest.mark.parametrize("kind, status", [("answer_after", 500), ("answer_after", 502), ("hang_after", 0)])
def test_what_a_create_made_that_failed_is_adopted_and_never_made_twice(
    server: E2bServer, kind: str, status: int
) -> None:
    provider = E2BProvider(server.environment, create_s=2)
    before = server.stats()["created"]
    fault = server.fault(kind, CREATE, method="POST", **({"status": status} if status else {}))
    made = provider.create(metadata={"task": "1", "nonce": "n"})
    assert fault.fired == 1
    assert server.stats()["created"] - before == 1
    assert [info.id for info in provider.list({"nonce": "n"})] == [made.id]
    assert made.run(["echo", "works"], timeout_s=20).output == "works\n"


def test_a_failed_create_adopts_nobody_elses_sandbox(server: E2bServer, provider: E2BProvider) -> None:
    other = provider.create(metadata={"task": "1"})
    server.fault("answer", CREATE, method="POST", status=500)
    with pytest.raises(ProviderBusy):
        provider.create(metadata={"task": "1"})
    assert [info.id for info in provider.list({"task": "1"})] == [other.id]


@pytest.mark.parametrize("retry_after_s, expected", [(7, 7.0), (None, None)])
def test_a_service_that_asks_for_patience_is_taken_at_its_word(
    server: E2bServer, provider: E2BProvider, retry_after_s: int | None, expected: float | None
) -> None:
    before = server.stats()
    fault = server.rate_limit(retry_after_s=retry_after_s)
    with pytest.raises(ProviderBusy) as raised:
        provider.create(metadata={})
    assert raised.value.retry_after_s == expected
    assert fault.fired == 1
    asked = server.stats()["requests"]
    assert asked["POST /sandboxes"] - before["requests"].get("POST /sandboxes", 0) == 1


@pytest.mark.parametrize("status", [500, 502, 503, 504, 529, 408])
def test_a_sick_service_is_busy_and_leaves_nothing(server: E2bServer, provider: E2BProvider, status: int) -> None:
    before = server.stats()["created"]
    server.fault("answer", CREATE, method="POST", status=status, body="<html>sick</html>", headers={"Retry-After": "3"})
    with pytest.raises(ProviderBusy) as raised:
        provider.create(metadata={})
    assert raised.value.retry_after_s == 3
    assert server.stats()["created"] == before


def test_a_full_account_is_busy(server: E2bServer, provider: E2BProvider, sandbox: E2BSandbox) -> None:
    server.change(most_sandboxes=1)
    try:
        with pytest.raises(ProviderBusy, match="no room"):
            provider.create(metadata={})
    finally:
        server.change(most_sandboxes=1000)


def test_a_service_that_cannot_be_reached_is_busy_and_the_remedy_names_its_address(
    server: E2bServer, hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    gone = E2BProvider({**server.environment, "E2B_API_URL": f"http://127.0.0.1:{port}"})
    with pytest.raises(ProviderBusy) as raised:
        gone.create(metadata={})
    assert "E2B_DOMAIN" in raised.value.remedy
    with pytest.raises(ProviderBusy) as raised:
        NovitaProvider({"NOVITA_API_KEY": "nvta_x", "NOVITA_DOMAIN": "nowhere.invalid"}).create(metadata={})
    assert "NOVITA_DOMAIN" in raised.value.remedy


def refusal_of(provider: E2BProvider | NovitaProvider) -> SandboxUnavailable:
    with pytest.raises(SandboxUnavailable) as raised:
        provider.create(metadata={})
    assert type(raised.value) is SandboxUnavailable
    return raised.value


def test_a_missing_key_is_named() -> None:
    assert "NOVITA_API_KEY" in refusal_of(NovitaProvider({})).remedy
    assert "E2B_API_KEY" in refusal_of(E2BProvider({})).remedy


def test_a_wrong_key_is_named_and_never_shown(server: E2bServer) -> None:
    found = refusal_of(E2BProvider({**server.environment, "E2B_API_KEY": "e2b_wrong_key"}))
    assert "E2B_API_KEY" in found.remedy
    other = refusal_of(E2BProvider({**server.environment, "E2B_API_KEY": "nvta_wrong_key"}))
    assert "one of Novita's" in other.message and "SANDBOX_PROVIDER=novita" in other.remedy
    with pytest.raises(SandboxUnavailable, match="one of Novita's"):
        E2BProvider({**server.environment, "E2B_API_KEY": "nvta_wrong_key"}).self_check()
    assert "wrong_key" not in f"{found.as_dict()}{other.as_dict()}"


def test_an_unknown_template_is_told_from_an_unknown_api(server: E2bServer, provider: E2BProvider) -> None:
    unknown = refusal_of(E2BProvider({**server.environment, "SANDBOX_TEMPLATE": "no-such"}))
    assert "SANDBOX_TEMPLATE" in unknown.message and "ca template build --provider e2b" in unknown.remedy
    for answer in ({"status": 404, "body": PAGE}, {"status": 405}):
        server.fault("answer", CREATE, method="POST", **answer)
        found = refusal_of(provider)
        assert "version of the API" in found.message and "SANDBOX_TEMPLATE" not in found.remedy


def test_a_session_longer_than_the_plan_allows_is_named(server: E2bServer) -> None:
    server.change(session_cap_s=3600)
    try:
        found = refusal_of(E2BProvider({**server.environment, "SANDBOX_SESSION_MINUTES": "240"}))
        assert "SANDBOX_SESSION_MINUTES" in found.remedy
    finally:
        server.change(session_cap_s=24 * 3600)


def test_a_sandbox_is_kept_longer_when_asked_but_never_shorter_or_beyond_the_session(server: E2bServer) -> None:
    provider = E2BProvider({**server.environment, "SANDBOX_SESSION_MINUTES": "60"})
    assert provider.session_cap_s == 3600
    sandbox = provider.create(metadata={})
    sandbox.extend(60)
    sandbox.extend(10 * 3600)
    provider.connect(sandbox.id).alive()
    timeouts = server.sandbox(sandbox.id)["timeouts"]
    assert all(3500 <= seconds <= 3600 for seconds in timeouts)


def test_a_list_is_not_taken_from_a_service_that_cannot_filter(
    server: E2bServer, provider: E2BProvider, sandbox: E2BSandbox
) -> None:
    whole = provider._api.about(sandbox.id, _raw_list)  # pyright: ignore[reportPrivateUsage]
    assert len(whole) == 1
    fault = server.fault("answer", "/v2/sandboxes", status=200, body=whole)
    assert provider.list({"task": "2"}) == []
    assert fault.fired == 1


def _raw_list(sdk: Any, options: dict[str, Any]) -> list[Any]:
    import httpx

    found = httpx.get(f"{options['api_url']}/v2/sandboxes", headers={"X-API-KEY": options["api_key"]})
    return found.json()


def test_what_the_process_has_in_its_environment_is_not_mixed_in(
    server: E2bServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("E2B_API_KEY", "e2b_of_somebody_else")
    monkeypatch.setenv("E2B_API_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("E2B_SANDBOX_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("E2B_DEBUG", "true")
    provider = E2BProvider(server.environment)
    sandbox = provider.connect(provider.create(metadata={}).id)
    assert sandbox.run(["true"], timeout_s=20).exit_code == 0
    sandbox.kill()
    with pytest.raises(SandboxGone):
        sandbox.alive()
    novita = NovitaProvider({"NOVITA_API_KEY": "nvta_x"})._api  # pyright: ignore[reportPrivateUsage]
    assert novita.options()["api_url"] == "https://api.us-phx-1.sandbox.novita.ai"
    assert novita._data_url("i1", None) == "https://49983-i1.us-phx-1.sandbox.novita.ai"  # pyright: ignore[reportPrivateUsage]


# -- what is in a sandbox ----------------------------------------------------------------------------------------------


def test_a_sandbox_that_an_agent_has_broken_is_neither_gone_nor_out_of_reach(sandbox: E2BSandbox) -> None:
    sandbox.run(["rm", "-rf", inside.FOLDER], timeout_s=20)
    with pytest.raises(SandboxError) as raised:
        sandbox.alive()
    assert type(raised.value) is SandboxError


def test_an_agent_that_deletes_its_folder_loses_files_and_nothing_else(sandbox: E2BSandbox) -> None:
    sandbox.start(["sh", "-c", "rm -rf /home/user/sandbox; sleep 600"], env={})
    until(lambda: sandbox.read("home", max_bytes=1) == b"", "it did not happen")
    assert sandbox.alive()
    with pytest.raises(SandboxError, match="folder"):
        sandbox.run(["true"], timeout_s=20)


def test_the_secrets_of_a_started_command_are_in_no_process_list(sandbox: E2BSandbox) -> None:
    sandbox.start(["sleep", "600"], env={"ANTHROPIC_API_KEY": "sk-ant-canary"})
    script = "cat /proc/[0-9]*/cmdline | tr '\\0' ' '; ps -ef 2>/dev/null; true"
    seen = sandbox.run(["sh", "-c", script], timeout_s=20).output
    assert "sleep 600" in seen
    assert "canary" not in seen


def test_what_a_snapshot_holds_is_there_in_a_sandbox_made_from_it(provider: E2BProvider, sandbox: E2BSandbox) -> None:
    sandbox.write("kept", b"work")
    sandbox.run(["sh", "-c", "echo set up > setup.log"], timeout_s=20)
    template = sandbox.snapshot()
    assert template is not None
    assert sandbox.run(["cat", "kept"], timeout_s=20).output == "work"  # it goes on
    second = provider.create(SandboxSpec(template=template), metadata={})
    assert second.read("kept", max_bytes=10) == b"work"
    assert second.read("setup.log", max_bytes=10) == b"set up\n"
    second.start(["true"], env={})


def test_a_service_without_snapshots_has_none(server: E2bServer, sandbox: E2BSandbox) -> None:
    for status in (404, 405, 501):
        server.fault("answer", f"{ONE}/snapshots", status=status)
        assert sandbox.snapshot() is None
    assert not sandbox.alive()


def bare_template(server: E2bServer, provider: E2BProvider, tmp_path: Path, *, with_library: bool) -> str:
    """A template without the agent's library, whose pip knows a folder of packages and no index."""
    import importlib.metadata

    from e2b import Sandbox

    version = importlib.metadata.version("claude-agent-sdk")
    wheel = tmp_path / f"claude_agent_sdk-{version}-py3-none-any.whl"
    about = f"claude_agent_sdk-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("claude_agent_sdk/__init__.py", "")
        file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: claude-agent-sdk\nVersion: {version}\n")
        file.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{about}/RECORD", "")
    box = Sandbox.create("bare", timeout=600, **server.options)
    if with_library:
        box.files.write(f"/home/user/wheels/{wheel.name}", wheel.read_bytes())
    box.files.write("/home/user/.config/pip/pip.conf", "[global]\nno-index = true\nfind-links = /home/user/wheels\n")
    template = box.create_snapshot().snapshot_id
    box.kill()
    return template


@pytest.mark.skipif(
    subprocess.run(["/usr/bin/python3", "-c", "import venv, ensurepip"], capture_output=True, check=False).returncode
    != 0,
    reason="needs a /usr/bin/python3 that can make virtual environments",
)
def test_a_plain_sandbox_is_prepared_and_says_so(server: E2bServer, provider: E2BProvider, tmp_path: Path) -> None:
    template = bare_template(server, provider, tmp_path, with_library=True)
    sandbox = provider.create(SandboxSpec(template=template), metadata={})
    assert sandbox.remark is not None and "Prepared a plain sandbox" in sandbox.remark
    found = sandbox.run(
        [sandbox.python, "-c", "import claude_agent_sdk; print(claude_agent_sdk.__file__)"], timeout_s=20
    )
    assert found.output.startswith(f"{inside.FOLDER}/venv/")


def test_a_plain_sandbox_that_cannot_be_prepared_is_killed(
    server: E2bServer, provider: E2BProvider, tmp_path: Path
) -> None:
    template = bare_template(server, provider, tmp_path, with_library=False)
    with pytest.raises(SandboxUnavailable) as raised:
        provider.create(SandboxSpec(template=template), metadata={"task": "plain"})
    assert "ca template build --provider e2b" in raised.value.remedy
    assert provider.list({"task": "plain"}) == []


# -- ca doctor ---------------------------------------------------------------------------------------------------------


def doctor(server: E2bServer, tmp_path: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cloudagent_mcp", "doctor", *arguments],
        env={"PATH": os.environ["PATH"], "CLOUDAGENT_HOME": str(tmp_path), **server.environment, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_doctor_tries_a_provider_tells_each_step_and_leaves_nothing(server: E2bServer, tmp_path: Path) -> None:
    out, err = (process := doctor(server, tmp_path, "--provider", "e2b", "--json")).communicate(timeout=110)
    findings = json.loads(out)
    assert process.returncode == 0, (err, [finding for finding in findings if not finding["ok"]])
    assert len(findings) > 20 and all(finding["seconds"] is not None for finding in findings[1:])
    assert server.stats()["living"] == 0


def test_the_doctor_says_what_to_change(server: E2bServer, tmp_path: Path) -> None:
    out, _ = (process := doctor(server, tmp_path, "--provider", "e2b", E2B_API_KEY="nvta_secret")).communicate(
        timeout=60
    )
    assert process.returncode == 1
    assert "E2B_API_KEY" in out and "nvta_secret" not in out
    _, err = (process := doctor(server, tmp_path, "--provider", "nowhere")).communicate(timeout=60)
    assert process.returncode == 2
    assert all(name in err for name in PROVIDERS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_doctor_kills_what_it_made_when_it_is_interrupted(
    server: E2bServer, tmp_path: Path, number: signal.Signals
) -> None:
    before = server.stats()["created"]
    process = doctor(server, tmp_path, "--provider", "e2b")
    until(lambda: server.stats()["created"] > before, "it did not happen")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert server.stats()["living"] == 0
