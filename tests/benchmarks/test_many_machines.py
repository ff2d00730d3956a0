"""What an installation of several processes costs, and how soon it recovers. Prints ratios, asserts nothing.

uv run pytest -m benchmark -n 0 -s tests/benchmarks/test_many_machines.py
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from cloudagent_mcp.client import HttpClient
from cloudagent_mcp.settings import Settings
from cloudagent_queue.lease import Timers
from cloudagent_storage.records import TaskStatus
from tests.support import bare_huey, light
from tests.support.installation import ADMIN_KEY, FAST, Installation, Process, connect
from tests.support.racing import race_all
from tests.support.valkey import ValkeyServer
from tests.support.worlds import until

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(600)]

REAL = Timers()
GAP_S = 0.2
"""Between two submits whose latency is measured: an idle queue is what most tasks find."""


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Installation]]:
    """Makes an installation with the arguments of `Installation.make`; closed with the test."""
    made: list[Installation] = []
    numbers = itertools.count()

    def make(**arguments: Any) -> Installation:
        made.append(Installation.make(tmp_path / str(next(numbers)), **arguments))
        return made[-1]

    yield make
    for installation in made:
        installation.close()


def percentile(values: Sequence[float], percent: float) -> float:
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def spread(values: Sequence[float], high: float = 99) -> str:
    """The median and what lies near the top, in milliseconds."""
    name = "max" if high == 100 else f"p{high:g}"
    return f"p50 {percentile(values, 50) * 1000:.0f} ms, {name} {percentile(values, high) * 1000:.0f} ms"


def tell(what: str, values: Sequence[float], aim_s: float, aim: str, *, high: float = 99) -> None:
    """One line: what it took, and how that compares with the aim."""
    ratio = percentile(values, high) / aim_s
    print(f"\n{what}: {spread(values, high)}, {ratio:.2f}x of {aim} (n={len(values)})")


def query(installation: Installation, sql: str) -> list[tuple[Any, ...]]:
    with connect(installation.database_url) as connection:
        cursor = connection.cursor()
        cursor.execute(sql)
        return list(cursor.fetchall())


def count(installation: Installation, where: str) -> int:
    return query(installation, f"SELECT count(*) FROM tasks WHERE {where}")[0][0]


def seen_at(wanted: set[str], reached: Callable[[], set[str]], what: str, seconds: float = 60) -> dict[str, float]:
    """When each of them was reached, by the monotonic clock."""
    found: dict[str, float] = {}
    deadline = time.monotonic() + seconds
    while len(found) < len(wanted):
        assert time.monotonic() < deadline, f"not in {seconds:g} s: {what}"
        found |= dict.fromkeys((reached() & wanted) - found.keys(), time.monotonic())
        time.sleep(0.01)
    return found


def submit_all(installation: Installation, count: int, **prompt: Any) -> list[str]:
    with installation.client() as client:
        arguments = installation.arguments(prompt, {"timeout_minutes": 60})
        return [client.call("submit_task", **arguments)["task_id"] for _ in range(count)]


def over_http(url: str) -> HttpClient:
    return HttpClient(Settings.read({"CLOUDAGENT_URL": url, "CLOUDAGENT_API_KEY": ADMIN_KEY}))


def timed(call: Callable[[], Any]) -> float:
    started = time.monotonic()
    call()
    return time.monotonic() - started


# -- recovery ----------------------------------------------------------------------------------------------------------


def test_a_dead_worker_to_the_next_event_of_its_tasks(
    make: Callable[..., Installation], postgres_url: str, valkey_url: str
) -> None:
    deaths, tasks = 4, 4
    installation = make(database=postgres_url, queue=valkey_url)
    worker = installation.start_worker(concurrency=tasks)
    submitted = submit_all(installation, tasks, steps=100_000, step_s=0.1)
    for task in submitted:
        installation.await_calls(task, 2)
    taken: list[float] = []
    for death in range(1, deaths + 1):
        successor = installation.start_worker(concurrency=tasks)
        worker.kill()
        killed = time.monotonic()
        offsets = dict(query(installation, "SELECT task_id, log_offset FROM tasks"))

        def moved(attempt: int = death + 1, offsets: dict[str, int] = offsets) -> set[str]:
            rows = query(installation, f"SELECT task_id, log_offset FROM tasks WHERE attempt = {attempt}")
            return {task_id for task_id, offset in rows if offset > offsets[task_id]}

        moving = seen_at(set(submitted), moved, "the tasks move again")
        taken += [at - killed for at in moving.values()]
        worker = successor
    repeated = 0
    for task in submitted:
        steps = [call["step"] for call in installation.journal(task, "call")]
        repeated += len(installation.journal(task, "start")) - 1 + (len(steps) != len(set(steps)))
    bound = FAST.lease_s + FAST.ring_again_s + FAST.sweep_s
    aim = f"lease {FAST.lease_s:g} s + ring_again {FAST.ring_again_s:g} s + sweep {FAST.sweep_s:g} s, scaled down"
    tell("dead worker to the next event of its task", taken, bound, aim, high=100)
    print(f"no call of the agent repeated: {1 - repeated / len(taken):.0%} of {len(taken)} (aim 100%)")


def test_redis_emptied_until_every_queued_task_was_started(
    make: Callable[..., Installation], postgres_url: str, valkey: ValkeyServer, valkey_url: str
) -> None:
    installation = make(database=postgres_url, queue=valkey_url)
    ring_again_s = 8.0  # longer than a worker takes to start
    bound = ring_again_s + FAST.sweep_s
    aim = f"ring_again {ring_again_s:g} s + sweep {FAST.sweep_s:g} s, scaled down"

    def start() -> Process:
        # A long lease, so that none which runs out brings the others forward.
        hook = "tests.support.light:end_at_once"
        return installation.start_worker(hook=hook, ring_again_s=ring_again_s, lease_s=60.0)

    worker = start()

    def started(tasks: Sequence[str], since: float) -> list[float]:
        until(lambda: light.claims(installation.journal_folder).keys() >= set(tasks), "all are started", 60)
        at = light.claims(installation.journal_folder)
        return [at[task] - since for task in tasks]

    submit_all(installation, 4, gate="go")
    until(lambda: count(installation, "status = 'running'") == 4, "the worker is busy")
    waiting = submit_all(installation, 50)
    valkey.flush()
    emptied = time.monotonic()
    installation.open_gate("go")
    tell("Redis emptied while the worker is busy, to a task's start", started(waiting, emptied), bound, aim, high=100)

    submit_all(installation, 4, gate="never")
    until(lambda: count(installation, "status = 'running'") == 4, "the worker is busy")
    waiting = submit_all(installation, 30)  # with their rings fewer than the queue has room for
    until(lambda: count(installation, "status = 'queued' AND rung_at IS NULL") == 0, "the sweeper has rung for all")
    worker.kill()
    valkey.flush()
    emptied = time.monotonic()
    start()
    what = "Redis emptied while no worker is there, just after it was rung for all, to a task's start"
    tell(what, started(waiting, emptied), bound, aim, high=100)


def test_a_stop_with_four_running(make: Callable[..., Installation], postgres_url: str, valkey_url: str) -> None:
    installation = make(database=postgres_url, queue=valkey_url, timers=REAL)
    submitted = submit_all(installation, 4, steps=2, gate="go")
    taken: list[float] = []
    for stop in range(1, 6):
        worker = installation.start_worker()
        held = f"lease_until IS NOT NULL AND phase = 'agent' AND attempt = {stop}"
        until(lambda held=held: count(installation, held) == len(submitted), "all run", 60)
        taken.append(worker.stop())
    tell("SIGTERM with 4 running to the worker's end", taken, 10, "10 s", high=100)


def test_a_cancel_until_the_sandbox_is_gone(
    make: Callable[..., Installation], postgres_url: str, valkey_url: str
) -> None:
    installation = make(database=postgres_url, queue=valkey_url, timers=REAL)
    installation.start_worker(concurrency=30)
    submitted = submit_all(installation, 30, steps=100_000, step_s=1.0)
    for task in submitted:
        installation.await_calls(task, 1, 120)
    sandboxes = dict(query(installation, "SELECT task_id, sandbox_id FROM tasks"))
    folder = installation.home() / "sandboxes"
    cancelled: dict[str, float] = {}

    def gone() -> set[str]:
        if len(cancelled) < len(submitted):
            task = submitted[len(cancelled)]
            cancelled[task] = time.monotonic()
            client.call("cancel_task", task_id=task)
        return {task for task in submitted if not (folder / sandboxes[task]).exists()}

    with installation.client() as client:
        at = seen_at(set(submitted), gone, "all sandboxes are gone", 120)
    tell(
        "cancel to the sandbox gone, 30 at once",
        [at[task] - cancelled[task] for task in submitted],
        15,
        "15 s",
    )


# -- submit and wait ---------------------------------------------------------------------------------------------------


def test_a_thousand_racing_submits_with_one_key(
    make: Callable[..., Installation], postgres_url: str, valkey_url: str
) -> None:
    installation = make(database=postgres_url, queue=valkey_url)
    arguments = installation.arguments({}, {"idempotency_key": "one"})
    raced = race_all(installation.environment(), arguments, processes=4, count=250, threads=16)
    seconds = max(each.ended for each in raced) - min(each.began for each in raced)
    answers = {task_id for each in raced for task_id in each.task_ids}
    kept = query(installation, "SELECT count(*) FROM tasks")[0][0]
    print(
        f"\n1,000 submits with one key from 4 processes of 16 threads: {kept} in the database (aim 1), "
        f"{len(answers)} answered, {seconds:.1f} s, {seconds:.1f} ms each"
    )


@pytest.mark.parametrize("kind", ["redis", "sqlite"])
def test_submit_to_claimed_against_bare_huey(
    make: Callable[..., Installation], request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    submits = 50
    where = request.getfixturevalue("valkey_url") if kind == "redis" else str(tmp_path / "bare.db")
    database = request.getfixturevalue("postgres_url") if kind == "redis" else "sqlite"
    floor = bare_huey.latencies(kind, where, tmp_path / "bare.txt", submits=submits, gap_s=GAP_S)

    installation = make(database=database, queue=where if kind == "redis" else None)
    installation.start_worker(hook="tests.support.light:end_at_once")
    submit_all(installation, 5)
    sent: dict[str, float] = {}
    answered: dict[str, float] = {}
    with installation.client() as client:
        for _ in range(submits):
            before = time.monotonic()
            task = client.call("submit_task", **installation.arguments({}, {}))["task_id"]
            sent[task], answered[task] = before, time.monotonic()
            time.sleep(GAP_S)
    until(lambda: light.claims(installation.journal_folder).keys() >= sent.keys(), "all are claimed")
    at = light.claims(installation.journal_folder)
    ours = [at[task] - before for task, before in sent.items()]
    print(
        f"\nsubmit to claimed on {'Redis and Postgres' if kind == 'redis' else 'SQLite'}: {spread(ours)}; "
        f"bare huey {spread(floor)}; p50 {statistics.median(ours) / statistics.median(floor):.2f}x, "
        f"p99 {percentile(ours, 99) / percentile(floor, 99):.2f}x (n={submits}, one every {GAP_S:g} s)"
    )
    submitting = [answered[task] - before for task, before in sent.items()]
    rows = [task for task in installation.tasks().values() if task.task_id in sent]
    since_row = [(row.started_at - row.created_at).total_seconds() for row in rows if row.started_at is not None]
    print(
        f"of it, the submit until its answer: {spread(submitting)}; the row's birth to its claim: {spread(since_row)}"
    )


@pytest.mark.parametrize("kind", ["postgres", "sqlite"])
def test_a_change_to_the_answer_of_a_waiting_get_task(
    make: Callable[..., Installation], request: pytest.FixtureRequest, kind: str
) -> None:
    together, rounds = 10, 5
    database = "sqlite" if kind == "sqlite" else request.getfixturevalue("postgres_url")
    installation = make(database=database)
    _, url = installation.start_server()
    store = installation.store
    taken: list[float] = []
    with closing(over_http(url)) as client, ThreadPoolExecutor(together) as pool:

        def wait(task_id: str) -> tuple[float, str]:
            answer = client.call("get_task", task_id=task_id, wait_seconds=30)
            return time.monotonic(), answer["status"]

        for _ in range(rounds):
            tasks = submit_all(installation, together)
            claimed = [store.tasks.claim(task, worker="w", lease_s=60) for task in tasks]
            waits = [pool.submit(wait, task) for task in tasks]
            time.sleep(1.0)
            changed: list[float] = []
            for claim in claimed:
                assert claim is not None
                changed.append(time.monotonic())
                store.tasks.finish(claim.task.task_id, claim.attempt, status=TaskStatus.COMPLETED)
                time.sleep(0.1)
            taken += [each.result()[0] - at for each, at in zip(waits, changed, strict=True)]
    early = sum(value < 0 for value in taken)
    tell(f"a change to the answer of a waiting get_task over HTTP, {kind}", taken, 0.2, "200 ms")
    if early:
        print(f"{early} of them answered before the change")


# -- many at once ------------------------------------------------------------------------------------------------------


def test_two_hundred_running_and_two_thousand_queued(
    make: Callable[..., Installation], postgres_url: str, valkey_url: str
) -> None:
    running, queued, threads = 200, 2000, 4
    installation = make(database=postgres_url, queue=valkey_url, timers=REAL)
    _, url = installation.start_server()
    workers = [start_light(installation, 100, line_s=10.0) for _ in range(2)]
    before = sum(resident(worker) for worker in workers)
    with closing(over_http(url)) as client, ThreadPoolExecutor(threads) as pool:
        arguments = installation.arguments({}, {"timeout_minutes": 60})

        def submit(_: int) -> float:
            return timed(lambda: client.call("submit_task", **arguments))

        list(pool.map(submit, range(running)))
        started = time.monotonic()
        while (working := count(installation, "phase = 'agent'")) < running and time.monotonic() - started < 60:
            time.sleep(0.2)
        begun_s = time.monotonic() - started
        submitting = time.monotonic()
        submits = list(pool.map(submit, range(queued)))
        rate = queued / (time.monotonic() - submitting)
        tasks: list[str] = [task_id for (task_id,) in query(installation, "SELECT task_id FROM tasks")]

        def get(task_id: str) -> float:
            return timed(lambda: client.call("get_task", task_id=task_id))

        gets = list(pool.map(get, random.Random(1).sample(tasks, 300)))
    each = (sum(resident(worker) for worker in workers) - before) / running
    time.sleep(max(0.0, submitting + 2.5 * REAL.heartbeat_s - time.monotonic()))
    watched_s = time.monotonic() - submitting
    print(
        f"\nwith {working} of {running} running in 2 workers after {begun_s:.1f} s and {queued} queued, "
        f"{threads} clients over HTTP, agents in memory:"
    )
    tell("submit_task", submits, 0.25, "250 ms")
    tell("get_task", gets, 0.1, "100 ms")
    print(f"submits a second: {rate:.0f}; memory of a running task: {each / 1e6:.2f} MB")
    print(f"missed heartbeats in {watched_s:.0f} s: {missed(installation, workers)} (aim 0)")


def test_a_thousand_running_in_one_worker(
    make: Callable[..., Installation], postgres_url: str, valkey_url: str
) -> None:
    running, watched_s, line_s, patience_s = 1000, 60.0, 10.0, 45.0
    installation = make(database=postgres_url, queue=valkey_url, timers=REAL)
    race_all(installation.environment(), installation.arguments({}, {}), processes=2, count=running // 2, threads=8)
    worker = start_light(installation, running, line_s=line_s)
    before, ready = resident(worker), time.monotonic()
    at_work = "phase = 'agent' AND lease_until IS NOT NULL"
    while (working := count(installation, at_work)) < running and time.monotonic() - ready < patience_s:
        time.sleep(0.2)
    begun_s = time.monotonic() - ready
    claimed = light.claims(installation.journal_folder)
    process = psutil.Process(worker.pid)
    used, since = sum(process.cpu_times()[:2]), time.monotonic()
    time.sleep(watched_s)
    share = (sum(process.cpu_times()[:2]) - used) / (time.monotonic() - since)
    each = (resident(worker) - before) / running
    print(
        f"\n{running} tasks for one worker, agents in memory that say a line every {line_s:g} s: "
        f"{len(claimed)} claimed after {max(claimed.values()) - ready:.1f} s, {working} at work after {begun_s:.1f} s; "
        f"then for {watched_s:g} s {share:.0%} of one core, {each / 1e6:.2f} MB a task, "
        f"{count(installation, at_work)} at work at the end"
    )
    print(f"missed heartbeats: {missed(installation, [worker])} (aim 0)")


def start_light(installation: Installation, concurrency: int, *, line_s: float) -> Process:
    return installation.start_worker(
        concurrency=concurrency, hook="tests.support.light:in_process", env={light.LINE_S: str(line_s)}
    )


def resident(process: Process) -> int:
    return psutil.Process(process.pid).memory_info().rss


def missed(installation: Installation, workers: Sequence[Process]) -> str:
    """Leases that ran out or that a worker gave up, and tasks that were claimed more than once."""
    lost = query(installation, "SELECT coalesce(sum(lost_leases), 0) FROM tasks")[0][0]
    logs = "".join(worker.log() for worker in workers)
    said = {
        "given up by the worker": "lost the lease",
        "given back": "has to wait",
        "renewals that failed": "could not renew",
        "failed reads of the queue": "Error reading from queue",
    }
    counts = ", ".join(f"{logs.count(line)} {name}" for name, line in said.items())
    return f"{lost} leases ran out, {count(installation, 'attempt > 1')} claimed again, {counts}"
