"""What a client brings back to one server process opens though another has sealed it."""

from __future__ import annotations

import pytest
from mcp.server.request_state import InvalidRequestState

from cloudagent_mcp.request_state import SharedRequestState
from cloudagent_mcp.settings import Settings
from cloudagent_storage.secrets import Keyring, generate_key
from tests.support.worlds import World


def test_every_process_of_an_installation_opens_what_another_has_sealed(world: World) -> None:
    one, two = (SharedRequestState(lambda: Settings.read(world.environment).keyring) for _ in range(2))
    assert two.unseal(one.seal(b"state")) == b"state"


def test_another_installation_opens_nothing(world: World) -> None:
    ours = SharedRequestState(lambda: world.settings.keyring)
    theirs = SharedRequestState(lambda: Keyring([generate_key()]))
    with pytest.raises(InvalidRequestState):
        theirs.unseal(ours.seal(b"state"))


def test_a_state_outlives_the_change_of_the_key() -> None:
    old, new = generate_key(), generate_key()
    sealed = SharedRequestState(lambda: Keyring([old])).seal(b"state")
    assert SharedRequestState(lambda: Keyring([new, old])).unseal(sealed) == b"state"


def test_the_keys_are_none_that_seal_anything_else() -> None:
    key = generate_key()
    ring = Keyring([key])
    (derived,) = ring.keys_for("MCP request state")
    assert len(derived) == 32
    assert derived not in (ring.keys_for("something else")[0], Keyring([derived]).keys_for("MCP request state")[0])
