"""API keys: how a token is made, and how one that somebody sends is looked up.

A token is `cag_`, the 26 characters of its key's id, `_`, and a secret of 256 random bits. Kept is only a hash of it,
keyed by the encryption keyring and bound to the account: whoever steals the database can neither use it nor test
guesses, and whoever can write to it cannot move a key to another account.
"""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from cloudagent_storage.errors import CloudAgentError, InvalidInput, OutOfRange, Unauthorized
from cloudagent_storage.records import ID_LENGTH, ApiKey, new_id

if TYPE_CHECKING:
    from cloudagent_storage.secrets import Keyring
    from cloudagent_storage.store import Store
    from cloudagent_storage.store.keys import KeptKey

log = logging.getLogger(__name__)

TOKEN = re.compile(rf"cag_([a-z2-7]{{{ID_LENGTH}}})_[A-Za-z0-9_-]{{43}}")
ACCOUNT_ID = re.compile(r"[a-z0-9-]{1,64}")
NAME_MAX = 100
HINT_LENGTH = 4

KNOWN_FOR_S = 2.0
"""How long an answer of the database's counts: a key that is revoked lets nobody in after that."""
KNOWN_KEYS = 1000
USE_NOTED_EVERY_S = 60.0
LOOKUPS_AT_ONCE = 4
"""Threads that ask the database about keys: a flood of wrong ones leaves the other threads and connections alone."""


def create_key(
    store: Store, keyring: Keyring, *, name: str, account_id: str, expires_days: int | None = None
) -> tuple[ApiKey, str]:
    """A new key of an account, which is made if there is none of that name; and its token, which nobody can tell again.

    Raises `InvalidInput` for a name of an account that cannot be one, and `OutOfRange` for a key's.
    """
    if not ACCOUNT_ID.fullmatch(account_id):
        raise InvalidInput("An account's name has 1 to 64 lower-case letters, digits and hyphens.", field="account")
    if not name.strip() or len(name) > NAME_MAX or not name.isprintable():
        raise OutOfRange(f"A key's name has 1 to {NAME_MAX} printable characters.", field="name")
    key_id = new_id("key")
    token = f"cag_{key_id.removeprefix('key_')}_{secrets.token_urlsafe(32)}"
    digest = keyring.digests(_hashed(token, account_id))[0]
    hint = token[-HINT_LENGTH:]
    key = store.keys.add(account_id, name, key_id=key_id, digest=digest, hint=hint, expires_days=expires_days)
    return key, token


def _hashed(token: str, account_id: str) -> str:
    return f"{account_id} {token}"


@dataclass
class _Known:
    kept: KeptKey
    at: float
    noted_at: float | None = None
    """When the use was last written down; this and the time before are monotonic."""


class ApiKeyCheck:
    """Tells whose token one is. What the database said of a key counts for two seconds, and only of keys that exist."""

    def __init__(self, store: Callable[[], Store], keyring: Callable[[], Keyring]) -> None:
        self._store = store
        self._keyring = keyring
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._lock = threading.Lock()
        self._limiter = anyio.CapacityLimiter(LOOKUPS_AT_ONCE)

    async def account_of(self, token: str) -> str:
        """The account that a token belongs to.

        Raises `Unauthorized`, the same for whatever is wrong with it, and `DatabaseUnavailable`.
        """
        form = TOKEN.fullmatch(token)
        if form is None:
            raise Unauthorized()
        key_id = f"key_{form[1]}"
        if (known := self._fresh(key_id)) is None:
            known = await anyio.to_thread.run_sync(self._look_up, key_id, token, limiter=self._limiter)
        if known is None or not self._fits(known.kept, token):
            raise Unauthorized()
        return known.kept.key.account_id

    def _fresh(self, key_id: str) -> _Known | None:
        with self._lock:
            known = self._known.get(key_id)
            return known if known is not None and monotonic() - known.at < KNOWN_FOR_S else None

    def _look_up(self, key_id: str, token: str) -> _Known | None:
        if (known := self._fresh(key_id)) is not None:
            return known  # another thread has asked meanwhile
        asked_at = monotonic()
        kept = self._store().keys.find(key_id)
        if kept is None:
            return None
        with self._lock:
            before = self._known.pop(key_id, None)
            known = self._known[key_id] = _Known(kept, asked_at, before.noted_at if before else None)
            while len(self._known) > KNOWN_KEYS:
                self._known.popitem(last=False)
        if self._fits(kept, token) and (known.noted_at is None or asked_at - known.noted_at >= USE_NOTED_EVERY_S):
            known.noted_at = asked_at
            self._note(kept.key, token)
        return known

    def _note(self, key: ApiKey, token: str) -> None:
        newest = self._keyring().digests(_hashed(token, key.account_id))[0]
        try:
            self._store().keys.used(key.key_id, digest=newest, every_s=USE_NOTED_EVERY_S)
        except CloudAgentError as error:
            log.warning("the use of a key could not be written down: %s", error)

    def _fits(self, kept: KeptKey, token: str) -> bool:
        digests = self._keyring().digests(_hashed(token, kept.key.account_id))
        # All of them, whichever fits: how long it takes tells nothing.
        fitting = [hmac.compare_digest(digest, kept.digest) for digest in digests]
        return kept.valid and any(fitting)
