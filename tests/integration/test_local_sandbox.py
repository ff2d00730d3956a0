"""The host is safe from what runs in a local sandbox, and nothing that runs is lost or mistaken for something else."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cloudagent_queue.sandboxes import Sandbox, open_provider, processes
from cloudagent_queue.sandboxes.bubblewrap import find_bubblewrap, isolation
from cloudagent_queue.sandboxes.local import LocalProvider, UnsafeProcessProvider
from cloudagent_storage.errors import SandboxError, SandboxUnavailable, SandboxUnreachable
from tests.support.stored import at_once

CANARY = "canary-6f1d"
IMPORT_FROM = os.pathsep.join(
    [sysconfig.get_path("purelib"), *(str(Path(__file__).parents[2] / part) for part in ("", "queue", "storage"))]
)


def wait_until(condition: Callable[[], object], *, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def provider(data_folder: Path) -> Iterator[LocalProvider]:
    made = LocalProvider(data_folder / "sandboxes")
    made.self_check()
    yield made
    for left in made.list({}):
        made.connect(left.id).kill()


@pytest.fixture
def sandbox(provider: LocalProvider) -> Sandbox:
    return provider.create(metadata={})


@pytest.fixture
def files(data_folder: Path, sandbox: Sandbox) -> Path:
    """The sandbox's root as the host sees it."""
    return data_folder / "sandboxes" / sandbox.id / "root"


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the host's that must survive."""
    with subprocess.Popen(["sleep", "600"], env={}) as process:
        yield process
        process.kill()


def public_command_lines() -> bytes:
    lines = bytearray()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            lines += (folder / "cmdline").read_bytes()
        except OSError:
            continue
    return bytes(lines)


# What the agent plants in its folder


def test_the_host_reads_through_no_symlink(sandbox: Sandbox, files: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "events.jsonl").write_text(CANARY)
    sandbox.run(["ln", "-s", str(outside / "events.jsonl"), "direct"], timeout_s=20)
    sandbox.run(["ln", "-s", str(outside), "run"], timeout_s=20)
    assert (files / "direct").read_text() == (files / "run/events.jsonl").read_text() == CANARY  # the trap is set
    assert sandbox.read("direct", max_bytes=100) == b""
    assert sandbox.read("run/events.jsonl", max_bytes=100) == b""


def test_the_host_writes_through_no_symlink(sandbox: Sandbox, files: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text(CANARY)
    sandbox.run(["ln", "-s", str(outside / "file"), "file"], timeout_s=20)
    sandbox.run(["ln", "-s", str(outside), "run"], timeout_s=20)
    sandbox.write("file", b"replaced")
    assert sandbox.read("file", max_bytes=100) == b"replaced"
    with pytest.raises(SandboxError):
        sandbox.write("run/file", b"x")
    with pytest.raises(SandboxError):
        sandbox.run(["true"], timeout_s=20, cwd="run")
    with pytest.raises(SandboxError):
        sandbox.run(["true"], timeout_s=20, home="run/home")
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"file": CANARY}


