"""What of finished tasks, and of the runs of schedules, is kept, and for how long.

A task's row stays for ever; its log and blobs, which are a thousand times larger, do not. It happens in three steps, so
that each transaction is short and a crash between any two costs nothing: a finished task is measured, once in its life;
when it is too old or too much, it *expires*, and readers are told so from then on; then its material is deleted, a
little at a time. Several processes may prune at once: each step says in its UPDATE what it expects to find.

Candidates expire with their parent, and never by themselves: they share what they were submitted with.
"""

# pyright: basic
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peewee import fn

from cloudagent_storage.records import TERMINAL
from cloudagent_storage.store.database import Database

TASKS_AT_ONCE = 20
"""How many tasks one transaction measures or lets expire."""
LINES_AT_ONCE = 2000
"""How many lines of a log one transaction deletes: some tens of milliseconds."""
PAGES_AT_ONCE = 1000
"""How many pages of SQLite's file one transaction gives back."""
RUNS_KEPT = 100
"""So many of a schedule's runs stay, however old they are."""
KEY_AGE_S = 7 * 86_400.0
"""How long a submit may be repeated with its idempotency key."""


class Retention:
    """Prunes what finished tasks have left behind. Tasks that have not ended are never touched."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._rows = db.tables.tasks

    def prune(self, *, max_age_s: float | None, max_bytes: int | None, go_on: Callable[[], bool] = lambda: True) -> int:
        """Let the logs and blobs of finished tasks expire, and delete them; returns how many tasks expired.

        Those that ended longer than `max_age_s` ago do; then, account by account, the oldest, until what is left of the
        account's finished tasks is at most `max_bytes` as the database keeps it. None is without limit. Idempotency
        keys older than `KEY_AGE_S` are forgotten, and runs of schedules older than `max_age_s`, but for the newest
        `RUNS_KEPT` of each schedule. `go_on` is asked between any two transactions.
        """
        expired = 0
        while go_on() and self._measure():
            pass
        if max_age_s is not None:
            while go_on() and (count := self._expire_old(max_age_s)):
                expired += count
            for schedule_id in self._schedules():
                while go_on() and self._forget_runs(schedule_id, max_age_s):
                    pass
        if max_bytes is not None:
            for account_id in self._accounts():
                while go_on() and (count := self._expire_oldest(account_id, max_bytes)):
                    expired += count
        while go_on() and self._delete_some():
            pass
        while go_on() and self._forget_keys():
            pass
        while go_on() and self._db.shrink(PAGES_AT_ONCE):
            pass
        return expired

    def _measure(self) -> int:
        """Measure some finished tasks that have not been; returns how many. Lengths are told without reading blobs."""
        rows, events, blobs = self._rows, self._db.tables.events, self._db.tables.blobs
        ended = rows.status.in_(list(TERMINAL)) & rows.kept_bytes.is_null() & rows.expired_at.is_null()
        with self._db.reading():
            found = [row.task_id for row in rows.select(rows.task_id).where(ended).limit(TASKS_AT_ONCE)]
            if not found:
                return 0
            sizes = dict.fromkeys(found, 0)
            length = self._db.octets(events.message) + fn.COALESCE(self._db.octets(events.raw_json), 0)
            for kept, size in ((events, length), (blobs, self._db.octets(blobs.data, blob=True))):
                sums = kept.select(kept.task_id, fn.SUM(size)).where(kept.task_id.in_(found))
                totals: Any = sums.group_by(kept.task_id).tuples()
                for task_id, total in totals:
                    sizes[task_id] += int(total)
        # Outside of the look: it may take a second for long logs, in which others can write. And one by one, as whoever
        # holds a candidate's row may wait for its parent's.
        for task_id in found:
            with self._db.writing():
                # At least 1: 0 says that nothing is left to delete.
                measured = rows.update(kept_bytes=max(1, sizes[task_id]))
                measured.where(rows.task_id == task_id, rows.kept_bytes.is_null()).execute()
        return len(found)

    def _accounts(self) -> list[str]:
        rows = self._db.tables.accounts
        with self._db.reading():
            return [row.account_id for row in rows.select(rows.account_id)]

    def _expire_old(self, max_age_s: float) -> int:
        rows = self._rows
        with self._db.writing():
            old = self._kept().where(rows.completed_at < self._db.later(-max_age_s)).order_by(rows.completed_at)
            return self._expire([row.task_id for row in self._db.locked(old.limit(TASKS_AT_ONCE), skip=True)])

    def _expire_oldest(self, account_id: str, max_bytes: int) -> int:
        """Let an account's oldest expire until it is under its size, some at once; returns how many."""
        rows = self._rows
        with self._db.writing():
            mine = self._kept().where(rows.account_id == account_id, rows.kept_bytes.is_null(False))
            # Locked, and only then summed up: of two who prune at once, the second sees what the first has done.
            oldest = list(self._db.locked(mine.order_by(rows.completed_at, rows.task_id).limit(TASKS_AT_ONCE)))
            sizes = self._with_candidates([row.task_id for row in oldest])
            left = rows.select(fn.COALESCE(fn.SUM(rows.kept_bytes), 0)).where(
                rows.account_id == account_id, rows.status.in_(list(TERMINAL)), rows.expired_at.is_null()
            )
            over = int(left.scalar()) - max_bytes
            chosen: list[str] = []
            for row in oldest:
                if over <= 0:
                    break
                chosen.append(row.task_id)
                over -= row.kept_bytes + sizes.get(row.task_id, 0)
            return self._expire(chosen)

    def _kept(self):
        rows = self._rows
        query = rows.select(rows.task_id, rows.kept_bytes)
        return query.where(rows.status.in_(list(TERMINAL)), rows.expired_at.is_null(), rows.candidate.is_null())

    def _with_candidates(self, task_ids: list[str]) -> dict[str, int]:
        """How much is kept of the candidates of each."""
        rows = self._rows
        query: Any = rows.select(rows.parent_task_id, fn.COALESCE(fn.SUM(rows.kept_bytes), 0))
        query = query.where(rows.parent_task_id.in_(task_ids), rows.candidate.is_null(False))
        return {task_id: int(size) for task_id, size in query.group_by(rows.parent_task_id).tuples()}

    def _expire(self, task_ids: list[str]) -> int:
        """Returns how many did; their candidates do with them, and do not count."""
        rows, expire = self._rows, self._rows.update(expired_at=self._db.now)
        of_these = rows.parent_task_id.in_(task_ids) & rows.candidate.is_null(False)
        expire.where(of_these, rows.expired_at.is_null()).execute()
        return expire.where(rows.task_id.in_(task_ids), rows.expired_at.is_null()).execute()

    def _delete_some(self) -> bool:
        """Delete a part of what one expired task has left; False when none has left anything."""
        rows, tables = self._rows, self._db.tables
        # In the words of the index: SQLite takes it for a range, and not for "is not null".
        left = (rows.expired_at <= self._db.now) & (rows.kept_bytes.is_null() | (rows.kept_bytes != 0))
        with self._db.writing():
            task = self._db.locked(rows.select(rows.task_id).where(left).limit(1), skip=True).first()
            if task is None:
                return False
            blobs, events, messages = tables.blobs, tables.events, tables.messages
            # One blob in a transaction: SQLite walks through all of its pages to set them free.
            blob = blobs.select(blobs.kind).where(blobs.task_id == task.task_id).first()
            if blob is not None:
                blobs.delete().where(blobs.task_id == task.task_id, blobs.kind == blob.kind).execute()
                return True
            first = events.select(fn.MIN(events.seq)).where(events.task_id == task.task_id).scalar()
            if first is not None:
                some = (events.task_id == task.task_id) & (events.seq < first + LINES_AT_ONCE)
                events.delete().where(some).execute()
                return True
            messages.delete().where(messages.task_id == task.task_id).execute()
            rows.update(kept_bytes=0, config=None).where(rows.task_id == task.task_id).execute()
            return True

    def _schedules(self) -> list[str]:
        rows = self._db.tables.schedules
        with self._db.reading():
            return [row.schedule_id for row in rows.select(rows.schedule_id)]

    def _forget_runs(self, schedule_id: str, max_age_s: float) -> bool:
        """Delete some of a schedule's old runs; False when there are no more."""
        runs = self._db.tables.schedule_runs
        mine = runs.schedule_id == schedule_id
        with self._db.writing():
            kept = runs.select(runs.due_at).where(mine).order_by(runs.due_at.desc()).offset(RUNS_KEPT - 1).first()
            if kept is None:
                return False
            old = mine & (runs.due_at < kept.due_at) & (runs.due_at < self._db.later(-max_age_s))
            oldest = list(runs.select(runs.due_at).where(old).order_by(runs.due_at).limit(LINES_AT_ONCE))
            if oldest:
                runs.delete().where(mine, runs.due_at <= oldest[-1].due_at).execute()
            return len(oldest) == LINES_AT_ONCE

    def _forget_keys(self) -> int:
        rows = self._rows
        old = rows.idempotency_key.is_null(False) & (rows.created_at < self._db.later(-KEY_AGE_S))
        with self._db.writing():
            some = self._db.locked(rows.select(rows.task_id).where(old).limit(LINES_AT_ONCE // 10), skip=True)
            forget = rows.update(idempotency_key=None, arguments_digest=None)
            return forget.where(rows.task_id.in_([row.task_id for row in some])).execute()
