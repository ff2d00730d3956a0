"""Disks that are really full: small ones, mounted for a child process alone, in a mount namespace of its own."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from cloudagent_mcp.client import LocalClient
from cloudagent_mcp.scripted_model import Rule, ScriptedModel
from cloudagent_storage.errors import CloudAgentError, StorageFull
from cloudagent_storage.records import LOCAL_ACCOUNT, TaskSpec, TaskStatus
from tests.support.scripts import bash, say
from tests.support.worlds import World, until

ROOT = Path(__file__).parent.parent.parent

GATE = "python3 -c 'import os, time\nwhile not os.path.exists(\"go\"): time.sleep(0.05)'"
GATED = Rule(
    prompt="Wait for me",
    turns=(bash("echo begun > begun.txt"), bash(GATE), *(bash("seq 2000") for _ in range(4)), say("Done.")),
)
QUICK = Rule(prompt="Be quick", turns=(say("Done."),))


def on_a_small_disk(scenario: Callable[[Path], None], folder: Path) -> None:
    """Run a function of this module with 40 MB mounted at `small` in the folder.

    An ordinary user is root in a user namespace for it, which the product's own sandbox needs as well.
    """
    for name in ("small", "data", "user"):
        (folder / name).mkdir(mode=0o700)
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    program = "import sys; from pathlib import Path; from tests.e2e import test_full_disk as here;"
    program += f"here.mount(Path(sys.argv[1])); here.{scenario.__name__}(Path(sys.argv[1])); print('ok')"
    done = subprocess.run(
        [*namespace, sys.executable, "-c", program, str(folder)],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    logs = [path.read_text()[-3000:] for path in folder.rglob("worker-*.log")]
    assert done.returncode == 0 and done.stdout.strip() == "ok", "\n".join([done.stderr, *logs])


def mount(folder: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=40m,mode=700", "tmpfs", str(folder / "small")]
    subprocess.run(command, check=True, env={"PATH": os.environ["PATH"]})


def fill(folder: Path) -> None:
    """Until not a byte is left."""
    with (folder / "small" / "filler").open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                pass


def make_space(folder: Path) -> None:
    (folder / "small" / "filler").unlink(missing_ok=True)


@contextmanager
def small_world(folder: Path, rule: Rule, *, home: Path, **variables: str) -> Generator[World]:
    """An installation with its data folder at `home`."""
    environment = {"CLOUDAGENT_HOME": str(home), "HOME": str(folder / "user"), "PATH": os.environ["PATH"], **variables}
    with ScriptedModel([rule]) as model:
        world = World(home, environment | dict(model.environment()))
        try:
            yield world
        finally:
            make_space(folder)
            world.close()


def refused(client: LocalClient) -> CloudAgentError | None:
    """Why no task is accepted; None where one was."""
    try:
        client.call("submit_task", prompt="Wait for nothing", repository="none")
    except CloudAgentError as error:
        return error
    return None


def full_database(folder: Path) -> None:
    file, reserve = folder / "small" / "store.db", folder / "small" / "reserve"
    home = folder / "data"
    with small_world(folder, GATED, home=home, DATABASE_URL=f"sqlite:///{file}") as world, world.client() as client:
        store = world.app().store
        kept: list[str] = []
        for _ in range(20):
            spec = TaskSpec(prompt="x", title="x")
            kept.append(store.tasks.add(LOCAL_ACCOUNT, spec, blobs={"input": os.urandom(9000)}).task_id)
            store.tasks.claim(kept[-1], worker="w", lease_s=60)
            store.tasks.finish(kept[-1], 1, status=TaskStatus.COMPLETED)
        worker = world.start_worker()
        until(lambda: reserve.exists() and reserve.stat().st_blocks, "the reserve is made")
        task_id = client.call("submit_task", prompt="Wait for me", repository="none")["task_id"]
        (begun,) = until(lambda: list((home / "sandboxes").glob("sbx_*/**/begun.txt")), "the agent works")
        sandboxes = sorted((home / "sandboxes").glob("sbx_*"))

        fill(folder)
        assert isinstance(refused(client), StorageFull)
        begun.with_name("go").touch()
        log = home / "worker-0.log"
        until(lambda: fill(folder) or "the reserve was given up" in log.read_text(), "the reserve is given up")
        until(lambda: fill(folder) or any(word in log.read_text() for word in ("has to wait", "lets go")), "it waits")
        # What the reserve gave is taken away as well: now nothing at all can be written.
        fill(folder)
        assert client.call("get_task", task_id=task_id)["status"] == "running"
        assert client.call("list_tasks", limit=100)["total"] == 21
        assert isinstance(refused(client), StorageFull)
        assert sorted((home / "sandboxes").glob("sbx_*")) == sandboxes

        make_space(folder)
        ended = world.wait(client, task_id)
        assert (ended["status"], ended["result"]["summary"]) == ("completed", "Done.")
        lines = world.log(client, task_id)
        assert [line["seq"] for line in lines] == list(range(1, len(lines) + 1))
        assert [line["kind"] for line in lines].count("tool_use") == 6
        until(lambda: refused(client) is None, "tasks are accepted again")
        assert reserve.stat().st_size and worker.poll() is None
        for old in kept:
            assert len(store.blobs.get(LOCAL_ACCOUNT, old, "input") or b"") == 9000
    checked = sqlite3.connect(file)
    assert checked.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    checked.close()


def full_worker(folder: Path) -> None:
    home = folder / "small" / "data"
    home.mkdir()
    elsewhere = {
        name: f"sqlite:///{folder / 'data' / file}" for name, file in (("DATABASE_URL", "a"), ("QUEUE_URL", "b"))
    }
    with small_world(folder, QUICK, home=home, **elsewhere) as world, world.client() as client:

        def submit() -> str:
            return client.call("submit_task", prompt="Be quick", repository="none")["task_id"]

        worker = world.start_worker()
        assert world.wait(client, submit())["status"] == "completed"
        fill(folder)
        ended = world.wait(client, submit())
        assert (ended["status"], ended["error"]["code"]) == ("failed", "storage_full")
        assert "disk is full" in ended["error"]["message"] and "Free space" in ended["error"]["remedy"]
        assert worker.poll() is None
        make_space(folder)
        assert world.wait(client, submit())["status"] == "completed"


def test_a_full_database_disk_refuses_new_tasks_and_running_ones_finish_when_there_is_space(tmp_path: Path) -> None:
    on_a_small_disk(full_database, tmp_path)


def test_a_task_whose_worker_has_a_full_disk_ends_and_the_worker_goes_on(tmp_path: Path) -> None:
    on_a_small_disk(full_worker, tmp_path)