def test_a_fifo_a_device_a_socket_and_a_folder_in_place_of_a_file_read_as_empty(sandbox: Sandbox, files: Path) -> None:
    sandbox.run(["mkfifo", "fifo"], timeout_s=20)
    sandbox.run([sandbox.python, "-c", "import socket; socket.socket(socket.AF_UNIX).bind('socket')"], timeout_s=20)
    sandbox.run(["mkdir", "folder"], timeout_s=20)
    if os.geteuid() == 0:
        os.mknod(files / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    began = time.monotonic()
    assert {sandbox.read(name, max_bytes=100) for name in ("fifo", "device", "socket", "folder")} == {b""}
    assert time.monotonic() - began < 5


def test_a_reader_takes_no_more_than_it_asked_for(sandbox: Sandbox) -> None:
    sandbox.run(["truncate", "--size", "16G", "endless"], timeout_s=20)
    assert sandbox.read("endless", offset=1 << 33, max_bytes=1000) == bytes(1000)


def test_deletion_follows_no_symlink_and_minds_no_depth_name_or_permission(
    provider: LocalProvider, sandbox: Sandbox, data_folder: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o750)
    (outside / "file").write_text(CANARY)
    script = f"""
import os
os.symlink({str(outside)!r}, "link")
for name in (b"new\\nline", b"\\xff\\xfe", b"-rf", "漢字".encode(), b"x" * 255):
    os.mkdir(name)
    os.symlink({str(outside)!r}, name + b"/link" if len(name) < 250 else b"other")
for depth in range(3000):
    os.mkdir("deep")
    os.chdir("deep")
os.chdir("/sandbox")
os.makedirs("locked/inner")
open("locked/inner/file", "w").close()
os.chmod("locked/inner", 0o500)
os.chmod("locked", 0)
os.chmod(".", 0)
"""
    done = sandbox.run([sandbox.python, "-c", script], timeout_s=60)
    assert done.exit_code == 0, done.output
    sandbox.kill()
    assert os.listdir(data_folder / "sandboxes") == []
    assert (outside / "file").read_text() == CANARY
    assert stat.S_IMODE(outside.stat().st_mode) == 0o750


# What runs inside


def test_nothing_of_the_host_is_visible_inside(
    provider: LocalProvider, sandbox: Sandbox, data_folder: Path, tmp_path: Path
) -> None:
    neighbour = provider.create(metadata={})
    neighbour.write(f"{CANARY}-neighbour", b"x")
    (data_folder / f"{CANARY}-data").write_text("x")
    (tmp_path / f"{CANARY}-elsewhere").write_text("x")
    at_home = Path.home() / f".{CANARY}-{os.getpid()}"
    at_home.touch()
    try:
        sandbox.write(f"{CANARY}-own", b"x")
        look = ["find", "/", "-path", "/proc", "-prune", "-o", "-name", f"*{CANARY}*", "-print"]
        found = sandbox.run(look, timeout_s=60).output
    finally:
        at_home.unlink()
    assert [line for line in found.splitlines() if not line.startswith("find: ")] == [f"/sandbox/{CANARY}-own"]
    for path in (
        "/etc/shadow",
        "/etc/ssh",
        "/etc/ssl/private",
        "/sys",
        "/run",
        "/var",
        "/boot",
        "/home",
        str(tmp_path),
    ):
        assert sandbox.run(["test", "-e", path], timeout_s=20).exit_code == 1, path


def test_nothing_of_the_host_can_be_written_inside(sandbox: Sandbox) -> None:
    script = """
import os
for top in ("/proc", "/usr", "/etc", "/dev"):
    for folder, folders, names in os.walk(top):
        if top == "/proc":
            folders[:] = [name for name in folders if folder != "/proc" or not name.isdecimal() and "self" not in name]
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path) and not os.path.islink(path) and os.access(path, os.W_OK):
                print(path)
"""
    done = sandbox.run([sandbox.python, "-c", script], timeout_s=60)
    own = {"/etc/passwd", "/etc/group"}
    assert done.exit_code == 0
    assert set(done.output.splitlines()) - own == set()
    status = sandbox.run(["cat", "/proc/self/status"], timeout_s=20).output
    assert {line.split()[1] for line in status.splitlines() if line.startswith("Cap")} == {"0" * 16}
    assert "NoNewPrivs:\t1" in status


def test_the_processes_of_the_host_are_hidden(sandbox: Sandbox, bystander: subprocess.Popen[bytes]) -> None:
    script = "import os; print(len([name for name in os.listdir('/proc') if name.isdecimal()]), os.getpid())"
    count, pid = sandbox.run([sandbox.python, "-c", script], timeout_s=20).output.split()
    assert (count, pid) == ("2", "2")
    assert sandbox.run(["kill", "-0", str(bystander.pid)], timeout_s=20).exit_code != 0


def test_the_environment_inside_is_what_was_asked_for(sandbox: Sandbox) -> None:
    script = "import json, os; print(json.dumps(dict(os.environ)))"
    done = sandbox.run([sandbox.python, "-c", script], timeout_s=20, env={"ASKED": "for"})
    assert json.loads(done.output) == {
        "ASKED": "for",
        "CLOUDAGENT_SANDBOX": sandbox.id,
        "HOME": "/sandbox/home",
        "IS_SANDBOX": "1",
        "LANG": "C.UTF-8",
        "PATH": f"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:{Path(sys.executable).parent}",
        "PWD": "/sandbox",  # set by bubblewrap
        "TMPDIR": "/tmp",
    }


def test_no_open_file_of_the_host_leaks_inside(sandbox: Sandbox) -> None:
    sandbox.start(["sh", "-c", "ls -l /proc/self/fd > seen"], env={})
    wait_until(lambda: not sandbox.alive())
    for listing in (
        sandbox.read("seen", max_bytes=10_000).decode(),
        sandbox.run(["ls", "-l", "/proc/self/fd"], timeout_s=20).output,
    ):
        assert [line.split()[8] for line in listing.splitlines()[1:]] == ["0", "1", "2", "3"]  # 3 is that of ls


def test_an_agent_that_takes_the_first_processs_open_files_cannot_forge_the_record(sandbox: Sandbox) -> None:
    script = """
import ctypes, os, time
taken = [ctypes.CDLL(None).syscall(438, os.pidfd_open(1), number, 0) for number in range(64)]
links = {os.readlink(f"/proc/self/fd/{file}"): file for file in taken if file >= 0}
for file in (file for link, file in links.items() if link.startswith("/") and not link.startswith("/dev/")):
    os.write(os.open(f"/proc/self/fd/{file}", os.O_WRONLY | os.O_APPEND), b'{"exit-code": 0}\\n{"child-pid": 1}\\n')
    os.fchmod(file, 0)
print(*links, file=open("links", "w"), flush=True)
time.sleep(600)
"""
    sandbox.start([sandbox.python, "-c", script], env={})
    wait_until(lambda: sandbox.read("links", max_bytes=1))
    assert b"started.lock" in sandbox.read("links", max_bytes=10_000)  # it did get hold of something
    assert sandbox.alive()
    sandbox.kill()


def test_the_data_folder_is_hidden_even_below_a_folder_that_is_shown(provider: LocalProvider) -> None:
    look = [find_bubblewrap().path, *isolation(hidden=Path("/usr/share")), "--", "ls", "/usr/share"]
    assert subprocess.run(look, env={}, capture_output=True, check=True).stdout == b""


def test_a_secret_in_the_environment_is_in_no_process_list(sandbox: Sandbox) -> None:
    secret = f"secret-{os.urandom(8).hex()}"
    seen = bytearray()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.extend(public_command_lines())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        sandbox.start(["sh", "-c", 'echo "$TOKEN" > token; sleep 600'], env={"TOKEN": secret})
        assert sandbox.run(["sh", "-c", 'echo "$TOKEN"'], timeout_s=20, env={"TOKEN": secret}).output == f"{secret}\n"
        wait_until(lambda: sandbox.read("token", max_bytes=100) == f"{secret}\n".encode())
        seen += public_command_lines()
    finally:
        done.set()
        watcher.join()
    assert b"bwrap" in seen
    assert secret.encode() not in seen


def test_bubblewrap_itself_runs_without_the_variables_of_the_caller(sandbox: Sandbox, tmp_path: Path) -> None:
    # LD_DEBUG makes the loader of a dynamically linked program write a file where LD_DEBUG_OUTPUT says.
    env = {"LD_DEBUG": "all", "LD_DEBUG_OUTPUT": str(tmp_path / "loader")}
    assert sandbox.run(["true"], timeout_s=20, env=env).exit_code == 0
    assert list(tmp_path.glob("loader*")) == []


# Which bubblewrap


def test_a_bubblewrap_that_makes_no_sandbox_is_passed_over(provider: LocalProvider, tmp_path: Path) -> None:
    assert provider.self_check().startswith("bubblewrap 0.")
    candidates = [("/bin/false", "system"), (str(tmp_path / "absent"), "system"), (find_bubblewrap().path, "the third")]
    assert LocalProvider(tmp_path / "other", bubblewraps=candidates).self_check().split(";")[0].endswith("(the third)")


def test_without_a_working_bubblewrap_nothing_is_made_and_the_remedy_is_named(tmp_path: Path) -> None:
    provider = LocalProvider(tmp_path / "sandboxes", bubblewraps=[("/bin/false", "system")])
    with pytest.raises(SandboxUnavailable, match="No sandbox can be made") as refusal:
        provider.create(metadata={})
    assert "bubblewrap" in refusal.value.remedy
    assert "SANDBOX_PROVIDER=unsafe-process" in refusal.value.remedy
    with pytest.raises(SandboxUnavailable):
        provider.self_check()
    assert not (tmp_path / "sandboxes").exists()


def test_a_data_folder_that_cannot_be_used_is_named_as_the_cause(provider: LocalProvider, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SandboxUnavailable) as refusal:
        LocalProvider(tmp_path / "file/sandboxes").create(metadata={})
    assert "CLOUDAGENT_HOME" in refusal.value.remedy
    assert str(tmp_path) not in str(refusal.value.as_dict())


def test_a_start_that_the_host_could_not_make_can_be_tried_again(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as without_interpreter:
        without_interpreter.setattr(sys, "executable", str(tmp_path / "absent"))
        with pytest.raises(SandboxUnreachable):
            sandbox.start(["true"], env={})
        with pytest.raises(SandboxUnreachable):
            sandbox.run(["true"], timeout_s=20)
    sandbox.start(["sh", "-c", "echo > done"], env={})
    wait_until(lambda: sandbox.read("done", max_bytes=1))


def test_the_providers_are_found_by_name(tmp_path: Path) -> None:
    assert isinstance(open_provider("local", data_folder=tmp_path), LocalProvider)
    assert isinstance(open_provider("unsafe-process", data_folder=tmp_path), UnsafeProcessProvider)


def test_a_sandbox_is_not_taken_over_by_the_other_provider(provider: LocalProvider, data_folder: Path) -> None:
    sandbox = provider.create(metadata={})
    other = UnsafeProcessProvider(data_folder / "sandboxes")
    assert other.list({}) == []
    with pytest.raises(SandboxUnreachable):
        other.connect(sandbox.id)


# Which process


@pytest.mark.parametrize(
    "record",
    [
        pytest.param('{"host": "HOST"}\n{"child-pid": PID}\n{"start-time": 1}\n', id="another start time"),
        pytest.param('{"host": "HOST"}\n{"child-pid": PID}\n', id="no marker"),
        pytest.param('{"host": "an earlier boot"}\n{"child-pid": PID}\n{"start-time": START}\n', id="another boot"),
    ],
)
def test_a_stranger_with_a_recycled_pid_is_never_signalled(
    sandbox: Sandbox, files: Path, bystander: subprocess.Popen[bytes], record: str
) -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    start = Path(f"/proc/{bystander.pid}/stat").read_text().rpartition(")")[2].split()[19]
    host = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    for old, new in {"HOST": host, "PID": str(bystander.pid), "START": start}.items():
        record = record.replace(old, new)
    (files.parent / "started.jsonl").write_text(record)
    assert not sandbox.alive()
    sandbox.stop()
    sandbox.end_processes()
    sandbox.kill()
    assert bystander.poll() is None


def test_a_process_whose_starter_died_before_noting_its_start_time_is_found(sandbox: Sandbox, files: Path) -> None:
    sandbox.start(["sleep", "600"], env={})
    record = files.parent / "started.jsonl"
    lines = [line for line in record.read_text().splitlines(keepends=True) if "start-time" not in line]
    pid = next(json.loads(line)["child-pid"] for line in lines if "child-pid" in line)
    os.truncate(record, 0)  # in place: bubblewrap holds the file open
    record.write_text("".join(lines))
    assert sandbox.alive()
    sandbox.end_processes()
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_a_start_that_is_under_way_is_not_taken_for_a_dead_one(
    sandbox: Sandbox, files: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr(processes, "KILL_PATIENCE_S", 0.2)
    record = files.parent / "started.jsonl"
    record.write_text("" if host == "here" else '{"host": "another host"}\n{"child-pid": 1}\n')
    with open(record.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if host == "here":
            assert sandbox.alive()
        else:
            with pytest.raises(SandboxUnreachable):
                sandbox.alive()
        with pytest.raises(SandboxUnreachable):
            sandbox.kill()
        assert files.is_dir()
    assert not sandbox.alive()
    sandbox.kill()
    assert not files.exists()


DIES_BEFORE_THE_LAUNCH = """
import os, sys
from pathlib import Path
from cloudagent_queue.sandboxes import open_provider, processes
processes.launch = lambda *_, **__: os._exit(7)
open_provider("local", data_folder=Path(sys.argv[1])).connect(sys.argv[2]).start(["true"], env={})
"""


def test_a_start_of_which_nothing_came_since_its_process_died_is_made_again_by_one_only(
    sandbox: Sandbox, files: Path, data_folder: Path
) -> None:
    command = [sys.executable, "-c", DIES_BEFORE_THE_LAUNCH, str(data_folder), sandbox.id]
    done = subprocess.run(command, env={"PYTHONPATH": IMPORT_FROM}, timeout=60, check=False)
    assert done.returncode == 7 and (files.parent / "started.jsonl").exists()
    assert not sandbox.alive()

    def start() -> bool:
        try:
            sandbox.start(["sh", "-c", "echo begun >> begun; sleep 600"], env={})
        except SandboxError:
            return False
        return True

    assert sorted(at_once(*[start] * 4)) == [False, False, False, True]
    wait_until(lambda: sandbox.read("begun", max_bytes=100))
    assert sandbox.alive() and sandbox.read("begun", max_bytes=100) == b"begun\n"
    sandbox.kill()


def test_what_a_command_left_running_counts_where_its_pids_mean_nothing(sandbox: Sandbox, files: Path) -> None:
    sandbox.start(["sh", "-c", "sleep 600 & echo > begun"], env={})
    wait_until(lambda: not sandbox.alive())
    record = files.parent / "started.jsonl"
    before = record.read_text()
    record.write_text(before.replace('"host": "', '"host": "another '))
    try:
        with pytest.raises(SandboxUnreachable):
            sandbox.kill()
        assert files.is_dir()
    finally:
        record.write_text(before)


def test_a_command_ends_in_time_though_its_sandbox_was_deleted(sandbox: Sandbox, files: Path) -> None:
    failures: list[Exception] = []

    def run() -> None:
        try:
            sandbox.run(["sh", "-c", "echo > begun; exec sleep 600"], timeout_s=2)
        except SandboxError as error:
            failures.append(error)

    other = threading.Thread(target=run, daemon=True)
    other.start()
    wait_until(lambda: sandbox.read("begun", max_bytes=1))
    shutil.rmtree(files.parent)
    other.join(timeout=20)
    assert not other.is_alive()
    assert failures == []


def test_a_command_that_runs_for_another_worker_is_ended_too(provider: LocalProvider, sandbox: Sandbox) -> None:
    codes: list[int | None] = []
    other = threading.Thread(
        target=lambda: codes.append(sandbox.run(["sh", "-c", "echo > begun; sleep 600"], timeout_s=60).exit_code),
        daemon=True,
    )
    other.start()
    wait_until(lambda: sandbox.read("begun", max_bytes=1))
    provider.connect(sandbox.id).end_processes()
    other.join(timeout=20)
    assert codes == [137]


def test_ended_processes_leave_no_zombies(provider: LocalProvider, sandbox: Sandbox) -> None:
    def children() -> set[int]:
        return {child.pid for child in psutil.Process().children()}

    others = children()  # a database that another test has started, say
    sandbox.start(["sleep", "600"], env={})
    assert children() > others
    sandbox.run(["true"], timeout_s=20)
    sandbox.kill()
    wait_until(lambda: children() <= others)


def test_what_a_crash_left_half_made_or_half_deleted_is_removed_later(
    provider: LocalProvider, sandbox: Sandbox, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [data_folder / "sandboxes" / f"{kind}_{sandbox.id}" for kind in (".new", ".gone")]
    for folder in left:
        (folder / "root").mkdir(parents=True)
    assert [info.id for info in provider.list({})] == [sandbox.id]
    assert all(folder.exists() for folder in left)
    now = time.time()
    monkeypatch.setattr("cloudagent_queue.sandboxes.local.time.time", lambda: now + 4000)
    assert [info.id for info in provider.list({})] == [sandbox.id]
    assert not any(folder.exists() for folder in left)
