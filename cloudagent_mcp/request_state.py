"""What the protocol hands a client to bring back (`requestState`), sealed so that every process can open it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from mcp.server.request_state import AESGCMRequestStateCodec

from cloudagent_storage.secrets import Keyring


class SharedRequestState:
    """Seals with keys that come from the installation's own, which all its processes have. Opened at first use."""

    def __init__(self, keyring: Callable[[], Keyring]) -> None:
        self._keyring = keyring

    @cached_property
    def _codec(self) -> AESGCMRequestStateCodec:
        return AESGCMRequestStateCodec(self._keyring().keys_for("MCP request state"))

    def seal(self, payload: bytes) -> str:
        return self._codec.seal(payload)

    def unseal(self, token: str) -> bytes:
        """Raises the SDK's `InvalidRequestState`."""
        return self._codec.unseal(token)
