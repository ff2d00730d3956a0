"""The schedules: how they are kept, and how each of their due times is answered once.

A due time is claimed by its row in `schedule_runs`. That row, the task that it submits and the move to the next due
time are one transaction: any number of workers may try, and die whenever they like.
"""

# pyright: basic
from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, TypedDict, Unpack, cast

from cloudagent_storage.errors import LimitReached, ScheduleNotFound
from cloudagent_storage.records import TaskDraft, TaskSpec, TaskStatus
from cloudagent_storage.schedule import (
    MAX_SCHEDULES,
    HeldSchedule,
    RunOutcome,
    Schedule,
    ScheduleList,
    ScheduleRun,
    not_ended,
)
from cloudagent_storage.store.blobs import packed, write_blob
from cloudagent_storage.store.database import Database
from cloudagent_storage.store.row import json_of
from cloudagent_storage.store.tasks import Tasks
from cloudagent_storage.tables import ScheduleRow, ScheduleRunRow

SHOWN_RUNS = 10
CHANGED_BEFORE = "The schedule was paused, or given other times, before a worker came to it."
SCHEDULE_ID = re.compile(r"sch_[a-z2-7]{26}")


class ScheduleChanges(TypedDict, total=False):
    """What a user can change of a schedule. What is left out stays."""

    name: str
    cron: str
    timezone: str
    enabled: bool
    spec: TaskSpec
    credentials: bytes
    next_due_at: datetime | None


