"""The test server is what it says: E2B's own SDK, unmodified, finds there what it finds at E2B; each fault hits."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from connectrpc.errors import ConnectError
from e2b import (
    AuthenticationException,
    BuildException,
    CommandExitException,
    FileNotFoundException,
    InvalidArgumentException,
    RateLimitException,
    Sandbox,
    SandboxException,
    SandboxNotFoundException,
    SandboxQuery,
    Template,
    TimeoutException,
)

from tests.support.e2b_server.client import CREATE, FILES, START, E2bServer, e2b_server
from tests.support.worlds import until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[E2bServer]:
    folder = tmp_path_factory.mktemp("e2b") / "server"
    with e2b_server(folder) as server:
        yield server
        assert len((folder / "log").read_text().splitlines()) == 1, "the server had an error of its own"


@pytest.fixture(autouse=True)
def healthy(server: E2bServer) -> Iterator[None]:
    """No test leaves a fault or a sandbox to the next one."""
    yield
    server.heal()
    for sandbox in server.sandboxes():
        if sandbox["alive"]:
            server.vanish(sandbox["id"])


@pytest.fixture
def sandbox(server: E2bServer) -> Sandbox:
    return Sandbox.create(timeout=300, **server.options)


def test_a_command_runs_in_a_place_of_its_own_with_what_it_printed_and_how_it_ended(sandbox: Sandbox) -> None:
    seen: list[str] = []
    done = sandbox.commands.run("echo out; echo err >&2; pwd; id -un; echo $A", envs={"A": "ü"}, on_stdout=seen.append)
    assert (done.exit_code, done.stderr) == (0, "err\n")
    assert done.stdout == "".join(seen) == "out\n/home/user\nuser\nü\n"
    with pytest.raises(CommandExitException) as failed:
        sandbox.commands.run("exit 3")
    assert (failed.value.exit_code, failed.value.error) == (3, "exit status 3")
    with pytest.raises(InvalidArgumentException, match="cwd '/nowhere' does not exist"):
        sandbox.commands.run("true", cwd="/nowhere")
    assert sandbox.commands.run("pwd", cwd="/tmp").stdout == "/tmp\n"


def test_much_output_arrives_whole(sandbox: Sandbox) -> None:
    done = sandbox.commands.run("head -c 3000000 /dev/zero | tr '\\0' x; echo end >&2")
    assert (len(done.stdout), done.stderr) == (3_000_000, "end\n")


def test_long_commands_and_large_folders_pass(sandbox: Sandbox) -> None:
    done = sandbox.commands.run(
        f"mkdir many; touch many/{{1..1500}}; : {'x' * 100_000}; echo $L", envs={"L": "y" * 90_000}
    )
    assert len(done.stdout) == 90_001
    assert len(sandbox.files.list("many")) == 1500


def test_the_agents_library_is_there_unless_the_template_lacks_it(server: E2bServer, sandbox: Sandbox) -> None:
    sandbox.commands.run("python3 -c 'import claude_agent_sdk'")
    bare = Sandbox.create("bare", **server.options)
    with pytest.raises(CommandExitException):
        bare.commands.run("python3 -c 'import claude_agent_sdk'")


def test_sandboxes_see_neither_each_other_nor_the_host(server: E2bServer, sandbox: Sandbox) -> None:
    other = Sandbox.create(**server.options)
    sandbox.files.write("secret", "mine")
    sandbox.files.write("/tmp/secret", "mine")
    assert not other.files.exists("secret") and not other.files.exists("/tmp/secret")
    folder = server.sandbox(sandbox.sandbox_id)["home"]
    assert Path(folder, "secret").read_text() == "mine"
    assert not other.files.exists(folder) and not other.files.exists(str(Path(__file__)))
    assert other.commands.run("ps -e -o comm=").stdout.split().count("bash") <= 1


def test_files_are_written_and_read_in_every_way_of_the_sdk(sandbox: Sandbox, tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    big = tmp_path / "big"
    big.write_bytes(content)
    files = sandbox.files
    assert files.write("deep/er/ä b", content).path == "/home/user/deep/er/ä b"
    with big.open("rb") as stream:
        files.write("/tmp/streamed", stream)
    files.write("gzipped", content, gzip=True)
    files.write_files([{"path": "one", "data": "1"}, {"path": "/home/user/two", "data": b"2"}])
    for path in ("deep/er/ä b", "/tmp/streamed", "gzipped"):
        assert files.read(path, format="bytes") == content, path
    assert b"".join(files.read("gzipped", format="stream")) == content
    assert (files.read("one"), files.read("two")) == ("1", "2")
    files.write("one", "")
    assert files.read("one") == ""
    assert {entry.name for entry in files.list(".")} == {"deep", "gzipped", "one", "two"}
    assert {entry.path for entry in files.list("~", depth=3)} >= {"/home/user/deep/er", "/home/user/deep/er/ä b"}
    assert (files.make_dir("new/er"), files.make_dir("new/er")) == (True, False)
    assert files.rename("two", "new/two").path == "/home/user/new/two"
    assert files.get_info("new/two").size == 1
    files.remove("new")
    assert not files.exists("new")
    for missing in (lambda: files.read("no"), lambda: files.list("no"), lambda: files.get_info("no")):
        with pytest.raises(FileNotFoundException):
            missing()
    with pytest.raises(InvalidArgumentException, match="is a directory"):
        files.read("deep")


def test_a_command_in_the_background_is_listed_fed_and_killed(sandbox: Sandbox) -> None:
    cat = sandbox.commands.run("cat; echo done", background=True, stdin=True, timeout=0)
    assert [process.pid for process in sandbox.commands.list()] == [cat.pid]
    sandbox.commands.send_stdin(cat.pid, "a line\n")
    sandbox.commands.close_stdin(cat.pid)
    assert cat.wait().stdout == "a line\ndone\n"
    sleeping = sandbox.commands.run("sleep 1000", background=True, timeout=0)
    assert sandbox.commands.kill(sleeping.pid)
    with pytest.raises(CommandExitException) as killed:
        sleeping.wait()
    assert (killed.value.exit_code, killed.value.error) == (-1, "signal: killed")
    assert not sandbox.commands.kill(sleeping.pid)
    assert sandbox.commands.list() == []


def test_what_a_command_detached_lives_on_until_the_sandbox_is_killed(server: E2bServer, sandbox: Sandbox) -> None:
    detach = "setsid nohup sh -c 'while :; do date +%s%N >tick; sleep 0.05; done' >/dev/null 2>&1 &"
    sandbox.commands.run(detach)
    sandbox.commands.run("( ( sleep 1000 & ) ) >/dev/null 2>&1")
    _ticks(sandbox)
    first = psutil.Process(server.sandbox(sandbox.sandbox_id)["first_process"])
    inside = [first, *first.children(recursive=True)]
    assert len(inside) >= 4
    assert sandbox.kill()
    assert not [process for process in inside if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_the_end_of_its_time_kills_a_command_and_a_dropped_stream_does_not(server: E2bServer, sandbox: Sandbox) -> None:
    with pytest.raises(TimeoutException, match="timeout"):
        sandbox.commands.run("echo $$ >pid; exec sleep 1000", timeout=1)
    until(lambda: sandbox.commands.list() == [], "the command is killed at its deadline")
    handle = sandbox.commands.run("sleep 1000", background=True, timeout=0)
    until(lambda: server.stats()["streams"] == 1, "the stream is open")
    handle.disconnect()
    until(lambda: server.stats()["streams"] == 0, "the stream is closed")
    assert [process.pid for process in sandbox.commands.list()] == [handle.pid]


def test_who_connects_to_a_command_hears_what_comes_and_not_what_was(sandbox: Sandbox) -> None:
    script = "echo early; touch begun; until [ -e go ]; do sleep 0.02; done; echo late; exit 4"
    first = sandbox.commands.run(script, background=True, timeout=0)
    until(lambda: sandbox.files.exists("begun"), "it has printed something")
    second = sandbox.commands.connect(first.pid, timeout=0)
    sandbox.files.write("go", "")
    with pytest.raises(CommandExitException) as ended:
        second.wait()
    assert (ended.value.exit_code, ended.value.stdout) == (4, "late\n")
    with pytest.raises(CommandExitException) as ended:
        first.wait()
    assert ended.value.stdout == "early\nlate\n"
    with pytest.raises(CommandExitException) as ended:  # how it ended is remembered
        sandbox.commands.connect(first.pid).wait()
    assert (ended.value.exit_code, ended.value.stdout) == (4, "")
    with pytest.raises(SandboxException, match="process with pid 99999 not found"):
        sandbox.commands.connect(99999)


def test_a_command_has_not_ended_while_something_holds_its_output(sandbox: Sandbox) -> None:
    handle = sandbox.commands.run("sleep 1000 & exit 0", background=True, timeout=0)
    until(lambda: not sandbox.files.exists(f"/proc/{handle.pid}"), "the command itself has exited")
    assert [process.pid for process in sandbox.commands.list()] == [handle.pid]
    sandbox.commands.run("pkill sleep")
    assert handle.wait().exit_code == 0


def test_sandboxes_are_listed_by_metadata_and_tell_what_was_asked(server: E2bServer) -> None:
    network: Any = {"allow_out": ["example.com"], "deny_out": ["0.0.0.0/0"]}
    metadata = {"deployment": "d 1", "ta&sk": "ü=2"}
    one = Sandbox.create(
        metadata=metadata, timeout=77, envs={"A": "1"}, network=network, allow_internet_access=False, **server.options
    )
    Sandbox.create(metadata={"deployment": "d 1"}, **server.options)
    assert one.commands.run("echo $A $E2B_SANDBOX_ID").stdout == f"1 {one.sandbox_id}\n"

    def listed(**metadata: str) -> list[str]:
        return [found.sandbox_id for found in _pages(server, SandboxQuery(metadata=metadata))]

    assert len(listed(deployment="d 1")) == 2
    assert listed(**metadata) == [one.sandbox_id]
    assert listed(deployment="d") == []
    info = one.get_info()
    assert (info.metadata, info.name, info.cpu_count, info.memory_mb) == (metadata, "base", 2, 512)
    assert 70 < (info.end_at - info.started_at).total_seconds() < 80
    one.set_timeout(200)
    record = server.sandbox(one.sandbox_id)
    assert record["timeouts"] == [200]
    assert record["asked"]["allow_internet_access"] is False
    assert (record["network"]["allowOut"], record["network"]["denyOut"]) == (["example.com"], ["0.0.0.0/0"])
    one.update_network({"allow_out": ["other.example"]})
    assert server.sandbox(one.sandbox_id)["network"]["allowOut"] == ["other.example"]


def test_a_sandbox_is_found_again_by_its_id_and_what_is_gone_is_said_to_be(server: E2bServer, sandbox: Sandbox) -> None:
    sandbox.files.write("kept", "yes")
    again = Sandbox.connect(sandbox.sandbox_id, **server.options)
    assert again.files.read("kept") == "yes"
    assert again.kill() and not again.kill()
    for call in (
        sandbox.get_info,
        lambda: Sandbox.connect(sandbox.sandbox_id, **server.options),
        lambda: sandbox.set_timeout(9),
    ):
        with pytest.raises(SandboxNotFoundException):
            call()
    with pytest.raises(TimeoutException, match="The sandbox was not found"):
        sandbox.commands.run("true")
    with pytest.raises(TimeoutException, match="The sandbox was not found"):
        sandbox.files.read("kept")
    assert not sandbox.is_running()
    assert _pages(server) == []


def test_a_wrong_key_and_a_wrong_token_open_nothing(server: E2bServer, sandbox: Sandbox) -> None:
    with pytest.raises(AuthenticationException, match="Invalid API key"):
        Sandbox.create(api_key="e2b_wrong", api_url=server.url, sandbox_url=server.url)
    refused = httpx.get(f"{server.url}/v2/sandboxes")
    assert (refused.status_code, refused.json()["code"]) == (401, 401)
    headers = {"E2b-Sandbox-Id": sandbox.sandbox_id, "X-Access-Token": "wrong"}
    assert httpx.get(f"{server.url}/files", params={"path": "x"}, headers=headers).status_code == 401
    assert server.stats()["living"] == 1


def test_an_unknown_template_is_refused_as_e2b_does(server: E2bServer) -> None:
    with pytest.raises(SandboxException, match="404: template 'nope' not found") as refused:
        Sandbox.create("nope", **server.options)
    assert refused.value.status_code == 404


def test_a_sandbox_ends_itself_when_its_time_is_up(server: E2bServer) -> None:
    sandbox = Sandbox.create(timeout=300, **server.options)
    handle = sandbox.commands.run("sleep 1000", background=True, timeout=0)
    sandbox.set_timeout(1)
    with pytest.raises(TimeoutException, match="was killed or reached its end of life"):
        handle.wait()
    assert not server.sandbox(sandbox.sandbox_id)["alive"]
    with pytest.raises(SandboxNotFoundException):
        sandbox.get_info()


def test_nobody_gets_more_time_than_the_session_cap(server: E2bServer) -> None:
    server.change(session_cap_s=3600)
    try:
        with pytest.raises(SandboxException, match="400: Timeout cannot be greater than 1 hours"):
            Sandbox.create(timeout=3601, **server.options)
        sandbox = Sandbox.create(timeout=60, **server.options)
        with pytest.raises(SandboxException, match="400: Max instance length exceeded"):
            sandbox.set_timeout(3700)
        server.change(refuse_beyond_cap=False)
        sandbox.set_timeout(7200)
        info = sandbox.get_info()
        assert (info.end_at - info.started_at).total_seconds() <= 3601
    finally:
        server.change(session_cap_s=86400, refuse_beyond_cap=True)


def test_a_full_quota_is_a_429_that_says_so(server: E2bServer) -> None:
    server.change(most_sandboxes=1)
    try:
        Sandbox.create(**server.options)
        with pytest.raises(RateLimitException, match=r"maximum number of concurrent E2B sandboxes \(1\)"):
            Sandbox.create(**server.options)
    finally:
        server.change(most_sandboxes=1000)


def test_a_snapshot_is_a_template_with_the_files_of_then(server: E2bServer, sandbox: Sandbox) -> None:
    sandbox.commands.run("echo then >file; ln -s file link; mkfifo pipe; mkdir -m 500 fixed")
    snapshot = sandbox.create_snapshot()
    sandbox.files.write("file", "now")
    later = Sandbox.create(snapshot.snapshot_id, **server.options)
    assert later.files.read("link") == "then\n"
    assert Sandbox.delete_snapshot(snapshot.snapshot_id, **server.options)
    with pytest.raises(SandboxException, match="404: template"):
        Sandbox.create(snapshot.snapshot_id, **server.options)


def test_a_template_is_built_and_its_steps_can_be_read_back(server: E2bServer, tmp_path: Path) -> None:
    (tmp_path / "runner.py").write_text("print()")
    template = (
        Template(file_context_path=tmp_path)
        .from_node_image("24")
        .apt_install(["git", "ripgrep"])
        .copy("runner.py", "/opt/runner.py")
        .run_cmd("pip install claude-agent-sdk")
        .set_start_cmd("sleep infinity", "true")
    )
    options = {name: value for name, value in server.options.items() if name != "sandbox_url"}
    logs: list[str] = []
    built = Template.build(
        template, "made:v1", cpu_count=4, memory_mb=2048, on_build_logs=lambda log: logs.append(log.message), **options
    )
    build = next(build for build in server.builds() if build["id"] == built.build_id)
    assert (build["status"], build["requested"]["cpuCount"], len(build["uploads"])) == ("ready", 4, 1)
    assert build["started"]["fromImage"] == "node:24"
    assert [step["type"] for step in build["started"]["steps"]] == ["RUN", "COPY", "RUN"]
    assert "pip install claude-agent-sdk" in build["started"]["steps"][2]["args"][0]
    assert any("pip install claude-agent-sdk" in line for line in logs)
    assert Template.exists("made", **options) and not Template.exists("other", **options)
    assert Sandbox.create("made", **server.options).get_info().cpu_count == 4
    server.fail_next_build(step=2, message="Command failed: exit status 1")
    with pytest.raises(BuildException, match="Command failed: exit status 1"):
        Template.build(template, "broken", **options)
    with pytest.raises(SandboxException, match="404"):
        Sandbox.create("broken", **server.options)


def test_429_is_waited_out_by_the_sdk_and_shown_when_it_lasts(server: E2bServer) -> None:
    limit = server.rate_limit(retry_after_s=0)
    Sandbox.create(**server.options)
    assert (limit.fired, server.stats()["created"]) == (1, _created(server))
    lasting = server.rate_limit(retry_after_s=0, count=None)
    with pytest.raises(RateLimitException):
        Sandbox.create(**server.options, retries=2)
    assert lasting.fired == 3


def test_5xx_creates_nothing_and_500_after_creating_leaves_a_sandbox(server: E2bServer) -> None:
    created = _created(server)
    refused = server.fault("answer", CREATE, status=503)
    with pytest.raises(Exception, match="503: Service temporarily unavailable"):
        Sandbox.create(**server.options)
    assert (refused.fired, _created(server)) == (1, created)
    late = server.fault("answer_after", CREATE, status=500)
    with pytest.raises(SandboxException, match="500"):
        Sandbox.create(metadata={"nonce": "n1"}, **server.options)
    assert late.fired == 1
    assert len(_pages(server, SandboxQuery(metadata={"nonce": "n1"}))) == 1


def test_a_create_that_is_never_answered_may_have_created(server: E2bServer) -> None:
    for kind, expected in (("hang", 0), ("hang_after", 1)):
        fault = server.fault(kind, CREATE)
        with pytest.raises(httpx.TimeoutException):
            Sandbox.create(metadata={"nonce": kind}, request_timeout=1, **server.options)
        assert fault.fired == 1
        assert len(_pages(server, SandboxQuery(metadata={"nonce": kind}))) == expected


def test_a_slow_create_is_slow_and_creates(server: E2bServer) -> None:
    fault = server.fault("delay", CREATE, seconds=0.5)
    began = time.monotonic()
    Sandbox.create(**server.options)
    assert time.monotonic() - began >= 0.5
    assert fault.fired == 1


@pytest.mark.parametrize("kind", ["cut", "half_close"])
def test_a_broken_stream_is_an_error_and_its_command_goes_on(server: E2bServer, sandbox: Sandbox, kind: str) -> None:
    fault = server.fault(kind, START, after_bytes=300)
    handle = sandbox.commands.run(
        "for i in $(seq 150); do echo $i; sleep 0.01; done; touch end", background=True, timeout=0
    )
    heard: list[str] = []
    # To the SDK, the second looks like the end of the sandbox's time.
    expected, words = (ConnectError, "[Cc]onnection reset") if kind == "cut" else (TimeoutException, "sandbox timeout")
    with pytest.raises(expected, match=words):
        handle.wait(on_stdout=heard.append)
    assert fault.fired == 1
    assert "150\n" not in "".join(heard)
    assert sandbox.is_running()
    assert sandbox.commands.connect(handle.pid, timeout=0).wait().stdout.endswith("150\n")
    assert sandbox.files.exists("end")


def test_a_stalled_stream_says_nothing_until_its_own_time_is_up(server: E2bServer, sandbox: Sandbox) -> None:
    fault = server.fault("stall", START, after_bytes=100)
    handle = sandbox.commands.run("while :; do date; sleep 0.01; done", background=True, timeout=3)
    with pytest.raises(TimeoutException, match="exceeding 'timeout'"):
        handle.wait()
    assert fault.fired == 1


def test_a_trickle_is_slow_and_whole(server: E2bServer, sandbox: Sandbox) -> None:
    sandbox.files.write("slow", "0123456789")
    fault = server.fault("trickle", FILES, bytes_per_s=50)
    began = time.monotonic()
    assert sandbox.files.read("slow") == "0123456789"
    assert time.monotonic() - began >= 0.2
    assert fault.fired == 1


def test_a_cut_download_is_an_error_and_no_short_file(server: E2bServer, sandbox: Sandbox) -> None:
    sandbox.files.write("big", b"x" * 2_000_000)
    fault = server.fault("cut", FILES, method="GET", after_bytes=1000)
    with pytest.raises(httpx.TransportError):
        sandbox.files.read("big", format="bytes")
    assert fault.fired == 1
    assert len(sandbox.files.read("big", format="bytes")) == 2_000_000


def test_a_sandbox_that_vanishes_breaks_its_streams_and_is_gone(server: E2bServer, sandbox: Sandbox) -> None:
    handle = sandbox.commands.run("sleep 1000", background=True, timeout=0)
    server.vanish(sandbox.sandbox_id)
    with pytest.raises(TimeoutException, match="was killed or reached its end of life"):
        handle.wait()
    with pytest.raises(SandboxNotFoundException):
        sandbox.get_info()


def test_a_frozen_sandbox_answers_nothing_and_goes_on_when_it_thaws(server: E2bServer, sandbox: Sandbox) -> None:
    other = Sandbox.create(**server.options)
    sandbox.commands.run("nohup sh -c 'while :; do date +%s%N >tick; sleep 0.02; done' >/dev/null 2>&1 &")
    _ticks(sandbox)
    server.freeze_sandbox(sandbox.sandbox_id)
    tick = Path(server.sandbox(sandbox.sandbox_id)["home"], "tick")
    before = tick.read_text()
    with pytest.raises(TimeoutException):
        sandbox.commands.list(request_timeout=1)
    assert tick.read_text() == before
    assert other.commands.run("echo fine").stdout == "fine\n"
    assert sandbox.get_info().sandbox_id == sandbox.sandbox_id  # the control plane does not know
    server.thaw_sandbox(sandbox.sandbox_id)
    _ticks(sandbox)


def test_a_frozen_server_answers_nothing_and_goes_on_when_it_thaws(server: E2bServer, sandbox: Sandbox) -> None:
    handle = sandbox.commands.run("until [ -e go ]; do sleep 0.02; done; echo gone on", background=True, timeout=0)
    server.freeze()
    try:
        with pytest.raises(httpx.TimeoutException):
            sandbox.get_info(request_timeout=1)
    finally:
        server.thaw()
    sandbox.files.write("go", "")
    assert handle.wait().stdout == "gone on\n"


def test_a_fault_takes_only_what_it_is_for(server: E2bServer, sandbox: Sandbox) -> None:
    other = Sandbox.create(**server.options)
    fault = server.fault("answer", FILES, method="GET", sandbox=other.sandbox_id, skip=1, status=500)
    for box in (sandbox, other):
        box.files.write("f", "x")
        assert box.files.read("f") == "x"
    assert sandbox.files.read("f") == "x"
    with pytest.raises(SandboxException, match="500"):
        other.files.read("f")
    assert other.files.read("f") == "x"
    assert fault.fired == 1


def test_many_streams_are_held_at_once(server: E2bServer, sandbox: Sandbox) -> None:
    results: list[str] = []

    def follow() -> None:
        handle = sandbox.commands.run("until [ -e go ]; do sleep 0.5; done; echo $$", background=True, timeout=0)
        results.append(handle.wait().stdout)

    threads = [threading.Thread(target=follow) for _ in range(60)]
    for thread in threads:
        thread.start()
    until(lambda: server.stats()["streams"] == 60, "all streams are open")
    sandbox.files.write("go", "")
    for thread in threads:
        thread.join()
    assert len(set(results)) == 60


@pytest.mark.parametrize("frozen", [False, True])
def test_neither_server_nor_sandbox_outlives_who_started_it(tmp_path: Path, frozen: bool) -> None:
    program = (
        "import json, sys, pathlib; from e2b import Sandbox; from tests.support.e2b_server.client import E2bServer\n"
        "server = E2bServer(pathlib.Path(sys.argv[1])); sandbox = Sandbox.create(**server.options)\n"
        "sandbox.commands.run('setsid sleep 1000 >/dev/null 2>&1 &')\n"
        "if sys.argv[2] == 'True': server.freeze_sandbox(sandbox.sandbox_id); server.freeze()\n"
        "print(server.pid, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "server"), str(frozen)]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdout is not None
        process = psutil.Process(int(starter.stdout.readline()))
        everything = [process, *process.children(recursive=True)]
        assert len(everything) >= 5
        starter.send_signal(signal.SIGKILL)
    until(lambda: not any(one.is_running() for one in everything), "all is ended")
    until(lambda: not (tmp_path / "server").exists(), "the folder is deleted")


def test_it_serves_one_who_is_not_root(tmp_path: Path) -> None:
    """A user without any right beyond his own: another name for us, in a user namespace."""
    program = (
        "import sys, pathlib, os; from e2b import Sandbox; from tests.support.e2b_server.client import e2b_server\n"
        "with e2b_server(pathlib.Path(sys.argv[1])) as server:\n"
        "    sandbox = Sandbox.create(**server.options)\n"
        "    sandbox.commands.run('setsid nohup sleep 1000 >/dev/null 2>&1 &'); sandbox.files.write('a', 'b')\n"
        "    print(os.getuid(), sandbox.commands.run('id -u; cat a; pgrep -c sleep').stdout.split(), sandbox.kill())"
    )
    command = ["unshare", "--user", "--map-user=4321", "--map-group=4321", sys.executable, "-c", program]
    done = subprocess.run(
        [*command, str(tmp_path / "server")], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    if "unshare" in done.stderr:
        pytest.skip(f"this machine makes no other user: {done.stderr.strip()}")
    assert (done.stdout, done.stderr) == ("4321 ['1000', 'b1'] True\n", "")


def _ticks(sandbox: Sandbox) -> None:
    """Returns when a process of the sandbox writes `tick` again and again."""
    until(lambda: sandbox.files.exists("tick"), "it has begun")
    seen = sandbox.files.read("tick")
    until(lambda: sandbox.files.read("tick") not in ("", seen), "it goes on")


def _pages(server: E2bServer, query: SandboxQuery | None = None) -> list[Any]:
    """All that is listed, from pages of one."""
    pages = Sandbox.list(query=query, limit=1, **server.options)
    found: list[Any] = []
    while pages.has_next:
        found += pages.next_items()
    return found


def _created(server: E2bServer) -> int:
    return server.stats()["created"]
