"""How an agent's end is seen, whenever it comes."""

from __future__ import annotations

from tests.support.failpoints import Failpoint
from tests.support.installation import Installation


def test_an_agent_that_ends_between_two_looks_at_it_has_not_died(on_sqlite: Installation) -> None:
    installation = on_sqlite
    late = Failpoint("cloudagent_queue.sandboxes.local:LocalSandbox.alive", nth=5, action="sleep:5")
    installation.start_worker(failpoints=[late])
    task = installation.submit(steps=1, step_s=3)  # says nothing more from its first moment to its end
    installation.conclude()
    assert installation.fired(late)
    assert installation.task(task).status == "completed"
