"""What was uploaded: whole bundles, each its account's alone, until nobody has used them for a day."""

# pyright: basic
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cloudagent_storage.errors import RepositoryTooLarge, UploadNotFound
from cloudagent_storage.records import Upload, new_id
from cloudagent_storage.store.blobs import MAX_BLOB_BYTES, WRITES_WITHIN_S
from cloudagent_storage.store.database import Database

LIFE_S = 86_400.0
"""How long an upload is kept after it was last uploaded, or used by a task."""
QUOTA_BYTES = 1_000_000_000
"""How much is kept for one account; beyond it those go that were not used for longest."""
COMPARED_MAX = 50
"""How many of an account's uploads, the newest, are looked at for what they have in common with another."""


class Uploads:
    """The uploads of all accounts. One commit is one upload of an account, however often it is sent."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._rows = db.tables.uploads

    def keep(
        self,
        account_id: str,
        bundle: bytes,
        *,
        base_sha: str,
        commits: Sequence[str],
        notes: Sequence[str],
        config: bytes | None,
        manifests: str,
        root: str | None = None,
        quota_bytes: int = QUOTA_BYTES,
    ) -> Upload:
        """Keep a whole bundle of `base_sha`, or that of the same commit which is there, with these notes.

        Those of the account's uploads that were not used for longest make room for it. Raises `RepositoryTooLarge` for
        one that the store does not take, and `StorageFull`.
        """
        if len(bundle) > min(MAX_BLOB_BYTES, quota_bytes):
            raise RepositoryTooLarge()
        self._db.check_room()
        rows, now = self._rows, self._db.now
        with self._db.writing():
            while (kept := self._again(account_id, base_sha, notes)) is None:
                self._db.take_time(WRITES_WITHIN_S)
                query = rows.insert(
                    upload_id=new_id("upl"),
                    account_id=account_id,
                    base_sha=base_sha,
                    commits=" ".join(commits),
                    notes=list(notes),
                    config=config,
                    manifests=manifests,
                    root=root,
                    data=bundle,
                    size=len(bundle),
                    used_at=now,
                )
                for row in list(query.on_conflict_ignore().returning(rows.upload_id)):
                    self._make_room(account_id, row.upload_id, quota_bytes)
            return kept

    def again(self, account_id: str, base_sha: str, notes: Sequence[str]) -> Upload:
        """The account's upload of this commit, with these notes from now on. Raises `UploadNotFound`."""
        with self._db.writing():
            known = self._again(account_id, base_sha, notes)
        if known is None:
            raise UploadNotFound()
        return known

    def take(self, account_id: str, upload_id: str) -> tuple[Upload, bytes]:
        """An account's upload and its bundle; it counts as used now.

        Raises `UploadNotFound`, the same for another account's as for one that was never there.
        """
        rows = self._rows
        with self._db.writing():
            self._db.take_time(WRITES_WITHIN_S)
            fresh = self._fresh(account_id) & (rows.upload_id == upload_id)
            if not rows.update(used_at=self._db.now).where(fresh).execute():
                raise UploadNotFound()
            row = rows.select(rows.data).where(rows.upload_id == upload_id).get()
            return self._find(account_id, upload_id), bytes(row.data)

    def known(self, account_id: str, commits: Sequence[str]) -> list[str]:
        """Those of the commits that an upload of the account has, with all their history; all of the same upload.

        They are in the order in which they were asked for, and those of the upload which has the first one.
        """
        for asked in self._in_common(account_id, commits):
            if found := [commit for commit in commits if commit in asked]:
                return found
        return []

    def holding(self, account_id: str, commits: Sequence[str]) -> bytes | None:
        """The bundle of an upload of the account that has all of these commits, or None."""
        rows = self._rows
        with self._db.writing():
            self._db.take_time(WRITES_WITHIN_S)
            for row in list(self._newest(account_id, rows.upload_id, rows.commits)):
                if set(commits) <= set(row.commits.split(" ")):
                    held = rows.select(rows.data).where(rows.upload_id == row.upload_id).first()
                    return None if held is None else bytes(held.data)
        return None

    def prune(self, *, unused_s: float = LIFE_S) -> int:
        """Delete what nobody has used for that long, one in a transaction. Returns how many."""
        rows, count = self._rows, 0
        while True:
            with self._db.writing():
                old = rows.select(rows.upload_id).where(rows.used_at < self._db.later(-unused_s)).limit(1)
                row = self._db.locked(old, skip=True).first()
                if row is None:
                    return count
                count += rows.delete().where(rows.upload_id == row.upload_id).execute()

    def _again(self, account_id: str, base_sha: str, notes: Sequence[str]) -> Upload | None:
        rows = self._rows
        same = (rows.account_id == account_id) & (rows.base_sha == base_sha)
        changed = list(rows.update(notes=list(notes), used_at=self._db.now).where(same).returning(rows.upload_id))
        return self._find(account_id, changed[0].upload_id) if changed else None

    def _make_room(self, account_id: str, new: str, quota_bytes: int) -> None:
        """Of two that arrive at once neither sees the other; the next one does."""
        rows = self._rows
        listed = rows.select(rows.upload_id, rows.size).where(rows.account_id == account_id)
        total = 0
        for row in list(self._db.locked(listed.order_by((rows.upload_id == new).desc(), rows.used_at.desc()))):
            total += row.size
            if total > quota_bytes:
                rows.delete().where(rows.upload_id == row.upload_id).execute()

    def _in_common(self, account_id: str, commits: Sequence[str]) -> list[set[str]]:
        """What each upload shares with `commits`, that first which shares the newest of them."""
        rows, asked = self._rows, set(commits)
        place = {commit: number for number, commit in enumerate(commits)}
        with self._db.reading():
            shared = [asked & set(row.commits.split(" ")) for row in self._newest(account_id, rows.commits)]
        return sorted((found for found in shared if found), key=lambda found: min(place[commit] for commit in found))

    def _newest(self, account_id: str, *columns: Any) -> Any:
        rows = self._rows
        return rows.select(*columns).where(self._fresh(account_id)).order_by(rows.used_at.desc()).limit(COMPARED_MAX)

    def _fresh(self, account_id: str) -> Any:
        return (self._rows.account_id == account_id) & (self._rows.used_at >= self._db.later(-LIFE_S))

    def _find(self, account_id: str, upload_id: str) -> Upload:
        rows = self._rows
        columns = [rows.upload_id, rows.base_sha, rows.notes, rows.config, rows.manifests, rows.root]
        row = rows.select(*columns).where(rows.upload_id == upload_id, rows.account_id == account_id).get()
        return Upload(
            upload_id=row.upload_id,
            base_sha=row.base_sha,
            notes=tuple(row.notes),
            config=None if row.config is None else bytes(row.config),
            manifests=row.manifests,
            root=row.root,
        )
