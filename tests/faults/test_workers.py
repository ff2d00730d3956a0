"""Workers that die, freeze or are stopped while they run tasks."""

from __future__ import annotations

import os
import re
import signal

import pytest

from cloudagent_queue.lease import Timers
from cloudagent_storage.store.backlog import LOST_LEASES
from tests.support.failpoints import Failpoint
from tests.support.hog import little_memory
from tests.support.installation import EITHER_SANDBOX, EVERYWHERE, PATIENT, Installation
from tests.support.worlds import until

TASKS = "cloudagent_storage.store.tasks:Tasks"
LET_GO = re.compile("attempt 1 lets go|could not release task_")
"""What a worker logs that finds out that its lease was lost; the second, where the database had hung up on it."""


@EVERYWHERE
def test_the_agents_of_a_killed_worker_go_on_and_the_next_worker_adopts_them(installation: Installation) -> None:
    tasks = installation.submit_many(3, steps=6, faults={"gate": "go"})
    worker = installation.start_worker()
    for task in tasks:
        installation.await_calls(task, 2)
    worker.kill()
    for task in tasks:
        installation.await_calls(task, 5)  # nobody follows, and it works
    installation.start_worker()
    installation.open_gate("go")
    installation.conclude()
    assert all(installation.attempts(task) > 1 for task in tasks)
    assert all("goes on in the same sandbox" in "".join(installation.log(task)) for task in tasks)


@pytest.mark.full("postgres", "e2b")
@EVERYWHERE
def test_a_frozen_worker_that_wakes_after_its_lease_lets_go(installation: Installation) -> None:
    frozen = installation.start_worker()
    task = installation.submit(steps=6, faults={"gate": "go"})
    installation.await_calls(task, 2)
    frozen.freeze()
    installation.start_worker()
    until(lambda: installation.attempts(task) == 2, "the other worker takes the task", 60)
    frozen.thaw()
    until(lambda: LET_GO.search(frozen.log()), "the first worker lets go", 60)
    installation.open_gate("go")
    installation.conclude()
    assert frozen.alive


ZOMBIES = {
    # The write that the first worker is about to make when it freezes, and what keeps the second busy meanwhile.
    "log": (Failpoint(f"{TASKS}.follow", "before", 3, "freeze"), None),
    "end": (
        Failpoint(f"{TASKS}.finish", "before", 1, "freeze"),
        Failpoint(f"{TASKS}.finish", "before", 1, "sleep:2.5"),
    ),
    "phase": (
        Failpoint(f"{TASKS}.update", "before", 6, "freeze"),  # into `save`
        Failpoint("cloudagent_queue.repository:collect", "before", 1, "sleep:2.5"),
    ),
}


@pytest.mark.full("end", "phase", "e2b")
@pytest.mark.parametrize("write", list(ZOMBIES))
@EVERYWHERE
def test_what_a_frozen_worker_was_about_to_write_is_refused_when_it_wakes(
    installation: Installation, write: str
) -> None:
    freezes, holds = ZOMBIES[write]
    frozen = installation.start_worker(failpoints=[freezes])
    task = installation.submit(steps=6, faults={"gate": "go"} if write == "log" else {})
    until(lambda: installation.fired(freezes) and frozen.is_frozen(), "the first worker is about to write", 60)
    installation.start_worker(failpoints=[holds] if holds else [])
    if holds is not None:
        until(lambda: installation.fired(holds), "the second has the task, and is at the same step", 60)
    else:
        until(lambda: "step 4" in installation.log(task), "the second has read the same lines", 60)
    frozen.thaw()
    until(lambda: "attempt 1 lets go" in frozen.log(), "the first worker is refused", 60)
    installation.open_gate("go")
    installation.conclude()


