"""Schedules on both databases: each due time is answered once, whoever races and whoever dies."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Unpack

import pytest

from cloudagent_queue import schedules
from cloudagent_queue.schedules import NO_WORKER, fire_due, overdue, run_now
from cloudagent_storage.errors import CredentialMissing, DatabaseUnavailable, LimitReached, ScheduleNotFound
from cloudagent_storage.records import LOCAL_ACCOUNT, TaskSpec, TaskStatus, new_id
from cloudagent_storage.schedule import MAX_SCHEDULES, Schedule, ScheduleRun
from cloudagent_storage.secrets import Keyring
from cloudagent_storage.store import ScheduleChanges, Store, retention
from cloudagent_storage.store.schedules import CHANGED_BEFORE
from tests.support.scheduled import ENVIRONMENT, KEYRING, SPEC, due_now, scheduled
from tests.support.stored import at_once, messages
from tests.support.worlds import git, make_repository, until


def fire(store: Store, keyring: Keyring = KEYRING) -> list[str]:
    """Answer all that is due; the tasks that were rung for."""
    rung: list[str] = []
    while fire_due(store, keyring, rung.append):
        pass
    return rung


def runs(store: Store, schedule_id: str) -> list[ScheduleRun]:
    return list(store.schedules.get(LOCAL_ACCOUNT, schedule_id).last_runs)


def end(store: Store, task_id: str | None) -> None:
    assert task_id is not None
    store.tasks.request_cancel(LOCAL_ACCOUNT, task_id)


def test_a_schedule_is_kept_as_it_was_asked_for(store: Store) -> None:
    added = scheduled(store, cron="30 4 * * *")
    assert store.schedules.get(LOCAL_ACCOUNT, added.schedule_id) == added
    assert (added.name, added.cron, added.timezone, added.enabled, added.task) == (
        *("hourly", "30 4 * * *", "UTC", True),
        SPEC,
    )
    assert len(added.next_due_at) == 1 and added.next_due_at[0] > store.now() and added.last_runs == ()
    assert "sk-ant" not in added.model_dump_json()
    assert store.schedules.enabled() == 1
    assert fire(store) == []


def test_a_due_time_is_one_task_with_all_that_belongs_to_it(store: Store) -> None:
    schedule = scheduled(store)
    due_at = due_now(store, schedule.schedule_id)
    (task_id,) = fire(store)
    task = store.tasks.get(LOCAL_ACCOUNT, task_id)
    assert (task.schedule_id, task.prompt, task.status) == (schedule.schedule_id, SPEC.prompt, TaskStatus.QUEUED)
    assert messages(store, task_id) == ["Queued by the schedule hourly."]
    (run,) = runs(store, schedule.schedule_id)
    assert (run.due_at, run.outcome, run.reason, run.task_id) == (due_at, "submitted", None, task_id)
    after = store.schedules.get(LOCAL_ACCOUNT, schedule.schedule_id)
    assert after.next_due_at[0] > store.now() and after.next_due_at[0].minute == 0
    assert [found.task_id for found in store.tasks.list(LOCAL_ACCOUNT, schedule_id=schedule.schedule_id).tasks] == [
        task_id
    ]
    claim = store.tasks.claim(task_id, worker="w", lease_s=60)
    assert claim is not None and claim.credentials is not None
    assert json.loads(KEYRING.open(claim.credentials, bound_to=task_id)) == ENVIRONMENT


def test_sixteen_sweepers_fire_a_due_time_once(store: Store, store_url: str) -> None:
    schedule = scheduled(store)
    for number in range(1, 4):
        due_at = due_now(store, schedule.schedule_id, ago_s=60 - 10 * number)
        stores = [Store.open(store_url) for _ in range(4)]
        rung: list[str] = []
        calls = [partial(fire_due, stores[n % 4], KEYRING, rung.append) for n in range(16)]
        at_once(*calls)
        for opened in stores:
            opened.close()
        assert len(rung) == 1
        found = runs(store, schedule.schedule_id)
        assert len(found) == number and found[0].due_at == due_at and found[0].task_id == rung[0]
        assert store.tasks.list(LOCAL_ACCOUNT).total == number
        end(store, rung[0])


DIES = """
import sys
from pathlib import Path
from cloudagent_queue.schedules import fire_due
from cloudagent_storage.secrets import Keyring
from cloudagent_storage.store import Store
import os, cloudagent_storage.store.schedules as module
url, key, where = sys.argv[1:]
store, keyring = Store.open(url), Keyring.from_file(Path(key))
def die(*_, **__):
    os._exit(9)
