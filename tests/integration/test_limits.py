"""What runs in a local sandbox cannot take the machine: processes, memory and disk have an end, and all of it goes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread

import psutil
import pytest

from cloudagent_queue.follow import read_result
from cloudagent_queue.sandboxes import Sandbox, disk_watch, open_provider, safe_files
from cloudagent_queue.sandboxes.limits import Groups, Limits, controls, places
from cloudagent_queue.sandboxes.local import LocalProvider
from cloudagent_storage.errors import SandboxError
from tests.integration.test_local_users import IMPORT_FROM, interpreter_for
from tests.support.stored import at_once
from tests.support.worlds import World, until

PIDS, MEMORY_MB, DISK_MB = 60, 200, 60
ENV = {"SANDBOX_PIDS": str(PIDS), "SANDBOX_MEMORY_MB": str(MEMORY_MB), "SANDBOX_DISK_MB": str(DISK_MB)}

limits_memory = pytest.mark.skipif("memory" not in controls(), reason="No control group for memory can be made here.")
limits_pids = pytest.mark.skipif("pids" not in controls(), reason="No control group for processes can be made here.")

# Each of these has an end of its own, well beyond the limits: where they are broken, a test fails, and no machine does.
FORK_BOMB = """
import os, time
forks = 0
while forks < 8:
    try:
        os.fork()
        forks += 1
    except OSError:
        pass
time.sleep(600)
"""
HOG = "held = []\nfor _ in range(100): held.append(bytearray(b'x') * 10_000_000)"
FILLER = "import os, time\nfor n in range(600): open(f'{n}', 'wb').write(os.urandom(1_000_000))\ntime.sleep(600)"
DAEMONS = """
import os, time
for _ in range(10):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            for number in range(3, 64):
                try:
                    os.close(number)
                except OSError:
                    pass
            os.execvpe("sleep", ["sleep", "600"], {})
        os._exit(0)
open("begun", "w").close()
time.sleep(600)
"""
ZOMBIES = """
import os, time
try:
    for _ in range(300):
        if os.fork() == 0:
            os._exit(0)
except OSError:
    open("begun", "w").close()
time.sleep(600)
"""


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[LocalProvider]:
    made = open_provider("local", data_folder=tmp_path, env=ENV)
    assert isinstance(made, LocalProvider)
    yield made
    for left in made.list({}):
        made.connect(left.id).kill()


@pytest.fixture
def sandbox(provider: LocalProvider) -> Sandbox:
    return provider.create(metadata={})


def groups(sandbox: Sandbox) -> list[Path]:
    return [path for place in places() if (path := place.folder / f"cloudagent_{sandbox.id}").exists()]


def inhabitants(sandbox: Sandbox) -> set[int]:
    """The processes in a sandbox's control groups, as the kernel counts them."""
    return {int(pid) for group in groups(sandbox) for pid in (group / "cgroup.procs").read_text().split()}


def python(sandbox: Sandbox, script: str) -> list[str]:
    return [sandbox.python, "-c", script]


def start(sandbox: Sandbox, script: str) -> None:
    sandbox.start(python(sandbox, script), env={})


def begun(sandbox: Sandbox) -> bool:
    return "begun" in sandbox.run(["ls"], timeout_s=20).output


def exists(tmp_path: Path, sandbox: Sandbox) -> Callable[[], bool]:
    return (tmp_path / "sandboxes" / sandbox.id / "root" / "begun").exists


# Processes


@limits_pids
def test_a_fork_bomb_comes_to_its_limit_and_is_gone_with_its_sandbox(
    provider: LocalProvider, sandbox: Sandbox, tmp_path: Path
) -> None:
    start(sandbox, FORK_BOMB)
    until(lambda: sandbox.limits_met(), "it is refused a process")
    assert len(inhabitants(sandbox)) <= PIDS
    # The machine and its other sandboxes go on meanwhile.
    assert provider.create(metadata={}).run(["sh", "-c", "true & wait"], timeout_s=20).exit_code == 0
    left = [psutil.Process(pid) for pid in inhabitants(sandbox)]
    sandbox.end_processes()
    until(lambda: not inhabitants(sandbox) and not any(process.is_running() for process in left), "all have ended", 10)
    assert str(PIDS) in sandbox.output().decode() and "SANDBOX_PIDS" in sandbox.output().decode()
    assert sandbox.run(["sh", "-c", "true & wait"], timeout_s=20).exit_code == 0  # it can be saved
    sandbox.kill()
    assert groups(sandbox) == []


