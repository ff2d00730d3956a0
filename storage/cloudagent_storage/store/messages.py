"""What users say to running agents."""

# pyright: basic
from __future__ import annotations

from collections.abc import Sequence

from cloudagent_storage.errors import NotNow
from cloudagent_storage.records import Message, new_id
from cloudagent_storage.store.database import Database
from cloudagent_storage.store.row import ACTIVE, change_held, find
from cloudagent_storage.tables import storable


class Messages:
    """The messages to tasks. A worker learns of them with every `Signals`, in their order, until they are delivered."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add(self, account_id: str, task_id: str, text: str) -> Message:
        """Leave a message for a task's agent. Raises `TaskNotFound`, and `NotNow` unless the task runs or waits."""
        message = Message(message_id=new_id("msg"), text=storable(text))
        with self._db.writing():
            # Locked: a message to a task that ends in this moment is refused, or the task's worker still learns of it.
            row = find(self._db, account_id, task_id, lock=True)
            if row.status not in ACTIVE:
                raise NotNow("No agent works on the task at this moment.")
            self._db.tables.messages.insert(
                message_id=message.message_id, task_id=task_id, text=message.text, created_at=self._db.now
            ).execute()
        return message

    def delivered(self, task_id: str, attempt: int, message_ids: Sequence[str]) -> None:
        """The agent has them: no worker learns of them again. Raises `LeaseLost`."""
        rows = self._db.tables.messages
        with self._db.writing():
            change_held(self._db, task_id, attempt)
            mine = rows.update(delivered_at=self._db.now).where(
                rows.task_id == task_id, rows.message_id.in_(message_ids)
            )
            mine.where(rows.delivered_at.is_null()).execute()
