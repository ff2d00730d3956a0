"""How an agent's end is seen, whenever it comes."""

from __future__ import annotations

import pytest

from tests.support.failpoints import Failpoint
from tests.support.installation import EITHER_SANDBOX, Installation

ALIVE = {
    "sqlite": "cloudagent_queue.sandboxes.local:LocalSandbox.alive",
    "e2b": "cloudagent_queue.sandboxes.e2b:E2BSandbox.alive",
}


@pytest.mark.full("e2b")
@EITHER_SANDBOX
def test_an_agent_that_ends_between_two_looks_at_it_has_not_died(installation: Installation) -> None:
    late = Failpoint(ALIVE["sqlite" if installation.cloud is None else "e2b"], nth=5, action="sleep:5")
    installation.start_worker(failpoints=[late])
    task = installation.submit(steps=1, step_s=3)  # says nothing more from its first moment to its end
    installation.conclude()
    assert installation.fired(late)
    assert installation.task(task).status == "completed"