target = {"run": (module.Schedules, "_add_run"), "task": (store.tasks, "add"), "blob": (module, "write_blob")}[where]
setattr(*target, die)
fire_due(store, keyring, print)
"""


@pytest.mark.parametrize("where", ["run", "task", "blob"])
def test_a_worker_that_dies_while_it_fires_leaves_neither_a_run_nor_a_task(
    store: Store, store_url: str, tmp_path: Path, where: str
) -> None:
    keyring = Keyring.from_file(tmp_path / "key")
    spec = SPEC.model_copy(update={"repository": str(make_repository(tmp_path / "repo"))})
    schedule = scheduled(store, spec=spec, keyring=keyring)
    due_at = due_now(store, schedule.schedule_id)
    arguments = [store_url, str(tmp_path / "key"), where]
    done = subprocess.run([sys.executable, "-c", DIES, *arguments], env={"HOME": str(tmp_path)}, timeout=60)
    assert done.returncode == 9
    assert runs(store, schedule.schedule_id) == [] and store.tasks.list(LOCAL_ACCOUNT).total == 0
    assert store.schedules.get(LOCAL_ACCOUNT, schedule.schedule_id).next_due_at == (due_at,)
    (task_id,) = fire(store, keyring)
    (run,) = runs(store, schedule.schedule_id)
    assert (run.due_at, run.task_id) == (due_at, task_id)
    assert store.blobs.get(LOCAL_ACCOUNT, task_id, "input")


def test_a_due_time_that_was_slept_through_is_missed_and_each_has_a_row(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedules, "MISSED_AT_A_TIME", 3)
    schedule = scheduled(store, cron="*/15 * * * *", ago=timedelta(hours=2))
    first = schedule.next_due_at[0]
    fired = fire(store)
    found = runs(store, schedule.schedule_id)[::-1]
    assert [run.due_at for run in found] == [first + timedelta(minutes=15 * n) for n in range(len(found))]
    missed = [run for run in found if run.outcome == "missed"]
    assert len(missed) >= 7 and all(run.reason == NO_WORKER and run.task_id is None for run in missed)
    # What is left is less than ten minutes old, if there is any.
    late = [run for run in found if run.outcome == "submitted"]
    assert [run.task_id for run in late] == fired and len(missed) + len(late) == len(found)
    assert store.schedules.get(LOCAL_ACCOUNT, schedule.schedule_id).next_due_at[0] > store.now()


def test_a_due_time_is_missed_after_ten_minutes_and_not_before(store: Store) -> None:
    late, too_late = scheduled(store), scheduled(store)
    due_now(store, late.schedule_id, ago_s=9 * 60)
    due_now(store, too_late.schedule_id, ago_s=11 * 60)
    fire(store)
    assert runs(store, late.schedule_id)[-1].outcome == "submitted"
    assert runs(store, too_late.schedule_id)[-1].outcome == "missed"


def test_a_due_time_is_skipped_while_the_task_before_goes_on(store: Store) -> None:
    schedule = scheduled(store)
    due_now(store, schedule.schedule_id, ago_s=5)
    (task_id,) = fire(store)
    due_now(store, schedule.schedule_id, ago_s=3)
    assert fire(store) == []
    run = runs(store, schedule.schedule_id)[0]
    assert run.outcome == "skipped" and task_id in (run.reason or "") and run.task_id is None
    end(store, task_id)
    due_now(store, schedule.schedule_id, ago_s=1)
    assert len(fire(store)) == 1


def test_a_task_that_began_after_the_look_is_seen_by_the_claim(store: Store) -> None:
    schedule = scheduled(store)
    due_now(store, schedule.schedule_id)
    (held,) = store.schedules.due(limit=10)
    run_now(store, KEYRING, lambda _: None, LOCAL_ACCOUNT, schedule.schedule_id)
    draft = schedules._draft(KEYRING, held)  # pyright: ignore[reportPrivateUsage]
    run = store.schedules.submit(held, draft, next_due_at=store.now() + timedelta(hours=1))
    assert run is not None and run.outcome == "skipped" and run.task_id is None
    assert store.tasks.list(LOCAL_ACCOUNT).total == 1


def test_what_a_submit_would_refuse_is_skipped_with_its_words_and_stops_no_other(store: Store, tmp_path: Path) -> None:
    gone = scheduled(store, spec=SPEC.model_copy(update={"repository": str(tmp_path / "gone")}))
    no_ref = SPEC.model_copy(update={"repository": str(make_repository(tmp_path / "repo")), "base_ref": "nowhere"})
    refless = scheduled(store, spec=no_ref)
    other_key = scheduled(store, keyring=Keyring([b"x" * 32]))
    odd = scheduled(store, spec=SPEC.model_copy(update={"agent": "nobody"}))
    good = scheduled(store)
    for schedule in (gone, refless, other_key, odd, good):
        due_now(store, schedule.schedule_id)
    (task_id,) = fire(store)
    said = [runs(store, schedule.schedule_id) for schedule in (gone, refless, other_key, odd)]
    assert [len(found) for found in said] == [1, 1, 1, 1]
    assert all(found[0].outcome == "skipped" and found[0].task_id is None for found in said)
    words = ["no such folder", "no branch, tag or commit", "ENCRYPTION_KEY has changed", "unexpected"]
    for found, word in zip(said, words, strict=True):
        assert word in (found[0].reason or "")
    assert runs(store, good.schedule_id)[0].task_id == task_id


def test_a_folder_is_read_when_the_schedule_is_due(store: Store, tmp_path: Path) -> None:
    repo = make_repository(tmp_path / "repo")
    schedule = scheduled(store, spec=SPEC.model_copy(update={"repository": str(repo)}))
    (repo / ".env").write_text("TOKEN=secret")
    (repo / "later.txt").write_text("written after the schedule was made\n")
    due_now(store, schedule.schedule_id)
    (task_id,) = fire(store)
    (tmp_path / "in.bundle").write_bytes(store.blobs.get(LOCAL_ACCOUNT, task_id, "input") or b"")
    git(tmp_path, "clone", "-q", "in.bundle", "out", "-b", "cloudagent-base")
    assert (tmp_path / "out" / "later.txt").exists()
    assert any(".env" in line for line in messages(store, task_id))
    assert store.tasks.get(LOCAL_ACCOUNT, task_id).base_sha == git(tmp_path / "out", "rev-parse", "HEAD")


def test_a_clock_that_was_set_back_fires_nothing_twice(store: Store) -> None:
    schedule = scheduled(store)
    due_at = due_now(store, schedule.schedule_id)
    (task_id,) = fire(store)
    end(store, task_id)
    # What a pause and a resume would do by a clock that shows the hour again.
    held = store.schedules.hold(LOCAL_ACCOUNT, schedule.schedule_id)
    assert store.schedules.change(held, next_due_at=due_at)
    assert fire(store) == []
    assert len(runs(store, schedule.schedule_id)) == store.tasks.list(LOCAL_ACCOUNT).total == 1
    assert store.schedules.get(LOCAL_ACCOUNT, schedule.schedule_id).next_due_at[0] > due_at


def test_a_schedule_that_was_changed_after_the_look_is_not_fired_as_it_was(store: Store) -> None:
    schedule = scheduled(store)
    due_at = due_now(store, schedule.schedule_id)
    (held,) = store.schedules.due(limit=10)
    other = TaskSpec(prompt="Something else.", title="Something else")
    assert store.schedules.change(store.schedules.hold(LOCAL_ACCOUNT, schedule.schedule_id), spec=other)
    draft = schedules._draft(KEYRING, held)  # pyright: ignore[reportPrivateUsage]
    assert store.schedules.submit(held, draft, next_due_at=due_at + timedelta(hours=1)) is None
    assert not store.schedules.pass_over(held, [due_at], "missed", "x", next_due_at=None)
    assert store.schedules.change(held, name="from an old look") is None
    (task_id,) = fire(store)
    assert store.tasks.get(LOCAL_ACCOUNT, task_id).prompt == "Something else."


def test_a_paused_schedule_is_never_due_and_can_still_be_run(store: Store) -> None:
    schedule = scheduled(store)
    held = store.schedules.hold(LOCAL_ACCOUNT, schedule.schedule_id)
    paused = store.schedules.change(held, enabled=False, next_due_at=None)
    assert paused is not None and not paused.enabled and paused.next_due_at == ()
    assert store.schedules.enabled() == 0 and store.schedules.due(limit=10) == []
    rung: list[str] = []
    made = [run_now(store, KEYRING, rung.append, LOCAL_ACCOUNT, schedule.schedule_id) for _ in range(3)]
    # At once, whatever else is under way, and each has a time of its own.
    assert [run.task_id for run in made] == rung and len({run.due_at for run in made}) == 3
    assert runs(store, schedule.schedule_id) == made[::-1]


def changed(store: Store, schedule_id: str, **changes: Unpack[ScheduleChanges]) -> Schedule:
    """As an update does it."""
    while True:
        held = store.schedules.hold(LOCAL_ACCOUNT, schedule_id)
        passed = overdue(store, held)
        if passed is not None and (after := store.schedules.change(held, overdue=passed, **changes)) is not None:
            return after


def test_a_pause_answers_the_due_times_that_nobody_has(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "MISSED_AT_A_TIME", 3)
    schedule = scheduled(store, cron="*/5 * * * *", ago=timedelta(minutes=48))
    first = schedule.next_due_at[0]
    paused = changed(store, schedule.schedule_id, enabled=False, next_due_at=None)
    now = store.now()
    found = runs(store, schedule.schedule_id)[::-1]
    assert [run.due_at for run in found] == [first + timedelta(minutes=5 * n) for n in range(len(found))]
    assert now - timedelta(minutes=5, seconds=5) < found[-1].due_at <= now
    assert len(found) in (9, 10) and paused.next_due_at == ()
    for run in found:
        recent = run.due_at > now - schedules.LATEST + timedelta(seconds=5)
        assert run.task_id is None and (run.outcome == "skipped" or not recent)
        assert run.reason == (CHANGED_BEFORE if run.outcome == "skipped" else NO_WORKER)
    assert found[-1].outcome == "skipped" and found[0].outcome == "missed"
    assert fire(store) == [] and len(runs(store, schedule.schedule_id)) == len(found)


def test_other_times_answer_the_due_time_that_they_do_away_with(store: Store) -> None:
    schedule = scheduled(store)
    due_at = due_now(store, schedule.schedule_id)
    later = store.now() + timedelta(hours=3)
    changed(store, schedule.schedule_id, cron="30 4 * * *", next_due_at=later)
    (run,) = runs(store, schedule.schedule_id)
    assert (run.due_at, run.outcome, run.reason) == (due_at, "skipped", CHANGED_BEFORE)


def test_a_due_time_that_comes_between_the_look_and_the_pause_is_answered(store: Store) -> None:
    schedule = scheduled(store)
    held = store.schedules.hold(LOCAL_ACCOUNT, schedule.schedule_id)
    soon = held.seen_at + timedelta(seconds=1)
    assert store.schedules.change(held, next_due_at=soon)
    held = store.schedules.hold(LOCAL_ACCOUNT, schedule.schedule_id)
    assert overdue(store, held) == []
    until(lambda: store.now() > soon, "it is due")
    assert store.schedules.change(held, enabled=False, next_due_at=None)
    assert [(run.due_at, run.outcome) for run in runs(store, schedule.schedule_id)] == [(soon, "skipped")]


def test_a_change_that_leaves_the_times_as_they_are_leaves_the_due_time_too(store: Store) -> None:
    schedule = scheduled(store)
    due_at = due_now(store, schedule.schedule_id)
    held = store.schedules.hold(LOCAL_ACCOUNT, schedule.schedule_id)
    assert store.schedules.change(held, name="another")
    assert runs(store, schedule.schedule_id) == []
    assert len(fire(store)) == 1 and runs(store, schedule.schedule_id)[0].due_at == due_at


def test_a_pause_and_the_sweepers_that_race_leave_one_row(store: Store) -> None:
    for _ in range(8):
        schedule = scheduled(store)
        due_at = due_now(store, schedule.schedule_id)
        rung: list[str] = []

        def pause(schedule_id: str = schedule.schedule_id) -> bool:
            changed(store, schedule_id, enabled=False, next_due_at=None)
            return False

        at_once(pause, *[partial(fire_due, store, KEYRING, rung.append)] * 3)
        (run,) = runs(store, schedule.schedule_id)
        assert run.due_at == due_at and [run.task_id] == (rung or [None])
        assert store.schedules.get(LOCAL_ACCOUNT, schedule.schedule_id).next_due_at == ()


def test_runs_grow_old_and_the_newest_hundred_of_each_schedule_stay(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "LINES_AT_ONCE", 7)
    many, few = scheduled(store), scheduled(store)
    now = store.now().replace(microsecond=0)
    for schedule, count in ((many, 130), (few, 50)):
        moments = [now - timedelta(days=number) for number in range(count, 0, -1)]
        due = due_now(store, schedule.schedule_id)
        held = store.schedules.hold(LOCAL_ACCOUNT, schedule.schedule_id)
        assert store.schedules.pass_over(held, [*moments, due], "missed", "x", next_due_at=now + timedelta(hours=1))
    kept = partial(run_times, store)
    store.retention.prune(max_age_s=120 * 86_400.0, max_bytes=None)
    assert len(kept(many)) == 120 and len(kept(few)) == 51  # younger than 120 days, and the one of just now
    store.retention.prune(max_age_s=None, max_bytes=None)
    assert len(kept(many)) == 120
    newest = kept(many)[:100]
    store.retention.prune(max_age_s=0, max_bytes=None)
    assert kept(many) == newest and len(kept(few)) == 51
    store.retention.prune(max_age_s=0, max_bytes=None)
    assert kept(many) == newest


def run_times(store: Store, schedule: Schedule) -> list[datetime]:
    """The times of all runs that are kept, the newest first."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("cloudagent_storage.store.schedules.SHOWN_RUNS", 10_000)
        return [run.due_at for run in runs(store, schedule.schedule_id)]


