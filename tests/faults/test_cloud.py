"""Whole tasks in a cloud at its worst: sandboxes vanish, lines are cut, services refuse or fall silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudagent_queue.sandboxes import circuit, e2b, e2b_api
from cloudagent_storage.records import LOCAL_ACCOUNT
from tests.support.e2b_server.client import CREATE, START, E2bServer, Fault, e2b_server
from tests.support.installation import Installation
from tests.support.worlds import until

SHORT_S = 1.0


def hasty(given: Any) -> None:
    """A worker that waits long for nothing: what a worker of a test puts in by name."""
    impatient(given)
    for module, name in [(e2b, "DATA_S"), (e2b, "TRY_AGAIN_WITHIN_S"), (e2b_api, "DATA_S")]:
        setattr(module, name, SHORT_S)


def impatient(_: Any) -> None:
    """A worker that does not wait long for a service."""
    e2b_api.CONTROL_S = SHORT_S
    defaults = e2b.E2BProvider.__init__.__kwdefaults__
    assert defaults is not None
    defaults["create_s"] = 3.0
    circuit.FIRST_S = circuit.TRIAL_S = 2.0


def created(cloud: E2bServer, installation: Installation) -> list[dict[str, Any]]:
    """Every sandbox that was ever made for its tasks."""
    tasks = installation.tasks()
    return [sandbox for sandbox in cloud.sandboxes() if sandbox["asked"]["metadata"].get("task") in tasks]


def asked_to_create(cloud: E2bServer) -> int:
    return cloud.stats()["requests"].get("POST /sandboxes", 0)


def starts(installation: Installation, task: str) -> list[str]:
    """The sandboxes in which its agents were started."""
    return [line["sandbox"] for line in installation.journal(task, "start")]


# -- a working agent, and what is between it and its worker ------------------------------------------------------------


BAD_LINES: dict[str, list[dict[str, Any]]] = {
    "cut": [{"kind": "cut", "after_bytes": count} for count in (0, 60, 500)],
    "half closed": [{"kind": "half_close", "after_bytes": count} for count in (0, 30)],
    "silent": [{"kind": "hang_after"}, {"kind": "stall", "after_bytes": 60}, {"kind": "hang"}],
    "trickle": [{"kind": "trickle", "bytes_per_s": 1}],
}


@pytest.mark.parametrize("how", list(BAD_LINES))
@pytest.mark.full("half closed", "silent", "trickle")
def test_a_bad_line_to_a_sandbox_neither_repeats_nor_loses_what_its_agent_does(
    on_e2b: Installation, cloud: E2bServer, how: str
) -> None:
    on_e2b.start_worker(hook=f"{__name__}:hasty", pause_s=0.5)
    task = on_e2b.submit(steps=30, faults={"events": 3})
    on_e2b.await_calls(task, 2)
    thrown = [cloud.fault(path=START, skip=2 * number, count=4, **fault) for number, fault in enumerate(BAD_LINES[how])]
    on_e2b.conclude()
    assert all(fault.fired for fault in thrown), [fault.fired for fault in thrown]
    assert len(starts(on_e2b, task)) == 1


@pytest.mark.full
def test_an_agent_whose_start_is_cut_off_is_started_once(on_e2b: Installation, cloud: E2bServer) -> None:
    """Also where every call is cut off after it was done: from the set-up to the end."""
    on_e2b.start_worker(hook=f"{__name__}:hasty", pause_s=0.5)
    task = on_e2b.submit(steps=6, setup="echo x >> /tmp/set-up; wc -l < /tmp/set-up", verify="test -f step_5.txt")
    thrown = [cloud.fault("cut", START, skip=3 * number + 1, after_bytes=40) for number in range(8)]
    on_e2b.conclude()
    assert all(fault.fired for fault in thrown)
    assert len(starts(on_e2b, task)) == 1
    assert on_e2b.task(task).verdict == "passed"
    assert "1" in [line.strip() for line in on_e2b.log(task)], "the set-up ran once"


@pytest.mark.parametrize("what", ["service", "sandbox"])
@pytest.mark.full("sandbox")
def test_what_is_frozen_for_longer_than_a_lease_is_waited_for_and_replaced_by_nothing(
    on_e2b: Installation, cloud: E2bServer, what: str
) -> None:
    on_e2b.start_worker(hook=f"{__name__}:hasty", pause_s=0.5)
    task = on_e2b.submit(steps=10, faults={"gate": "go"})
    on_e2b.await_calls(task, 3)
    before = created(cloud, on_e2b)
    sandbox = before[-1]
    if what == "service":
        cloud.freeze()
    else:
        cloud.freeze_sandbox(sandbox["id"])
    # Given back and claimed again: it waited longer than a worker's patience, and than a lease.
    until(lambda: on_e2b.attempts(task) >= 3, "the task has waited", 60)
    on_e2b.settle()
    assert on_e2b.task(task).status == "running"
    if what == "service":
        cloud.thaw()
    else:
        cloud.thaw_sandbox(sandbox["id"])
    on_e2b.open_gate("go")
    on_e2b.conclude()
    assert len(created(cloud, on_e2b)) == len(before) and starts(on_e2b, task) == [sandbox["id"]]
    assert on_e2b.column(task, "lost_leases") == 0


@pytest.mark.full
def test_an_agent_that_ignores_every_request_to_end_is_ended(on_e2b: Installation) -> None:
    on_e2b.start_worker()
    task = on_e2b.submit(steps=3, faults={"gate": "never", "ignore_stop": True}, timeout_minutes=0.05)
    on_e2b.conclude({task: "timed_out"}, seconds=0.05 * 60 + on_e2b.timers.stop_grace_s + 15)
    assert not on_e2b.journal(task, "stop") and not on_e2b.journal(task, "end")
    result = on_e2b.task(task).result
    assert result is not None and result.artifacts is not None and result.artifacts.files_changed == 2


# -- creates -----------------------------------------------------------------------------------------------------------

CREATES: dict[str, Callable[[E2bServer], Fault]] = {
    "429": lambda cloud: cloud.rate_limit(retry_after_s=2, method="POST"),
    "500 after": lambda cloud: cloud.fault("answer_after", CREATE, method="POST", status=500),
    "silent after": lambda cloud: cloud.fault("hang_after", CREATE, method="POST"),
    "cut after": lambda cloud: cloud.fault("cut", CREATE, method="POST", after_bytes=20),
    "slow": lambda cloud: cloud.fault("delay", CREATE, method="POST", seconds=2),
}


@pytest.mark.parametrize("how", list(CREATES))
@pytest.mark.full("429", "silent after", "cut after", "slow")
def test_however_a_create_goes_wrong_a_task_has_one_sandbox_in_the_end(
    on_e2b: Installation, cloud: E2bServer, how: str
) -> None:
    fault = CREATES[how](cloud)
    on_e2b.start_worker(hook=f"{__name__}:impatient")
    task = on_e2b.submit(steps=3)
    on_e2b.conclude()
    assert fault.fired == 1
    assert [made["id"] for made in created(cloud, on_e2b)] == starts(on_e2b, task)


@pytest.mark.full
def test_a_sandbox_that_appears_after_its_create_was_given_up_is_killed(on_e2b: Installation, cloud: E2bServer) -> None:
    """Longer than anybody looks for it: nothing can adopt it."""
    fault = cloud.fault("delay", CREATE, method="POST", seconds=12)
    on_e2b.start_worker(hook=f"{__name__}:impatient")
    task = on_e2b.submit(steps=3)
    on_e2b.wait_all()
    until(lambda: len(created(cloud, on_e2b)) == 2, "it appears", 30)
    until(lambda: not cloud.living(), "the sweeper kills it", 30)
    on_e2b.conclude()
    assert fault.fired == 1 and len(starts(on_e2b, task)) == 1


# -- fail-over ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def second(tmp_path: Path, on_e2b: Installation) -> Iterator[E2bServer]:
    """Another cloud, which is the installation's second choice: `novita`, and then `e2b`."""
    with e2b_server(tmp_path / "second", shared_folder=str(on_e2b.journal_folder)) as running:
        yield running
        for process in on_e2b.processes:
            process.kill()


