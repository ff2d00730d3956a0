"""The cloud provider against the test server of E2B's protocols."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cloudagent_queue.sandboxes import e2b as e2b_provider
from cloudagent_queue.sandboxes import e2b_api
from cloudagent_queue.sandboxes.e2b import E2BProvider, E2BSandbox
from tests.support.e2b_server.client import E2bServer, e2b_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[E2bServer]:
    with e2b_server(tmp_path_factory.mktemp("e2b") / "server") as running:
        yield running


@pytest.fixture(autouse=True)
def healthy(server: E2bServer, provider: E2BProvider) -> Iterator[None]:
    """No test leaves a fault or a sandbox to the next one."""
    yield
    server.heal()
    for info in provider.list({}):
        provider.connect(info.id).kill()


@pytest.fixture
def provider(server: E2bServer) -> E2BProvider:
    return E2BProvider(server.environment)


@pytest.fixture
def sandbox(provider: E2BProvider) -> E2BSandbox:
    return provider.create(metadata={"task": "1"})


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for what does not answer."""
    monkeypatch.setattr(e2b_provider, "DATA_S", 1.0)
    monkeypatch.setattr(e2b_api, "CONTROL_S", 1.0)
    monkeypatch.setattr(e2b_api, "KILL_S", 0.0)
    monkeypatch.setattr(e2b_provider, "TRY_AGAIN_WITHIN_S", 0.0)
