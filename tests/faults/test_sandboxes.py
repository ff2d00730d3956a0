"""Sandboxes that die under a working agent, or whose time is up: the task goes on in another."""

from __future__ import annotations

from typing import Any

import pytest

from cloudagent_queue.sandboxes.local import UnsafeProcessProvider
from cloudagent_storage.records import LOCAL_ACCOUNT
from cloudagent_storage.store.backlog import PATIENCE_S
from tests.support.failpoints import Failpoint
from tests.support.installation import Installation
from tests.support.worlds import until

KEEP_S = 0.3
SESSION_S = 6.0


def short_sessions(_: Any) -> None:
    """The provider ends every sandbox soon: what a worker of a test puts in by name."""
    UnsafeProcessProvider.session_cap_s = SESSION_S


def kill_sandbox(installation: Installation, host: str = "a") -> None:
    """From outside, as a provider that has lost a machine."""
    provider = installation.providers()[host]
    (found,) = provider.list({})
    provider.connect(found.id).kill()


def has_checkpoint(installation: Installation, task: str) -> bool:
    return installation.store.blobs.get(LOCAL_ACCOUNT, task, "checkpoint") is not None


def sandboxes(installation: Installation, task: str) -> list[str]:
    """Those in which its agents were started, in order."""
    return [line["sandbox"] for line in installation.journal(task, "start")]


def test_a_task_whose_sandbox_dies_goes_on_in_another_from_its_last_checkpoint(installation: Installation) -> None:
    installation.start_worker(checkpoint_s=KEEP_S)
    task = installation.submit(steps=6, faults={"gate": "go"}, setup="ls")
    installation.await_calls(task, 4)
    until(lambda: has_checkpoint(installation, task), "a checkpoint")
    kill_sandbox(installation)
    installation.open_gate("go")
    installation.conclude()
    assert len(sandboxes(installation, task)) == 2
    log = installation.log(task)
    assert "The sandbox died. The task goes on in a new one." in log
    assert "step_0.txt" in log[log.index("The sandbox died. The task goes on in a new one.") :][3], "it was restored"
    assert installation.column(task, "sandbox_losses") == 1
    assert not has_checkpoint(installation, task), "the result takes its place"
    assert installation.task(task).usage.sandbox_seconds > 0


def test_a_sandbox_that_dies_while_no_worker_is_there_is_noticed_by_the_next(on_sqlite: Installation) -> None:
    worker = on_sqlite.start_worker(checkpoint_s=KEEP_S)
    task = on_sqlite.submit(steps=6, faults={"gate": "go"})
    until(lambda: has_checkpoint(on_sqlite, task), "a checkpoint")
    worker.kill()
    kill_sandbox(on_sqlite)
    on_sqlite.open_gate("go")
    on_sqlite.start_worker()
    on_sqlite.conclude()
    assert len(sandboxes(on_sqlite, task)) == 2


@pytest.mark.parametrize("place", ["begin_sandbox", "update", "finish"])
@pytest.mark.full("update", "finish")
def test_a_worker_that_dies_while_it_moves_a_task_leaves_it_whole(on_sqlite: Installation, place: str) -> None:
    nth = {"begin_sandbox": 2, "update": 8, "finish": 1}[place]
    dies = Failpoint(f"cloudagent_storage.store.tasks:Tasks.{place}", "before", nth)
    on_sqlite.start_worker(failpoints=[dies], checkpoint_s=KEEP_S)
    task = on_sqlite.submit(steps=5, faults={"gate": "go"})
    until(lambda: has_checkpoint(on_sqlite, task), "a checkpoint")
    kill_sandbox(on_sqlite)
    on_sqlite.open_gate("go")
    until(lambda: on_sqlite.fired(dies), "the worker dies", 60)
    on_sqlite.start_worker()
    on_sqlite.conclude()


def test_before_the_providers_time_is_up_a_task_moves_to_a_new_sandbox(on_sqlite: Installation) -> None:
    on_sqlite.start_worker(hook="tests.faults.test_sandboxes:short_sessions")
    task = on_sqlite.submit(steps=4, faults={"gate": "go"})
    until(lambda: len(sandboxes(on_sqlite, task)) == 2, "the task moves", 60)
    on_sqlite.open_gate("go")
    on_sqlite.conclude()
    assert on_sqlite.journal(task, "stop"), "the first agent was asked to stop"
    assert on_sqlite.column(task, "sandbox_losses") in (None, 0)