@limits_pids
def test_what_is_run_beside_the_agent_counts_and_is_told_of(sandbox: Sandbox) -> None:
    done = sandbox.run(
        python(sandbox, "import os\nfor n in range(300): os.fork() or __import__('time').sleep(60)"), timeout_s=20
    )
    assert done.exit_code not in (0, None) and "SANDBOX_PIDS" in done.output
    assert inhabitants(sandbox) == set()
    assert sandbox.run(["sh", "-c", "exit 3"], timeout_s=20).output == ""  # that is another failure


@limits_pids
def test_dead_children_that_nobody_waits_for_count_and_go(sandbox: Sandbox, tmp_path: Path) -> None:
    start(sandbox, ZOMBIES)
    until(exists(tmp_path, sandbox), "it got no more")
    sandbox.kill()
    assert groups(sandbox) == []
    assert [
        process for process in psutil.process_iter() if process.ppid() == os.getpid() and "bwrap" in process.name()
    ] == []


@pytest.mark.parametrize("end", ["end_processes", "kill"])
def test_daemons_that_left_session_parent_and_environment_are_ended(sandbox: Sandbox, tmp_path: Path, end: str) -> None:
    start(sandbox, DAEMONS)
    until(exists(tmp_path, sandbox), "they run")
    space = os.readlink(f"/proc/{_first_process(tmp_path, sandbox)}/ns/pid")
    assert len(_in_namespace(space)) >= 12
    getattr(sandbox, end)()
    assert _in_namespace(space) == []
    assert inhabitants(sandbox) == set()


def _first_process(tmp_path: Path, sandbox: Sandbox) -> int:
    lines = (tmp_path / "sandboxes" / sandbox.id / "started.jsonl").read_text().splitlines()
    return next(seen["child-pid"] for line in lines if "child-pid" in (seen := json.loads(line)))


def _in_namespace(space: str) -> list[int]:
    found: list[int] = []
    for pid in psutil.pids():
        try:
            if os.readlink(f"/proc/{pid}/ns/pid") == space:
                found.append(pid)
        except OSError:
            continue
    return found


