"""What a worker does about leases, lost messages and the sandboxes of those before it: one process and no agent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cloudagent_queue.lease import Lease, Timers
from cloudagent_queue.run import run_task
from cloudagent_queue.sandboxes import Provider, open_provider
from cloudagent_queue.sweep import ring_again
from cloudagent_queue.task_queue import TaskQueue
from cloudagent_queue.worker import Worker
from cloudagent_storage.errors import LeaseLost
from cloudagent_storage.records import LOCAL_ACCOUNT, Phase, TaskSpec, TaskStatus
from cloudagent_storage.secrets import Keyring, generate_key
from cloudagent_storage.store import Store
from tests.support.stored import EXPIRED, claimed, queued
from tests.support.worlds import FAST, until


@pytest.fixture
def local_store(tmp_path: Path) -> Iterator[Store]:
    store = Store.open(f"sqlite:///{tmp_path / 'store.db'}")
    store.migrate()
    store.accounts.ensure(LOCAL_ACCOUNT)
    yield store
    store.close()


def is_lost(lease: Lease) -> bool:
    try:
        lease.check()
    except LeaseLost:
        return True
    return False


def test_a_lease_that_cannot_be_renewed_is_let_go_of_before_it_ends(local_store: Store) -> None:
    timers = Timers(lease_s=60, heartbeat_s=50, let_go_s=0.3, signals_s=0.05)
    with Lease(local_store, claimed(local_store), timers) as lease:
        lease.check()
        until(lambda: is_lost(lease), "it lets go", 5)
        assert local_store.tasks.due(waited_s=-1) == []  # nobody else may have the task yet


def test_a_heartbeat_keeps_a_lease_for_as_long_as_it_is_wanted(local_store: Store) -> None:
    timers = replace(FAST, lease_s=2.0, heartbeat_s=0.1, let_go_s=20.0)
    claim = claimed(local_store, lease_s=timers.lease_s)
    ended = time.monotonic() + 1.5 * timers.lease_s
    with Lease(local_store, claim, timers) as lease:
        while time.monotonic() < ended:
            assert local_store.tasks.claim(claim.task.task_id, worker="other", lease_s=60) is None
            lease.check()
            time.sleep(0.05)


def test_what_nobody_has_rung_for_is_put_into_the_queue(local_store: Store, tmp_path: Path) -> None:
    queue = TaskQueue(f"sqlite:///{tmp_path / 'queue.db'}")
    waiting = [queued(local_store), claimed(local_store, lease_s=EXPIRED).task.task_id]
    claimed(local_store)
    assert ring_again(local_store, queue, FAST) == len(waiting)
    came: list[str] = []
    stopping = threading.Event()

    def run(task_id: str) -> None:
        came.append(task_id)
        if len(came) == len(waiting):
            stopping.set()

    giving_up = threading.Timer(5, stopping.set)
    giving_up.start()
    queue.consume(run, concurrency=1, stopping=stopping, grace_s=5)
    giving_up.cancel()
    queue.close()
    assert came == waiting


def left_by_nonce(store: Store, provider: Provider, task_id: str) -> None:
    """A worker died after it had made a sandbox and before it could say so."""
    store.tasks.update(task_id, 1, phase=Phase.SANDBOX)
    store.tasks.begin_sandbox(task_id, 1, nonce="nonce", provider="local", place=None)
    provider.create(metadata={"deployment": "d", "task": task_id, "nonce": "nonce"})


def left_by_id(store: Store, provider: Provider, task_id: str) -> None:
    """A worker died while it set the repository up."""
    store.tasks.update(task_id, 1, phase=Phase.REPOSITORY)
    store.tasks.begin_sandbox(task_id, 1, nonce="nonce", provider="local", place=None)
    sandbox = provider.create(metadata={"deployment": "d", "task": task_id, "nonce": "nonce"})
    store.tasks.update(task_id, 1, sandbox_id=sandbox.id)


@pytest.mark.parametrize("leave", [left_by_nonce, left_by_id])
def test_a_sandbox_without_an_agent_is_gone_before_another_is_made(
    local_store: Store, tmp_path: Path, leave: Callable[[Store, Provider, str], None]
) -> None:
    provider = open_provider("unsafe-process", data_folder=tmp_path)
    # What the set-up command of the second attempt sees, and then it fails: no agent is needed.
    look = f"ls -d {tmp_path}/sandboxes/sbx_* | wc -l; exit 7"
    spec = TaskSpec(prompt="x", title="x", setup=look, provider="unsafe-process")
    task_id = local_store.tasks.add(LOCAL_ACCOUNT, spec).task_id
    claimed(local_store, task_id)
    leave(local_store, provider, task_id)
    local_store.tasks.release(task_id, 1)
    worker = Worker(
        name="second",
        place="here",
        store=local_store,
        keyring=Keyring([generate_key()]),
        providers=["unsafe-process"],
        open_provider=lambda _: provider,
        deployment="d",
        cache_folder=tmp_path / "repositories",
        git_environment={},
        ring=lambda _: None,
        stopping=threading.Event(),
        timers=FAST,
    )
    assert run_task(worker)
    task = local_store.tasks.get(LOCAL_ACCOUNT, task_id)
    assert task.status is TaskStatus.FAILED and task.error is not None and task.error.code == "setup_failed"
    lines = [line.message.strip() for line in local_store.events.list(LOCAL_ACCOUNT, task_id).lines]
    assert "1" in lines, lines
    assert provider.list({}) == []
