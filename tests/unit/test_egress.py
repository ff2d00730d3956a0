"""What an entry of an allow-list means, and which hosts a task gets."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudagent_mcp.settings import Settings
from cloudagent_queue.agents import open_agent
from cloudagent_queue.allowed_hosts import REGISTRIES, check_asked, check_setting, egress_for
from cloudagent_queue.sandboxes.egress import (
    AllowList,
    canonical_host,
    check_egress,
    is_public,
    join_host,
    parse_rule,
    split_host,
)
from cloudagent_queue.sandboxes.egress_proxy import Upstream
from cloudagent_storage.errors import EgressNotAllowed, InvalidEgress, InvalidInput
from cloudagent_storage.records import TaskSpec

CLAUDE = open_agent("claude")
KEY = {"ANTHROPIC_API_KEY": "sk-ant-test"}


def spec(repository: str = "none", *, egress: tuple[str, ...] = ()) -> TaskSpec:
    return TaskSpec(prompt="x", title="x", repository=repository, egress=egress)


@pytest.mark.parametrize(
    "entry, host, port, listed",
    [
        ("example.com", "example.com", 443, True),
        ("example.com", "example.com", 80, True),
        ("example.com", "example.com", 8443, False),
        ("example.com", "www.example.com", 443, False),
        ("Example.COM.", "example.com", 443, True),
        ("example.com:8443", "example.com", 8443, True),
        ("example.com:8443", "example.com", 443, False),
        ("*.example.com", "a.b.example.com", 443, True),
        ("*.example.com", "example.com", 443, False),
        ("*.example.com", "evilexample.com", 443, False),
        ("*.example.com", "example.com.evil.org", 443, False),
        ("*.example.com:8443", "a.example.com", 8443, True),
        ("bücher.example", "xn--bcher-kva.example", 443, True),
        ("93.184.216.34", "93.184.216.34", 443, True),
        ("2606:2800:220:1::1", "2606:2800:220:1::1", 443, True),
        ("[2606:2800:220:1::1]:8443", "2606:2800:220:1::1", 8443, True),
        ("localhost:8080", "localhost", 8080, True),
        ("127.0.0.1:8080", "127.0.0.1", 8080, True),
        ("127.0.0.1:8080", "localhost", 8080, False),
    ],
)
def test_an_entry_lists_just_what_it_says(entry: str, host: str, port: int, listed: bool) -> None:
    assert AllowList([entry]).lists(host, port) is listed


@pytest.mark.parametrize(
    "entry",
    [
        *("", " ", "*", "*.", "*.com", "*.*.com", "a.*.com", "*.127.0.0.1", "https://example.com", "example.com/path"),
        *("user@example.com", "example.com:", "example.com:0", "example.com:65536", "example.com:http", "a b.com"),
        *("example..com", ".example.com", "-example.com", "a" * 64 + ".com", "a." * 130 + "com", "nul\0.com"),
        *("localhost", "127.0.0.1", "[::1]", "localhost:80", "0.0.0.0:8080", "[::]:8080", "224.0.0.1", "fe80::1%eth0"),
        *("1.2.3.400", "example.123", "[example.com]:80", "[::1", "half\ud800.com", "line\n.com", "12345678901"),
    ],
)
def test_what_is_no_host_is_refused_with_a_code(entry: str) -> None:
    with pytest.raises(InvalidEgress) as refused:
        parse_rule(entry)
    assert refused.value.code == "invalid_egress"
    assert not entry.strip() or entry not in refused.value.message


@pytest.mark.parametrize(
    "spelling",
    [
        *("127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0X7F.1", "0177.0.0.1", "127.0.0.1."),
        *("::ffff:127.0.0.1", "::ffff:7f00:1", "\uff11\uff12\uff17.0.0.1", "127。0。0。1"),
    ],
)
def test_every_spelling_of_an_address_is_that_address(spelling: str) -> None:
    assert canonical_host(spelling) == "127.0.0.1"


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "127.8.8.8",
            "0.0.0.0",
            "10.0.0.1",
            "172.16.0.1",
            "192.168.1.1",
            "100.64.0.1",
            "169.254.169.254",
        ),
        *("224.0.0.1", "239.1.1.1", "255.255.255.255", "240.0.0.1", "192.0.2.1", "198.18.0.1"),
        *("::1", "::", "fe80::1", "fd00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1"),
        *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2002:a00:1::1", "fd00:ec2::254"),
    ],
)
def test_an_address_of_a_private_network_is_not_public_in_any_clothes(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    assert not AllowList(["example.com"]).admits(ipaddress.ip_address(address), 443)


@pytest.mark.parametrize("address", ["93.184.216.34", "1.1.1.1", "2606:4700::1111", "64:ff9b::101:101"])
def test_an_address_of_the_internet_is_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def test_a_private_address_is_admitted_where_it_is_listed_with_that_port() -> None:
    allowed = AllowList(["nexus.example.com", "10.1.2.3", "localhost:8080"])
    assert allowed.admits(ipaddress.ip_address("10.1.2.3"), 443)
    assert not allowed.admits(ipaddress.ip_address("10.1.2.3"), 8443)
    assert not allowed.admits(ipaddress.ip_address("10.1.2.4"), 443)
    assert allowed.admits(ipaddress.ip_address("127.0.0.1"), 8080)
    assert not allowed.admits(ipaddress.ip_address("127.0.0.1"), 443)


@given(st.text(max_size=60))
def test_no_text_breaks_the_reading_of_an_entry(text: str) -> None:
    try:
        rule = parse_rule(text)
    except InvalidEgress:
        return
    assert parse_rule(str(rule)) == rule


@given(st.ip_addresses(), st.integers(1, 65535))
def test_an_address_and_port_are_read_as_they_are_written(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int
) -> None:
    host, read = split_host(join_host(str(address), port), default_port=None)
    assert (ipaddress.ip_address(host), read) == (address, port)


# Which hosts a task gets


def test_without_a_setting_a_task_reaches_its_model_its_repository_and_the_registries() -> None:
    allowed = egress_for("registries", CLAUDE, KEY, spec("https://git.example.com/you/it.git"))
    assert allowed == ("api.anthropic.com", "git.example.com", *REGISTRIES)
    assert egress_for("none", CLAUDE, KEY, spec()) == ("api.anthropic.com",)
    assert egress_for("open", CLAUDE, KEY, spec()) is None


@pytest.mark.parametrize(
    "repository, hosts",
    [
        ("https://git.example.com:8443/x.git", {"git.example.com:8443"}),
        ("git@git.example.com:you/x.git", {"git.example.com"}),
        ("ssh://git@git.example.com:2222/x.git", {"git.example.com"}),
        ("https://[2606:4700::1111]:8443/x", {"[2606:4700::1111]:8443"}),
        ("/home/you/x", set[str]()),
        ("none", set[str]()),
    ],
)
def test_the_host_of_a_repository_is_allowed(repository: str, hosts: set[str]) -> None:
    assert set(egress_for("none", CLAUDE, KEY, spec(repository)) or ()) == {"api.anthropic.com", *hosts}


def test_githubs_other_hosts_come_with_a_repository_on_github_alone() -> None:
    assert "api.github.com" in (egress_for("none", CLAUDE, KEY, spec("git@github.com:you/x.git")) or ())
    assert "api.github.com" not in (egress_for("registries", CLAUDE, KEY, spec("https://gitlab.com/x.git")) or ())


@pytest.mark.parametrize(
    "env, hosts",
    [
        ({"ANTHROPIC_BASE_URL": "http://127.0.0.1:4000/v1"}, {"127.0.0.1:4000"}),
        ({"ANTHROPIC_BASE_URL": "http://localhost:4000"}, {"localhost:4000"}),
        ({"ANTHROPIC_BASE_URL": "https://user:secret@gateway.example.com/x"}, {"gateway.example.com:443"}),
        (
            {"CLAUDE_CODE_USE_BEDROCK": "1", "AWS_REGION": "eu-central-1"},
            {f"{name}.eu-central-1.amazonaws.com" for name in ("bedrock", "bedrock-runtime", "sts")},
        ),
        (
            {"CLAUDE_CODE_USE_VERTEX": "1", "CLOUD_ML_REGION": "europe-west1"},
            {"europe-west1-aiplatform.googleapis.com", "oauth2.googleapis.com", "sts.googleapis.com"},
        ),
        (
            {"CLAUDE_CODE_USE_FOUNDRY": "1", "ANTHROPIC_FOUNDRY_RESOURCE": "mine"},
            {"mine.services.ai.azure.com", "login.microsoftonline.com"},
        ),
        ({"CLAUDE_CODE_USE_BEDROCK": "0"}, {"api.anthropic.com"}),
    ],
)
def test_the_model_is_reached_where_the_environment_says_it_is(env: dict[str, str], hosts: set[str]) -> None:
    assert set(egress_for("none", CLAUDE, env, spec()) or ()) == hosts


@pytest.mark.parametrize("address", ["http://127.0.0.1", "http://", "not a url", "http://[::1", "http://x:99999/"])
def test_an_endpoint_that_cannot_be_listed_is_refused_with_a_code(address: str) -> None:
    with pytest.raises(InvalidEgress):
        egress_for("registries", CLAUDE, {"ANTHROPIC_BASE_URL": address}, spec())


def test_a_task_gets_what_it_asks_for_beside_the_rest() -> None:
    allowed = egress_for("none", CLAUDE, KEY, spec(egress=("docs.example.com", "api.anthropic.com")))
    assert allowed == ("api.anthropic.com", "docs.example.com")


@pytest.mark.parametrize(
    "who, own_user, may", [("none", True, False), ("user", True, True), ("user", False, False), ("any", False, True)]
)
def test_who_may_ask_for_hosts_is_the_operators_to_say(who: str, own_user: bool, may: bool) -> None:
    assert check_asked([], who, own_user=own_user) == ()  # pyright: ignore[reportArgumentType]
    if may:
        assert check_asked(["A.example.com"], who, own_user=own_user) == ("a.example.com",)  # pyright: ignore[reportArgumentType]
    else:
        with pytest.raises(EgressNotAllowed) as refused:
            check_asked(["a.example.com"], who, own_user=own_user)  # pyright: ignore[reportArgumentType]
        assert refused.value.code == "egress_not_allowed"


@pytest.mark.parametrize("host", ["localhost:8080", "127.0.0.1:8080", "10.0.0.1", "169.254.169.254", "[fd00::1]:443"])
def test_a_task_cannot_ask_for_the_workers_own_network(host: str) -> None:
    with pytest.raises(InvalidEgress):
        check_egress([host])
    with pytest.raises(InvalidEgress):
        egress_for("registries", CLAUDE, KEY, spec(egress=(host,)))
    assert check_setting(host) == [str(parse_rule(host))]  # its operator can


def test_too_many_hosts_are_refused() -> None:
    assert len(check_egress(f"h{number}.example.com" for number in range(200))) == 200
    with pytest.raises(InvalidEgress):
        check_egress(f"h{number}.example.com" for number in range(201))


def test_a_setting_that_means_nothing_names_its_variable() -> None:
    assert Settings.read({"SANDBOX_EGRESS": "registries, *.example.com"}).sandbox_egress == "registries, *.example.com"
    for value in ("open,example.com", "https://example.com", "*"):
        with pytest.raises(InvalidInput) as refused:
            Settings.read({"SANDBOX_EGRESS": value})
        assert refused.value.field == "SANDBOX_EGRESS"


# The user's own proxy


@pytest.mark.parametrize(
    "host, port, proxy",
    [
        ("example.com", 443, "http://one:1"),
        ("example.com", 80, "http://two:2"),
        ("corp.example", 443, None),
        ("a.corp.example", 443, None),
        ("notcorp.example", 443, "http://one:1"),
        ("ported.example", 8443, None),
        ("ported.example", 443, "http://one:1"),
        ("localhost", 8080, None),
        ("127.0.0.1", 8080, None),
    ],
)
def test_the_users_proxy_is_used_where_the_environment_says_so(host: str, port: int, proxy: str | None) -> None:
    upstream = Upstream.read(
        {
            "HTTPS_PROXY": "http://one:1",
            "HTTP_PROXY": "http://two:2",
            "NO_PROXY": ".corp.example, ported.example:8443 other",
        }
    )
    assert upstream.proxy_for(host, port, tunnel=port != 80) == proxy
    assert Upstream.read({"ALL_PROXY": "http://a:1", "NO_PROXY": "*"}).proxy_for(host, port, tunnel=True) is None
    assert Upstream.read({}).proxy_for(host, port, tunnel=True) is None
