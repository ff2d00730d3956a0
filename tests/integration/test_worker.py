"""What happens around tasks: lost doorbells, orphan sandboxes, workers that come and go."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from filelock import FileLock

from cloudagent_mcp import __version__
from cloudagent_mcp.embedded import ensure_worker, only_worker, running_worker, stop_when_idle
from cloudagent_mcp.worker import deployment
from cloudagent_queue import repository
from cloudagent_queue.lease import Lease
from cloudagent_queue.sandboxes import CommandResult, open_provider
from cloudagent_queue.sweep import kill_orphans, ring_again
from cloudagent_storage.errors import Busy, LeaseLost, SandboxError
from cloudagent_storage.records import LOCAL_ACCOUNT, Phase, TaskSpec, TaskStatus
from cloudagent_storage.store import Store
from tests.support.worlds import FAST, World, until

SPEC = TaskSpec(prompt="x", title="x")


def test_a_task_whose_message_was_lost_is_rung_for_again_and_runs(world: World) -> None:
    with world.client() as client:
        task_id = client.call("submit_task", prompt="x", repository="none", timeout_minutes=0.1)["task_id"]
        (world.home / "queue.db").unlink()
        world.start_worker()
        # No model is there: that it was tried is enough.
        until(lambda: client.call("get_task", task_id=task_id)["attempt"] == 1, "the task is claimed")
        client.call("cancel_task", task_id=task_id)
        world.wait(client, task_id)


def test_only_sandboxes_that_no_living_task_owns_are_killed(world: World) -> None:
    store, provider = world.app().store, open_provider("local", data_folder=world.home)
    owner = deployment(world.settings.store_url)

    def sandbox(task: str, nonce: str, owner: str = owner) -> str:
        return provider.create(metadata={"deployment": owner, "task": task, "nonce": nonce}).id

    running, ended = (store.tasks.add(LOCAL_ACCOUNT, SPEC).task_id for _ in range(2))
    for task in (running, ended):
        assert store.tasks.claim(task, worker="w", lease_s=60)
    by_nonce, by_id = sandbox(running, "nonce-1"), sandbox(running, "nonce-2")
    store.tasks.begin_sandbox(running, 1, nonce="nonce-1", provider="local", place=None)
    store.tasks.update(running, 1, sandbox_id=by_id)
    orphans = {sandbox(running, "an earlier one"), sandbox(ended, "nonce-3"), sandbox("task_unknown", "nonce-4")}
    store.tasks.begin_sandbox(ended, 1, nonce="nonce-3", provider="local", place=None)
    store.tasks.finish(ended, 1, status=TaskStatus.FAILED)
    foreign = sandbox(ended, "nonce-5", owner="another installation")

    assert kill_orphans(store, provider, deployment=owner) == len(orphans)
    assert {info.id for info in provider.list({})} == {by_nonce, by_id, foreign}


def test_a_submit_is_accepted_while_redis_is_down_and_waits_in_its_row(world: World) -> None:
    world.environment["REDIS_URL"] = "redis://127.0.0.1:1/0"
    with world.client() as client:
        task_id = client.call("submit_task", prompt="x", repository="none")["task_id"]
        assert client.call("get_task", task_id=task_id)["status"] == "queued"
    assert world.app().store.tasks.due(waited_s=0) == [task_id]


def test_a_worker_does_not_start_on_a_redis_that_may_drop_its_messages(world: World, valkey_url: str) -> None:
    world.environment["REDIS_URL"] = valkey_url
    server: Any = redis.Redis.from_url(valkey_url)  # pyright: ignore[reportUnknownMemberType]
    server.config_set("maxmemory-policy", "allkeys-lru")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "cloudagent_mcp", "worker"],
            env=world.environment,
            capture_output=True,
            text=True,
            timeout=30,
        )
    finally:
        server.config_set("maxmemory-policy", "noeviction")
        server.close()
    assert done.returncode == 3
    assert "(queue_unavailable)" in done.stderr and "noeviction" in done.stderr


@pytest.mark.parametrize("phase", [Phase.SAVE, Phase.VERIFY])
def test_a_cancel_is_still_one_when_the_worker_died_after_it_had_stopped_the_agent(world: World, phase: Phase) -> None:
    store = world.app().store
    provider = open_provider("local", data_folder=world.home)
    task = store.tasks.add(LOCAL_ACCOUNT, SPEC.model_copy(update={"verify": "true"}))
    claim = store.tasks.claim(task.task_id, worker="a worker that dies", lease_s=60)
    assert claim is not None
    sandbox = provider.create(metadata={"deployment": deployment(world.settings.store_url), "task": task.task_id})
    base = repository.check_out(sandbox, bundle=None, base_sha=None, branch=task.branch)
    sandbox.write("repository/half.txt", b"half of the work\n")
    sandbox.write("run/result.json", b'{"outcome": "stopped", "summary": "I was stopped."}')
    store.tasks.update(task.task_id, 1, base_sha=base, sandbox_id=sandbox.id, provider="local", phase=phase)
    store.tasks.request_cancel(LOCAL_ACCOUNT, task.task_id)
    store.tasks.release(task.task_id, 1)
    world.start_worker()
    with world.client() as client:
        ended = world.wait(client, task.task_id)
        assert (ended["status"], ended["error"]["code"], ended["attempt"]) == ("cancelled", "cancelled_by_user", 2)
        assert ended["result"]["summary"] == "I was stopped." and ended["verdict"] is None
        assert client.call("get_task_diff", task_id=task.task_id)["files"][0]["path"] == "half.txt"
    until(lambda: not provider.list({}), "the sandbox is gone")


def test_ringing_again_leaves_out_what_was_rung_for_just_now(world: World) -> None:
    app = world.app()
    app.store.tasks.add(LOCAL_ACCOUNT, SPEC)
    assert ring_again(app.store, app.queue, FAST) == 1
    assert ring_again(app.store, app.queue, FAST) == 0


def test_a_lease_is_let_go_of_before_another_worker_may_have_it(store: Store) -> None:
    task_id = store.tasks.add(LOCAL_ACCOUNT, SPEC).task_id
    claim = store.tasks.claim(task_id, worker="first", lease_s=FAST.lease_s)
    assert claim is not None
    with Lease(store, claim, FAST) as lease:
        lease.check()
        store.tasks.release(task_id, claim.attempt)
        assert store.tasks.claim(task_id, worker="second", lease_s=60) is not None

        def lost() -> bool:
            try:
                lease.check()
            except LeaseLost:
                return True
            return False

        until(lost, "the first worker notices")


def test_a_cancel_interrupts_a_long_call_from_the_leases_own_thread(store: Store) -> None:
    task_id = store.tasks.add(LOCAL_ACCOUNT, SPEC).task_id
    claim = store.tasks.claim(task_id, worker="w", lease_s=60)
    assert claim is not None
    interrupted = threading.Event()
    with Lease(store, claim, FAST) as lease, lease.interruptible(interrupted.set):
        store.tasks.request_cancel(LOCAL_ACCOUNT, task_id)
        assert interrupted.wait(10)
        interrupted.clear()
        assert interrupted.wait(10), "again: what was to be interrupted may have begun just now"
        assert lease.signals.cancel_requested


def test_who_asks_how_an_interrupted_call_has_ended_gets_the_time_to_hear_it(store: Store) -> None:
    task_id = store.tasks.add(LOCAL_ACCOUNT, SPEC).task_id
    claim = store.tasks.claim(task_id, worker="w", lease_s=60)
    assert claim is not None
    store.tasks.request_cancel(LOCAL_ACCOUNT, task_id)
    interrupted, cut = threading.Event(), 0
    with Lease(store, claim, FAST) as lease, lease.interruptible(interrupted.set):
        assert interrupted.wait(10)
        interrupted.clear()
        while interrupted.wait(10 * FAST.signals_s):  # the question is cut, and asked anew
            interrupted.clear()
            cut += 1
            assert cut < 20
    assert cut > 0


def test_a_cancel_that_comes_between_the_clone_and_the_command_of_a_verify_is_not_lost(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = store.tasks.add(LOCAL_ACCOUNT, SPEC).task_id
    claim = store.tasks.claim(task_id, worker="w", lease_s=60)
    assert claim is not None
    sandbox = open_provider("local", data_folder=tmp_path).create(metadata={})
    interrupted, run = threading.Event(), sandbox.run

    def interrupt() -> None:
        sandbox.end_processes()
        interrupted.set()

    def run_and_stand_still(command: Sequence[str], **how: Any) -> CommandResult:
        done = run(command, **how)
        if "clone" in command:
            store.tasks.request_cancel(LOCAL_ACCOUNT, task_id)
            assert interrupted.wait(20)  # it has come, and found nothing to end
        return done

    monkeypatch.setattr(sandbox, "run", run_and_stand_still)
    try:
        exit_code: int | None = 137
        # On a busy machine it is ended before it has begun.
        with Lease(store, claim, FAST) as lease, lease.interruptible(interrupt), contextlib.suppress(SandboxError):
            exit_code = repository.verify(
                sandbox, input_bundle=None, result_bundle=None, branch="b", command="sleep 600", timeout_s=30
            ).exit_code
        assert interrupted.is_set() and exit_code == 137
    finally:
        sandbox.kill()


def test_there_is_one_embedded_worker_for_a_data_folder(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloudagent_mcp.embedded.DRAIN_S", 0.1)
    with only_worker(world.home, version="1.0"):
        found = running_worker(world.home)
        assert found is not None and (found.version, found.pid) == ("1.0", os.getpid())
        with pytest.raises(Busy), only_worker(world.home, version="1.0"):
            pass
    assert running_worker(world.home) is None


def test_a_worker_that_is_about_to_run_is_not_started_once_more(world: World) -> None:
    for _ in range(5):  # as clients do that submit at the same moment
        ensure_worker(world.settings, version=__version__)
    first = until(lambda: (found := running_worker(world.home)) and found.pid and found, "the worker runs")
    command = ["-m", "cloudagent_mcp", "worker", "--embedded"]
    mine = [process for process in psutil.process_iter() if str(world.home) in _home_of(process, command)]
    assert [process.pid for process in mine] == [first.pid]
    os.kill(first.pid, signal.SIGTERM)
    until(lambda: running_worker(world.home) is None, "the worker has stopped")


def _home_of(process: psutil.Process, command: list[str]) -> str:
    with contextlib.suppress(psutil.Error):
        if process.cmdline()[1:] == command:
            return process.environ().get("CLOUDAGENT_HOME", "")
    return ""


def test_an_idle_worker_stops_but_not_while_a_task_is_unfinished(world: World) -> None:
    store = world.app().store
    task_id = store.tasks.add(LOCAL_ACCOUNT, SPEC).task_id
    stopping = threading.Event()
    with only_worker(world.home, version="1.0") as lock:
        watching = threading.Thread(
            target=stop_when_idle, args=(store, lock, world.home, stopping), kwargs={"idle_s": 0.2}
        )
        watching.start()
        assert not stopping.wait(1.0)
        assert running_worker(world.home) is not None
        store.tasks.request_cancel(LOCAL_ACCOUNT, task_id)
        assert stopping.wait(10)
        watching.join(10)
        assert running_worker(world.home) is None


def test_a_task_that_is_committed_while_the_worker_is_about_to_stop_is_seen(world: World) -> None:
    store = world.app().store
    stopping = threading.Event()
    with only_worker(world.home, version="1.0") as lock:
        # Held, as by a client that has committed a task and looks whether a worker runs.
        with FileLock(world.home / "worker.start.lock"):
            watching = threading.Thread(
                target=stop_when_idle, args=(store, lock, world.home, stopping), kwargs={"idle_s": 0.1}
            )
            watching.start()
            assert not stopping.wait(1.0)
            store.tasks.add(LOCAL_ACCOUNT, SPEC)
        assert not stopping.wait(1.0)
        assert running_worker(world.home) is not None
        stopping.set()
        watching.join(10)


OLD_WORKER = """
import sys, threading
from cloudagent_mcp.embedded import only_worker
import signal, pathlib
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
with only_worker(pathlib.Path(sys.argv[1]), version="0.0.1"):
    print("holds", flush=True)
    stop.wait(60)
"""


def test_an_older_worker_is_asked_to_drain_and_a_new_one_takes_its_place(world: World) -> None:
    old = subprocess.Popen([sys.executable, "-c", OLD_WORKER, str(world.home)], stdout=subprocess.PIPE)
    assert old.stdout is not None and old.stdout.readline()
    ensure_worker(world.settings, version=__version__)
    assert old.wait(15) == 0
    old.stdout.close()
    found = until(
        lambda: (now := running_worker(world.home)) and now.version == __version__ and now, "the new one runs", 20
    )
    os.kill(found.pid, signal.SIGTERM)
    until(lambda: running_worker(world.home) is None, "it stops")


def test_the_embedded_worker_gets_no_clients_credential(world: World) -> None:
    ensure_worker(world.settings, version=__version__)
    found = until(lambda: (now := running_worker(world.home)) and now.pid and now, "the worker runs", 20)
    environment = Path(f"/proc/{found.pid}/environ").read_bytes()
    assert b"CLOUDAGENT_HOME=" in environment and b"ANTHROPIC" not in environment
    os.kill(found.pid, signal.SIGTERM)
    until(lambda: running_worker(world.home) is None, "it stops")
