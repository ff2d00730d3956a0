"""A verify that fails, whatever happens while its output goes back to the agent: every retry counts once."""

from __future__ import annotations

from typing import Any

import pytest

from cloudagent_storage.records import LOCAL_ACCOUNT, Result, Task
from tests.support.failpoints import Failpoint
from tests.support.installation import EITHER_SANDBOX, Installation
from tests.support.worlds import until

MENDED_BY_THE_SECOND = "ls; test -e retry_2_step_0.txt"
MENDED_BY_THE_FIRST = "ls; test -e retry_1_step_0.txt"
NEVER = "echo it is wrong; exit 7"
STARTS = {
    "sqlite": "cloudagent_queue.sandboxes.local:LocalSandbox.start",
    "e2b": "cloudagent_queue.sandboxes.e2b:E2BSandbox.start",
}
MOMENTS = {
    "verified": ("cloudagent_queue.repository:verify", "after", 1),
    "put there": ("tests.support.standin:StandIn.install", "after", 2),
    "about to start": ("start", "before", 2),
    "started": ("start", "after", 2),
    "saved again": ("cloudagent_queue.attempt:Attempt.save", "after", 2),
    "verified again": ("cloudagent_queue.repository:verify", "after", 2),
    "about to start again": ("start", "before", 3),
}


def submit(installation: Installation, verify: str, *mend: dict[str, Any], retries: int = 2, **arguments: Any) -> str:
    faults: dict[str, Any] = {"mend": [{"steps": 2, "step_s": 0.05, **one} for one in mend or ({},)]}
    faults |= arguments.pop("faults", {})
    return installation.submit(steps=3, step_s=0.05, faults=faults, verify=verify, retries=retries, **arguments)


def result_of(task: Task) -> Result:
    assert task.result is not None
    return task.result


def files_of(installation: Installation, task_id: str) -> set[str]:
    with installation.client() as client:
        return {file["path"] for file in client.call("get_task_diff", task_id=task_id)["files"]}


FIRST = {"step_0.txt", "step_1.txt", "step_2.txt"}
SECOND = {"retry_1_step_0.txt", "retry_1_step_1.txt"}


@pytest.mark.full(
    "e2b",
    "verified-sqlite",
    "verified again-sqlite",
    "put there-sqlite",
    "started-sqlite",
    "saved again-sqlite",
    "about to start again-sqlite",
)
@pytest.mark.parametrize("moment", list(MOMENTS))
@EITHER_SANDBOX
def test_whenever_a_worker_dies_each_retry_is_taken_once(installation: Installation, moment: str) -> None:
    place, when, nth = MOMENTS[moment]
    if place == "start":
        place = STARTS["sqlite" if installation.cloud is None else "e2b"]
    dies = Failpoint(place, when, nth)
    worker = installation.start_worker(failpoints=[dies])
    task_id = submit(installation, MENDED_BY_THE_SECOND)
    worker.wait(60)
    assert installation.fired(dies)
    installation.start_worker()
    installation.conclude()
    task = installation.task(task_id)
    checked = result_of(task).verify
    assert (task.verdict, task.retries_used, task.attempt) == ("passed", 2, 2) and checked is not None
    assert (checked.exit_code, checked.tries) == (0, 3)
    runs = [(line["number"], line["failed"]) for line in installation.journal(task_id, "start")]
    assert [number for number, _ in runs] == [1, 2, 3]
    assert runs[0][1] is None and "step_2.txt" in runs[1][1] and "retry_1_step_1.txt" in runs[2][1]


@pytest.mark.full
@EITHER_SANDBOX
def test_a_retry_outlives_its_worker(installation: Installation) -> None:
    worker = installation.start_worker()
    task_id = submit(installation, MENDED_BY_THE_FIRST, {"gate": "go"})
    installation.await_calls(task_id, 4)
    worker.kill()
    installation.start_worker()
    until(lambda: installation.attempts(task_id) == 2, "the next worker has it", 60)
    installation.open_gate("go")
    installation.conclude()
    assert (installation.task(task_id).verdict, installation.task(task_id).retries_used) == ("passed", 1)


@pytest.mark.full("e2b", "restart-sqlite")
@pytest.mark.parametrize("on_interrupt", ["resume", "restart"])
@EITHER_SANDBOX
def test_a_retry_whose_sandbox_dies_goes_on_from_what_was_saved(installation: Installation, on_interrupt: str) -> None:
    installation.start_worker()
    task_id = submit(installation, MENDED_BY_THE_FIRST, {"gate": "go"}, on_interrupt=on_interrupt)
    installation.await_calls(task_id, 4)
    installation.kill_sandbox()
    until(lambda: len(installation.journal(task_id, "start")) == 3, "it goes on elsewhere", 60)
    installation.open_gate("go")
    installation.conclude()
    task = installation.task(task_id)
    assert (task.verdict, task.retries_used) == ("passed", 1)
    assert files_of(installation, task_id) == FIRST | SECOND
    told = [line["failed"] for line in installation.journal(task_id, "start")]
    assert told[0] is None and told[1] == told[2] and "step_2.txt" in told[1]