def test_runs_that_are_asked_for_in_one_moment_are_all_kept(store: Store) -> None:
    schedule = scheduled(store)
    call = partial(run_now, store, KEYRING, lambda _: None, LOCAL_ACCOUNT, schedule.schedule_id)
    made = at_once(*[call] * 8)
    assert len({run.due_at for run in made}) == len({run.task_id for run in made}) == 8
    assert store.tasks.list(LOCAL_ACCOUNT, schedule_id=schedule.schedule_id).total == 8


def test_a_run_that_is_refused_tells_the_caller_and_leaves_a_row(store: Store) -> None:
    schedule = scheduled(store)
    held = store.schedules.hold(LOCAL_ACCOUNT, schedule.schedule_id)
    assert store.schedules.change(
        held, credentials=KEYRING.seal(b'{"agent": {}, "git": {}}', bound_to=schedule.schedule_id)
    )
    with pytest.raises(CredentialMissing):
        run_now(store, KEYRING, lambda _: None, LOCAL_ACCOUNT, schedule.schedule_id)
    (run,) = runs(store, schedule.schedule_id)
    assert run.outcome == "skipped" and "claude setup-token" in (run.reason or "")


def test_a_deleted_schedule_takes_its_runs_along_and_leaves_its_tasks(store: Store) -> None:
    schedule = scheduled(store)
    due_now(store, schedule.schedule_id)
    (held,) = store.schedules.due(limit=10)
    (task_id,) = fire(store)
    store.schedules.delete(LOCAL_ACCOUNT, schedule.schedule_id)
    with pytest.raises(ScheduleNotFound):
        store.schedules.get(LOCAL_ACCOUNT, schedule.schedule_id)
    assert store.tasks.get(LOCAL_ACCOUNT, task_id).schedule_id == schedule.schedule_id
    draft = schedules._draft(KEYRING, held)  # pyright: ignore[reportPrivateUsage]
    assert store.schedules.submit(held, draft) is None and store.schedules.submit(held, draft, at_once=True) is None
    assert fire(store) == []