FEW_PROCESSES = """
import pathlib, sys
from cloudagent_queue.sandboxes import open_provider
from cloudagent_queue.sandboxes.limits import controls
env = {"SANDBOX_PIDS": "30", "SANDBOX_DISK_MB": "40"}
provider = open_provider("local", data_folder=pathlib.Path(sys.argv[1]), env=env)
print("memory" in controls(), "pids" in controls(), provider.self_check())
sandbox = provider.create(metadata={})
count = '''
import os, time
children = 0
try:
    while children < 200:
        os.fork() or time.sleep(60)
        children += 1
except OSError:
    pass
print(children)
'''
print(sandbox.run([sandbox.python, "-c", count], timeout_s=60).output.strip())
print(sandbox.run(["no such program"], timeout_s=60).exit_code)
hide = "import os; os.mkdir('hidden'); os.chdir('hidden'); os.chmod('.', 0o300)"
print("SANDBOX_DISK_MB" in sandbox.run([sandbox.python, "-c", hide + sys.argv[2]], timeout_s=60).output)
sandbox.kill()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="Only root can become another user.")
def test_without_control_groups_processes_are_limited_from_inside_and_the_rest_is_said(tmp_path: Path) -> None:
    nobody = 65534
    interpreter = interpreter_for(nobody)
    if interpreter is None:
        pytest.skip("There is no Python that the user nobody may execute.")
    folder = Path("/tmp") / f"cloudagent-{os.urandom(8).hex()}"
    folder.mkdir(mode=0o700)
    os.chown(folder, nobody, nobody)
    run = partial(subprocess.run, user=nobody, group=nobody, extra_groups=[], cwd="/", timeout=100, check=False)
    # More than the limit of the sandbox, of the same user's.
    others = [subprocess.Popen(["sleep", "600"], user=nobody, group=nobody, extra_groups=[]) for _ in range(40)]
    try:
        command = [interpreter, "-c", FEW_PROCESSES, str(folder), f"\n{FILLER}"]
        done = run(command, env={"PYTHONPATH": IMPORT_FROM}, capture_output=True, text=True)
    finally:
        for other in others:
            other.kill()
            other.wait()
        shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    said, children, code, disk = done.stdout.splitlines()
    assert said.startswith("False False bubblewrap") and said.endswith(
        "limits: 30 processes, 40 MB of disk; cannot limit memory, as no control group can be made here"
    )
    assert 20 < int(children) < 30 and code == "127"
    assert disk == "True"  # though root alone could look into the folder


# Memory


@limits_memory
def test_only_what_takes_too_much_memory_is_killed(provider: LocalProvider, sandbox: Sandbox) -> None:
    bystander = provider.create(metadata={})
    bystander.start(["sleep", "600"], env={})
    sandbox.start(["sleep", "600"], env={})
    done = sandbox.run(python(sandbox, HOG), timeout_s=60)
    assert done.exit_code == 137
    words = f"The sandbox used up its {MEMORY_MB} MB of memory, and 1 process was killed (SANDBOX_MEMORY_MB)."
    assert done.output == f"\n{words}" and list(sandbox.limits_met()) == [words]
    assert sandbox.alive() and bystander.alive() and bystander.limits_met() == []


@limits_memory
def test_an_agent_that_is_killed_for_its_memory_leaves_words_that_say_so(sandbox: Sandbox) -> None:
    start(sandbox, f"import os\nos.write(1, b'last words')\n{HOG}")
    until(lambda: not sandbox.alive(), "it is killed")
    assert sandbox.output().startswith(b"last words\nThe sandbox used up its 200 MB")
    assert sandbox.output(max_bytes=80).decode().startswith("The sandbox") is False
    assert len(sandbox.output(max_bytes=80)) <= 80
    # The same where something inside lived to tell that the agent had died.
    sandbox.write(
        "run/result.json", b'{"outcome": "failed", "error": {"code": "agent_error", "message": "Exit code -9."}}'
    )
    ended = read_result(sandbox)
    assert ended is not None and ended.error is not None
    assert ended.error.message.startswith("Exit code -9. The sandbox used up its 200 MB of memory")


@limits_memory
def test_files_in_tmp_count_as_memory(sandbox: Sandbox) -> None:
    script = "import os\nos.chdir('/tmp')\nfor n in range(500): open(f'{n}', 'wb').write(bytes(1_000_000))"
    done = sandbox.run(python(sandbox, script), timeout_s=60)
    assert done.exit_code == 137 and "SANDBOX_MEMORY_MB" in done.output


# The disk


def test_what_fills_the_disk_is_stopped_and_its_work_can_be_saved(sandbox: Sandbox, tmp_path: Path) -> None:
    start(sandbox, FILLER)
    until(lambda: not sandbox.alive(), "it is ended", 60)
    assert (
        sandbox.output()
        .decode()
        .endswith(f"It took more than {DISK_MB} MB of the disk, and was ended (SANDBOX_DISK_MB).")
    )
    assert (safe_files.size_of(tmp_path / "sandboxes" / sandbox.id) or 0) > DISK_MB * 1_000_000
    assert sandbox.run(["sh", "-c", "rm -r [1-9]* && echo saved"], timeout_s=60).output == "saved\n"


def test_a_setup_that_fills_the_disk_is_stopped_too(sandbox: Sandbox) -> None:
    done = sandbox.run(python(sandbox, FILLER), timeout_s=90)
    assert done.exit_code == 137 and "SANDBOX_DISK_MB" in done.output


def test_what_is_printed_counts(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.start(["sh", "-c", "yes | head -c 500000000; sleep 600"], env={})
    until(lambda: not sandbox.alive(), "it is ended", 60)
    # A file has an end of its own, that needs no watching.
    assert (tmp_path / "sandboxes" / sandbox.id / "output.log").stat().st_size <= DISK_MB * 1_000_000


def test_a_tree_too_deep_to_be_measured_is_no_place_to_hide(sandbox: Sandbox) -> None:
    deep = "import os\nfor _ in range(600):\n    os.mkdir('d')\n    os.chdir('d')\n"
    start(sandbox, f"{deep}{FILLER}")
    until(lambda: not sandbox.alive(), "it is ended", 60)
    assert "nested too deep" in sandbox.output().decode()


def test_one_that_writes_while_the_disk_is_nearly_full_is_ended_and_no_other(
    provider: LocalProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(_: Path) -> None: ...

    monkeypatch.setattr(disk_watch, "ensure", nothing)  # the test looks itself
    quiet, writing = provider.create(metadata={}), provider.create(metadata={})
    large = "open('large', 'wb').write(bytes(30_000_000)); import time; time.sleep(600)"
    start(quiet, large)
    start(writing, "import time; time.sleep(600)")
    folder = tmp_path / "sandboxes"
    until(lambda: (safe_files.size_of(folder / quiet.id) or 0) > 30_000_000, "it has written")
    monkeypatch.setattr(disk_watch, "_BUSY", 0)
    monkeypatch.setattr(disk_watch, "FLOOR_BYTES", shutil.disk_usage(folder).total)
    monkeypatch.setattr(disk_watch, "FLOOR_PART", 1.0)
    watch = disk_watch.Watch(folder)
    for _ in range(2):  # at one that wrote much before
        watch.look()
    assert quiet.alive() and writing.alive()
    (folder / writing.id / "root/more").write_bytes(os.urandom(20_000_000))
    watch.look()
    assert quiet.alive() and not writing.alive()
    assert "nearly full" in writing.output().decode() and quiet.limits_met() == []


def test_hard_links_and_holes_are_no_space_and_symlinks_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(bytes(5_000_000))
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "file").write_bytes(os.urandom(1_000_000))
    (folder / "inner/again").hardlink_to(folder / "file")
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "loop").symlink_to(folder)
    with open(folder / "hole", "wb") as hole:
        hole.truncate(1 << 40)
    assert 1_000_000 <= (safe_files.size_of(folder) or 0) < 1_100_000


def watchers(folder: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in (p.info["cmdline"] or [])]


def test_one_process_watches_a_folder_and_ends_with_its_last_sandbox(provider: LocalProvider, tmp_path: Path) -> None:
    made = [provider.create(metadata={}) for _ in range(6)]
    at_once(*[partial(sandbox.start, ["sleep", "600"], env={}) for sandbox in made])
    until(lambda: len(watchers(tmp_path / "sandboxes")) == 1, "one is left of those that were started")
    watchers(tmp_path / "sandboxes")[0].kill()
    until(lambda: not watchers(tmp_path / "sandboxes"), "it is dead")
    made[0].run(["true"], timeout_s=20)
    until(lambda: len(watchers(tmp_path / "sandboxes")) == 1, "another took its place")
    for sandbox in made:
        sandbox.kill()
    until(lambda: not watchers(tmp_path / "sandboxes"), "it has ended")


# What outlives the worker

STARTS_AND_DIES = """
import os, pathlib, sys, signal
from cloudagent_queue.sandboxes import open_provider
sandbox = open_provider("local", data_folder=pathlib.Path(sys.argv[1]), env=dict(os.environ)).create(metadata={})
sandbox.start([sandbox.python, "-c", sys.argv[2]], env={})
print(sandbox.id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@limits_pids
def test_limits_hold_after_the_worker_was_killed_and_another_one_removes_them(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STARTS_AND_DIES, str(tmp_path), FORK_BOMB]
    died = subprocess.run(
        command, env={**ENV, "PYTHONPATH": IMPORT_FROM}, stdout=subprocess.PIPE, timeout=60, check=False
    )
    assert died.returncode == -signal.SIGKILL
    provider = open_provider("local", data_folder=tmp_path)  # with limits of its own
    (found,) = provider.list({})
    sandbox = provider.connect(found.id)
    until(lambda: sandbox.limits_met(), "it is refused a process")
    assert f"had {PIDS} processes" in sandbox.limits_met()[0]
    assert len(inhabitants(sandbox)) <= PIDS and sandbox.alive()
    assert watchers(tmp_path / "sandboxes")
    sandbox.kill()
    assert groups(sandbox) == []
    until(lambda: not watchers(tmp_path / "sandboxes"), "nothing is left")


@limits_pids
def test_no_group_is_left_however_a_command_and_the_deletion_meet(provider: LocalProvider) -> None:
    for _ in range(20):
        sandbox = provider.create(metadata={})

        def run(sandbox: Sandbox = sandbox) -> None:
            try:
                sandbox.run(["true"], timeout_s=20)
            except SandboxError:  # it is gone, in one way or another
                return

        at_once(run, sandbox.kill)
        assert groups(sandbox) == []


@limits_pids
@pytest.mark.parametrize("moment", ["before the groups are made", "before the folder goes"])
def test_no_group_is_left_of_a_command_that_begins_while_its_sandbox_is_deleted(
    provider: LocalProvider, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    make, rename = Groups.make, Path.rename
    other = provider.connect(sandbox.id)

    def make_late(made: Groups) -> list[str]:
        other.kill()
        return make(made)

    def rename_late(path: Path, target: Path) -> Path:
        if path.name == sandbox.id:
            make(Groups(path, Limits()))
            assert groups(sandbox)
        return rename(path, target)

    if moment == "before the groups are made":
        monkeypatch.setattr(Groups, "make", make_late)
        with pytest.raises(SandboxError):
            sandbox.run(["true"], timeout_s=20)
    else:
        monkeypatch.setattr(Path, "rename", rename_late)
        other.kill()
    assert groups(sandbox) == []


@limits_pids
def test_no_group_is_left_of_a_command_whose_sandbox_somebody_removed_by_hand(sandbox: Sandbox, tmp_path: Path) -> None:
    def run() -> None:
        with suppress(SandboxError):
            sandbox.run(["sleep", "1"], timeout_s=20)

    running = Thread(target=run)
    running.start()
    until(lambda: inhabitants(sandbox), "it runs")
    shutil.rmtree(tmp_path / "sandboxes" / sandbox.id)
    running.join(30)
    assert groups(sandbox) == []


@limits_pids
def test_a_program_that_cannot_be_limited_is_not_run(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def nowhere(_: object) -> list[str]:
        return [str(tmp_path / "absent/cgroup.procs")]

    monkeypatch.setattr("cloudagent_queue.sandboxes.limits.Groups.make", nowhere)
    with pytest.raises(SandboxError, match="could not be started"):
        sandbox.run(["touch", "begun"], timeout_s=20)
    assert sandbox.read("begun", max_bytes=1) == b"" and not exists(tmp_path, sandbox)()


# As its user sees it


def test_the_operator_sets_the_limits_and_a_task_that_hits_one_says_so(world: World) -> None:
    world.environment |= {"SANDBOX_DISK_MB": "40"}
    world.start_worker()
    fill = "python3 -c \"import os; [open(str(n), 'wb').write(os.urandom(1000000)) for n in range(600)]\""
    with world.client() as client:
        task_id = client.call("submit_task", prompt="x", repository="none", setup=fill)["task_id"]
        task = world.wait(client, task_id)
        assert task["error"]["code"] == "setup_failed"
        lines = client.call("get_task_logs", task_id=task_id)["lines"]
    assert any("more than 40 MB of the disk" in line["message"] for line in lines)
    assert "40 MB of disk" in world.app().open_provider("local").self_check()


@pytest.mark.parametrize(("value", "expected"), [({}, Limits()), ({"SANDBOX_PIDS": "0"}, Limits(pids=0))])
def test_a_limit_that_is_not_set_has_its_default(value: dict[str, str], expected: Limits) -> None:
    assert Limits.read(value) == expected