def test_a_task_moves_in_time_however_often_its_worker_changes(on_sqlite: Installation) -> None:
    hook = "tests.faults.test_sandboxes:short_sessions"
    first = on_sqlite.start_worker(hook=hook)
    task = on_sqlite.submit(steps=4, faults={"gate": "go"})
    on_sqlite.await_calls(task, 3)
    first.kill()
    on_sqlite.start_worker(hook=hook)
    until(lambda: len(sandboxes(on_sqlite, task)) == 2, "the task moves", 60)
    on_sqlite.open_gate("go")
    on_sqlite.conclude()
    at = [line["at"] for line in on_sqlite.journal(task) if line["what"] in ("start", "stop")]
    assert at[1] - at[0] < SESSION_S, "the second worker knew how old the sandbox was"


def test_a_task_that_wants_to_fail_keeps_its_last_checkpoint(on_sqlite: Installation) -> None:
    on_sqlite.start_worker(checkpoint_s=KEEP_S)
    task = on_sqlite.submit(steps=6, faults={"gate": "go"}, on_interrupt="fail")
    on_sqlite.await_calls(task, 5)
    until(lambda: has_checkpoint(on_sqlite, task), "a checkpoint")
    kill_sandbox(on_sqlite)
    on_sqlite.conclude({task: "sandbox_lost"})
    result = on_sqlite.task(task).result
    assert result is not None and result.artifacts is not None
    assert result.artifacts.files_changed > 0
    assert on_sqlite.store.blobs.get(LOCAL_ACCOUNT, task, "result") is not None


def test_a_task_that_wants_to_start_again_finds_nothing_of_the_first_try(on_sqlite: Installation) -> None:
    on_sqlite.start_worker(checkpoint_s=KEEP_S)
    task = on_sqlite.submit(steps=6, faults={"gate": "go"}, setup="ls -A", on_interrupt="restart")
    on_sqlite.await_calls(task, 5)
    until(lambda: has_checkpoint(on_sqlite, task), "a checkpoint")
    kill_sandbox(on_sqlite)
    on_sqlite.open_gate("go")
    on_sqlite.conclude()
    assert [line.strip() for line in on_sqlite.log(task)].count(".git") == 2


def test_a_task_that_kills_every_sandbox_ends(on_sqlite: Installation) -> None:
    on_sqlite.start_worker(checkpoint_s=KEEP_S)
    task = on_sqlite.submit(steps=6, faults={"gate": "go"})
    for count in range(1, 5):
        until(lambda count=count: len(sandboxes(on_sqlite, task)) == count, "it is started", 60)
        kill_sandbox(on_sqlite)
    on_sqlite.conclude({task: "sandbox_lost"})


def test_a_cancel_of_a_task_that_has_just_lost_its_sandbox_brings_its_checkpoint_out(on_sqlite: Installation) -> None:
    waits = Failpoint("cloudagent_storage.store.tasks:Tasks.begin_sandbox", "before", 2, "sleep:3")
    on_sqlite.start_worker(failpoints=[waits], checkpoint_s=KEEP_S)
    task = on_sqlite.submit(steps=6, faults={"gate": "go"})
    on_sqlite.await_calls(task, 5)
    until(lambda: has_checkpoint(on_sqlite, task), "a checkpoint")
    kill_sandbox(on_sqlite)
    until(lambda: on_sqlite.fired(waits), "a new sandbox is about to be made", 60)
    on_sqlite.store.tasks.request_cancel(LOCAL_ACCOUNT, task)
    on_sqlite.conclude({task: "cancelled"})
    result = on_sqlite.task(task).result
    assert result is not None and result.artifacts is not None and result.artifacts.files_changed > 0


def test_a_task_whose_machine_stays_away_goes_on_elsewhere(on_sqlite: Installation) -> None:
    away = on_sqlite.start_worker("a", checkpoint_s=KEEP_S)
    task = on_sqlite.submit(steps=6, faults={"gate": "go"})
    until(lambda: has_checkpoint(on_sqlite, task), "a checkpoint")
    away.kill()
    kill_sandbox(on_sqlite)
    on_sqlite.open_gate("go")
    on_sqlite.start_worker("b", patience_s=1.0)
    until(lambda: on_sqlite.task(task).status.terminal, "it ends", 60)
    on_sqlite.start_worker("a")
    on_sqlite.conclude()
    assert "The machine that the sandbox is on did not come back. The task goes on in a new one." in on_sqlite.log(task)
    assert PATIENCE_S > 60