def test_only_the_newest_ten_runs_are_shown(store: Store) -> None:
    schedule = scheduled(store, cron="*/5 * * * *", ago=timedelta(hours=3))
    fire(store)
    found = runs(store, schedule.schedule_id)
    assert len(found) == 10 and [run.due_at for run in found] == sorted((run.due_at for run in found), reverse=True)


def test_schedules_are_listed_oldest_first_and_there_are_at_most_a_hundred(store: Store, store_url: str) -> None:
    store.accounts.ensure("other")
    made = [scheduled(store).schedule_id for _ in range(MAX_SCHEDULES - 1)]
    other = Store.open(store_url)

    def one_more(opened: Store) -> Schedule | None:
        try:
            return scheduled(opened)
        except LimitReached as error:
            assert error.code == "limit_reached" and "100" in error.message
            return None

    added = [
        schedule for schedule in at_once(*[partial(one_more, opened) for opened in (store, other) * 4]) if schedule
    ]
    other.close()
    assert len(added) == 1
    scheduled(store, account_id="other")
    listed = store.schedules.list(LOCAL_ACCOUNT)
    assert listed.total == MAX_SCHEDULES
    assert {schedule.schedule_id for schedule in listed.schedules} == {*made, added[0].schedule_id}
    moments = [schedule.created_at for schedule in listed.schedules]
    assert moments == sorted(moments)
    page = store.schedules.list(LOCAL_ACCOUNT, limit=7, offset=98)
    assert (len(page.schedules), page.total) == (2, MAX_SCHEDULES)


