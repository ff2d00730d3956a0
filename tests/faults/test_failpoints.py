"""A process is killed between any two steps of a task's life, from submit to discard."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.support.failpoints import Failpoint
from tests.support.installation import EVERYWHERE, Installation
from tests.support.worlds import until

TASKS = "cloudagent_storage.store.tasks:Tasks"
EVENTS = "cloudagent_storage.store.events:Events"
BLOBS = "cloudagent_storage.store.blobs:Blobs"
PROVIDER = "cloudagent_queue.sandboxes.local:UnsafeProcessProvider"
SANDBOX = "cloudagent_queue.sandboxes.local:UnsafeProcessSandbox"
REPOSITORY = "cloudagent_queue.repository"
PROCESSES = "cloudagent_queue.sandboxes.processes"

STEPS: dict[str, tuple[str, int]] = {
    # What a worker calls for a task with a set-up and a verify command, in order: the place and how many such calls.
    "claim": ("cloudagent_storage.store.backlog:Backlog.claim_next", 1),
    # sandbox, sandbox's id, repository, base, setup, agent, save, verify, model
    "update": (f"{TASKS}.update", 9),
    "begin a sandbox": (f"{TASKS}.begin_sandbox", 1),
    "create": (f"{PROVIDER}.create", 1),
    "half created": ("pathlib:Path.rename", 1),
    # ready, repository, set-up's output, saved, verdict
    "note": (f"{EVENTS}.add", 5),
    "check out": (f"{REPOSITORY}:check_out", 1),
    "set up": (f"{REPOSITORY}:run_setup", 1),
    "renew": (f"{TASKS}.renew", 1),
    "signals": (f"{TASKS}.signals", 2),
    # check-out, set-up, agent, collect, clone, verify
    "launch": (f"{PROCESSES}:launch", 6),
    "settle": (f"{PROCESSES}:Record.settle", 6),
    "install": ("tests.support.standin:StandIn.install", 1),
    "start": (f"{SANDBOX}.start", 1),
    "follow": (f"{TASKS}.follow", 2),
    "end processes": (f"{SANDBOX}.end_processes", 1),
    "collect": (f"{REPOSITORY}:collect", 1),
    "inspect": (f"{REPOSITORY}:inspect", 1),
    "keep": (f"{BLOBS}.put_all", 1),
    "drop": (f"{BLOBS}.drop", 1),
    "verify": (f"{REPOSITORY}:verify", 1),
    "finish": (f"{TASKS}.finish", 1),
    "discard": (f"{SANDBOX}.kill", 1),
    "half deleted": ("cloudagent_queue.sandboxes.safe_files:remove_tree", 1),
}
CLOUD_API = "cloudagent_queue.sandboxes.e2b_api:Api"
CLOUD_SANDBOX = "cloudagent_queue.sandboxes.e2b:E2BSandbox"
OF_A_CLOUD: dict[str, tuple[str, int]] = {
    # Where the sandboxes are in the cloud, this is what is called instead of what is named the same above.
    "create": ("cloudagent_queue.sandboxes.e2b:E2BProvider.create", 1),
    "half created": (f"{CLOUD_API}.create", 1),
    "half prepared": (f"{CLOUD_SANDBOX}.prepare", 1),
    # check-out, set-up, collect, clone, verify
    "launch": (f"{CLOUD_SANDBOX}.run", 5),
    "start": (f"{CLOUD_SANDBOX}.start", 1),
    "end processes": (f"{CLOUD_SANDBOX}.end_processes", 1),
    "discard": (f"{CLOUD_SANDBOX}.kill", 1),
    "half deleted": (f"{CLOUD_API}.about", 1),
}
ONLY_HERE = ("settle",)
EACH_TIME = {
    ("sqlite", "claim after 1"),
    ("sqlite", "create after 1"),
    ("sqlite", "launch before 3"),
    ("sqlite", "keep after 1"),
    ("sqlite", "finish before 1"),
    ("sqlite", "discard before 1"),
    ("postgres", "finish before 1"),
    ("e2b", "half created after 1"),
}
"""What every run throws; the rest is for `--full`."""


def _all() -> Iterator[object]:
    for database in ("sqlite", "postgres", "e2b"):
        of_a_cloud = {step: place for step, place in STEPS.items() if step not in ONLY_HERE} | OF_A_CLOUD
        for step, (place, count) in (of_a_cloud if database == "e2b" else STEPS).items():
            for nth in range(1, count + 1):
                for when in ("before", "after"):
                    name = f"{step} {when} {nth}"
                    marks = [] if (database, name) in EACH_TIME else [pytest.mark.full]
                    point = Failpoint(place, when, nth)
                    yield pytest.param(f"on_{database}", point, marks=marks, id=f"{database}, {name}")


@pytest.mark.parametrize(("fixture", "point"), list(_all()))
def test_a_worker_is_killed_at_any_step_and_the_task_completes(
    request: pytest.FixtureRequest, fixture: str, point: Failpoint
) -> None:
    installation: Installation = request.getfixturevalue(fixture)
    worker = installation.start_worker(concurrency=1, failpoints=[point])
    task = installation.submit(steps=4, setup="sleep 1", verify="test -f step_3.txt")
    assert worker.wait(60) == -signal.SIGKILL
    assert installation.fired(point)
    installation.start_worker()
    installation.conclude()
    assert installation.task(task).verdict == "passed"


@pytest.mark.full
@EVERYWHERE
def test_a_sandbox_whose_id_was_never_stored_is_gone_before_there_is_another(installation: Installation) -> None:
    place, _ = STEPS["create"] if installation.cloud is None else OF_A_CLOUD["create"]
    kills = Failpoint(place, "after")
    freezes = Failpoint(place, "after", action="freeze")
    worker = installation.start_worker(failpoints=[kills])
    installation.submit(steps=4)
    assert worker.wait() == -signal.SIGKILL and installation.fired(kills)
    (provider,) = installation.providers().values()
    (lost,) = provider.list({})
    installation.settle()  # its first sweep is to find a task that wants a worker; there is no second
    worker = installation.start_worker(failpoints=[freezes], sweep_s=60)
    until(lambda: installation.fired(freezes) and worker.is_frozen(), "the next attempt has its own", 60)
    (found,) = provider.list({})
    assert found.id != lost.id
    worker.thaw()
    installation.conclude()


@pytest.mark.full
@pytest.mark.parametrize("when", ["before", "after"])
@EVERYWHERE
def test_a_worker_is_killed_while_it_gives_its_tasks_back(installation: Installation, when: str) -> None:
    point = Failpoint(f"{TASKS}.release", when)
    worker = installation.start_worker(failpoints=[point])
    tasks = installation.submit_many(2, steps=4, faults={"gate": "go"})
    for task in tasks:
        installation.await_calls(task)
    worker.process.send_signal(signal.SIGTERM)
    assert worker.wait() == -signal.SIGKILL
    assert installation.fired(point)
    installation.start_worker()
    installation.open_gate("go")
    installation.conclude()


SUBMIT = {
    "nothing is kept yet": (Failpoint(f"{TASKS}.add", "before"), 0),
    "committed, and no worker was told": (Failpoint("cloudagent_queue.task_queue:TaskQueue.put", "before"), 1),
    "committed and told": (Failpoint("cloudagent_queue.task_queue:TaskQueue.put", "after"), 1),
}


@pytest.mark.full("postgres")
@pytest.mark.parametrize("moment", SUBMIT)
def test_a_submit_is_killed_and_its_task_is_there_as_a_whole_or_not_at_all(
    installation: Installation, moment: str
) -> None:
    point, count = SUBMIT[moment]
    installation.start_worker()
    submit = installation.start_submit([installation.arguments({"steps": 4}, {})], failpoints=[point])
    assert submit.wait() == -signal.SIGKILL
    assert installation.fired(point) and submit.log() == ""
    assert len(installation.tasks()) == count
    installation.conclude(seconds=installation.timers.ring_again_s + 20)
