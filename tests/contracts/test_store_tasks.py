"""What users can ask of the store, on both databases."""

from __future__ import annotations

import base64
from collections.abc import Callable

import pytest

from cloudagent_storage.errors import (
    AmbiguousId,
    CloudAgentError,
    InvalidCursor,
    RepositoryTooLarge,
    TaskEnded,
    TaskNotFound,
)
from cloudagent_storage.records import LOCAL_ACCOUNT, BlobKind, TaskPage, TaskSpec, TaskStatus, Usage, new_id
from cloudagent_storage.store import Store
from tests.support.stored import ask, at_once, claimed, line, messages, queued

SPEC = TaskSpec(
    prompt="Fix the bug. ✓",
    title="Fix the bug",
    repository="https://example.com/a.git",
    base_ref="main",
    verify="make test",
    timeout_minutes=1.5,
    tags=("nightly", "a b"),
)


def test_a_new_task_is_kept_as_it_was_asked_for(store: Store) -> None:
    task_id = new_id("task")
    added = store.tasks.add(
        LOCAL_ACCOUNT, SPEC, task_id=task_id, base_sha="abc", blobs={"input": b"bundle"}, lines=[line("Queued.")]
    )
    task = store.tasks.get(LOCAL_ACCOUNT, task_id)
    assert added == task
    assert (task.task_id, task.status, task.attempt, task.base_sha) == (task_id, TaskStatus.QUEUED, 0, "abc")
    assert (task.prompt, task.title, task.tags) == (SPEC.prompt, SPEC.title, SPEC.tags)
    assert (task.repository, task.base_ref, task.branch) == (SPEC.repository, "main", f"task/{task_id[5:13]}")
    assert task.usage == Usage()
    assert task.created_at.utcoffset() is not None and task.started_at is None
    assert store.blobs.get(LOCAL_ACCOUNT, task_id, "input") == b"bundle"
    assert messages(store, task_id) == ["Queued."]
    claim = claimed(store, task_id)
    assert claim.spec == SPEC