USER_CALLS: list[Callable[[Store, str], object]] = [
    lambda store, schedule_id: store.schedules.get(LOCAL_ACCOUNT, schedule_id),
    lambda store, schedule_id: store.schedules.hold(LOCAL_ACCOUNT, schedule_id),
    lambda store, schedule_id: store.schedules.delete(LOCAL_ACCOUNT, schedule_id),
    lambda store, schedule_id: run_now(store, KEYRING, lambda _: None, LOCAL_ACCOUNT, schedule_id),
]


def test_an_id_of_another_account_looks_like_an_unknown_one(store: Store) -> None:
    store.accounts.ensure("other")
    theirs = scheduled(store, account_id="other").schedule_id
    for call in USER_CALLS:
        for schedule_id in [theirs, new_id("sch"), "", "sch_", "sch_\x00", "\ud800", "' OR 1=1 --", theirs.upper()]:
            with pytest.raises(ScheduleNotFound) as caught:
                call(store, schedule_id)
            assert caught.value.as_dict() == ScheduleNotFound().as_dict()
    mine = store.schedules.hold("other", theirs).model_copy(update={"account_id": LOCAL_ACCOUNT})
    with pytest.raises(ScheduleNotFound):
        store.schedules.change(mine, name="taken over")
    assert store.schedules.list(LOCAL_ACCOUNT).total == 0 and store.schedules.get("other", theirs).name == "hourly"


