"""The large things that belong to a task: bundles, the diff, the session."""

# pyright: basic
from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

from cloudagent_storage.errors import RepositoryTooLarge, TaskNotFound
from cloudagent_storage.records import BlobKind
from cloudagent_storage.store.change import change, change_held
from cloudagent_storage.store.database import Database
from cloudagent_storage.store.row import find_kept

MAX_BLOB_BYTES = 200_000_000
"""The size that a blob may have, before it is compressed."""
SHARED: tuple[BlobKind, ...] = ("input", "start", "conversation")
"""What all candidates of a task begin with."""
WRITES_WITHIN_S = 60.0
"""How long one may take to be written, also where people wait for the answer."""


def packed(data: bytes) -> bytes:
    """A blob as its row keeps it. Raises `RepositoryTooLarge`."""
    if len(data) > MAX_BLOB_BYTES:
        raise RepositoryTooLarge()
    return zlib.compress(data)


def write_blob(db: Database, task_id: str, kind: BlobKind, data: bytes, size: int) -> None:
    """Write a packed blob in the place of an earlier one, within the caller's transaction."""
    rows = db.tables.blobs
    insert = rows.insert(task_id=task_id, kind=kind, data=data, size=size)
    insert.on_conflict(conflict_target=[rows.task_id, rows.kind], preserve=[rows.data, rows.size]).execute()


class Blobs:
    """The blobs of tasks; one of each kind."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def put(self, task_id: str, kind: BlobKind, data: bytes, *, attempt: int | None) -> None:
        """Keep one blob; see `put_all`."""
        self.put_all(task_id, {kind: data}, attempt=attempt)

    def put_all(self, task_id: str, blobs: Mapping[BlobKind, bytes], *, attempt: int | None) -> None:
        """Keep some blobs in one step, each in the place of an earlier one of its kind.

        A worker passes its `attempt`, and `LeaseLost` is raised when it has the task no more. Raises `TaskNotFound`,
        and `RepositoryTooLarge` past `MAX_BLOB_BYTES`.
        """
        ready: list[tuple[BlobKind, bytes, int]] = [(kind, packed(data), len(data)) for kind, data in blobs.items()]
        with self._db.writing():
            if attempt is not None:
                change_held(self._db, task_id, attempt)
            elif change(self._db, task_id, self._db.tables.tasks.task_id == task_id) is None:
                raise TaskNotFound()
            for kind, data, size in ready:
                write_blob(self._db, task_id, kind, data, size)

    def drop(self, task_id: str, kinds: Sequence[BlobKind], *, attempt: int) -> None:
        """Delete some blobs of a task that this attempt has. Raises `LeaseLost`."""
        rows = self._db.tables.blobs
        with self._db.writing():
            change_held(self._db, task_id, attempt)
            rows.delete().where(rows.task_id == task_id, rows.kind.in_(kinds)).execute()

    def get(self, account_id: str, task_id: str, kind: BlobKind) -> bytes | None:
        """A blob of an account's task, or None where there is none. Raises `TaskNotFound` and `TaskExpired`.

        What a candidate was submitted with is kept once, with its parent; see `Task.submitted_as`.
        """
        rows, tasks = self._db.tables.blobs, self._db.tables.tasks
        with self._db.reading():
            task = find_kept(self._db, account_id, task_id, columns=[tasks.candidate, tasks.parent_task_id])
            row = rows.select(rows.data).where(rows.task_id == task_id, rows.kind == kind).first()
            if row is None and task.candidate is not None and kind in SHARED:
                row = rows.select(rows.data).where(rows.task_id == task.parent_task_id, rows.kind == kind).first()
            if row is None:
                find_kept(self._db, account_id, task_id)  # it may have expired between the two
        return None if row is None else zlib.decompress(row.data)
