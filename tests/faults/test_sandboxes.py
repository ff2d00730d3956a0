"""Sandboxes that die under a working agent, or whose time is up: the task goes on in another."""

from __future__ import annotations

from typing import Any

import pytest

from cloudagent_queue.sandboxes import e2b
from cloudagent_queue.sandboxes.e2b import E2BProvider
from cloudagent_queue.sandboxes.local import UnsafeProcessProvider
from cloudagent_storage.records import LOCAL_ACCOUNT
from cloudagent_storage.store.backlog import PATIENCE_S
from tests.support.failpoints import Failpoint
from tests.support.installation import EITHER_SANDBOX, EVERYWHERE, Installation
from tests.support.worlds import until

KEEP_S = 0.3
SESSION_S = 6.0
CLOUD_SESSION_S = 20.0


def short_sessions(_: Any) -> None:
    """The provider ends every sandbox soon: what a worker of a test puts in by name."""
    UnsafeProcessProvider.session_cap_s = SESSION_S

    class ShortSessions(E2BProvider):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            # To move within a tenth of so short a session is not always possible: the cloud gives some more time.
            self._api.session_s = CLOUD_SESSION_S
            self.session_cap_s = SESSION_S

    e2b.E2BProvider = ShortSessions


def set_up_each_time(installation: Installation) -> None:
    """The cloud keeps no finished set-up, so that the command of a test tells what it finds in each sandbox."""
    if installation.cloud is not None:
        installation.cloud.fault("answer", ".*/snapshots", status=501, count=None)


def has_checkpoint(installation: Installation, task: str) -> bool:
    return installation.store.blobs.get(LOCAL_ACCOUNT, task, "checkpoint") is not None


def sandboxes(installation: Installation, task: str) -> list[str]:
    """Those in which its agents were started, in order."""
    return [line["sandbox"] for line in installation.journal(task, "start")]


@EVERYWHERE
def test_a_task_whose_sandbox_dies_goes_on_in_another_from_its_last_checkpoint(installation: Installation) -> None:
    set_up_each_time(installation)
    installation.start_worker(checkpoint_s=KEEP_S)
    task = installation.submit(steps=6, faults={"gate": "go"}, setup="ls")
    installation.await_calls(task, 4)
    until(lambda: has_checkpoint(installation, task), "a checkpoint")
    installation.kill_sandbox()
    installation.open_gate("go")
    installation.conclude()
    assert len(sandboxes(installation, task)) == 2
    log = installation.log(task)
    assert "The sandbox died. The task goes on in a new one." in log
    assert "step_0.txt" in log[log.index("The sandbox died. The task goes on in a new one.") :][3], "it was restored"
    assert installation.column(task, "sandbox_losses") == 1
    assert not has_checkpoint(installation, task), "the result takes its place"
    assert installation.task(task).usage.sandbox_seconds > 0


@pytest.mark.full("e2b")
@EITHER_SANDBOX
def test_a_sandbox_that_dies_while_no_worker_is_there_is_noticed_by_the_next(installation: Installation) -> None:
    worker = installation.start_worker(checkpoint_s=KEEP_S)
    task = installation.submit(steps=6, faults={"gate": "go"})
    until(lambda: has_checkpoint(installation, task), "a checkpoint")
    worker.kill()
    installation.kill_sandbox()
    installation.open_gate("go")
    installation.start_worker()
    installation.conclude()
    assert len(sandboxes(installation, task)) == 2


@pytest.mark.full("update", "finish", "e2b")
@pytest.mark.parametrize("place", ["begin_sandbox", "update", "finish"])
@EITHER_SANDBOX
def test_a_worker_that_dies_while_it_moves_a_task_leaves_it_whole(installation: Installation, place: str) -> None:
    nth = {"begin_sandbox": 2, "update": 8, "finish": 1}[place]
    dies = Failpoint(f"cloudagent_storage.store.tasks:Tasks.{place}", "before", nth)
    installation.start_worker(failpoints=[dies], checkpoint_s=KEEP_S)
    task = installation.submit(steps=5, faults={"gate": "go"})
    until(lambda: has_checkpoint(installation, task), "a checkpoint")
    installation.kill_sandbox()
    installation.open_gate("go")
    until(lambda: installation.fired(dies), "the worker dies", 60)
    installation.start_worker()
    installation.conclude()


@EITHER_SANDBOX
def test_before_the_providers_time_is_up_a_task_moves_to_a_new_sandbox(installation: Installation) -> None:
    installation.start_worker(hook="tests.faults.test_sandboxes:short_sessions")
    task = installation.submit(steps=4, faults={"gate": "go"})
    until(lambda: len(sandboxes(installation, task)) == 2, "the task moves", 60)
    installation.open_gate("go")
    installation.conclude()
    assert installation.journal(task, "stop"), "the first agent was asked to stop"
    assert installation.column(task, "sandbox_losses") in (None, 0)
    if installation.cloud is not None:
        for sandbox in installation.cloud.sandboxes():
            if sandbox["id"] in sandboxes(installation, task):
                assert sandbox["ended_at"] - sandbox["started_at"] < CLOUD_SESSION_S, "it did not wait for its end"


