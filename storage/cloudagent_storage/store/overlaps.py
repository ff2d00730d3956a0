"""Tasks that touch the same files."""

# pyright: basic
from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from cloudagent_storage.records import Overlap
from cloudagent_storage.store.database import Database
from cloudagent_storage.store.row import ACTIVE
from cloudagent_storage.tables import TaskRow


class Overlaps:
    """Who is about to change what another changes, too."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def of(self, account_id: str, task_ids: Sequence[str]) -> Mapping[str, Sequence[Overlap]]:
        """Of these tasks, those that touch the same files as other tasks of their repository which are under way.

        Only tasks of the account, and none against the one that it goes on from; those with the same parent are
        tries of the same thing, of which one is chosen. One query.
        """
        rows, ids = self._db.tables.tasks, list(task_ids)
        asked = rows.alias()
        keys = asked.select(asked.source_key).where(asked.account_id == account_id, asked.task_id.in_(ids))
        columns = [rows.task_id, rows.status, rows.source_key, rows.parent_task_id, rows.touches, rows.created_at]
        known = rows.select(*columns).where(rows.account_id == account_id, rows.touches.is_null(False))
        under_way = known.where(rows.status.in_(ACTIVE), rows.source_key.in_(keys.where(asked.touches.is_null(False))))
        # Each half by an index of its own; with OR, SQLite would look at all tasks of the account.
        query = under_way.union_all(known.where(rows.task_id.in_(ids), rows.status.not_in(ACTIVE)))
        with self._db.reading():
            found = sorted(query, key=lambda row: row.created_at)
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
    if one.task_id == other.task_id or (one.parent_task_id is not None and one.parent_task_id == other.parent_task_id):
        return True
    return one.task_id == other.parent_task_id or other.task_id == one.parent_task_id