def test_a_task_of_a_schedule_belongs_to_the_schedules_account(store: Store) -> None:
    store.accounts.ensure("other")
    theirs = scheduled(store, account_id="other")
    due_now(store, theirs.schedule_id, account_id="other")
    (task_id,) = fire(store)
    assert store.tasks.get("other", task_id).schedule_id == theirs.schedule_id
    assert store.tasks.list(LOCAL_ACCOUNT, schedule_id=theirs.schedule_id).total == 0


def test_what_the_database_does_not_answer_stays_due(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = scheduled(store)
    due_at = due_now(store, schedule.schedule_id)

    def unavailable(*_: object, **__: object) -> None:
        raise DatabaseUnavailable()

    with monkeypatch.context() as patched:
        patched.setattr(store.schedules, "submit", unavailable)
        with pytest.raises(DatabaseUnavailable):
            fire_due(store, KEYRING, lambda _: None)
    assert runs(store, schedule.schedule_id) == []
    assert len(fire(store)) == 1 and runs(store, schedule.schedule_id)[0].due_at == due_at


def test_the_databases_clock_is_read_as_utc(store: Store) -> None:
    now: datetime = store.now()
    assert now.utcoffset() == timedelta(0) and abs(now - datetime.now(now.tzinfo)) < timedelta(minutes=1)
