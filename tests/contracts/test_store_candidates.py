"""Several candidates under one parent, on both databases: what becomes of it, whatever becomes of them, and when."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence

import pytest

from cloudagent_storage.errors import (
    CloudAgentError,
    InvalidInput,
    NotReady,
    OutOfRange,
    SeveralAgents,
    TaskEnded,
    TaskExpired,
    TaskNotFound,
)
from cloudagent_storage.records import (
    LOCAL_ACCOUNT,
    Artifacts,
    BlobKind,
    CandidateDraft,
    Claim,
    Idempotency,
    Result,
    Task,
    TaskError,
    TaskSpec,
    TaskStatus,
    Usage,
    Verdict,
    new_id,
)
from cloudagent_storage.store import Store
from tests.support.stored import ask, at_once, claimed, execute, line, messages, queued

LOCAL = LOCAL_ACCOUNT
FAILURE = TaskError(code="timed_out", message="It took too long.", remedy="Allow more.")


def group(
    store: Store, count: int = 3, *, cancel_losers: bool = False, account_id: str = LOCAL, key: str | None = None
) -> list[str]:
    """The ids of a new parent and of its candidates."""
    spec = TaskSpec(
        prompt="x", title="Fix it", best_of=count, models=("a", "b"), max_budget_usd=3.0, cancel_losers=cancel_losers
    )
    drafts = [
        CandidateDraft(
            task_id=new_id("task"),
            spec=TaskSpec(prompt="x", title="Fix it", model="ab"[number % 2], max_budget_usd=1.0),
            credentials=b"sealed",
        )
        for number in range(count)
    ]
    parent = store.tasks.add(
        account_id,
        spec,
        base_sha="base",
        blobs={"input": b"bundle"},
        lines=[line("Queued.")],
        candidates=drafts,
        idempotency=None if key is None else Idempotency(key=key, digest="d"),
    )
    return [parent.task_id, *(found.task_id for found in store.candidates.of(account_id, parent.task_id))]


def end(
    store: Store,
    claim: Claim,
    status: TaskStatus = TaskStatus.COMPLETED,
    verdict: Verdict | None = Verdict.UNVERIFIED,
    *,
    lines: int = 2,
    cost: float = 0.5,
    sandbox_cost: float | None = 0.1,
) -> Task:
    artifacts = Artifacts(branch=claim.task.branch, files_changed=1 if lines else 0, insertions=lines)
    return store.tasks.finish(
        claim.task.task_id,
        claim.attempt,
        status=status,
        verdict=verdict if status is TaskStatus.COMPLETED else None,
        result=Result(summary=claim.task.task_id, artifacts=artifacts),
        error=FAILURE if status is TaskStatus.FAILED else None,
        usage=Usage(cost_usd=cost, turns=2, input_tokens=10, sandbox_seconds=3.0, sandbox_cost_usd=sandbox_cost),
    )


def get(store: Store, task_id: str) -> Task:
    return store.tasks.get(LOCAL, task_id)


def test_a_parent_begins_with_its_first_candidate_and_ends_with_its_last(store: Store) -> None:
    parent, first, second, third = group(store)
    assert get(store, parent).status is TaskStatus.QUEUED and get(store, parent).best_of == 3
    mine = [get(store, task_id) for task_id in (first, second, third)]
    assert [task.candidate for task in mine] == [1, 2, 3]
    assert {task.parent_task_id for task in mine} == {parent} and [task.model for task in mine] == ["a", "b", "a"]
    end(store, claimed(store, second), verdict=Verdict.FAILED)
    running = get(store, parent)
    assert running.status is TaskStatus.RUNNING and running.started_at is not None and running.best is None
    assert running.usage.cost_usd == 0.5
    end(store, claimed(store, third), TaskStatus.FAILED)
    claim = claimed(store, first)
    assert get(store, parent).status is TaskStatus.RUNNING
    end(store, claim, verdict=Verdict.PASSED, lines=7)
    ended = get(store, parent)
    assert (ended.status, ended.verdict, ended.error) == (TaskStatus.COMPLETED, Verdict.PASSED, None)
    assert ended.best is not None and (ended.best.candidate, ended.best.task_id) == (1, first)
    assert ended.result == get(store, first).result and ended.branch == get(store, first).branch
    assert ended.completed_at is not None and ended.model == "a"
    usage = ended.usage
    assert (usage.cost_usd, usage.turns, usage.input_tokens, usage.sandbox_seconds) == (1.5, 6, 30, 9.0)
    assert usage.sandbox_cost_usd == pytest.approx(0.3)
    assert messages(store, parent) == [
        "Queued.",
        f"Candidate 2, {second}, has started.",
        f"Candidate 2, {second}: completed, failed, +2 -0, $0.5000.",
        f"Candidate 3, {third}, has started.",
        f"Candidate 3, {third}: failed (timed_out), +2 -0, $0.5000.",
        f"Candidate 1, {first}, has started.",
        f"Candidate 1, {first}: completed, passed, +7 -0, $0.5000.",
        "Completed. The best of 3 is candidate 1.",
    ]
    assert messages(store, first)[0] == f"Queued, as candidate 1 of {parent}."


@pytest.mark.parametrize(
    ("endings", "status", "code"),
    [
        (["failed", "failed"], TaskStatus.FAILED, "timed_out"),
        (["failed", "cancelled"], TaskStatus.FAILED, "timed_out"),
        (["cancelled", "cancelled"], TaskStatus.CANCELLED, "cancelled_by_user"),
        (["cancelled", "completed"], TaskStatus.COMPLETED, None),
    ],
)
def test_a_parent_ends_as_its_best_candidate_did(
    store: Store, endings: Sequence[str], status: TaskStatus, code: str | None
) -> None:
    parent, *candidates = group(store, len(endings))
    for task_id, how in zip(candidates, endings, strict=True):
        if how == "cancelled":
            store.tasks.request_cancel(LOCAL, task_id)
        else:
            end(store, claimed(store, task_id), TaskStatus(how))
    ended = get(store, parent)
    assert (ended.status, ended.error and ended.error.code) == (status, code)
    assert ended.best is not None and ended.best.candidate == 1 + endings.index(
        next(how for how in ("completed", "failed", "cancelled") if how in endings)
    )


def test_a_candidate_that_goes_on_in_a_second_attempt_has_started_once(store: Store) -> None:
    parent, first, _ = group(store, 2)
    claim = claimed(store, first)
    store.tasks.release(first, claim.attempt)
    assert claimed(store, first).attempt == 2
    assert messages(store, parent) == ["Queued.", f"Candidate 1, {first}, has started."]


def test_a_candidate_whose_workers_are_lost_ends_its_parent_too(store: Store) -> None:
    parent, only = group(store, 1)
    for _ in range(3):
        assert store.tasks.claim(only, worker="w", lease_s=-1) is not None
    assert store.backlog.claim_next(worker="w", place="here", lease_s=60) is None
    ended = get(store, parent)
    assert (ended.status, ended.error and ended.error.code) == (TaskStatus.FAILED, "poisoned")
    assert [task.task_id for task in store.backlog.overview().dead_letters] == [only]


# -- how they are compared -------------------------------------------------------------------------------------------

ORDER: list[Callable[[Store, Claim], object]] = [
    lambda store, claim: end(store, claim, verdict=Verdict.PASSED, lines=2, cost=0.1),
    lambda store, claim: end(store, claim, verdict=Verdict.PASSED, lines=2, cost=0.2),
    lambda store, claim: end(store, claim, verdict=Verdict.PASSED, lines=5, cost=0.1),
    lambda store, claim: end(store, claim, verdict=Verdict.PASSED, lines=0, cost=0.0),
    lambda store, claim: end(store, claim, verdict=Verdict.UNVERIFIED, lines=1, cost=0.1),
    lambda store, claim: end(store, claim, verdict=Verdict.FAILED, lines=1, cost=0.1),
    lambda store, claim: end(store, claim, TaskStatus.FAILED, lines=1, cost=0.0),
]
"""Ways to end, the best first."""


@pytest.mark.parametrize("seed", range(6))
def test_candidates_are_ranked_by_end_verdict_size_and_cost(store: Store, seed: int) -> None:
    import random

    order = list(range(len(ORDER)))
    random.Random(seed).shuffle(order)
    parent, *candidates = group(store, len(ORDER) + 1)
    for task_id, which in zip(candidates, order, strict=False):
        ORDER[which](store, claimed(store, task_id))
    table = store.candidates.of(LOCAL, parent)
    assert [found.rank for found in table] == [*range(1, len(ORDER) + 1), None]
    assert [order[found.candidate - 1] for found in table[:-1]] == list(range(len(ORDER)))
    assert table[-1].status is TaskStatus.QUEUED and table[-1].task_id == candidates[-1]
    store.tasks.request_cancel(LOCAL, candidates[-1])
    best = get(store, parent).best
    assert best is not None and best.candidate == order.index(0) + 1
    assert (table[0].insertions, table[0].cost_usd, table[0].files_changed) == (2, 0.1, 1)


def test_the_result_that_is_meant_is_the_named_candidates_or_the_best_ones(store: Store) -> None:
    parent, first, second = group(store, 2)
    plain = queued(store)
    assert store.candidates.choose(LOCAL, plain).task_id == plain
    with pytest.raises(InvalidInput):
        store.candidates.choose(LOCAL, plain, 1)
    assert store.candidates.choose(LOCAL, parent, 2).task_id == second
    with pytest.raises(NotReady):
        store.candidates.choose(LOCAL, parent)
    for task_id, verdict in ((first, Verdict.FAILED), (second, Verdict.PASSED)):
        end(store, claimed(store, task_id), verdict=verdict)
    assert store.candidates.choose(LOCAL, parent).task_id == second
    assert store.candidates.choose(LOCAL, parent, 1).task_id == first
    with pytest.raises(OutOfRange):
        store.candidates.choose(LOCAL, parent, 3)
    for stranger in ("other", LOCAL):
        store.accounts.ensure("other")
        with pytest.raises(TaskNotFound):
            store.candidates.choose(stranger, parent if stranger == "other" else new_id("task"), 1)
        with pytest.raises(TaskNotFound):
            store.candidates.of(stranger, parent if stranger == "other" else new_id("task"))


def test_what_a_group_was_submitted_with_is_kept_once_and_found_by_every_candidate(
    store: Store, store_url: str
) -> None:
    parent, first, second = group(store, 2)
    assert {store.blobs.get(LOCAL, task_id, "input") for task_id in (parent, first, second)} == {b"bundle"}
    assert execute(store_url, "SELECT count(*) FROM blobs") == [(1,)]
    claim = claimed(store, first)
    own: dict[BlobKind, bytes] = {"input": b"its own", "result": b"r"}
    store.blobs.put_all(first, own, attempt=claim.attempt)
    assert store.blobs.get(LOCAL, first, "input") == b"its own"
    assert store.blobs.get(LOCAL, second, "input") == b"bundle"
    assert store.blobs.get(LOCAL, second, "result") is None and store.blobs.get(LOCAL, parent, "result") is None
    # What goes on from a task is no candidate of it, and shares nothing.
    following = store.tasks.add(LOCAL, TaskSpec(prompt="x", title="x"), parent_task_id=parent)
    assert store.blobs.get(LOCAL, following.task_id, "input") is None
    assert len(store.candidates.of(LOCAL, parent)) == 2


# -- the queue -------------------------------------------------------------------------------------------------------


def test_no_worker_is_ever_given_a_parent(store: Store) -> None:
    parent, *candidates = group(store)
    assert store.tasks.claim(parent, worker="w", lease_s=60) is None
    assert parent not in store.tasks.due(waited_s=0)
    taken = [store.backlog.claim_next(worker="w", place="here", lease_s=60) for _ in range(4)]
    assert sorted(claim.task.task_id for claim in taken if claim) == sorted(candidates)
    # It runs by now, without an owner, and without a lease, as what was given back does.
    assert get(store, parent).status is TaskStatus.RUNNING
    assert store.tasks.claim(parent, worker="w", lease_s=60) is None
    assert store.backlog.claim_next(worker="w", place="here", lease_s=60) is None
    assert parent not in store.tasks.due(waited_s=0)
    assert get(store, parent).attempt == 0


def test_a_worker_of_the_version_before_sees_nothing_in_a_parent_that_it_could_take(
    store: Store, store_url: str
) -> None:
    parent, first = group(store, 1)
    for _ in range(2):
        # What it looks for: no word about candidates in it.
        moment = "strftime('%Y-%m-%d %H:%M:%f', 'now')" if store_url.startswith("sqlite") else "now()"
        ready = f"(not_before IS NULL OR not_before <= {moment})"
        status = "status IN ('queued', 'running', 'waiting')"
        found = execute(store_url, f"SELECT task_id FROM tasks WHERE {status} AND {ready}")
        assert found == [(first,)]
        store.tasks.claim(first, worker="w", lease_s=60)
    assert get(store, parent).status is TaskStatus.RUNNING


def test_only_candidates_count_in_the_queue_and_toward_limits(store: Store) -> None:
    parent, first, second = group(store, 2)
    (waiting,) = store.backlog.overview().accounts
    assert (waiting.queued, waiting.running) == (2, 0)
    assert store.backlog.place_of(LOCAL, parent) is None
    place = store.backlog.place_of(LOCAL, second)
    assert place is not None and place.position == 2
    claim = store.backlog.claim_next(worker="w", place="here", lease_s=60, running_max=2)
    assert claim is not None and claim.task.task_id == first
    overview = store.backlog.overview()
    assert [(found.task_id, found.candidate) for found in overview.running] == [(first, 1)]
    assert (overview.accounts[0].queued, overview.accounts[0].running) == (1, 1)
    assert store.backlog.claim_next(worker="w", place="here", lease_s=60, running_max=1) is None
    assert store.backlog.claim_next(worker="w", place="here", lease_s=60, running_max=2) is not None


def test_candidates_are_listed_only_where_they_are_asked_for(store: Store) -> None:
    plain = [queued(store) for _ in range(2)]
    parent, *candidates = group(store, 5)
    later = queued(store)
    for limit in (1, 2, 50):
        found: list[str] = []
        cursor: str | None = None
        while True:
            page = store.tasks.list(LOCAL, limit=limit, cursor=cursor)
            assert page.total == 4
            found += [task.task_id for task in page.tasks]
            if (cursor := page.next_cursor) is None:
                break
        assert found == [later, parent, *reversed(plain)]
    page = store.tasks.list(LOCAL, candidates=True)
    assert page.total == 9 and {task.task_id for task in page.tasks} >= set(candidates)
    assert store.tasks.resolve(LOCAL, candidates[0][5:15]) == candidates[0]


def test_a_schedule_that_waits_for_its_task_waits_for_the_parent_alone(store: Store, store_url: str) -> None:
    parent, first = group(store, 1)
    execute_write(store_url, f"UPDATE tasks SET schedule_id = 'sch_x' WHERE task_id = '{parent}'")
    assert store.tasks.list(LOCAL, schedule_id="sch_x").total == 1
    assert get(store, first).schedule_id is None


def execute_write(url: str, sql: str) -> None:
    execute(url, sql)


# -- cancel, messages, questions -------------------------------------------------------------------------------------


def test_a_cancel_of_the_parent_reaches_every_candidate_and_one_of_a_candidate_it_alone(store: Store) -> None:
    parent, first, second, third, fourth = group(store, 4)
    running = claimed(store, first)
    end(store, claimed(store, second), TaskStatus.FAILED)
    task, changed = store.tasks.request_cancel(LOCAL, fourth)
    assert changed and task.status is TaskStatus.CANCELLED and get(store, parent).status is TaskStatus.RUNNING
    task, changed = store.tasks.request_cancel(LOCAL, parent)
    assert changed and task.status is TaskStatus.RUNNING
    assert store.tasks.request_cancel(LOCAL, parent)[1] is False
    assert get(store, third).status is TaskStatus.CANCELLED
    assert store.tasks.signals(first, running.attempt).cancel_requested
    end(store, running, TaskStatus.CANCELLED)
    ended = get(store, parent)
    assert ended.status is TaskStatus.CANCELLED and ended.error is not None
    assert ended.error.code == "cancelled_by_user"
    assert store.tasks.request_cancel(LOCAL, parent)[1] is False


def test_a_parent_of_which_nothing_has_started_is_cancelled_at_once(store: Store) -> None:
    parent, *candidates = group(store, 3)
    task, changed = store.tasks.request_cancel(LOCAL, parent)
    assert changed and task.status is TaskStatus.CANCELLED and task.started_at is None
    assert {get(store, task_id).status for task_id in candidates} == {TaskStatus.CANCELLED}
    assert store.tasks.unfinished() == 0
    assert messages(store, parent)[-1] == "Cancelled. The best of 3 is candidate 1."


def test_a_message_is_for_a_candidate_and_a_question_is_told_of_by_the_parent(store: Store) -> None:
    parent, first, second = group(store, 2)
    claim = claimed(store, first)
    ask(store, first, claim.attempt)
    assert get(store, parent).asking == (first,) and get(store, parent).status is TaskStatus.RUNNING
    (pending,) = store.messages.pending(LOCAL, limit=5)
    assert (pending.task_id, pending.candidate) == (first, 1)
    with pytest.raises(SeveralAgents) as refused:
        store.messages.add(LOCAL, parent, "hello")
    assert first in refused.value.remedy and second in refused.value.remedy and "waiting" in refused.value.remedy
    assert sum("asks something" in said for said in messages(store, parent)) == 1
    store.messages.add(LOCAL, first, "this", question_id="q_1")
    assert get(store, parent).asking == ()
    for task_id in (first, second):
        end(store, claim if task_id == first else claimed(store, task_id))
    with pytest.raises(TaskEnded):
        store.messages.add(LOCAL, parent, "hello")


def test_a_change_of_the_parent_is_announced(store: Store) -> None:
    parent, first = group(store, 1)
    told = threading.Event()
    with store.changes.watch([parent], told.set):
        deadline = threading.Event()
        while not store.changes.prompt:
            deadline.wait(0.02)
        claim = claimed(store, first)
        assert told.wait(10)
        told.clear()
        end(store, claim)
        assert told.wait(10)


# -- losers ----------------------------------------------------------------------------------------------------------


def test_losers_are_cancelled_in_the_step_in_which_one_passes(store: Store) -> None:
    parent, first, second, third = group(store, cancel_losers=True)
    running, winner = claimed(store, first), claimed(store, second)
    end(store, winner, verdict=Verdict.PASSED)
    assert store.tasks.signals(first, running.attempt).cancel_requested
    loser = get(store, third)
    assert loser.status is TaskStatus.CANCELLED and loser.error is not None and "had passed" in loser.error.message
    assert get(store, parent).status is TaskStatus.RUNNING
    assert messages(store, first)[-1] == "Cancel requested: candidate 2 has passed."
    assert f"Candidate 3, {third}, was cancelled before it started." in messages(store, parent)
    end(store, running, TaskStatus.CANCELLED)
    ended = get(store, parent)
    assert (ended.status, ended.verdict) == (TaskStatus.COMPLETED, Verdict.PASSED)
    assert ended.best is not None and ended.best.task_id == second


@pytest.mark.parametrize(
    ("cancel_losers", "status", "verdict"),
    [
        (False, TaskStatus.COMPLETED, Verdict.PASSED),
        (True, TaskStatus.COMPLETED, Verdict.FAILED),
        (True, TaskStatus.COMPLETED, Verdict.UNVERIFIED),
        (True, TaskStatus.FAILED, None),
    ],
)
def test_nobody_has_lost_before_one_has_passed_or_where_it_is_not_wanted(
    store: Store, cancel_losers: bool, status: TaskStatus, verdict: Verdict | None
) -> None:
    _, first, second, third = group(store, cancel_losers=cancel_losers)
    running = claimed(store, second)
    end(store, claimed(store, first), status, verdict)
    assert not store.tasks.signals(second, running.attempt).cancel_requested
    assert get(store, third).status is TaskStatus.QUEUED


# -- races -----------------------------------------------------------------------------------------------------------

ROUNDS = 12


@pytest.mark.parametrize(("cancel_losers", "verdict"), [(False, Verdict.UNVERIFIED), (True, Verdict.PASSED)])
def test_candidates_that_end_in_one_moment_end_their_parent_once(
    store: Store, cancel_losers: bool, verdict: Verdict
) -> None:
    for _ in range(ROUNDS):
        parent, *candidates = group(store, 6, cancel_losers=cancel_losers)
        claims = [claimed(store, task_id) for task_id in candidates]
        at_once(*(lambda claim=claim: end(store, claim, verdict=verdict) for claim in claims))
        ended = get(store, parent)
        assert ended.status is TaskStatus.COMPLETED and ended.usage.turns == 12
        assert sum("The best of" in said for said in messages(store, parent)) == 1
        assert sum(": completed" in said for said in messages(store, parent)) == 6


def test_candidates_that_begin_in_one_moment_begin_their_parent_once(store: Store) -> None:
    for _ in range(ROUNDS):
        parent, *candidates = group(store, 6)
        at_once(*(lambda task_id=task_id: claimed(store, task_id) for task_id in candidates))
        assert get(store, parent).status is TaskStatus.RUNNING
        assert sum("has started" in said for said in messages(store, parent)) == 6
        store.tasks.request_cancel(LOCAL, parent)


def test_ends_cancels_claims_and_lines_of_one_group_at_once_never_block_each_other(store: Store) -> None:
    """Whatever order the locks are asked for in, nobody waits in a circle: a deadlock would be an error."""
    for number in range(ROUNDS):
        parent, *candidates = group(store, 8, cancel_losers=True)
        claims = [claimed(store, task_id) for task_id in candidates[:6]]

        def finish(claim: Claim) -> None:
            end(store, claim, verdict=Verdict.PASSED)

        def write(claim: Claim) -> None:
            for _ in range(5):
                try:
                    store.events.add(claim.task.task_id, line(), attempt=claim.attempt)
                    store.tasks.renew(claim.task.task_id, claim.attempt, lease_s=60)
                except CloudAgentError as error:
                    assert error.code == "lease_lost", error
                    return

        calls: list[Callable[[], object]] = [
            *(lambda claim=claim: finish(claim) for claim in claims[:4]),
            *(lambda claim=claim: write(claim) for claim in claims[3:]),
            *(
                lambda task_id=task_id: store.tasks.request_cancel(LOCAL, task_id)
                for task_id in (parent, candidates[5])
            ),
            lambda: store.backlog.claim_next(worker="w", place="here", lease_s=60),
            lambda: store.candidates.settle(),
            lambda: store.retention.prune(max_age_s=3600, max_bytes=None),
        ]
        rotated = calls[number % len(calls) :] + calls[: number % len(calls)]
        at_once(*rotated)
        for task_id in candidates:
            task = get(store, task_id)
            if not task.status.terminal:
                assert store.tasks.signals(task_id, task.attempt).cancel_requested
                store.tasks.finish(task_id, task.attempt, status=TaskStatus.CANCELLED)
        assert get(store, parent).status is TaskStatus.COMPLETED
        assert sum("The best of" in said for said in messages(store, parent)) == 1


def test_racing_submits_with_one_key_are_one_group(store: Store) -> None:
    found = at_once(*(lambda: group(store, 3, key="once") for _ in range(12)))
    assert len({tuple(ids) for ids in found}) == 1
    assert store.tasks.list(LOCAL, candidates=True).total == 4


def test_a_group_that_cannot_be_kept_whole_is_not_kept_at_all(store: Store) -> None:
    taken = queued(store)
    drafts = [
        CandidateDraft(task_id=task_id, spec=TaskSpec(prompt="x", title="x")) for task_id in (new_id("task"), taken)
    ]
    with pytest.raises(CloudAgentError):
        store.tasks.add(LOCAL, TaskSpec(prompt="x", title="x", best_of=2), candidates=drafts)
    assert store.tasks.list(LOCAL, candidates=True).total == 1


# -- a version before, and time --------------------------------------------------------------------------------------


def test_a_parent_that_nobody_has_told_of_the_last_end_is_settled(store: Store, store_url: str) -> None:
    parent, first, second = group(store, 2)
    end(store, claimed(store, first), verdict=Verdict.PASSED)
    assert store.candidates.settle() == 0
    # As a worker of the version before does it.
    execute(store_url, f"UPDATE tasks SET status = 'failed', lease_until = NULL WHERE task_id = '{second}'")
    assert get(store, parent).status is TaskStatus.RUNNING
    assert store.candidates.settle() == 1 and store.candidates.settle() == 0
    ended = get(store, parent)
    assert ended.status is TaskStatus.COMPLETED and ended.best is not None and ended.best.task_id == first


def test_a_parent_and_its_candidates_expire_together(store: Store, store_url: str) -> None:
    parent, first, second = group(store, 2)
    end(store, claimed(store, first))
    claim = claimed(store, second)
    moment = "'2001-01-01 00:00:00.000'"
    execute(store_url, f"UPDATE tasks SET completed_at = {moment} WHERE task_id = '{first}'")
    assert store.retention.prune(max_age_s=3600, max_bytes=1) == 0
    store.blobs.put(second, "result", b"x" * 1000, attempt=claim.attempt)
    end(store, claim)
    assert store.retention.prune(max_age_s=3600, max_bytes=10**9) == 0
    assert store.blobs.get(LOCAL, first, "input") == b"bundle"
    execute(store_url, f"UPDATE tasks SET completed_at = {moment} WHERE task_id = '{parent}'")
    assert store.retention.prune(max_age_s=3600, max_bytes=None) == 1
    for task_id in (parent, first, second):
        assert get(store, task_id).expired_at is not None
        with pytest.raises(TaskExpired):
            store.blobs.get(LOCAL, task_id, "input")
    assert (
        execute(store_url, "SELECT count(*) FROM blobs") == execute(store_url, "SELECT count(*) FROM events") == [(0,)]
    )
    assert [found.rank for found in store.candidates.of(LOCAL, parent)] == [1, 2]


def test_a_group_counts_with_all_that_its_candidates_have_left(store: Store) -> None:
    import random

    parents: list[str] = []
    for number in range(2):
        parent, *candidates = group(store, 2)
        parents.append(parent)
        for task_id, seed in zip(candidates, itertools.count(number * 10)):
            claim = claimed(store, task_id)
            store.blobs.put(task_id, "result", random.Random(seed).randbytes(10_000), attempt=claim.attempt)
            end(store, claim)
    assert store.retention.prune(max_age_s=None, max_bytes=50_000) == 0
    assert store.retention.prune(max_age_s=None, max_bytes=30_000) == 1
    assert [get(store, parent).expired_at is not None for parent in parents] == [True, False]