def novita_first(cloud: E2bServer, second: E2bServer) -> dict[str, str]:
    return {"SANDBOX_PROVIDER": "novita,e2b", **cloud.environment_of("novita"), **second.environment_of("e2b")}


REFUSALS: dict[str, tuple[Callable[[E2bServer], Fault | None], str]] = {
    "quota": (lambda cloud: cloud.change(most_sandboxes=0), "no room for another sandbox"),
    "429": (
        lambda cloud: cloud.rate_limit(retry_after_s=60, method="POST", count=None),
        "gets too many requests (429)",
    ),
    "500": (
        lambda cloud: cloud.fault("answer", CREATE, method="POST", status=500, count=None),
        "failed to make a sandbox (500)",
    ),
    "wrong key": (lambda cloud: cloud.fault("answer", CREATE, method="POST", status=401), "refuses the API key"),
    "down": (lambda cloud: cloud.freeze(), "does not answer at its address"),
}


@pytest.mark.parametrize("how", list(REFUSALS))
@pytest.mark.full("429", "500", "wrong key", "down")
def test_where_the_first_provider_gives_no_sandbox_the_second_does_and_the_log_says_why(
    on_e2b: Installation, cloud: E2bServer, second: E2bServer, how: str
) -> None:
    refuse, why = REFUSALS[how]
    fault = refuse(cloud)
    on_e2b.start_worker(hook=f"{__name__}:impatient", env=novita_first(cloud, second))
    task = on_e2b.submit(steps=3)
    on_e2b.wait_all()
    assert on_e2b.task(task).status == "completed"
    assert on_e2b.task(task).provider == "e2b"
    (reason,) = [line for line in on_e2b.log(task) if line.startswith("No sandbox from novita:")]
    assert why in reason
    assert fault is None or fault.fired == 1
    until(lambda: not second.living(), "it is killed")
    assert [sandbox["id"] for sandbox in second.sandboxes()] == starts(on_e2b, task)
    if how == "down":
        cloud.thaw()
        # Nobody knows what a service made that did not answer: the sweeper does, once it answers again.
        until(lambda: not cloud.living(), "nothing is left there", 30)


