"""Candidates whose worker dies: each goes on, and their parent ends with them."""

from __future__ import annotations

import pytest

from cloudagent_storage.records import LOCAL_ACCOUNT, TaskStatus
from tests.support.failpoints import Failpoint
from tests.support.installation import Installation


def candidates(installation: Installation, parent: str) -> list[str]:
    found = installation.store.candidates.of(LOCAL_ACCOUNT, parent)
    return [one.task_id for one in sorted(found, key=lambda one: one.candidate)]


@pytest.mark.parametrize("installation", ["sqlite", "postgres"], indirect=True)
def test_candidates_of_a_killed_worker_go_on_and_end_their_parent(installation: Installation) -> None:
    parent = installation.submit(steps=6, best_of=3, faults={"gate": "go"})
    worker = installation.start_worker()
    mine = candidates(installation, parent)
    for task in mine:
        installation.await_calls(task, 2)
    worker.kill()
    for task in mine:
        installation.await_calls(task, 5)
    assert installation.task(parent).status is TaskStatus.RUNNING
    installation.start_worker()
    installation.open_gate("go")
    installation.conclude()
    assert all(installation.attempts(task) > 1 for task in mine)
    ended = installation.task(parent)
    assert ended.status is TaskStatus.COMPLETED and ended.best is not None
    assert sum("has started" in said for said in installation.log(parent)) == 3


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("installation", ["sqlite", "postgres"], indirect=True)
def test_a_worker_that_dies_in_the_moment_of_a_pass_leaves_no_loser_and_no_parent_behind(
    installation: Installation, when: str
) -> None:
    dies = Failpoint("cloudagent_storage.store.tasks:Tasks.finish", when, 1, "kill")
    worker = installation.start_worker(failpoints=[dies])
    # The last candidate that is left has no more to do than the first.
    parent = installation.submit(steps=2, best_of=2, verify="true", cancel_losers=True, faults={})
    assert worker.wait(60)
    assert installation.fired(dies)
    installation.start_worker()
    installation.conclude(dict.fromkeys(candidates(installation, parent), "any"))
    ended = installation.task(parent)
    assert ended.status is TaskStatus.COMPLETED and ended.verdict == "passed"
    assert {installation.task(task).status.terminal for task in candidates(installation, parent)} == {True}