class Schedules:
    """All schedules. What is for users takes their account."""

    def __init__(self, db: Database, tasks: Tasks) -> None:
        self._db = db
        self._tasks = tasks
        self._rows = db.tables.schedules
        self._runs = db.tables.schedule_runs

    # -- for users -------------------------------------------------------------------------------------------------

    def add(
        self,
        account_id: str,
        *,
        schedule_id: str,
        name: str,
        cron: str,
        timezone: str,
        spec: TaskSpec,
        credentials: bytes | None,
        next_due_at: datetime,
    ) -> Schedule:
        """Keep a new schedule. Raises `LimitReached` when the account has `MAX_SCHEDULES`."""
        rows, accounts = self._rows, self._db.tables.accounts
        with self._db.writing():
            # Locked, so that two at once do not both become the last one that is allowed.
            list(self._db.locked(accounts.select().where(accounts.account_id == account_id)))
            if rows.select().where(rows.account_id == account_id).count() >= MAX_SCHEDULES:
                raise LimitReached(f"The account has {MAX_SCHEDULES} schedules, and may not have more.")
            rows.insert(
                schedule_id=schedule_id,
                account_id=account_id,
                name=name,
                cron=cron,
                timezone=timezone,
                spec=json_of(spec),
                credentials=credentials,
                created_at=self._db.now,
                updated_at=self._db.now,
                next_due_at=next_due_at,
            ).execute()
            return self._schedule_of(self._find(account_id, schedule_id))

    def get(self, account_id: str, schedule_id: str) -> Schedule:
        """An account's schedule. Raises `ScheduleNotFound`, the same for another account's id as for an unknown one."""
        with self._db.reading():
            return self._schedule_of(self._find(account_id, schedule_id))

    def hold(self, account_id: str, schedule_id: str) -> HeldSchedule:
        """The same with all that is needed to fire or to change it. Raises `ScheduleNotFound`."""
        with self._db.reading():
            return self._held(self._find(account_id, schedule_id))

    def list(self, account_id: str, *, limit: int = MAX_SCHEDULES, offset: int = 0) -> ScheduleList:
        """An account's schedules, oldest first."""
        rows = self._rows
        mine = rows.select().where(rows.account_id == account_id)
        with self._db.reading():
            total = mine.count()
            page = mine.order_by(rows.created_at, rows.schedule_id).limit(limit).offset(offset)
            return ScheduleList(schedules=tuple(self._schedule_of(row) for row in list(page)), total=total)

    def change(
        self, held: HeldSchedule, *, overdue: Sequence[datetime] = (), **changes: Unpack[ScheduleChanges]
    ) -> Schedule | None:
        """Change a schedule; None when it is another since it was looked at. Raises `ScheduleNotFound`.

        `overdue` are its due times up to the look, of which `held.due_at` is the first, if the change does away with
        them: nobody will answer them any more, so that they are skipped here.
        """
        columns: dict[str, Any] = dict(changes)
        if "spec" in changes:
            columns["spec"] = json_of(changes["spec"])
        with self._db.writing():
            row = self._find(held.account_id, held.schedule.schedule_id, lock=True)
            # A due time may have been answered meanwhile; only what was decided by the earlier one is decided anew.
            if row.revision != held.revision or ("next_due_at" in changes and row.next_due_at != held.due_at):
                return None
            if "next_due_at" in changes and row.next_due_at is not None:
                # It may have become due since the look.
                passed = row.next_due_at <= self._db.read_clock()
                for moment in overdue or ([row.next_due_at] if passed else []):
                    self._add_run(held, moment, "skipped", reason=CHANGED_BEFORE)
            self._update(row.schedule_id, revision=row.revision + 1, updated_at=self._db.now, **columns)
            return self._schedule_of(self._find(held.account_id, held.schedule.schedule_id))

    def delete(self, account_id: str, schedule_id: str) -> Schedule:
        """Remove a schedule with its runs, and say what it was. Its tasks stay. Raises `ScheduleNotFound`."""
        with self._db.writing():
            row = self._find(account_id, schedule_id, lock=True)
            schedule = self._schedule_of(row)
            self._rows.delete().where(self._rows.schedule_id == schedule_id).execute()
            self._db.announce(schedule_id)
            return schedule

    # -- for workers -----------------------------------------------------------------------------------------------

    def enabled(self) -> int:
        """How many schedules will be due some time."""
        with self._db.reading():
            return self._rows.select().where(self._rows.next_due_at.is_null(False)).count()

    def due(self, *, limit: int) -> Sequence[HeldSchedule]:
        """The schedules that are due, the longest waiting first. Nothing is claimed by looking."""
        rows = self._rows
        with self._db.reading():
            found = rows.select().where(rows.next_due_at <= self._db.now).order_by(rows.next_due_at).limit(limit)
            return [self._held(row) for row in list(found)]

    def pass_over(
        self,
        held: HeldSchedule,
        moments: Sequence[datetime],
        outcome: RunOutcome,
        reason: str,
        *,
        next_due_at: datetime | None,
    ) -> bool:
        """Answer due times, of which `held.due_at` is the first, without a task. False when another has done it."""
        assert held.due_at is not None
        with self._db.writing():
            if not self._still_due(held):
                return False
            for moment in moments:
                self._add_run(held, moment, outcome, reason=reason)
            self._update(held.schedule.schedule_id, next_due_at=next_due_at)
            return True

    def refuse_now(self, held: HeldSchedule, reason: str) -> None:
        """Note that a run which was asked for outside of the due times could not be."""
        with self._db.writing():
            if self._lock(held) is not None:
                self._add_run(held, None, "skipped", reason=reason)

    def submit(
        self,
        held: HeldSchedule,
        draft: TaskDraft,
        *,
        next_due_at: datetime | None = None,
        at_once: bool = False,
    ) -> ScheduleRun | None:
        """Answer the due time `held.due_at` with a new task, in one step; None when another has done it.

        A task of the schedule that has not ended makes it a run that is skipped. `at_once` answers no due time: it
        submits whatever else is under way, and is None only when the schedule is another by now.
        Raises `RepositoryTooLarge`.
        """
        # Before the transaction: to compress a large one takes seconds.
        bundle = None if draft.bundle is None else packed(draft.bundle)
        schedule_id = held.schedule.schedule_id
        with self._db.writing():
            if at_once:
                if self._lock(held) is None:
                    return None
            else:
                if not self._still_due(held):
                    return None
                self._update(schedule_id, next_due_at=next_due_at)
                if (unfinished := self._unfinished(schedule_id)) is not None:
                    return self._add_run(held, held.due_at, "skipped", reason=not_ended(unfinished))
            due_at = None if at_once else held.due_at
            run = self._add_run(held, due_at, "submitted", task_id=draft.task_id)
            if run is None:
                return None
            self._tasks.add(
                held.account_id,
                held.schedule.task,
                task_id=draft.task_id,
                base_sha=draft.base_sha,
                config=draft.config,
                manifests=draft.manifests,
                source_key=draft.source_key,
                credentials=draft.credentials,
                git_credentials=draft.git_credentials,
                candidates=draft.candidates,
                lines=draft.lines,
                schedule_id=schedule_id,
            )
            if bundle is not None and draft.bundle is not None:
                write_blob(self._db, draft.task_id, "input", bundle, len(draft.bundle))
            return run

    # -- what they share -------------------------------------------------------------------------------------------

    def _find(self, account_id: str, schedule_id: str, *, lock: bool = False) -> ScheduleRow:
        rows = self._rows
        row = None
        if SCHEDULE_ID.fullmatch(schedule_id):
            query = rows.select().where(rows.schedule_id == schedule_id, rows.account_id == account_id)
            row = (self._db.locked(query) if lock else query).first()
        if row is None:
            raise ScheduleNotFound()
        return row

    def _lock(self, held: HeldSchedule) -> ScheduleRow | None:
        """The row, if it is what was looked at; nobody else changes it before the transaction ends."""
        rows = self._rows
        query = rows.select().where(rows.schedule_id == held.schedule.schedule_id, rows.revision == held.revision)
        return self._db.locked(query).first()

    def _still_due(self, held: HeldSchedule) -> bool:
        row = self._lock(held)
        return row is not None and row.next_due_at is not None and row.next_due_at == held.due_at

    def _update(self, schedule_id: str, **columns: Any) -> None:
        self._rows.update(**columns).where(self._rows.schedule_id == schedule_id).execute()
        self._db.announce(schedule_id)

    def _add_run(
        self,
        held: HeldSchedule,
        due_at: datetime | None,
        outcome: RunOutcome,
        *,
        reason: str | None = None,
        task_id: str | None = None,
    ) -> ScheduleRun | None:
        """Write the row of a due time, or of this moment; None when it has one: the clock was set back, say."""
        schedule_id = held.schedule.schedule_id
        query = self._runs.insert(
            schedule_id=schedule_id,
            due_at=self._db.now_in_runs(schedule_id) if due_at is None else due_at,
            outcome=outcome,
            reason=reason,
            task_id=task_id,
            created_at=self._db.now,
        ).on_conflict_ignore()
        inserted = list(query.returning(self._runs).objects(self._runs))
        self._db.announce(schedule_id)
        return _run_of(inserted[0]) if inserted else None

    def _unfinished(self, schedule_id: str) -> str | None:
        tasks = self._db.tables.tasks
        open_ones = [status for status in TaskStatus if not status.terminal]
        query = tasks.select(tasks.task_id).where(tasks.schedule_id == schedule_id, tasks.status.in_(open_ones))
        row = query.first()
        return None if row is None else row.task_id

    def _held(self, row: ScheduleRow) -> HeldSchedule:
        return HeldSchedule(
            schedule=self._schedule_of(row),
            account_id=row.account_id,
            revision=row.revision,
            due_at=row.next_due_at,
            seen_at=self._db.read_clock(),
            credentials=None if row.credentials is None else bytes(row.credentials),
            unfinished_task_id=self._unfinished(row.schedule_id),
        )

    def _schedule_of(self, row: ScheduleRow) -> Schedule:
        runs = self._runs
        newest = runs.select().where(runs.schedule_id == row.schedule_id).order_by(runs.due_at.desc())
        return Schedule(
            schedule_id=row.schedule_id,
            name=row.name,
            cron=row.cron,
            timezone=row.timezone,
            enabled=row.enabled,
            task=TaskSpec.model_validate(row.spec),
            created_at=row.created_at,
            updated_at=row.updated_at,
            next_due_at=() if row.next_due_at is None else (row.next_due_at,),
            last_runs=tuple(_run_of(run) for run in newest.limit(SHOWN_RUNS)),
        )


def _run_of(row: ScheduleRunRow) -> ScheduleRun:
    return ScheduleRun(
        due_at=row.due_at,
        outcome=cast(RunOutcome, row.outcome),
        reason=row.reason,
        task_id=row.task_id,
        created_at=row.created_at,
    )
