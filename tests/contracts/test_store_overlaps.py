"""Tasks that touch the same files, on both databases."""

from __future__ import annotations

import threading

import pytest

from cloudagent_storage.errors import LeaseLost
from cloudagent_storage.records import LOCAL_ACCOUNT, CandidateDraft, Claim, Overlap, TaskSpec, TaskStatus, new_id
from cloudagent_storage.store import Store
from tests.support.stored import EXPIRED, claimed, line, queued

SPEC = TaskSpec(prompt="Fix it.", title="Fix it")


def working(
    store: Store, *touches: str, key: str | None = "root", account_id: str = LOCAL_ACCOUNT, parent: str | None = None
) -> Claim:
    """A task that a worker has, and whose agent has touched these files."""
    task = store.tasks.add(account_id, SPEC, source_key=key, parent_task_id=parent, credentials=b"sealed")
    claim = claimed(store, task.task_id)
    if touches:
        touch(store, claim, *touches)
    return claim


def touch(store: Store, claim: Claim, *touches: str) -> None:
    store.tasks.follow(claim.task.task_id, claim.attempt, [line()], log_offset=1, lease_s=60, touches=touches)


def end(store: Store, claim: Claim, status: TaskStatus = TaskStatus.COMPLETED) -> None:
    store.tasks.finish(claim.task.task_id, claim.attempt, status=status)


def met(store: Store, *claims: Claim, account_id: str = LOCAL_ACCOUNT) -> dict[str, list[Overlap]]:
    found = store.overlaps.of(account_id, [claim.task.task_id for claim in claims])
    return {task_id: list(overlaps) for task_id, overlaps in found.items()}


def test_two_tasks_at_work_on_the_same_file_meet_and_those_on_others_do_not(store: Store) -> None:
    one, other = working(store, "calc.py", "a.txt"), working(store, "b.txt", "calc.py")
    working(store, "c.txt")
    assert met(store, one) == {one.task.task_id: [Overlap(task_id=other.task.task_id, files=("calc.py",))]}
    assert met(store, other) == {other.task.task_id: [Overlap(task_id=one.task.task_id, files=("calc.py",))]}


def test_of_a_list_each_is_told_of_all_that_it_meets(store: Store) -> None:
    first, second, third = working(store, "a", "b"), working(store, "b", "c"), working(store, "a", "c")
    names = [claim.task.task_id for claim in (first, second, third)]
    assert met(store, first, second, third) == {
        names[0]: [Overlap(task_id=names[2], files=("a",)), Overlap(task_id=names[1], files=("b",))],
        names[1]: [Overlap(task_id=names[0], files=("b",)), Overlap(task_id=names[2], files=("c",))],
        names[2]: [Overlap(task_id=names[0], files=("a",)), Overlap(task_id=names[1], files=("c",))],
    }


def test_one_that_has_ended_is_told_of_those_at_work_and_they_are_not_told_of_it(store: Store) -> None:
    done, going = working(store, "calc.py"), working(store, "calc.py")
    store.tasks.update(done.task.task_id, done.attempt, touches=("calc.py",))
    end(store, done)
    assert met(store, done) == {done.task.task_id: [Overlap(task_id=going.task.task_id, files=("calc.py",))]}
    assert met(store, going) == {} and list(met(store, done, going)) == [done.task.task_id]
    end(store, going, TaskStatus.CANCELLED)
    assert met(store, done) == met(store, done, going) == {}


def test_what_another_account_or_repository_touches_meets_nothing(store: Store) -> None:
    store.accounts.ensure("other")
    mine = working(store, "calc.py")
    theirs = working(store, "calc.py", account_id="other")
    elsewhere = working(store, "calc.py", key="another root")
    assert met(store, mine, theirs, elsewhere) == {}
    assert met(store, mine, theirs, account_id="other") == {}
    unknown = [working(store, "calc.py", key=None) for _ in range(2)]
    assert met(store, *unknown) == {}


def test_candidates_of_one_task_do_not_meet_each_other(store: Store) -> None:
    drafts = [CandidateDraft(task_id=new_id("task"), spec=SPEC, credentials=b"sealed") for _ in range(2)]
    store.tasks.add(LOCAL_ACCOUNT, SPEC, source_key="root", candidates=drafts)
    tries = [claimed(store, draft.task_id) for draft in drafts]
    for claim in tries:
        touch(store, claim, "calc.py")
    assert met(store, *tries) == {}
    other = working(store, "calc.py")
    assert {len(overlaps) for overlaps in met(store, *tries).values()} == {1} and len(met(store, other)) == 1


def test_a_task_and_those_that_go_on_from_it_do_not_meet_but_those_do_meet_each_other(store: Store) -> None:
    first = working(store, "calc.py")
    one = working(store, "calc.py", parent=first.task.task_id)
    assert met(store, first, one) == {}
    other = working(store, "calc.py", parent=first.task.task_id)
    assert met(store, one) == {one.task.task_id: [Overlap(task_id=other.task.task_id, files=("calc.py",))]}


def test_a_queued_task_touches_nothing(store: Store) -> None:
    at_work = working(store, "calc.py")
    task_id = queued(store)
    assert store.overlaps.of(LOCAL_ACCOUNT, [task_id, at_work.task.task_id]) == {}
    assert store.overlaps.of(LOCAL_ACCOUNT, []) == {}


def test_the_next_attempt_knows_what_earlier_ones_have_touched(store: Store) -> None:
    claim = working(store)
    store.tasks.follow(
        claim.task.task_id, claim.attempt, [line()], log_offset=1, lease_s=EXPIRED, touches=("a\ud800\0", "ä")
    )
    again = claimed(store, claim.task.task_id)
    assert again.touches == ("a\ufffd\ufffd", "ä")
    with pytest.raises(LeaseLost):
        touch(store, claim, "late")
    assert claimed(store).touches == ()


def test_the_result_says_what_was_touched_in_the_end(store: Store) -> None:
    one, other = working(store, "calc.py"), working(store, "calc.py")
    store.tasks.update(one.task.task_id, one.attempt, touches=())
    assert met(store, one, other) == {}


@pytest.mark.parametrize("store_url", ["postgres"], indirect=True)  # SQLite only tells that something has changed
def test_a_list_that_grows_wakes_nobody_by_itself(store: Store) -> None:
    claim, other = working(store), working(store)
    changed, marker = threading.Event(), threading.Event()
    with (
        store.changes.watch([claim.task.task_id], changed.set),
        store.changes.watch([other.task.task_id], marker.set),
    ):
        assert marker.wait(10) and changed.wait(10), "from here on it listens"
        changed.clear()
        marker.clear()
        store.tasks.update(claim.task.task_id, claim.attempt, touches=("calc.py",))
        store.events.add(other.task.task_id, line())
        assert marker.wait(10), "which came after it"
        assert not changed.is_set()
