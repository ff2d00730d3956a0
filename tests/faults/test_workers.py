"""Workers that die, freeze or are stopped while they run tasks."""

from __future__ import annotations

from tests.support.installation import Installation


def test_the_agents_of_a_killed_worker_go_on_and_the_next_worker_adopts_them(installation: Installation) -> None:
    tasks = installation.submit_many(3, steps=20, step_s=0.1)
    worker = installation.start_worker()
    for task in tasks:
        installation.await_calls(task, 3)
    worker.kill()
    calls = [installation.calls(task) for task in tasks]
    installation.start_worker()
    installation.conclude()
    assert all(count < 20 for count in calls), "the kill came too late to mean anything"
    assert [installation.attempts(task) for task in tasks] == [2] * 3
