"""Encryption at rest: AES-256-GCM, each secret bound to what it belongs to, under keys that can be replaced."""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import hmac
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloudagent_storage.errors import Internal

KEY_BYTES = 32
VERSION = b"\x01"
KEY_ID_BYTES = 4
NONCE_BYTES = 12
PREFIX_BYTES = len(VERSION) + KEY_ID_BYTES


def generate_key() -> str:
    """A fresh key, as urlsafe base64."""
    return base64.urlsafe_b64encode(secrets.token_bytes(KEY_BYTES)).decode()


class Keyring:
    """One or more keys, newest first: the first seals, and each opens what it has sealed.

    A key is replaced by putting a new one in front; the old one stays for as long as anything is sealed with it.
    Each is 32 bytes as urlsafe base64. Raises `Internal` when one is not, or when there is none.
    """

    def __init__(self, keys: Sequence[bytes | str]) -> None:
        decoded = [_decode(key) for key in keys]
        if not decoded:
            raise _bad_key()
        self._sealing = _key_id(decoded[0])
        self._ciphers = {_key_id(key): AESGCM(key) for key in reversed(decoded)}
        self._hashing = [_derived(key, "cloudagent keyed hash") for key in decoded]
        self._derive = [functools.partial(_derived, key) for key in decoded]

    @classmethod
    def from_file(cls, path: Path) -> Keyring:
        """The keys in a file, separated by white space. A missing file is made with a fresh key, for its owner alone.

        Any number of processes may do so at once: all get the same key. Raises `Internal` when the file is no use.
        """
        try:
            if not path.exists():
                _create(path)
            return cls(path.read_text(encoding="utf-8").split())
        except (OSError, UnicodeDecodeError):
            raise Internal(
                "The file with the encryption key cannot be read or made.",
                remedy="Give this user the data folder (CLOUDAGENT_HOME) to read and write, or set ENCRYPTION_KEY.",
            ) from None

    def seal(self, plaintext: bytes, *, bound_to: str) -> bytes:
        """Encrypt. What comes out opens only with the same `bound_to`, such as the id of the row that it is in."""
        prefix = VERSION + self._sealing
        nonce = secrets.token_bytes(NONCE_BYTES)
        cipher = self._ciphers[self._sealing]
        return prefix + nonce + cipher.encrypt(nonce, plaintext, prefix + bound_to.encode())

    def open(self, sealed: bytes, *, bound_to: str) -> bytes:
        """Decrypt. Raises `Internal` when no key fits, or when what was sealed was altered or belongs elsewhere."""
        prefix, nonce = sealed[:PREFIX_BYTES], sealed[PREFIX_BYTES : PREFIX_BYTES + NONCE_BYTES]
        cipher = self._ciphers.get(prefix[len(VERSION) :])
        if not prefix.startswith(VERSION) or cipher is None:
            raise Internal(
                "ENCRYPTION_KEY has changed: a stored secret was sealed with a key that is not there.",
                remedy="Put the earlier key back, behind the new one and a comma; or submit the task again.",
            )
        try:
            return cipher.decrypt(nonce, sealed[PREFIX_BYTES + NONCE_BYTES :], prefix + bound_to.encode())
        except (InvalidTag, ValueError):
            raise Internal(
                "A stored secret was altered, or moved to where it does not belong.",
                remedy="Submit the task again; find out who else can write to the database.",
            ) from None

    def keys_for(self, purpose: str) -> Sequence[bytes]:
        """Keys for something else than to seal, the newest first: each process with this keyring has the same."""
        return [derive(f"cloudagent {purpose}") for derive in self._derive]

    def digests(self, text: str) -> Sequence[str]:
        """Hashes of a text that nobody can make without the keys: one for each key, the newest first."""
        return [hmac.new(key, text.encode(), "sha256").hexdigest() for key in self._hashing]


def _derived(key: bytes, purpose: str) -> bytes:
    """A key of its own for another purpose: what is learned of the one says nothing of the other."""
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=purpose.encode()).derive(key)


def _decode(key: bytes | str) -> bytes:
    if isinstance(key, bytes) and len(key) == KEY_BYTES:
        return key
    try:
        text = key.encode() if isinstance(key, str) else key
        plain = text.translate(bytes.maketrans(b"-_", b"+/"))  # what `openssl rand -base64 32` prints is welcome too
        decoded = base64.b64decode(plain.rstrip(b"=") + b"=", validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise _bad_key() from None
    if len(decoded) != KEY_BYTES:
        raise _bad_key()
    return decoded


def _key_id(key: bytes) -> bytes:
    return hashlib.sha256(b"cloudagent key id" + key).digest()[:KEY_ID_BYTES]


def _bad_key() -> Internal:
    return Internal(
        "The encryption key cannot be used: it is not 32 bytes in urlsafe base64.",
        remedy="Correct ENCRYPTION_KEY, or the key's file in the data folder; `openssl rand -base64 32` makes a key.",
    )


def _create(path: Path) -> None:
    """Put a whole file in place, or leave alone the one that another process has put there first."""
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f"{generate_key()}\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(fresh, path)
        except FileExistsError:
            return
    finally:
        fresh.unlink()
