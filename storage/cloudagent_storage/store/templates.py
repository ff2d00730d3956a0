"""Templates that hold a finished set-up, so that it runs once for each thing that it depends on."""

# pyright: basic
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cloudagent_storage.records import KeptTemplate
from cloudagent_storage.store.database import Database
from cloudagent_storage.tables import TemplateRow


class Templates:
    """The templates of all accounts. Each holds files of its account's repository, and is given to no other account."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._rows = db.tables.templates

    def find(self, account_id: str, provider: str, key: str) -> str | None:
        """The provider's name of the account's template for this key, or None. It counts as used now."""
        rows = self._rows
        with self._db.writing():
            query = rows.update(last_used_at=self._db.now).where(self._is(account_id, provider, key))
            found = list(query.returning(rows.template))
        return found[0].template if found else None

    def keep(self, account_id: str, provider: str, key: str, template: str) -> str | None:
        """Keep a new template. Returns the one that it takes the place of, which nobody is given any more, or None."""
        rows, now = self._rows, self._db.now
        new: dict[str, Any] = {"template": template, "created_at": now, "last_used_at": now}
        with self._db.writing():
            while True:
                # Inserted first: of two who keep one at once, the second then waits for the first one's row.
                query = rows.insert(account_id=account_id, provider=provider, key=key, **new).on_conflict_ignore()
                if list(query.returning(rows.template)):
                    return None
                before = self._db.locked(rows.select().where(self._is(account_id, provider, key))).first()
                if before is None:
                    continue  # forgotten in between
                rows.update(**new).where(self._is(account_id, provider, key)).execute()
                return None if before.template == template else before.template

    def forget(self, kept: KeptTemplate) -> bool:
        """Forget a template that its provider does not have any more, unless another has taken its place by now."""
        same = self._is(kept.account_id, kept.provider, kept.key) & (self._rows.template == kept.template)
        with self._db.writing():
            return self._rows.delete().where(same).execute() > 0

    def unused(self, provider: str, *, for_s: float, limit: int = 100) -> Sequence[KeptTemplate]:
        """A provider's templates that nobody has asked for within so many seconds, the longest unused first."""
        rows = self._rows
        with self._db.reading():
            old = (rows.provider == provider) & (rows.last_used_at < self._db.later(-for_s))
            query = rows.select().where(old).order_by(rows.last_used_at)
            return [_template_of(row) for row in list(query.limit(limit))]

    def _is(self, account_id: str, provider: str, key: str) -> Any:
        rows = self._rows
        return (rows.account_id == account_id) & (rows.provider == provider) & (rows.key == key)


def _template_of(row: TemplateRow) -> KeptTemplate:
    return KeptTemplate(account_id=row.account_id, provider=row.provider, key=row.key, template=row.template)
