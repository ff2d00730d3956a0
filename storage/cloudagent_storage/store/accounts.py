"""Who owns tasks."""

# pyright: basic
from __future__ import annotations

from cloudagent_storage.records import Account
from cloudagent_storage.store.database import Database


class Accounts:
    """The accounts."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def ensure(self, account_id: str) -> Account:
        """The account of that name, made if there is none."""
        rows = self._db.tables.accounts
        with self._db.reading():
            row = rows.get_or_none(rows.account_id == account_id)
        if row is None:  # asked first: every process begins with this, and who only reads must not wait for a lock
            with self._db.writing():
                rows.insert(account_id=account_id, created_at=self._db.now).on_conflict_ignore().execute()
                row = rows.get_by_id(account_id)
        return Account(account_id=row.account_id, created_at=row.created_at)
