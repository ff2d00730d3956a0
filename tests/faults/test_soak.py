"""Random faults over a stream of tasks, for as long as one likes: `pytest tests/faults --soak MINUTES --seed N`."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from cloudagent_queue.task_queue import QUEUE_NAME, TaskQueue
from cloudagent_storage.errors import DatabaseUnavailable
from tests.faults.test_failpoints import STEPS
from tests.faults.test_messages import GARBAGE, put_raw
from tests.support.failpoints import Failpoint
from tests.support.installation import Installation, Process, connect

WORKERS = 3
AT_ONCE = 12
"""How many unfinished tasks there are at most: with more, the machine's load is what is tested."""


class Soak:
    """The stream, the workers and the faults; all chances come from one seed."""

    def __init__(self, installation: Installation, seed: int) -> None:
        self.installation = installation
        self.random = random.Random(seed)
        self.queue = TaskQueue(installation.queue_url)
        self.workers: list[Process] = []
        self.frozen: dict[Process, float] = {}
        """Until when each is."""
        self.expected: dict[str, str] = {}
        self.thrown: Counter[str] = Counter()
        self.keys = 0
        self.faults: list[Callable[[], None]] = [
            self.kill_worker,
            self.kill_worker_at_a_step,
            self.freeze_worker,
            self.stop_worker,
            self.repeat_messages,
            self.put_garbage,
            self.lose_messages,
            self.cancel_a_task,
            self.kill_a_submit,
        ]
        if installation.database_url.startswith("postgres"):
            self.faults.append(self.hang_up)

    def run(self, minutes: float, say: Callable[[str], None]) -> None:
        end = time.monotonic() + 60 * minutes
        next_fault = time.monotonic() + 3
        while time.monotonic() < end:
            self.keep_workers()
            try:
                if self.installation.store.tasks.unfinished() < AT_ONCE:
                    self.submit()
                if time.monotonic() >= next_fault:
                    fault = self.random.choice(self.faults)
                    say(f"{60 * minutes - (end - time.monotonic()):7.1f} s  {fault.__name__}")
                    fault()
                    self.thrown[fault.__name__] += 1
                    next_fault = time.monotonic() + self.random.uniform(0.5, 5)
            except DatabaseUnavailable:
                continue  # we were hung up on, too
            time.sleep(0.1)
        while self.frozen:
            self.keep_workers()
            time.sleep(0.1)
        self.workers.append(self.installation.start_worker())
        self.queue.close()

    # -- the stream ------------------------------------------------------------------------------------------------

    def submit(self) -> None:
        roll = self.random.random()
        steps = self.random.randint(2, 40)
        arguments: dict[str, Any] = {"steps": steps, "step_s": self.random.choice([0, 0.05, 0.2])}
        faults: dict[str, Any] = {"events": self.random.choice([1, 1, 20]), "pad": self.random.choice([0, 1000])}
        if self.random.random() < 0.5:
            arguments["verify"] = f"test -f step_{steps - 1}.txt"
        if roll < 0.05:
            faults["die_at"] = steps // 2
        if roll > 0.8:
            self.keys += 1
            arguments["idempotency_key"] = f"key {self.keys}"
        task = self.installation.submit(faults=faults, **arguments)
        if roll < 0.05:
            self.expected[task] = "interrupted"
        if roll > 0.8:
            assert self.installation.submit(faults=faults, **arguments) == task

    def keep_workers(self) -> None:
        for worker, until in list(self.frozen.items()):
            if time.monotonic() >= until:
                worker.thaw()
                del self.frozen[worker]
        self.workers = [worker for worker in self.workers if worker.alive]
        while len(self.workers) < WORKERS:
            self.workers.append(self.installation.start_worker())

    def worker(self) -> Process | None:
        awake = [worker for worker in self.workers if worker not in self.frozen and worker.alive]
        return self.random.choice(awake) if awake else None

    # -- the faults ------------------------------------------------------------------------------------------------

    def kill_worker(self) -> None:
        if worker := self.worker():
            worker.kill()

    def kill_worker_at_a_step(self) -> None:
        place, count = self.random.choice(list(STEPS.values()))
        when = self.random.choice(["before", "after"])
        nth = self.random.randint(1, 3 * count)
        self.workers.append(self.installation.start_worker(failpoints=[Failpoint(place, when, nth, once=False)]))

    def freeze_worker(self) -> None:
        if worker := self.worker():
            worker.freeze()
            self.frozen[worker] = time.monotonic() + self.random.uniform(0.2, 2.5 * self.installation.timers.lease_s)

    def stop_worker(self) -> None:
        if worker := self.worker():
            assert worker.stop(within=20) < 10

    def repeat_messages(self) -> None:
        for task in self.random.choices(self.installation.accepted or ["none"], k=20):
            self.queue.put(task)

    def put_garbage(self) -> None:
        for data in self.random.sample(GARBAGE, 3):
            put_raw(self.installation, data)

    def lose_messages(self) -> None:
        if self.installation.queue_url.startswith("sqlite:///"):
            with connect(self.installation.queue_url) as connection:
                connection.execute("DELETE FROM task WHERE queue = ?", (QUEUE_NAME,))
        else:
            client: Any = redis.Redis.from_url(self.installation.queue_url)  # pyright: ignore[reportUnknownMemberType]
            client.flushall()
            client.close()

    def cancel_a_task(self) -> None:
        task = self.random.choice(self.installation.accepted[-AT_ONCE:])
        with self.installation.client() as client:
            if client.call("cancel_task", task_id=task)["changed"]:
                self.expected[task] = "any"

    def kill_a_submit(self) -> None:
        place = self.random.choice(
            ["cloudagent_storage.store.tasks:Tasks.add", "cloudagent_queue.task_queue:TaskQueue.put"]
        )
        point = Failpoint(place, self.random.choice(["before", "after"]), once=False)
        submit = self.installation.start_submit([self.installation.arguments({"steps": 3}, {})], failpoints=[point])
        assert submit.wait() == -9

    def hang_up(self) -> None:
        with connect(self.installation.database_url) as connection:
            connection.cursor().execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_nothing_is_lost_whatever_happens_in_whatever_order(
    installation: Installation, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    minutes: Any = request.config.getoption("--soak")
    seed: Any = request.config.getoption("--seed")
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed

    def say(line: str) -> None:
        with capsys.disabled():
            print(line, flush=True)

    say(f"\n--soak {minutes:g} --seed {seed} on {installation.database_url.partition(':')[0]}, in {tmp_path}")
    soak = Soak(installation, seed)
    soak.run(minutes, say)
    installation.wait_all(180)
    tasks = installation.tasks()
    # Three workers in a row that died of our faults, with nothing new to be seen of the task: it is right to give up.
    poisoned = {
        task.task_id: "poisoned"
        for task in tasks.values()
        if task.error is not None
        and task.error.code == "poisoned"
        and installation.column(task.task_id, "lost_leases") == 3
    }
    endings = Counter(task.error.code if task.error else task.status.value for task in tasks.values())
    say(f"{len(tasks)} tasks: {dict(endings)}; at most {max(task.attempt for task in tasks.values())} attempts")
    say(f"thrown: {dict(soak.thrown)}")
    assert len(poisoned) <= len(tasks) // 50
    installation.conclude({**soak.expected, **poisoned})