def test_a_task_for_which_nobody_has_a_sandbox_waits_and_goes_on_by_itself(
    on_e2b: Installation, cloud: E2bServer, second: E2bServer
) -> None:
    cloud.change(most_sandboxes=0)
    second.change(most_sandboxes=0)
    on_e2b.start_worker(hook=f"{__name__}:impatient", env=novita_first(cloud, second))
    task = on_e2b.submit(steps=3)
    until(lambda: on_e2b.attempts(task) >= 2, "it was given back, and tried once more", 60)
    assert not on_e2b.task(task).status.terminal
    second.change(most_sandboxes=10)
    on_e2b.wait_all()
    assert on_e2b.task(task).status == "completed" and on_e2b.task(task).provider == "e2b"
    assert on_e2b.column(task, "lost_leases") == 0
    said = [line for line in on_e2b.log(task) if line.startswith("No sandbox from")]
    assert len(said) <= 8, "what is so for long is not told again and again"


def test_twenty_tasks_do_not_hammer_a_provider_that_is_sick(on_e2b: Installation, cloud: E2bServer) -> None:
    sick = cloud.fault("answer", CREATE, method="POST", status=503, count=None)
    before = asked_to_create(cloud)
    on_e2b.start_worker(hook=f"{__name__}:impatient", concurrency=2)
    first, *others = on_e2b.submit_many(20, steps=1)
    until(lambda: all(on_e2b.attempts(task) for task in (first, *others)), "each has had its turn", 60)
    until(lambda: on_e2b.attempts(first) >= 2, "and again", 60)
    # Those of two threads that came at once, and one after each of ever longer pauses.
    assert 1 <= sick.fired == asked_to_create(cloud) - before <= 6
    cloud.heal()
    for task in others:
        on_e2b.store.tasks.request_cancel(LOCAL_ACCOUNT, task)
    on_e2b.conclude(dict.fromkeys(others, "cancelled"))
