"""How an agent's end is seen, whenever it comes."""

from __future__ import annotations

import pytest

from tests.support.failpoints import Failpoint
from tests.support.installation import EITHER_SANDBOX, Installation

LATE = {
    "sqlite": Failpoint("cloudagent_queue.sandboxes.local:LocalSandbox.alive", nth=5, action="sleep:5"),
    # What one call brings is what the agent said and whether it lives; the third is made when it has begun.
    "e2b": Failpoint("cloudagent_queue.sandboxes.e2b:E2BSandbox.watch", nth=3, action="sleep:5"),
}


@pytest.mark.full("e2b")
@EITHER_SANDBOX
def test_an_agent_that_ends_between_two_looks_at_it_has_not_died(installation: Installation) -> None:
    late = LATE["sqlite" if installation.cloud is None else "e2b"]
    installation.start_worker(failpoints=[late])
    task = installation.submit(steps=1, step_s=3)  # says nothing more from its first moment to its end
    installation.conclude()
    assert installation.fired(late)
    assert installation.task(task).status == "completed"


@pytest.mark.full("obeys-e2b", "obeys-sqlite", "ignores-sqlite")
@pytest.mark.parametrize("obeys", [True, False], ids=["obeys", "ignores"])
@EITHER_SANDBOX
def test_an_agent_that_talks_without_a_pause_is_cancelled_whether_it_obeys_or_not(
    installation: Installation, obeys: bool
) -> None:
    installation.start_worker()
    task = installation.submit(steps=100_000, step_s=0.001, faults={"events": 5, "ignore_stop": not obeys})
    installation.await_calls(task, 20)
    with installation.client() as client:
        assert client.call("cancel_task", task_id=task)["changed"]
    installation.conclude({task: "cancelled"}, seconds=30)
    assert bool(installation.journal(task, "stop")) == obeys
    result = installation.task(task).result
    assert result is not None and result.artifacts is not None and result.artifacts.files_changed > 0
