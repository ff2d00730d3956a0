"""The seal on a session: only what this installation collected of a task is ever handed on as that task's.

A sealed session is a line of JSON that says whose it is, and the session behind it. The line's `mac` is an HMAC over
account, task, attempt and the hash of what follows, with a key derived from the keyring. So whoever can write to the
database, and has no key, can neither make a session nor move one to another task.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence
from typing import Any, cast

from cloudagent_storage.errors import SessionForeign, SessionTampered
from cloudagent_storage.secrets import Keyring

PURPOSE = "session seal"
HEADER_MAX = 1000


def seal(keyring: Keyring, session: bytes, *, account_id: str, task_id: str, attempt: int) -> bytes:
    """A session as it is kept. An attempt of 0 says that the task was submitted with it."""
    digest = hashlib.sha256(session).hexdigest()
    mac = _macs(keyring, account_id, task_id, attempt, digest)[0]
    header = {"account_id": account_id, "task_id": task_id, "attempt": attempt, "sha256": digest, "mac": mac}
    return json.dumps(header).encode() + b"\n" + session


def unseal(keyring: Keyring, sealed: bytes, *, account_id: str, task_id: str) -> bytes:
    """The session. Raises `SessionTampered`, and `SessionForeign` for one that has no seal or another task's."""
    line, separator, session = sealed.partition(b"\n")
    try:
        if not separator or len(line) > HEADER_MAX:
            raise ValueError
        header = cast("dict[str, Any]", json.loads(line))
        owner, task, attempt, digest, mac = (
            header[name] for name in ("account_id", "task_id", "attempt", "sha256", "mac")
        )
        texts = all(isinstance(text, str) for text in (owner, task, digest, mac))
        if not texts or type(attempt) is not int or attempt < 0:
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SessionForeign() from None
    if hashlib.sha256(session).hexdigest() != digest:
        raise SessionTampered()
    known = _macs(keyring, owner, task, attempt, digest)
    if not any(hmac.compare_digest(mac.encode("utf-8", "replace"), one.encode()) for one in known):
        raise SessionTampered()
    if (owner, task) != (account_id, task_id):
        raise SessionForeign()
    return session


def _macs(keyring: Keyring, account_id: str, task_id: str, attempt: int, digest: str) -> Sequence[str]:
    """By every key that there is, the newest first."""
    said = json.dumps([account_id, task_id, attempt, digest]).encode()
    return [hmac.new(key, said, "sha256").hexdigest() for key in keyring.keys_for(PURPOSE)]