@pytest.mark.full
def test_the_time_in_which_a_sandbox_was_made_ready_counts(on_sqlite: Installation) -> None:
    slow = Failpoint("cloudagent_queue.sandboxes.local:UnsafeProcessProvider.create", "after", 1, "sleep:4")
    on_sqlite.start_worker(failpoints=[slow], hook="tests.faults.test_sandboxes:short_sessions")
    task = on_sqlite.submit(steps=4, faults={"gate": "go"})
    until(lambda: len(sandboxes(on_sqlite, task)) == 2, "the task moves", 60)
    on_sqlite.open_gate("go")
    on_sqlite.conclude()
    assert on_sqlite.fired(slow)
    at = [line["at"] for line in on_sqlite.journal(task) if line["what"] in ("start", "stop")]
    assert at[1] - at[0] < SESSION_S - 3


@pytest.mark.full("e2b")
@EITHER_SANDBOX
def test_a_task_moves_in_time_however_often_its_worker_changes(installation: Installation) -> None:
    hook = "tests.faults.test_sandboxes:short_sessions"
    first = installation.start_worker(hook=hook)
    task = installation.submit(steps=4, faults={"gate": "go"})
    installation.await_calls(task, 3)
    first.kill()
    installation.start_worker(hook=hook)
    until(lambda: len(sandboxes(installation, task)) == 2, "the task moves", 60)
    installation.open_gate("go")
    installation.conclude()
    at = [line["at"] for line in installation.journal(task) if line["what"] in ("start", "stop")]
    assert at[1] - at[0] < SESSION_S, "the second worker knew how old the sandbox was"


@pytest.mark.full("e2b")
@EITHER_SANDBOX
def test_a_task_that_wants_to_fail_keeps_its_last_checkpoint(installation: Installation) -> None:
    installation.start_worker(checkpoint_s=KEEP_S)
    task = installation.submit(steps=6, faults={"gate": "go"}, on_interrupt="fail")
    installation.await_calls(task, 5)
    until(lambda: has_checkpoint(installation, task), "a checkpoint")
    installation.kill_sandbox()
    installation.conclude({task: "sandbox_lost"})
    result = installation.task(task).result
    assert result is not None and result.artifacts is not None
    assert result.artifacts.files_changed > 0
    assert installation.store.blobs.get(LOCAL_ACCOUNT, task, "result") is not None


@pytest.mark.full("e2b")
@EITHER_SANDBOX
def test_a_task_that_wants_to_start_again_finds_nothing_of_the_first_try(installation: Installation) -> None:
    set_up_each_time(installation)
    installation.start_worker(checkpoint_s=KEEP_S)
    task = installation.submit(steps=6, faults={"gate": "go"}, setup="ls -A", on_interrupt="restart")
    installation.await_calls(task, 5)
    until(lambda: has_checkpoint(installation, task), "a checkpoint")
    installation.kill_sandbox()
    installation.open_gate("go")
    installation.conclude()
    assert [line.strip() for line in installation.log(task)].count(".git") == 2


@pytest.mark.full("e2b")
@EITHER_SANDBOX
def test_a_task_that_kills_every_sandbox_ends(installation: Installation) -> None:
    installation.start_worker(checkpoint_s=KEEP_S)
    task = installation.submit(steps=6, faults={"gate": "go"})
    for count in range(1, 5):
        until(lambda count=count: len(sandboxes(installation, task)) == count, "it is started", 60)
        installation.kill_sandbox()
    installation.conclude({task: "sandbox_lost"})


@pytest.mark.full("e2b")
@EITHER_SANDBOX
def test_a_cancel_of_a_task_that_has_just_lost_its_sandbox_brings_its_checkpoint_out(
    installation: Installation,
) -> None:
    waits = Failpoint("cloudagent_storage.store.tasks:Tasks.begin_sandbox", "before", 2, "sleep:3")
    installation.start_worker(failpoints=[waits], checkpoint_s=KEEP_S)
    task = installation.submit(steps=6, faults={"gate": "go"})
    installation.await_calls(task, 5)
    until(lambda: has_checkpoint(installation, task), "a checkpoint")
    installation.kill_sandbox()
    until(lambda: installation.fired(waits), "a new sandbox is about to be made", 60)
    installation.store.tasks.request_cancel(LOCAL_ACCOUNT, task)
    installation.conclude({task: "cancelled"})
    result = installation.task(task).result
    assert result is not None and result.artifacts is not None and result.artifacts.files_changed > 0


def test_a_task_whose_machine_stays_away_goes_on_elsewhere(on_sqlite: Installation) -> None:
    away = on_sqlite.start_worker("a", checkpoint_s=KEEP_S)
    task = on_sqlite.submit(steps=6, faults={"gate": "go"})
    until(lambda: has_checkpoint(on_sqlite, task), "a checkpoint")
    away.kill()
    on_sqlite.kill_sandbox()
    on_sqlite.open_gate("go")
    on_sqlite.start_worker("b", patience_s=1.0)
    until(lambda: on_sqlite.task(task).status.terminal, "it ends", 60)
    on_sqlite.start_worker("a")
    on_sqlite.conclude()
    assert "The machine that the sandbox is on did not come back. The task goes on in a new one." in on_sqlite.log(task)
    assert PATIENCE_S > 60
