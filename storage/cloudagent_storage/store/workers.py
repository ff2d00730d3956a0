"""The worker processes: who they are, and when they were last heard of."""

# pyright: basic
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peewee import fn

from cloudagent_storage.overview import WorkerInfo
from cloudagent_storage.store.database import Database
from cloudagent_storage.store.row import ACTIVE

FORGET_S = 24 * 3600
"""A worker that was silent for so long is left out."""


class Workers:
    """The workers of this installation. What they report is for people and estimates; leases decide who runs what."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._rows = db.tables.workers

    def report(self, name: str, *, place: str, version: str, concurrency: int, swept: bool) -> None:
        """A worker says that it lives, and with `swept` that it has just gone through everything that time brings."""
        rows, now = self._rows, self._db.now
        seen = {"place": place, "version": version, "concurrency": concurrency, "seen_at": now}
        if swept:
            seen["swept_at"] = now
        with self._db.writing():
            rows.insert(name=name, started_at=now, **seen).on_conflict(
                conflict_target=[rows.name], update=seen
            ).execute()
            rows.delete().where(rows.seen_at < self._db.later(-FORGET_S)).execute()

    def leave(self, name: str) -> None:
        """A worker has stopped."""
        with self._db.writing():
            self._rows.delete().where(self._rows.name == name).execute()

    def list(self) -> Sequence[WorkerInfo]:
        """The workers that were heard of lately, the newest first."""
        with self._db.reading():
            return workers(self._db)


def workers(db: Database, *, within_s: float = FORGET_S) -> Sequence[WorkerInfo]:
    """The same, within the caller's transaction, of those that were heard of so lately."""
    rows, tasks = db.tables.workers, db.tables.tasks
    lately = rows.seen_at >= db.later(-within_s)
    counted: Any = tasks.select(tasks.owner, fn.COUNT(tasks.task_id))
    counted = counted.where(tasks.status.in_(ACTIVE), tasks.lease_until >= db.now).group_by(tasks.owner)
    held: dict[str, int] = dict(counted.tuples())
    return [
        WorkerInfo(
            name=row.name,
            place=row.place,
            version=row.version,
            concurrency=row.concurrency,
            running=held.get(row.name, 0),
            started_at=row.started_at,
            seen_at=row.seen_at,
            swept_at=row.swept_at,
        )
        for row in rows.select().where(lately).order_by(rows.started_at.desc(), rows.name)
    ]
