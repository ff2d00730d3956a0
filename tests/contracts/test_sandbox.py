"""What every sandbox provider promises."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from cloudagent_queue.sandboxes import PLAIN, Provider, Sandbox, SandboxSpec
from cloudagent_queue.sandboxes.local import LocalProvider, LocalSandbox, UnsafeProcessProvider
from cloudagent_storage.errors import SandboxError, SandboxGone


class Closed(LocalProvider):
    """`local`, with a network of its own for each sandbox: everything else is as it was."""

    def create(self, spec: SandboxSpec = PLAIN, *, metadata: Mapping[str, str]) -> LocalSandbox:
        return super().create(replace(spec, egress=["example.com"]), metadata=metadata)


PROVIDERS: Mapping[str, Callable[[Path], Provider]] = {
    "local": LocalProvider,
    "local, closed": Closed,
    "unsafe-process": UnsafeProcessProvider,
}

AWKWARD = 'it\'s "quoted" $(id) `id` \\ \n second line\ttab · 漢字 🦀 '

# Runs on as a process that has left its parents, its session and its signals behind, and holds a lock to tell of it.
ESCAPED = """
import fcntl, os, signal, sys, time
if os.fork():
    while not os.path.exists("held"):
        time.sleep(0.01)
    if sys.argv[1:] == ["stay"]:
        time.sleep(600)
    sys.exit(0)
