"""Making sandboxes: what is asked for, what is refused and why, and what a failed create leaves."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from cloudagent_queue.sandboxes import SandboxSpec
from cloudagent_queue.sandboxes.e2b import E2BProvider, E2BSandbox, NovitaProvider
from cloudagent_storage.errors import (
    ProviderBusy,
    SandboxGone,
    SandboxUnavailable,
    TemplateNotFound,
)
from tests.support.e2b_server.client import CREATE, E2bServer

PAGE = "<html><h1>404 Not Found</h1><hr>nginx</html>"


def test_a_create_says_what_the_sandbox_is_to_be(server: E2bServer, provider: E2BProvider) -> None:
    open_box = provider.create(metadata={"task": "é ü"})
    closed = provider.create(SandboxSpec(egress=()), metadata={})
    some = provider.create(
        SandboxSpec(egress=("pkg.example.org", "api.example.com:8443", "*.example.net")), metadata={}
    )
    asked = server.sandbox(open_box.id)["asked"]
    assert asked["timeout"] == 3600
    assert asked["metadata"]["task"] == "é ü"
    assert asked["allow_internet_access"] is True and not asked.get("network")
    assert asked["secure"] is True
    assert not asked.get("envVars")
    assert server.sandbox(closed.id)["asked"]["allow_internet_access"] is False
    network = server.sandbox(some.id)["asked"]["network"]
    assert sorted(network["allowOut"]) == ["*.example.net", "api.example.com", "pkg.example.org"]
    assert network["denyOut"] == ["0.0.0.0/0"]
    assert open_box.resources is not None and (open_box.resources.cpus, open_box.resources.memory_mb) == (2, 512)
    assert [info.metadata for info in provider.list({"task": "é ü"})] == [{"task": "é ü"}]


@pytest.mark.parametrize("kind, status", [("answer_after", 500), ("answer_after", 502), ("hang_after", 0)])
def test_what_a_create_made_that_failed_is_adopted_and_never_made_twice(
    server: E2bServer, kind: str, status: int
) -> None:
    provider = E2BProvider(server.environment, create_s=2)
    before = server.stats()["created"]
    fault = server.fault(kind, CREATE, method="POST", **({"status": status} if status else {}))
    made = provider.create(metadata={"task": "1", "nonce": "n"})
    assert fault.fired == 1
    assert server.stats()["created"] - before == 1
    assert [info.id for info in provider.list({"nonce": "n"})] == [made.id]
    assert made.run(["echo", "works"], timeout_s=20).output == "works\n"


def test_a_failed_create_adopts_nobody_elses_sandbox(server: E2bServer, provider: E2BProvider) -> None:
    other = provider.create(metadata={"task": "1"})
    server.fault("answer", CREATE, method="POST", status=500)
    with pytest.raises(ProviderBusy):
        provider.create(metadata={"task": "1"})
    assert [info.id for info in provider.list({"task": "1"})] == [other.id]


@pytest.mark.parametrize("retry_after_s, expected", [(7, 7.0), (None, None)])
def test_a_service_that_asks_for_patience_is_taken_at_its_word(
    server: E2bServer, provider: E2BProvider, retry_after_s: int | None, expected: float | None
) -> None:
    before = server.stats()
    fault = server.rate_limit(retry_after_s=retry_after_s)
    with pytest.raises(ProviderBusy) as raised:
        provider.create(metadata={})
    assert raised.value.retry_after_s == expected
    assert fault.fired == 1
    asked = server.stats()["requests"]
    assert asked["POST /sandboxes"] - before["requests"].get("POST /sandboxes", 0) == 1


@pytest.mark.parametrize("status", [500, 502, 503, 504, 529, 408])
def test_a_sick_service_is_busy_and_leaves_nothing(server: E2bServer, provider: E2BProvider, status: int) -> None:
    before = server.stats()["created"]
    server.fault("answer", CREATE, method="POST", status=status, body="<html>sick</html>", headers={"Retry-After": "3"})
    with pytest.raises(ProviderBusy) as raised:
        provider.create(metadata={})
    assert raised.value.retry_after_s == 3
    assert server.stats()["created"] == before


def test_a_full_account_is_busy(server: E2bServer, provider: E2BProvider, sandbox: E2BSandbox) -> None:
    server.change(most_sandboxes=1)
    try:
        with pytest.raises(ProviderBusy, match="no room"):
            provider.create(metadata={})
    finally:
        server.change(most_sandboxes=1000)


def test_a_service_that_cannot_be_reached_is_busy_and_the_remedy_names_its_address(
    server: E2bServer, hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    gone = E2BProvider({**server.environment, "E2B_API_URL": f"http://127.0.0.1:{port}"})
    with pytest.raises(ProviderBusy) as raised:
        gone.create(metadata={})
    assert "E2B_DOMAIN" in raised.value.remedy
    with pytest.raises(ProviderBusy) as raised:
        NovitaProvider({"NOVITA_API_KEY": "nvta_x", "NOVITA_DOMAIN": "nowhere.invalid"}).create(metadata={})
    assert "NOVITA_DOMAIN" in raised.value.remedy


def refusal_of(provider: E2BProvider | NovitaProvider) -> SandboxUnavailable:
    with pytest.raises(SandboxUnavailable) as raised:
        provider.create(metadata={})
    assert type(raised.value) in (SandboxUnavailable, TemplateNotFound), "asking again would not help"
    return raised.value


def test_a_missing_key_is_named() -> None:
    assert "NOVITA_API_KEY" in refusal_of(NovitaProvider({})).remedy
    assert "E2B_API_KEY" in refusal_of(E2BProvider({})).remedy


def test_a_wrong_key_is_named_and_never_shown(server: E2bServer) -> None:
    found = refusal_of(E2BProvider({**server.environment, "E2B_API_KEY": "e2b_wrong_key"}))
    assert "E2B_API_KEY" in found.remedy
    other = refusal_of(E2BProvider({**server.environment, "E2B_API_KEY": "nvta_wrong_key"}))
    assert "one of Novita's" in other.message and "SANDBOX_PROVIDER=novita" in other.remedy
    with pytest.raises(SandboxUnavailable, match="one of Novita's"):
        E2BProvider({**server.environment, "E2B_API_KEY": "nvta_wrong_key"}).self_check()
    assert "wrong_key" not in f"{found.as_dict()}{other.as_dict()}"


def test_an_unknown_template_is_told_from_an_unknown_api(server: E2bServer, provider: E2BProvider) -> None:
    unknown = refusal_of(E2BProvider({**server.environment, "SANDBOX_TEMPLATE": "no-such"}))
    assert "SANDBOX_TEMPLATE" in unknown.message and "ca template build --provider e2b" in unknown.remedy
    for answer in ({"status": 404, "body": PAGE}, {"status": 405}):
        server.fault("answer", CREATE, method="POST", **answer)
        found = refusal_of(provider)
        assert "version of the API" in found.message and "SANDBOX_TEMPLATE" not in found.remedy


def test_a_session_longer_than_the_plan_allows_is_named(server: E2bServer) -> None:
    server.change(session_cap_s=3600)
    try:
        found = refusal_of(E2BProvider({**server.environment, "SANDBOX_SESSION_MINUTES": "240"}))
        assert "SANDBOX_SESSION_MINUTES" in found.remedy
    finally:
        server.change(session_cap_s=24 * 3600)


def test_a_sandbox_is_kept_longer_when_asked_but_never_shorter_or_beyond_the_session(server: E2bServer) -> None:
    provider = E2BProvider({**server.environment, "SANDBOX_SESSION_MINUTES": "60"})
    assert provider.session_cap_s == 3600
    sandbox = provider.create(metadata={})
    sandbox.extend(60)
    sandbox.extend(10 * 3600)
    provider.connect(sandbox.id).alive()
    timeouts = server.sandbox(sandbox.id)["timeouts"]
    assert all(3500 <= seconds <= 3600 for seconds in timeouts)


def test_a_list_is_not_taken_from_a_service_that_cannot_filter(
    server: E2bServer, provider: E2BProvider, sandbox: E2BSandbox
) -> None:
    whole = provider._api.about(sandbox.id, _raw_list)  # pyright: ignore[reportPrivateUsage]
    assert len(whole) == 1
    fault = server.fault("answer", "/v2/sandboxes", status=200, body=whole)
    assert provider.list({"task": "2"}) == []
    assert fault.fired == 1


def _raw_list(sdk: Any, options: dict[str, Any]) -> list[Any]:
    import httpx

    found = httpx.get(f"{options['api_url']}/v2/sandboxes", headers={"X-API-KEY": options["api_key"]})
    return found.json()


def test_what_the_process_has_in_its_environment_is_not_mixed_in(
    server: E2bServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("E2B_API_KEY", "e2b_of_somebody_else")
    monkeypatch.setenv("E2B_API_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("E2B_SANDBOX_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("E2B_DEBUG", "true")
    provider = E2BProvider(server.environment)
    sandbox = provider.connect(provider.create(metadata={}).id)
    assert sandbox.run(["true"], timeout_s=20).exit_code == 0
    sandbox.kill()
    with pytest.raises(SandboxGone):
        sandbox.alive()
    novita = NovitaProvider({"NOVITA_API_KEY": "nvta_x"})._api  # pyright: ignore[reportPrivateUsage]
    assert novita.options()["api_url"] == "https://api.us-phx-1.sandbox.novita.ai"
    assert novita._data_url("i1", None) == "https://49983-i1.us-phx-1.sandbox.novita.ai"  # pyright: ignore[reportPrivateUsage]
