"""Clocks that jump: leases are kept in the database's time, and waits in one that only goes forward."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.support.clock import HOUR, JumpingClock
from tests.support.installation import PATIENT, Installation, Process
from tests.support.worlds import until

HOOK = "tests.support.clock:tell_on_signal"


def offset_of(worker: Process) -> float:
    """How far a worker's clock is from ours, in seconds, by what it says itself."""
    before = worker.log().count("it is ")
    os.kill(worker.pid, signal.SIGUSR1)
    until(lambda: worker.log().count("it is ") > before, "it says what time it has")
    return int(worker.log().rpartition("it is ")[2].split()[0]) - time.time()


@pytest.mark.full
def test_a_workers_clock_jumps_an_hour_and_no_lease_ends_early_or_late(on_postgres: Installation) -> None:
    on_postgres.timers = PATIENT
    clock = JumpingClock(on_postgres.folder / "clock")
    jumping = on_postgres.start_worker(concurrency=2, env=clock.environment, hook=HOOK)
    tasks = on_postgres.submit_many(2, steps=6, faults={"gate": "go"})
    for task in tasks:
        on_postgres.await_calls(task, 2)
    on_postgres.start_worker(concurrency=4)
    tasks += on_postgres.submit_many(2, steps=6, faults={"gate": "go"})
    for jump in (HOUR, -HOUR):
        clock.jump(jump)
        assert abs(offset_of(jumping) - jump) < 60
        on_postgres.settle()  # longer than a lease, of which nobody may think that it has ended
        assert [on_postgres.attempts(task) for task in tasks] == [1] * 4
    jumping.kill()
    started = time.monotonic()
    until(lambda: [on_postgres.attempts(task) for task in tasks] == [2, 2, 1, 1], "the other worker takes over", 60)
    timers = on_postgres.timers
    assert time.monotonic() - started < timers.lease_s + timers.ring_again_s + 10
    on_postgres.open_gate("go")
    on_postgres.conclude()


@pytest.mark.full
@pytest.mark.parametrize("jump", [HOUR, -HOUR])
def test_the_clock_of_the_whole_machine_jumps_an_hour_and_nothing_is_lost(on_sqlite: Installation, jump: float) -> None:
    # With SQLite the database's time is the machine's: a lease may end early then, and the fence has to hold.
    clock = JumpingClock(on_sqlite.folder / "clock")
    workers = [on_sqlite.start_worker(concurrency=2, env=clock.environment, hook=HOOK) for _ in range(2)]
    tasks = on_sqlite.submit_many(4, steps=6, faults={"gate": "go"})
    for task in tasks:
        on_sqlite.await_calls(task, 2)
    clock.jump(jump)
    assert all(abs(offset_of(worker) - jump) < 60 for worker in workers)
    on_sqlite.settle()
    workers[0].kill()
    on_sqlite.start_worker(concurrency=2, env=clock.environment, hook=HOOK)
    on_sqlite.open_gate("go")
    on_sqlite.wait_all()
    clock.jump(0)  # or the age of what was left half deleted could not be told
    on_sqlite.conclude()
