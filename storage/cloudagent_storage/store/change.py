"""Every change of a task, with what follows from it for the task whose candidate it is."""

# pyright: basic
from __future__ import annotations

from typing import Any

from peewee import Expression

from cloudagent_storage.errors import LeaseLost
from cloudagent_storage.store.candidates import tell_parent
from cloudagent_storage.store.database import Database
from cloudagent_storage.store.row import held_by, update_row
from cloudagent_storage.tables import TaskRow


def change(db: Database, task_id: str, where: Expression, **arguments: Any) -> TaskRow | None:
    """Change a task's row if it is as `where` says, within the caller's transaction; see `update_row`.

    A candidate that begins, asks or ends changes its parent in the same transaction.
    """
    row = update_row(db, task_id, where, **arguments)
    if row is not None and row.candidate is not None and "status" in arguments:
        tell_parent(db, task_id, claimed="attempt" in arguments, asks=arguments.get("asked") is not None)
    return row


def change_held(db: Database, task_id: str, attempt: int, **arguments: Any) -> TaskRow:
    """The same for the worker that has the task. Raises `LeaseLost` when this attempt does not, or not any more."""
    row = change(db, task_id, held_by(db, attempt), **arguments)
    if row is None:
        raise LeaseLost()
    return row