os.setsid()
if os.fork():
    os._exit(0)
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
null = os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(null, stream)
lock = open("lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
open("held", "w").close()
time.sleep(600)
"""
LOCK_IS_FREE = "import fcntl; fcntl.flock(open('lock'), fcntl.LOCK_EX | fcntl.LOCK_NB)"

START_AND_DIE = """
import os, pathlib, signal, sys
from cloudagent_queue.sandboxes.local import LocalProvider, UnsafeProcessProvider
provider = {"local": LocalProvider, "unsafe-process": UnsafeProcessProvider}[sys.argv[1]](pathlib.Path(sys.argv[2]))
sandbox = provider.create(metadata={})
sandbox.start(["sh", "-c", "echo begun > begun; until [ -e go ]; do sleep 0.02; done; echo ended > ended"], env={})
print(sandbox.id, flush=True)
os.killpg(0, signal.SIGKILL)
"""


STANDARD_SIGNALS = 0x7FFF_FFFF
"""1 to 31; the two after them are the C library's own."""


def wait_until(condition: Callable[[], object], *, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def has(sandbox: Sandbox, path: str) -> Callable[[], bool]:
    return lambda: sandbox.read(path, max_bytes=1) != b""


def ended(sandbox: Sandbox) -> Callable[[], bool]:
    return lambda: not sandbox.alive()


@pytest.fixture(params=PROVIDERS)
def provider(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Provider]:
    made = PROVIDERS[request.param](tmp_path / "sandboxes")
    made.self_check()
    yield made
    for left in made.list({}):
        made.connect(left.id).kill()


@pytest.fixture
def sandbox(provider: Provider) -> Sandbox:
    return provider.create(metadata={"task": "task_1"})


def test_a_started_command_outlives_the_process_that_started_it(provider: Provider, tmp_path: Path) -> None:
    starter = subprocess.run(
        [sys.executable, "-c", START_AND_DIE, provider.name, str(tmp_path / "sandboxes")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        start_new_session=True,
    )
    assert starter.returncode == -9, starter.stderr
    adopted = provider.connect(starter.stdout.strip())
    assert adopted.alive()
    wait_until(has(adopted, "begun"))
    adopted.write("go", b"")
    wait_until(ended(adopted))
    assert adopted.read("ended", max_bytes=100) == b"ended\n"


def test_a_command_runs_once_in_the_life_of_a_sandbox(sandbox: Sandbox) -> None:
    assert not sandbox.alive()
    sandbox.start(["true"], env={})
    wait_until(ended(sandbox))
    with pytest.raises(SandboxError):
        sandbox.start(["true"], env={})


def test_a_started_command_begins_in_the_root_with_its_environment(sandbox: Sandbox) -> None:
    script = "import json, os; json.dump([os.getcwd(), os.environ['AWKWARD'], os.environ['HOME']], open('seen', 'w'))"
    sandbox.start([sandbox.python, "-c", script], env={"AWKWARD": AWKWARD})
    wait_until(ended(sandbox))
    seen = json.loads(sandbox.read("seen", max_bytes=10_000))
    assert seen == [sandbox.root, AWKWARD, f"{sandbox.root}/home"]


def test_output_is_read_on_from_an_offset(sandbox: Sandbox) -> None:
    sandbox.start(
        ["sh", "-c", "mkdir run; echo one >> run/log; until [ -e go ]; do sleep 0.02; done; echo two >> run/log"],
        env={},
    )
    wait_until(has(sandbox, "run/log"))
    first = sandbox.read("run/log", max_bytes=1000)
    assert first == b"one\n"
    assert sandbox.read("run/log", offset=len(first), max_bytes=1000) == b""
    sandbox.write("go", b"")
    wait_until(ended(sandbox))
    assert sandbox.read("run/log", offset=len(first), max_bytes=1000) == b"two\n"
    assert sandbox.read("run/log", offset=1, max_bytes=4) == b"ne\nt"
    assert sandbox.read("run/log", offset=10**12, max_bytes=10) == b""


def test_ending_the_processes_reaches_one_that_hides_and_keeps_the_files(provider: Provider, sandbox: Sandbox) -> None:
    sandbox.write("escaped.py", ESCAPED.encode())
    sandbox.start([sandbox.python, "escaped.py"], env={})
    wait_until(ended(sandbox))
    assert sandbox.run([sandbox.python, "-c", LOCK_IS_FREE], timeout_s=20).exit_code == 1
    provider.connect(sandbox.id).end_processes()
    assert sandbox.run([sandbox.python, "-c", LOCK_IS_FREE], timeout_s=20).exit_code == 0
    assert sandbox.read("escaped.py", max_bytes=10_000) == ESCAPED.encode()
    assert not sandbox.alive()


def test_a_stopped_command_can_clean_up(provider: Provider, sandbox: Sandbox) -> None:
    script = "trap 'echo clean > cleaned; exit' TERM; echo > ready; while :; do sleep 0.02; done"
    sandbox.start(["sh", "-c", script], env={})
    wait_until(has(sandbox, "ready"))
    provider.connect(sandbox.id).stop()
    wait_until(ended(sandbox))
    assert sandbox.read("cleaned", max_bytes=100) == b"clean\n"
    sandbox.stop()


def test_a_command_that_is_stopped_at_once_ends(sandbox: Sandbox) -> None:
    sandbox.start(["sleep", "600"], env={})
    sandbox.stop()
    wait_until(ended(sandbox))


def test_a_command_runs_to_its_end_and_tells_its_code_and_output(sandbox: Sandbox) -> None:
    done = sandbox.run(["sh", "-c", 'printf "%s" "$1"; echo err >&2; exit 7', "sh", AWKWARD], timeout_s=20)
    assert (done.exit_code, done.output) == (7, f"{AWKWARD}err\n")
    assert sandbox.run(["sh", "-c", "kill -9 $$"], timeout_s=20).exit_code == 137
    assert sandbox.run(["no-such-command"], timeout_s=20).exit_code == 127


def test_a_command_runs_beside_the_started_one(sandbox: Sandbox) -> None:
    sandbox.start(["sleep", "600"], env={})
    assert sandbox.run(["true"], timeout_s=20).exit_code == 0
    assert sandbox.alive()


def test_a_command_gets_its_environment_its_folder_and_its_home(sandbox: Sandbox) -> None:
    sandbox.write("a/b/file", b"")
    script = """
import json, os
print(json.dumps([os.getcwd(), os.environ["AWKWARD"], os.environ["HOME"], os.listdir(os.environ["HOME"])]))
"""
    done = sandbox.run(
        [sandbox.python, "-c", script], timeout_s=20, env={"AWKWARD": AWKWARD}, cwd="a/b", home="homes/fresh"
    )
    assert json.loads(done.output) == [f"{sandbox.root}/a/b", AWKWARD, f"{sandbox.root}/homes/fresh", []]


def test_a_command_whose_time_is_up_dies_with_its_children(sandbox: Sandbox) -> None:
    sandbox.write("escaped.py", ESCAPED.encode())
    began = time.monotonic()
    done = sandbox.run(["sh", "-c", f"echo begun; {sandbox.python} escaped.py stay"], timeout_s=3)
    assert time.monotonic() - began < 10
    assert (done.exit_code, done.output) == (None, "begun\n")
    assert sandbox.run(["test", "-e", "held"], timeout_s=20).exit_code == 0
    assert sandbox.run([sandbox.python, "-c", LOCK_IS_FREE], timeout_s=20).exit_code == 0


def test_what_a_command_leaves_running_ends_with_it(sandbox: Sandbox) -> None:
    sandbox.write("escaped.py", ESCAPED.encode())
    assert sandbox.run([sandbox.python, "escaped.py"], timeout_s=20).exit_code == 0
    assert sandbox.run([sandbox.python, "-c", LOCK_IS_FREE], timeout_s=20).exit_code == 0


def test_of_a_long_output_the_beginning_and_the_end_are_kept(sandbox: Sandbox) -> None:
    done = sandbox.run([sandbox.python, "-c", "print('first'); print('x' * 50_000_000); print('last')"], timeout_s=60)
    assert done.output.startswith("first\n")
    assert done.output.endswith("\nlast\n")
    assert "bytes left out" in done.output
    assert len(done.output) < 100_000


def test_the_environment_of_the_host_does_not_leak(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST_CANARY", "chirp")
    assert "chirp" not in sandbox.run(["env"], timeout_s=20).output
    sandbox.start(["sh", "-c", "env > seen"], env={})
    wait_until(ended(sandbox))
    seen = sandbox.read("seen", max_bytes=100_000)
    assert b"HOME=" in seen
    assert b"chirp" not in seen


def test_commands_inherit_no_signal_handling(sandbox: Sandbox) -> None:
    ignored = int(sandbox.run(["grep", "SigIgn", "/proc/self/status"], timeout_s=20).output.split()[1], 16)
    assert ignored & STANDARD_SIGNALS == 0


def test_files_arrive_unharmed_in_folders_that_did_not_exist(sandbox: Sandbox) -> None:
    data = bytes(range(256)) * 20_000
    for path in ("big.bin", "a/b/c/spaces and 漢字.bin"):
        sandbox.write(path, data)
        assert sandbox.read(path, max_bytes=10**8) == data
    done = sandbox.run(["sha256sum", "big.bin"], timeout_s=20)
    assert done.output.split()[0] == hashlib.sha256(data).hexdigest()
    sandbox.write("big.bin", b"")
    assert sandbox.read("big.bin", max_bytes=10) == b""


def test_an_absent_file_reads_as_empty(sandbox: Sandbox) -> None:
    sandbox.write("folder/file", b"x")
    for path in ("nothing", "no/folder", "folder", "folder/file/below", ".", "n" * 5000):
        assert sandbox.read(path, max_bytes=10) == b""


@pytest.mark.parametrize("path", ["../outside", "a/../../outside", "/etc/passwd", "nul\0byte", "half\ud800"])
def test_a_path_that_leaves_the_sandbox_is_refused(sandbox: Sandbox, path: str) -> None:
    with pytest.raises(SandboxError):
        sandbox.read(path, max_bytes=10)
    with pytest.raises(SandboxError):
        sandbox.write(path, b"x")
    with pytest.raises(SandboxError):
        sandbox.run(["true"], timeout_s=20, cwd=path)
    with pytest.raises(SandboxError):
        sandbox.run(["true"], timeout_s=20, home=path)


@pytest.mark.parametrize("name, value", [("", "x"), ("A=B", "x"), ("A\0B", "x"), ("A", "x\0--bind\0/\0/mnt")])
def test_an_impossible_variable_is_refused(sandbox: Sandbox, name: str, value: str) -> None:
    with pytest.raises(SandboxError):
        sandbox.run(["true"], timeout_s=20, env={name: value})


def test_a_killed_sandbox_is_gone_for_everyone(provider: Provider, sandbox: Sandbox) -> None:
    sandbox.start(["sleep", "600"], env={})
    second = provider.connect(sandbox.id)
    sandbox.kill()
    sandbox.kill()
    second.kill()
    assert provider.list({}) == []
    uses: list[Callable[[], object]] = [
        lambda: provider.connect(sandbox.id),
        lambda: second.start(["true"], env={}),
        second.alive,
        second.stop,
        second.end_processes,
        lambda: second.run(["true"], timeout_s=20),
        lambda: second.read("file", max_bytes=1),
        lambda: second.write("file", b"x"),
        lambda: second.extend(60),
    ]
    for use in uses:
        with pytest.raises(SandboxGone):
            use()


def test_a_sandbox_that_never_started_anything_can_be_killed(provider: Provider, sandbox: Sandbox) -> None:
    provider.connect(sandbox.id).kill()
    with pytest.raises(SandboxGone):
        provider.connect(sandbox.id)


@pytest.mark.parametrize(
    "sandbox_id", ["", ".", "..", "../sandboxes", "sbx_", "sbx_" + "a" * 25 + "/", "sbx_" + "a" * 26]
)
def test_an_id_that_names_no_sandbox_is_gone(provider: Provider, sandbox: Sandbox, sandbox_id: str) -> None:
    with pytest.raises(SandboxGone):
        provider.connect(sandbox_id)


def test_sandboxes_are_listed_by_their_metadata(provider: Provider) -> None:
    first = provider.create(metadata={"deployment": "d", "task": "1"})
    second = provider.create(metadata={"deployment": "d", "task": "2"})
    assert {info.id for info in provider.list({"deployment": "d"})} == {first.id, second.id}
    assert [(info.id, info.metadata) for info in provider.list({"task": "2"})] == [
        (second.id, {"deployment": "d", "task": "2"})
    ]
    assert provider.list({"task": "3"}) == []
    second.kill()
    assert [info.id for info in provider.list({})] == [first.id]


def test_git_works_inside(sandbox: Sandbox) -> None:
    sandbox.write("repository/file", b"content\n")
    env = {f"GIT_{who}_{what}": "agent@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    for command in (
        ["git", "init", "--quiet"],
        ["git", "add", "file"],
        ["git", "commit", "--quiet", "-m", AWKWARD],
        ["git", "bundle", "create", "--quiet", "../result.bundle", "HEAD"],
    ):
        done = sandbox.run(command, timeout_s=60, cwd="repository", env=env)
        assert done.exit_code == 0, done.output
    assert sandbox.read("result.bundle", max_bytes=20).startswith(b"# v2 git bundle")


def test_python_inside_can_import_the_library_of_the_agent(sandbox: Sandbox) -> None:
    done = sandbox.run([sandbox.python, "-c", "import claude_agent_sdk"], timeout_s=60)
    assert (done.exit_code, done.output) == (0, "")
