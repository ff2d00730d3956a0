"""The oracle itself: it must find what it is there for, and nothing in a deployment that is well."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloudagent_storage.records import EventDraft, new_id
from tests.support.failpoints import Failpoint
from tests.support.installation import Installation
from tests.support.oracle import leftover_processes
from tests.support.worlds import until


@pytest.fixture(scope="module")
def well(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An installation with one finished task, in which the oracle finds nothing."""
    installation = Installation.make(tmp_path_factory.mktemp("well"))
    installation.start_worker()
    installation.submit(steps=3)
    installation.conclude()
    yield installation
    installation.close()


def test_a_task_that_was_accepted_and_is_not_there_is_found(well: Installation) -> None:
    well.accepted.append(lost := new_id("task"))
    try:
        with pytest.raises(AssertionError, match=f"{lost} was accepted and is lost"):
            well.check()
    finally:
        well.accepted.remove(lost)
    well.check()


def test_a_task_that_has_not_ended_is_found(make_installation: Callable[..., Installation]) -> None:
    installation = make_installation()
    installation.submit()
    with pytest.raises(AssertionError, match="it has not ended: queued"):
        installation.check()


def test_another_ending_than_the_expected_one_is_found(well: Installation) -> None:
    (task,) = well.accepted
    with pytest.raises(AssertionError, match="should have ended as cancelled and did as completed"):
        well.check({task: "cancelled"})
    well.check({task: "any"})


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({"what": "overlap"}, "two agents lived at once"),
        ({"what": "start", "sandbox": "sbx_other"}, "its agent was started 2 times"),
        ({"what": "start", "sandbox": "sbx_other", "number": 2}, "its agent had the runs"),
        ({"what": "call", "step": 1}, "calls were repeated or left out"),
        ({"what": "call", "step": 3}, "its agent wrote 4 files, and its result has 3"),
        ({"what": "end", "events": 4}, "its log has 3"),
    ],
)
def test_what_an_agent_did_twice_is_found(well: Installation, line: dict[str, Any], complaint: str) -> None:
    (task,) = well.accepted
    journal = well.journal_folder / f"{task}.jsonl"
    before = journal.read_text()
    journal.write_text(before + json.dumps({"pid": 1, "sandbox": "sbx_x", "number": 1, "at": 0.0, **line}) + "\n")
    try:
        with pytest.raises(AssertionError, match=complaint):
            well.check()
    finally:
        journal.write_text(before)
    well.check()


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (EventDraft(kind="text", message="step 2", raw={"number": 2}), "lost, doubled or out of order"),
        (EventDraft(kind="text", message="step 9", raw={"number": 9}), "lost, doubled or out of order"),
        (EventDraft(kind="status", message="Completed."), "it ended more than once"),
        (EventDraft(kind="status", message="Sandbox ready."), "the lines that say that it ended are"),
    ],
)
def test_a_line_too_many_in_the_log_is_found(
    make_installation: Callable[..., Installation], line: EventDraft, complaint: str
) -> None:
    installation = make_installation()
    installation.start_worker()
    task = installation.submit(steps=3, step_s=0)
    installation.wait_all()
    installation.store.events.add(task, line)
    with pytest.raises(AssertionError, match=complaint):
        installation.check()


def test_a_sandbox_and_a_process_that_nobody_owns_are_found(make_installation: Callable[..., Installation]) -> None:
    installation = make_installation()
    (provider,) = (installation.home() and installation.providers()).values()
    sandbox = provider.create(metadata={"task": "task_none"})
    sandbox.start(["sleep", "60"], env={})
    until(lambda: leftover_processes(installation), "its environment can be read")
    with pytest.raises(AssertionError, match=r"(?s)a process left over: .*a sandbox left over") as found:
        installation.check()
    assert sandbox.id in str(found.value)
    sandbox.kill()
    installation.check()


def test_a_folder_that_was_left_half_made_is_found(make_installation: Callable[..., Installation]) -> None:
    installation = make_installation()
    half = installation.home() / "sandboxes" / ".new_sbx_x"
    half.mkdir(parents=True)
    with pytest.raises(AssertionError, match="a sandbox left over"):
        installation.check()
    half.rmdir()
    installation.check()


def test_two_agents_of_one_task_cannot_go_unseen(make_installation: Callable[..., Installation]) -> None:
    installation = make_installation()
    installation.start_worker()
    task = installation.submit(steps=2, faults={"gate": "open"})
    installation.await_calls(task)
    (host,) = installation.providers().values()
    (first,) = host.list({})
    second = host.create(metadata=first.metadata)
    for name in ("agent.py", "request.json"):
        second.write(f"run/{name}", host.connect(first.id).read(f"run/{name}", max_bytes=100_000))
    second.start([second.python, "-I", "-S", "run/agent.py"], env={})
    until(lambda: installation.journal(task, "overlap"), "the second agent finds the first")
    installation.open_gate("open")
    installation.wait_all()
    with pytest.raises(AssertionError, match="two agents lived at once"):
        installation.check()


def test_a_failpoint_says_that_it_fired_and_fires_once(make_installation: Callable[..., Installation]) -> None:
    installation = make_installation()
    failpoint = Failpoint("cloudagent_storage.store.backlog:Backlog.claim_next", "after")
    first = installation.start_worker(failpoints=[failpoint])
    assert not installation.fired(failpoint)
    installation.submit(steps=2, step_s=0)
    assert first.wait() == -9
    assert installation.fired(failpoint)
    installation.start_worker(failpoints=[failpoint])
    installation.conclude()


def test_no_process_of_another_installation_is_taken_for_ours(well: Installation, tmp_path: Path) -> None:
    other = Installation.make(tmp_path)
    try:
        (provider,) = (other.home() and other.providers()).values()
        provider.create(metadata={}).start(["sleep", "60"], env={})
        assert len(leftover_processes(other)) == 1 and not leftover_processes(well)
    finally:
        other.close()
    assert not leftover_processes(other)
