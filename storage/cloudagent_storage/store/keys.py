"""The keys with which accounts come in over HTTP. What is kept of a token is a keyed hash, made elsewhere."""

# pyright: basic
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cloudagent_storage.errors import AmbiguousId, KeyNotFound
from cloudagent_storage.records import ID_LENGTH, ApiKey
from cloudagent_storage.store.database import Database
from cloudagent_storage.tables import ApiKeyRow

DAY_S = 86_400
PREFIX = re.compile(rf"[a-z2-7]{{4,{ID_LENGTH}}}")


@dataclass(frozen=True)
class KeptKey:
    """A key as the one who checks tokens needs it."""

    key: ApiKey
    digest: str
    valid: bool
    """Neither revoked nor expired at this moment, by the database's clock."""


class Keys:
    """The API keys of all accounts."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._rows = db.tables.api_keys

    def add(
        self, account_id: str, name: str, *, key_id: str, digest: str, hint: str, expires_days: int | None = None
    ) -> ApiKey:
        """Keep a new key, and its account if there is none of that name yet."""
        accounts = self._db.tables.accounts
        expires = None if expires_days is None else self._db.later(expires_days * DAY_S)
        with self._db.writing():
            accounts.insert(account_id=account_id, created_at=self._db.now).on_conflict_ignore().execute()
            self._rows.insert(
                key_id=key_id,
                account_id=account_id,
                name=name,
                digest=digest,
                hint=hint,
                created_at=self._db.now,
                expires_at=expires,
            ).execute()
            return _key_of(self._rows.get_by_id(key_id))

    def list(self) -> Sequence[ApiKey]:
        """Every key that was ever made, the newest first."""
        with self._db.reading():
            return [_key_of(row) for row in self._rows.select().order_by(self._rows.created_at.desc())]

    def find(self, key_id: str) -> KeptKey | None:
        """The key of that id, revoked or not, or None."""
        rows = self._rows
        valid = rows.revoked_at.is_null() & (rows.expires_at.is_null() | (rows.expires_at > self._db.now))
        with self._db.reading():
            row = rows.select(rows, valid.alias("valid")).where(rows.key_id == key_id).objects().first()
        return None if row is None else KeptKey(key=_key_of(row), digest=row.digest, valid=bool(row.valid))

    def used(self, key_id: str, *, digest: str, every_s: float) -> None:
        """Note that a key was used, unless that was done within `every_s`, by whichever server.

        `digest` is of its token under the newest encryption key; an older key is needed no longer then.
        """
        rows = self._rows
        long_ago = rows.last_used_at.is_null() | (rows.last_used_at < self._db.later(-every_s))
        with self._db.writing():
            rows.update(last_used_at=self._db.now, digest=digest).where(rows.key_id == key_id, long_ago).execute()

    def revoke(self, prefix: str) -> ApiKey:
        """End the one key whose id begins so, at least four characters, with or without `key_`; twice is no error.

        Raises `KeyNotFound`, and `AmbiguousId` when there are several.
        """
        rows = self._rows
        start = prefix.removeprefix("key_")
        if not PREFIX.fullmatch(start):
            raise KeyNotFound()
        with self._db.writing():
            found = list(rows.select().where(rows.key_id.startswith(f"key_{start}")).limit(2))
            if not found:
                raise KeyNotFound()
            if len(found) > 1:
                raise AmbiguousId("Several keys begin with that prefix.", field="key")
            key_id = found[0].key_id
            rows.update(revoked_at=self._db.now).where(rows.key_id == key_id, rows.revoked_at.is_null()).execute()
            return _key_of(rows.get_by_id(key_id))


def _key_of(row: ApiKeyRow) -> ApiKey:
    return ApiKey(
        key_id=row.key_id,
        account_id=row.account_id,
        name=row.name,
        hint=row.hint,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
    )