def test_a_task_that_cannot_be_kept_whole_is_not_kept_at_all(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloudagent_storage.store.blobs.MAX_BLOB_BYTES", 10)
    task_id = new_id("task")
    with pytest.raises(RepositoryTooLarge):
        store.tasks.add(LOCAL_ACCOUNT, SPEC, task_id=task_id, blobs={"input": b"x" * 11})
    task = store.tasks.add(LOCAL_ACCOUNT, SPEC, task_id=task_id, blobs={"input": b"x" * 10})
    with pytest.raises(CloudAgentError):
        store.tasks.add(LOCAL_ACCOUNT, SPEC, task_id=task.task_id, blobs={"input": b"other"}, lines=[line(), line()])
    assert store.blobs.get(LOCAL_ACCOUNT, task_id, "input") == b"x" * 10
    assert messages(store, task_id) == []


def test_an_account_that_does_not_exist_cannot_have_tasks(store: Store) -> None:
    with pytest.raises(CloudAgentError) as caught:
        store.tasks.add("nobody", SPEC)
    assert "nobody" not in str(caught.value.as_dict())
    assert store.tasks.list("nobody").total == 0


USER_CALLS: list[Callable[[Store, str], object]] = [
    lambda store, task_id: store.tasks.get(LOCAL_ACCOUNT, task_id),
    lambda store, task_id: store.tasks.version(LOCAL_ACCOUNT, task_id),
    lambda store, task_id: store.tasks.resolve(LOCAL_ACCOUNT, task_id),
    lambda store, task_id: store.tasks.request_cancel(LOCAL_ACCOUNT, task_id),
    lambda store, task_id: store.events.list(LOCAL_ACCOUNT, task_id),
    lambda store, task_id: store.events.tail(LOCAL_ACCOUNT, task_id, 5),
    lambda store, task_id: store.blobs.get(LOCAL_ACCOUNT, task_id, "diff"),
    lambda store, task_id: store.messages.add(LOCAL_ACCOUNT, task_id, "hello"),
]


def test_an_id_of_another_account_looks_like_an_unknown_one(store: Store) -> None:
    store.accounts.ensure("other")
    theirs = queued(store, account_id="other")
    malformed = ["", "task_", "task_\x00", "task_\ud800", "../../etc", "' OR 1=1 --", "x" * 10_000, theirs.upper()]
    unlike = [TaskNotFound().as_dict()]
    for call in USER_CALLS:
        for task_id in [theirs, new_id("task"), *malformed]:
            with pytest.raises(TaskNotFound) as caught:
                call(store, task_id)
            assert [caught.value.as_dict()] == unlike
    assert store.tasks.list(LOCAL_ACCOUNT).total == 0
    assert store.tasks.get("other", theirs).status is TaskStatus.QUEUED


def test_any_unique_beginning_names_a_task(store: Store) -> None:
    first, second, third = (f"task_{start:a<26}" for start in ("bbbb2", "bbbb3", "cccc"))
    store.accounts.ensure("other")
    for task_id in (first, second, third):
        store.tasks.add(LOCAL_ACCOUNT, SPEC, task_id=task_id)
    store.tasks.add("other", SPEC, task_id=f"task_{'ccccd':a<26}")
    for name in (first, "task_bbbb2", "bbbb2", "bbbb2aaa"):
        assert store.tasks.resolve(LOCAL_ACCOUNT, name) == first
    assert store.tasks.resolve(LOCAL_ACCOUNT, "cccc") == third
    with pytest.raises(AmbiguousId):
        store.tasks.resolve(LOCAL_ACCOUNT, "bbbb")
    for name in ("ccc", "task_", "dddd", "%%%%", "____", "ccccd", f"{first}a"):
        with pytest.raises(TaskNotFound):
            store.tasks.resolve(LOCAL_ACCOUNT, name)


def pages(store: Store, limit: int) -> list[TaskPage]:
    found = [store.tasks.list(LOCAL_ACCOUNT, limit=limit)]
    while (cursor := found[-1].next_cursor) is not None:
        found.append(store.tasks.list(LOCAL_ACCOUNT, limit=limit, cursor=cursor))
    return found


def test_tasks_are_listed_newest_first_each_once(store: Store) -> None:
    added = [queued(store) for _ in range(23)]
    newest_first = added[::-1]
    for limit, sizes in ((5, [5, 5, 5, 5, 3]), (23, [23]), (100, [23])):
        found = pages(store, limit)
        assert [len(page.tasks) for page in found] == sizes
        assert [task.task_id for page in found for task in page.tasks] == newest_first
        assert {page.total for page in found} == {23}
    second = store.tasks.list(LOCAL_ACCOUNT, limit=5, offset=5)
    assert [task.task_id for task in second.tasks] == newest_first[5:10]
    assert (second.limit, second.offset, second.total) == (5, 5, 23)


def test_a_task_that_is_added_between_two_pages_moves_nothing(store: Store) -> None:
    added = [queued(store) for _ in range(6)]
    first = store.tasks.list(LOCAL_ACCOUNT, limit=3)
    queued(store)
    second = store.tasks.list(LOCAL_ACCOUNT, limit=3, cursor=first.next_cursor)
    assert [task.task_id for task in (*first.tasks, *second.tasks)] == added[::-1]
    assert (second.next_cursor, second.total) == (None, 7)


def test_a_list_is_filtered(store: Store) -> None:
    def found(**filters: str | TaskStatus) -> list[str]:
        page = store.tasks.list(LOCAL_ACCOUNT, **filters)  # pyright: ignore[reportArgumentType]
        assert page.total == len(page.tasks)
        return [task.task_id for task in page.tasks]

    plain = queued(store)
    tagged = queued(store, spec=SPEC)
    ended = queued(store)
    store.tasks.request_cancel(LOCAL_ACCOUNT, ended)
    assert found(tag="nightly") == found(tag="a b") == [tagged]
    assert found(tag="night") == found(tag="a") == found(tag='"') == found(tag="\x00") == found(tag="\ud800") == []
    assert found(repository=SPEC.repository) == [tagged]
    assert found(repository="none") == [ended, plain]
    assert found(repository="none\x00") == found(schedule_id="sch_x") == []
    assert found(status=TaskStatus.QUEUED) == [tagged, plain]
    assert found(status=TaskStatus.CANCELLED) == [ended]
    assert found(status=TaskStatus.QUEUED, repository="none") == [plain]


def test_a_cursor_that_no_list_handed_out_is_refused(store: Store) -> None:
    queued(store)
    moment, task_id = "2026-01-01T00:00:00+00:00", new_id("task")
    forged = [f"{moment}", f"{moment} x", f"{moment}  {task_id}", f"2026-01-01T00:00:00 {task_id}", f"x {task_id}", ""]
    forged += [f"0001-01-01T00:00:00+23:00 {task_id}", f"{moment} {task_id}\x00", f"{moment} task_' OR 1=1"]
    cursors = [base64.urlsafe_b64encode(text.encode()).decode() for text in forged]
    for cursor in [*cursors, "!", "\ud800", "ä", "a", "_" * 8]:
        with pytest.raises(InvalidCursor):
            store.tasks.list(LOCAL_ACCOUNT, cursor=cursor)


def test_a_cursor_of_the_first_or_the_last_year_is_only_an_end(store: Store) -> None:
    queued(store)
    for year, expected in (("0001", 0), ("9999", 1)):
        text = f"{year}-12-31T23:59:59.999999+00:00 {new_id('task')}"
        page = store.tasks.list(LOCAL_ACCOUNT, cursor=base64.urlsafe_b64encode(text.encode()).decode())
        assert len(page.tasks) == expected


def test_a_queued_task_is_cancelled_at_once(store: Store) -> None:
    task_id = queued(store)
    task, changed = store.tasks.request_cancel(LOCAL_ACCOUNT, task_id)
    assert changed and task.status is TaskStatus.CANCELLED and task == store.tasks.get(LOCAL_ACCOUNT, task_id)
    assert task.error is not None and task.error.code == "cancelled_by_user"
    assert task.completed_at is not None and task.started_at is None
    assert messages(store, task_id) == ["Queued.", "Cancelled before it started."]
    assert store.tasks.claim(task_id, worker="worker", lease_s=60) is None
    assert store.tasks.request_cancel(LOCAL_ACCOUNT, task_id) == (task, False)
    assert len(messages(store, task_id)) == 2


def test_the_worker_of_a_running_task_is_told_of_a_cancel_once(store: Store) -> None:
    claim = claimed(store)
    task_id = claim.task.task_id
    assert not store.tasks.signals(task_id, claim.attempt).cancel_requested
    task, changed = store.tasks.request_cancel(LOCAL_ACCOUNT, task_id)
    assert changed and task.status is TaskStatus.RUNNING and task.error is None
    again, changed = store.tasks.request_cancel(LOCAL_ACCOUNT, task_id)
    assert not changed and again == task
    assert messages(store, task_id) == ["Queued.", "Cancel requested."]
    assert store.tasks.signals(task_id, claim.attempt).cancel_requested
    assert store.tasks.renew(task_id, claim.attempt, lease_s=60).cancel_requested


def test_of_many_cancels_at_once_one_changes_something(store: Store) -> None:
    for task_id in (queued(store), claimed(store).task.task_id):
        answers = at_once(*[lambda: store.tasks.request_cancel(LOCAL_ACCOUNT, task_id)] * 8)  # noqa: B023
        assert [changed for _, changed in answers].count(True) == 1
        assert len(messages(store, task_id)) == 2


def test_a_message_reaches_the_worker_until_it_is_delivered(store: Store) -> None:
    task_id = queued(store)
    early = store.messages.add(LOCAL_ACCOUNT, task_id, "before it starts")
    claim = claimed(store, task_id)
    first = store.messages.add(LOCAL_ACCOUNT, task_id, "one")
    second = store.messages.add(LOCAL_ACCOUNT, task_id, "two \x00")
    assert store.tasks.signals(task_id, claim.attempt).messages == (early, first, second)
    assert second.text == "two \ufffd"
    store.messages.delivered(task_id, claim.attempt, [early.message_id, first.message_id])
    assert store.tasks.renew(task_id, claim.attempt, lease_s=60).messages == (second,)
    ask(store, task_id, claim.attempt)
    third = store.messages.add(LOCAL_ACCOUNT, task_id, "three")
    answer = store.tasks.follow(task_id, claim.attempt, [], log_offset=1, lease_s=60)
    assert answer.messages == (second, third)
    assert [message.answers for message in answer.messages] == [None, "q_1"]
    store.tasks.finish(task_id, claim.attempt, status=TaskStatus.COMPLETED)
    with pytest.raises(TaskEnded):
        store.messages.add(LOCAL_ACCOUNT, task_id, "too late")


def test_a_message_reaches_only_its_own_task(store: Store) -> None:
    claim, other = claimed(store), claimed(store)
    message = store.messages.add(LOCAL_ACCOUNT, claim.task.task_id, "hello")
    store.messages.delivered(other.task.task_id, other.attempt, [message.message_id])
    assert store.tasks.signals(other.task.task_id, other.attempt).messages == ()
    assert store.tasks.signals(claim.task.task_id, claim.attempt).messages == (message,)


def test_the_version_tells_every_change_of_status_phase_and_log(store: Store) -> None:
    task_id = queued(store)
    versions = [store.tasks.version(LOCAL_ACCOUNT, task_id)]

    def changed() -> bool:
        versions.append(store.tasks.version(LOCAL_ACCOUNT, task_id))
        return versions[-1] not in versions[:-1]

    claim = claimed(store, task_id)
    assert changed()
    store.tasks.update(task_id, claim.attempt, phase=claim.task.phase, base_sha="abc")
    assert not changed()
    store.events.add(task_id, line())
    assert changed()
    store.tasks.finish(task_id, claim.attempt, status=TaskStatus.FAILED)
    assert changed()


def test_blobs_come_back_as_they_were(store: Store) -> None:
    claim = claimed(store)
    task_id = claim.task.task_id
    everything = bytes(range(256)) * 4000
    blobs: dict[BlobKind, bytes] = {"input": everything, "diff": b"", "session": b"\x00"}
    for kind, data in blobs.items():
        store.blobs.put(task_id, kind, data, attempt=claim.attempt)
        assert store.blobs.get(LOCAL_ACCOUNT, task_id, kind) == data
    assert store.blobs.get(LOCAL_ACCOUNT, task_id, "result") is None
    store.blobs.put(task_id, "diff", b"newer", attempt=None)
    assert store.blobs.get(LOCAL_ACCOUNT, task_id, "diff") == b"newer"
    assert store.blobs.get(LOCAL_ACCOUNT, task_id, "input") == everything
    with pytest.raises(TaskNotFound):
        store.blobs.put(new_id("task"), "diff", b"", attempt=None)


def test_an_account_is_made_once(store: Store) -> None:
    made = at_once(*[lambda: store.accounts.ensure("team")] * 4)
    assert len({account.created_at for account in made}) == 1
    assert made[0].account_id == "team"
