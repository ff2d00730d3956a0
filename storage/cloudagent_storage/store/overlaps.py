"""Tasks that touch the same files."""

# pyright: basic
from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from cloudagent_storage.records import Overlap
from cloudagent_storage.store.database import Database
from cloudagent_storage.store.row import ACTIVE
from cloudagent_storage.tables import TaskRow

QUERY = f"""
SELECT task_id, status, source_key, parent_task_id, candidate, touches, created_at FROM tasks
WHERE account_id = ? AND status IN {tuple(map(str, ACTIVE))} AND touches IS NOT NULL AND source_key IN (
    SELECT source_key FROM tasks WHERE account_id = ? AND task_id IN (ANY) AND touches IS NOT NULL)
UNION ALL
SELECT task_id, status, source_key, parent_task_id, candidate, touches, created_at FROM tasks
WHERE account_id = ? AND task_id IN (ANY) AND status NOT IN {tuple(map(str, ACTIVE))} AND touches IS NOT NULL
"""
"""What is under way in the repositories of the tasks that are asked for, and those of them that are not. Each half goes
by an index of its own; with OR, SQLite would look at all tasks of the account."""


class Overlaps:
    """Who is about to change what another changes, too."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def of(self, account_id: str, task_ids: Sequence[str]) -> Mapping[str, Sequence[Overlap]]:
        """Of these tasks, those that touch the same files as other tasks of their repository which are under way.

        Only tasks of the account, and none against the one that it goes on from; candidates of one parent are
        tries of the same thing, of which one is chosen. One query.
        """
        rows, ids = self._db.tables.tasks, list(task_ids)
        if not ids:
            return {}
        # Peewee takes longer to write such a query than a database to answer it, and this one is asked all the time.
        sql = QUERY.replace("ANY", ", ".join("?" * len(ids))).replace("?", rows._meta.database.param)
        with self._db.reading():
            found = sorted(
                rows.raw(sql, account_id, account_id, *ids, account_id, *ids), key=lambda row: row.created_at
            )
        return _overlaps_of(found, set(task_ids))


def _overlaps_of(found: Sequence[TaskRow], asked: Container[str]) -> Mapping[str, Sequence[Overlap]]:
    """Who of those asked for meets which of the active."""
    touching: dict[tuple[str | None, str], list[TaskRow]] = {}
    for row in found:
        if row.status in ACTIVE:
            for path in row.touches:
                touching.setdefault((row.source_key, path), []).append(row)
    met: dict[str, dict[str, list[str]]] = {}
    for row in found:
        if row.task_id not in asked:
            continue
        for path in row.touches:
            for other in touching.get((row.source_key, path), ()):
                if not _belong_together(row, other):
                    met.setdefault(row.task_id, {}).setdefault(other.task_id, []).append(path)
    return {
        task_id: tuple(Overlap(task_id=other, files=tuple(files)) for other, files in others.items())
        for task_id, others in met.items()
    }


def _belong_together(one: TaskRow, other: TaskRow) -> bool:
    tries = one.candidate is not None and other.candidate is not None and one.parent_task_id == other.parent_task_id
    if one.task_id == other.task_id or tries:
        return True
    return one.task_id == other.parent_task_id or other.task_id == one.parent_task_id