def test_of_a_retry_that_dies_with_its_sandbox_what_had_been_saved_stays_with_its_verdict(
    on_sqlite: Installation,
) -> None:
    on_sqlite.start_worker()
    task_id = submit(on_sqlite, NEVER, {"gate": "never"}, on_interrupt="fail")
    on_sqlite.await_calls(task_id, 4)
    on_sqlite.kill_sandbox()
    on_sqlite.wait_all()
    task, result = on_sqlite.task(task_id), result_of(on_sqlite.task(task_id))
    assert (task.status, task.verdict, task.error, task.retries_used) == ("completed", "failed", None, 1)
    assert result.retry_error is not None and result.retry_error.code == "sandbox_lost"
    assert result.verify is not None and (result.verify.exit_code, result.verify.tries) == (7, 1)
    assert files_of(on_sqlite, task_id) == FIRST
    assert result.summary == "3 steps"


@pytest.mark.full("e2b")
@EITHER_SANDBOX
def test_a_cancel_during_a_retry_keeps_all_that_was_done_and_claims_nothing(installation: Installation) -> None:
    installation.start_worker()
    task_id = submit(installation, NEVER, {"hang_at": 1})
    installation.await_calls(task_id, 4)
    with installation.client() as client:
        assert client.call("cancel_task", task_id=task_id)["changed"]
    installation.conclude({task_id: "cancelled"})
    task = installation.task(task_id)
    assert (task.verdict, result_of(task).verify, task.retries_used) == (None, None, 1)
    assert files_of(installation, task_id) == FIRST | SECOND


@pytest.mark.full("wrong")
@pytest.mark.parametrize("verify", [NEVER, MENDED_BY_THE_FIRST], ids=["wrong", "mended"])
def test_a_retry_that_is_cut_short_is_saved_and_checked_and_is_the_last(on_sqlite: Installation, verify: str) -> None:
    on_sqlite.start_worker()
    task_id = submit(on_sqlite, verify, {"fail_with": "budget_exceeded"}, retries=5)
    on_sqlite.conclude()
    task, result = on_sqlite.task(task_id), result_of(on_sqlite.task(task_id))
    assert (task.status, task.verdict, task.retries_used) == ("completed", "failed" if verify == NEVER else "passed", 1)
    assert result.retry_error is not None and result.retry_error.code == "budget_exceeded"
    assert result.verify is not None and result.verify.tries == 2
    assert files_of(on_sqlite, task_id) == FIRST | SECOND
    assert on_sqlite.log(task_id)[-1] == "Completed. Its last retry was cut short: It was to fail."


@pytest.mark.full
def test_all_runs_share_one_time_limit(on_sqlite: Installation) -> None:
    on_sqlite.start_worker()
    faults = {"steps": 3, "step_s": 1.5}
    task_id = submit(on_sqlite, NEVER, {"hang_at": 1}, faults=faults, timeout_minutes=0.12)
    on_sqlite.conclude()
    result = result_of(on_sqlite.task(task_id))
    assert result.retry_error is not None and result.retry_error.code == "timed_out"
    times = {line["what"]: line["at"] for line in on_sqlite.journal(task_id) if line["number"] == 2}
    assert times["end"] - times["start"] < 0.12 * 60 - 3, "the first run had taken more than 4 of these 7 seconds"


@pytest.mark.parametrize(
    ("limit", "usage"), [("max_turns", {"turns": 5}), ("max_budget_usd", {"cost_usd": 5.0, "turns": 1})]
)
def test_where_a_limit_is_used_up_nothing_goes_back(on_sqlite: Installation, limit: str, usage: dict[str, Any]) -> None:
    on_sqlite.start_worker()
    task_id = submit(on_sqlite, NEVER, faults={"usage": usage}, **{limit: 5})
    on_sqlite.wait_all()
    task = on_sqlite.task(task_id)
    assert (task.verdict, task.retries_used) == ("failed", 0)
    assert f"No retry: {limit} of the task used up." in on_sqlite.log(task_id)


@pytest.mark.full
def test_an_agent_that_changes_nothing_is_told_as_often_as_was_asked_for_and_no_more(on_sqlite: Installation) -> None:
    on_sqlite.start_worker()
    task_id = submit(on_sqlite, NEVER, {"steps": 0}, retries=2)
    on_sqlite.conclude()
    task = on_sqlite.task(task_id)
    checked = result_of(task).verify
    assert (task.verdict, task.retries_used) == ("failed", 2) and checked is not None
    assert (checked.exit_code, checked.output, checked.tries) == (7, "it is wrong\n", 3)
    told = [line for line in on_sqlite.log(task_id) if "goes back" in line]
    assert told == [
        f"Verify failed with exit code 7; its output goes back to the agent (retry {number} of 2)." for number in (1, 2)
    ]
    assert files_of(on_sqlite, task_id) == FIRST


def test_a_retry_that_takes_everything_back_is_checked_without_it(on_sqlite: Installation) -> None:
    on_sqlite.start_worker()
    task_id = submit(on_sqlite, "test ! -e step_0.txt", {"steps": 0, "undo": True})
    on_sqlite.wait_all()
    task = on_sqlite.task(task_id)
    artifacts = result_of(task).artifacts
    assert (task.verdict, task.retries_used) == ("passed", 1)
    assert artifacts is not None and artifacts.files_changed == 0
    assert on_sqlite.store.blobs.get(LOCAL_ACCOUNT, task_id, "result") is None