@pytest.mark.full
def test_a_worker_that_freezes_with_the_tasks_row_locked_holds_it_for_a_bounded_time(on_postgres: Installation) -> None:
    freezes = Failpoint("cloudagent_storage.store.row:write_lines", "before", 6, "freeze")
    frozen = on_postgres.start_worker(failpoints=[freezes])
    task = on_postgres.submit(steps=8, faults={"gate": "go"})
    until(lambda: on_postgres.fired(freezes) and frozen.is_frozen(), "it is frozen in a transaction", 60)
    on_postgres.start_worker()
    until(lambda: on_postgres.attempts(task) == 2, "the database hangs up on the frozen one", 60)
    frozen.thaw()
    until(lambda: LET_GO.search(frozen.log()), "the first worker lets go", 60)
    on_postgres.open_gate("go")
    on_postgres.conclude()


@pytest.mark.full("SIGINT", "e2b")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@EVERYWHERE
def test_a_stop_gives_running_tasks_back_at_once_and_their_agents_go_on(
    installation: Installation, number: signal.Signals
) -> None:
    installation.timers = PATIENT
    worker = installation.start_worker(drain_s=Timers().drain_s)
    tasks = installation.submit_many(4, steps=6, faults={"gate": "go"})
    for task in tasks:
        installation.await_calls(task, 2)
    assert worker.stop(number) < 10
    assert worker.process.returncode == 0
    assert [installation.column(task, "lease_until") for task in tasks] == [None] * 4
    for task in tasks:
        installation.await_calls(task, 5)
    installation.start_worker()
    installation.open_gate("go")
    installation.conclude()
    assert [installation.column(task, "lost_leases") for task in tasks] == [0] * 4
    assert [installation.attempts(task) for task in tasks] == [2] * 4


@pytest.mark.full
@EITHER_SANDBOX
def test_tasks_outlive_a_worker_that_is_killed_for_its_memory(installation: Installation) -> None:
    worker = installation.start_worker(hook="tests.support.hog:on_signal")
    tasks = installation.submit_many(3, steps=6, faults={"gate": "go"})
    for task in tasks:
        installation.await_calls(task, 2)
    with little_memory(worker.pid) as killed:
        os.kill(worker.pid, signal.SIGUSR1)
        assert worker.wait() == -signal.SIGKILL
        if killed is None:
            print("no control group can be made: it was killed in the middle of taking memory")
        else:
            assert "oom_kill 1" in killed.read_text()
    installation.start_worker()
    installation.open_gate("go")
    installation.conclude()
    assert all(installation.attempts(task) > 1 for task in tasks)


@pytest.mark.full
@EITHER_SANDBOX
def test_a_worker_that_gets_no_memory_ends_the_task_and_keeps_its_work(installation: Installation) -> None:
    starves = Failpoint(f"{TASKS}.follow", "before", 3, "raise:MemoryError")
    installation.start_worker(failpoints=[starves])
    task = installation.submit(steps=6, faults={"gate": "never"})
    installation.conclude({task: "internal"})
    assert installation.fired(starves)
    result = installation.task(task).result
    assert result is not None and result.artifacts is not None and result.artifacts.files_changed > 0


@pytest.mark.full("postgres")
def test_a_task_that_kills_every_worker_ends_as_poisoned_and_the_others_complete(installation: Installation) -> None:
    poison = installation.submit(steps=6, faults={"die_worker": 2})
    others = installation.submit_many(2, steps=150, step_s=0.1)
    workers = [installation.start_worker()]

    def poisoned() -> bool:
        if not workers[-1].alive:
            workers.append(installation.start_worker())
        return installation.task(poison).status.terminal

    until(poisoned, "it is given up", 90)
    installation.conclude({poison: "poisoned"})
    # A busy machine may take a lease from a worker before the agent kills it; that counts as well.
    assert installation.column(poison, "lost_leases") == LOST_LEASES <= installation.attempts(poison)
    killed = [line["worker"] for line in installation.journal(poison, "killed_worker")]
    assert killed and killed == [worker.pid for worker in workers if worker.process.returncode == -signal.SIGKILL]
    assert all(installation.attempts(task) > 1 for task in others)
