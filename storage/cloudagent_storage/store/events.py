"""The log of a task: written in numbered lines, and never changed."""

# pyright: basic
from __future__ import annotations

from collections.abc import Sequence

from cloudagent_storage.errors import TaskNotFound
from cloudagent_storage.records import EventDraft, EventKind, Level, LogPage
from cloudagent_storage.store.change import change, change_held
from cloudagent_storage.store.database import Database
from cloudagent_storage.store.log import line_of
from cloudagent_storage.store.row import find, find_kept


class Events:
    """The logs of tasks."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add(self, task_id: str, *drafts: EventDraft, attempt: int | None = None) -> None:
        """Add lines to a task's log.

        A worker passes its `attempt`, and `LeaseLost` is raised when it has the task no more. Raises `TaskNotFound`.
        """
        with self._db.writing():
            if attempt is not None:
                change_held(self._db, task_id, attempt, lines=drafts)
            elif change(self._db, task_id, self._db.tables.tasks.task_id == task_id, lines=drafts) is None:
                raise TaskNotFound()

    def list(
        self,
        account_id: str,
        task_id: str,
        *,
        after: int = 0,
        limit: int = 100,
        level: Level | None = None,
        kinds: Sequence[EventKind] = (),
        raw: bool = False,
    ) -> LogPage:
        """The lines that follow line `after`: at most `limit`, of at least that level, of these kinds if any are named.

        `next_after` is the last line that was looked at, whether or not it was one of those; `more` says whether a line
        after it would have been. Raises `TaskNotFound` and `TaskExpired`.
        """
        rows = self._db.tables.events
        with self._db.reading():
            columns = [self._db.tables.tasks.last_seq, self._db.tables.tasks.completed_at]
            task = find_kept(self._db, account_id, task_id, columns=columns)
            last_seq = task.last_seq
            # Up to the last line of before, so that what is committed in between is not taken for looked at.
            query = rows.select(*self._columns(raw)).where(
                rows.task_id == task_id, rows.seq > after, rows.seq <= last_seq
            )
            if level is not None:
                query = query.where(rows.level.in_([known for known in Level if known.rank >= level.rank]))
            if kinds:
                query = query.where(rows.kind.in_(kinds))
            lines = [line_of(row, raw=raw) for row in query.order_by(rows.seq).limit(limit + 1)]
            if task.completed_at is not None:
                find_kept(self._db, account_id, task_id)  # no part of a log that is being deleted passes for all of it
        more = len(lines) > limit
        lines = lines[:limit]
        next_after = lines[-1].seq if more and lines else after if more else max(after, last_seq)
        return LogPage(task_id=task_id, lines=tuple(lines), next_after=next_after, more=more)

    def tail(self, account_id: str, task_id: str, count: int) -> LogPage:
        """The last `count` lines, oldest first; none of a task that has expired. Raises `TaskNotFound`."""
        rows = self._db.tables.events
        with self._db.reading():
            columns = [self._db.tables.tasks.last_seq, self._db.tables.tasks.expired_at]
            task = find(self._db, account_id, task_id, columns=columns)
            last_seq = task.last_seq
            if task.expired_at is not None:
                return LogPage(task_id=task_id, lines=(), next_after=last_seq, more=False)
            query = rows.select(*self._columns(False)).where(rows.task_id == task_id, rows.seq <= last_seq)
            newest = [line_of(row, raw=False) for row in query.order_by(rows.seq.desc()).limit(count)]
        return LogPage(task_id=task_id, lines=tuple(reversed(newest)), next_after=last_seq, more=False)

    def _columns(self, raw: bool) -> Sequence[object]:
        rows = self._db.tables.events
        columns = [rows.seq, rows.timestamp, rows.level, rows.kind, rows.message]
        return [*columns, rows.raw_json] if raw else columns
