"""An agent in a sandbox with an allow-list reaches what is listed, and nothing else: not by any name, address or kind
of socket. The names below are a test's own, see `tests/support/named_hosts.py`; all else is real."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cloudagent_mcp.scripted_model import ScriptedModel
from cloudagent_queue.agents import REPOSITORY_FOLDER, RESULT, open_agent
from cloudagent_queue.sandboxes import network
from cloudagent_queue.sandboxes.local import LocalProvider
from cloudagent_storage.records import TaskSpec
from tests.support.closed import (
    ASK,
    CONNECT,
    Host,
    both_ways,
    closed_provider,
    folder_of,
    inside,
    make,
    own_addresses,
    proxy_of,
    statuses,
)
from tests.support.git_repos import make_repository
from tests.support.git_server import git_server
from tests.support.scripts import WRITE_AND_COMMIT
from tests.support.worlds import until


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    yield made
    made.close()


@pytest.fixture
def provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalProvider]:
    with closed_provider(tmp_path, monkeypatch) as made:
        yield made


# What is not listed


def test_nothing_of_the_hosts_network_is_reached_directly(provider: LocalProvider, host: Host) -> None:
    own = [[address, host.port] for address in ("127.0.0.1", "0.0.0.0", *own_addresses())]
    shared = provider.create(metadata={})
    assert set(inside(shared, CONNECT, own)) == {"HTTP/1.0 200 OK"}  # the trap is set
    host.seen.clear()
    closed = make(provider, "example.com")
    elsewhere = [["169.254.169.254", 80], ["10.0.0.1", 80], ["192.168.1.1", 80], ["1.1.1.1", 443], ["::1", host.port]]
    assert not any(answer.startswith("HTTP") for answer in inside(closed, CONNECT, own + elsewhere))
    assert host.seen == []


def test_the_proxy_leads_to_nothing_of_the_hosts_network_however_it_is_spelt(
    provider: LocalProvider, host: Host
) -> None:
    sandbox = make(provider, "example.com", names={"localhost": [["127.0.0.1"]]})
    spellings = [
        *("127.0.0.1", "localhost", "LOCALHOST", "localhost.", "0.0.0.0", "0", "[::1]", "[::]", "[::ffff:127.0.0.1]"),
        *("2130706433", "0x7f000001", "0177.0.0.1", "127.1", "127.0.0.1.", "169.254.169.254", "[fe80::1%25lo]"),
        *("example.com@127.0.0.1", "127.0.0.1#example.com", "example.com\\@127.0.0.1", "\uff11\uff12\uff17.0.0.1"),
        *own_addresses(),
    ]
    requests = [request for spelling in spellings for request in both_ways(f"{spelling}:{host.port}")]
    assert set(statuses(inside(sandbox, ASK, requests))) == {"400", "403"}
    assert host.seen == []


def test_a_listed_name_leads_to_no_private_address(provider: LocalProvider, host: Host) -> None:
    bad = ["127.0.0.1", "0.0.0.0", "169.254.169.254", "10.0.0.1", "::1", "::ffff:127.0.0.1", *own_addresses()]
    names = {f"n{number}.test": [[address]] for number, address in enumerate(bad)}
    sandbox = make(provider, *(f"{name}:{host.port}" for name in names), names=names)
    requests = [request for name in names for request in both_ways(f"{name}:{host.port}")]
    answers = inside(sandbox, ASK, requests)
    assert set(statuses(answers)) == {"403"}
    assert host.seen == []
    assert set(sandbox.blocked()) == {f"{name}:{host.port}" for name in names}


def test_a_name_is_resolved_once_and_what_was_checked_is_connected_to(provider: LocalProvider, host: Host) -> None:
    place = f"rebind.test:{host.port}"
    rebound = {"rebind.test": [["127.0.0.2"], ["127.0.0.1"]]}
    sandbox = make(provider, place, f"127.0.0.2:{host.port}", names=rebound)
    (answer,) = inside(sandbox, ASK, both_ways(place)[:1])
    assert "served at 127.0.0.2" in answer
    assert json.loads((folder_of(provider, sandbox) / "asked.json").read_text()) == {"rebind.test": 1}
    (answer,) = inside(sandbox, ASK, both_ways(place)[:1])
    assert statuses([answer]) == ["403"]


def test_a_listed_host_is_not_reached_at_another_port_nor_under_a_name_that_only_looks_like_it(
    provider: LocalProvider, host: Host
) -> None:
    here = [["127.0.0.2"]]
    names = {
        "web.test": here,
        "a.good.test": here,
        "good.test": here,
        "evilgood.test": here,
        "good.test.evil": here,
    }
    sandbox = make(provider, "web.test", f"*.good.test:{host.port}", f"127.0.0.2:{host.port}", names=names)
    refused = [
        *(f"web.test:{host.port}", "web.test:22", f"good.test:{host.port}", f"evilgood.test:{host.port}"),
        *(f"good.test.evil:{host.port}", f"a.good.test@evilgood.test:{host.port}", "a.good.test:22"),
    ]
    requests = [request for place in refused for request in both_ways(place)]
    assert set(statuses(inside(sandbox, ASK, requests))) <= {"400", "403"}
    assert host.seen == []
    assert statuses(inside(sandbox, ASK, both_ways(f"A.Good.test.:{host.port}"))) == ["200", "200"]


def test_no_other_kind_of_socket_leads_out(provider: LocalProvider) -> None:
    script = """
import ctypes
def attempt(make):
    try:
        make()
        return "open"
    except OSError as error:
        return error.errno
def udp():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", ("8.8.8.8", 53))
libc = ctypes.CDLL(None, use_errno=True)
ring = libc.syscall(425, 8, ctypes.create_string_buffer(256))
print(json.dumps({
    "udp": attempt(udp),
    "raw": attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()),
    "packet": attempt(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()),
    "vsock": attempt(lambda: socket.socket(40, socket.SOCK_STREAM).close()),
    "io_uring": "open" if ring >= 0 else ctypes.get_errno(),
    "dns": attempt(lambda: socket.getaddrinfo("example.com", 443)),
    "interfaces": [name for _, name in socket.if_nameindex() if name == "lo" or os.path.exists("/sys")],
}))
"""
    seen = inside(make(provider, "example.com"), script)
    assert seen.pop("interfaces") == ["lo"]
    assert seen.pop("dns") != "open"
    assert seen == {"udp": 101, "raw": 1, "packet": 97, "vsock": 97, "io_uring": 38}


def test_abstract_sockets_of_the_host_are_out_of_reach(provider: LocalProvider) -> None:
    name = f"\0cloudagent-test-{os.urandom(8).hex()}"
    script = """
connection = socket.socket(socket.AF_UNIX)
try:
    connection.connect(given[0])
    print('"reached"')
except OSError as error:
    print(json.dumps(type(error).__name__))
"""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen()
        assert inside(provider.create(metadata={}), script, name) == "reached"  # the trap is set
        assert inside(make(provider), script, name) == "ConnectionRefusedError"


def test_a_sandbox_cannot_find_its_own_proxy_from_behind_nor_that_of_another(
    provider: LocalProvider, host: Host
) -> None:
    other = make(provider, f"127.0.0.1:{host.port}")
    other.start(["sleep", "600"], env={})
    sandbox = make(provider)
    assert (folder_of(provider, other) / "egress.sock").is_socket()
    look = ["find", "/", "-path", "/proc", "-prune", "-o", "-name", "egress*", "-type", "s", "-print"]
    assert [line for line in sandbox.run(look, timeout_s=60).output.splitlines() if line.startswith("/")] == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", network.PROXY_PORT))
    assert set(statuses(inside(sandbox, ASK, both_ways(f"127.0.0.1:{host.port}")))) == {"403"}


def test_the_program_that_opens_the_way_out_leaves_nothing_open(provider: LocalProvider, host: Host) -> None:
    script = """
import ctypes
own = [os.readlink(f"/proc/self/fd/{file}") for file in os.listdir("/proc/self/fd") if int(file) > 2
       and os.path.exists(f"/proc/self/fd/{file}")]
libc, first = ctypes.CDLL(None), os.pidfd_open(1)
taken = [libc.syscall(438, first, file, 0) for file in range(64)]
print(json.dumps([own, [os.readlink(f"/proc/self/fd/{file}") for file in taken if file >= 0]]))
"""
    sandbox = make(provider, f"127.0.0.1:{host.port}")
    own, of_the_first = inside(sandbox, script)
    assert not any("socket" in link for link in own + of_the_first)
    sandbox.start(["sh", "-c", "ls -l /proc/self/fd > seen"], env={})
    until(lambda: not sandbox.alive(), "it ends")
    assert b"socket" not in sandbox.read("seen", max_bytes=10_000)


# What is listed


def test_a_listed_port_of_this_machine_is_there_under_its_own_address_too(provider: LocalProvider, host: Host) -> None:
    sandbox = make(provider, f"localhost:{host.port}", names={"localhost": [["127.0.0.1"]]})
    curl = f"curl -sS http://127.0.0.1:{host.port}/one && curl -sS http://localhost:{host.port}/two"
    assert sandbox.run(["sh", "-c", curl], timeout_s=30).exit_code == 0
    assert statuses(inside(sandbox, ASK, both_ways(f"localhost:{host.port}"))) == ["200", "200"]
    assert [line.split()[0] for line in host.seen] == ["/one", "/two", "/tunnel", "/plain"]
    assert sandbox.blocked() == []


def test_a_request_goes_to_the_host_that_was_checked_whatever_its_fields_say(
    provider: LocalProvider, host: Host
) -> None:
    place = f"web.test:{host.port}"
    sandbox = make(provider, place, f"127.0.0.2:{host.port}", names={"web.test": [["127.0.0.2"]]})
    request = f"GET http://{place}?q=1#part HTTP/1.1\r\nHost: inner.test\r\nProxy-Authorization: Basic eA==\r\n"
    request += "Connection: keep-alive, X-Hop\r\nX-Hop: 1\r\nX-Kept: yes\r\n\r\n"
    (answer,) = inside(sandbox, ASK, [request])
    assert host.seen == [f"/?q=1 {place}"]
    assert "X-Kept: yes" in answer and "Connection: close" in answer
    assert not any(left in answer for left in ("inner.test", "X-Hop", "Proxy-Authorization"))


@pytest.mark.parametrize(
    "request_",
    [
        *(
            "\r\n\r\n",
            "GET / HTTP/1.1\r\n\r\n",
            "GET https://example.com/ HTTP/1.1\r\n\r\n",
            "CONNECT x HTTP/1.1\r\n\r\n",
        ),
        *("CONNECT example.com:0 HTTP/1.1\r\n\r\n", "CONNECT example.com:443 HTTP/2.0\r\n\r\n", "\x16\x03\x01\r\n\r\n"),
        "GET http://example.com/ HTTP/1.1\r\nA: 1\r\n folded\r\n\r\n",
        "GET http://example.com/ HTTP/1.1\r\nA : 1\r\n\r\n",
        "GET http://example.com/ HTTP/1.1\r\nA: 1\nHost: x\r\n\r\n",
        "GET http://example.com/\0 HTTP/1.1\r\n\r\n",
        "GET http://exa\udcffmple.com/ HTTP/1.1\r\n\r\n",
        f"GET http://example.com/{'x' * 40_000} HTTP/1.1\r\n\r\n",
    ],
)
def test_a_request_that_is_none_is_answered_and_does_no_harm(provider: LocalProvider, request_: str) -> None:
    sandbox = make(provider, "example.com")
    assert statuses(inside(sandbox, ASK, [request_]))[0] in ("400", "431")
    assert statuses(inside(sandbox, ASK, both_ways("other.test:80"))) == ["403", "403"]


def test_git_and_curl_reach_a_listed_host_through_the_proxy(provider: LocalProvider, tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    make_repository(tmp_path / "served" / "repo", {"file": b"content\n"})
    with git_server(tmp_path / "server", {"": tmp_path / "served"}) as server:
        port = server.host.partition(":")[2]
        sandbox = make(provider, f"git.test:{port}", server.host, names={"git.test": [["127.0.0.1"]]})
        for name in ("git.test", "127.0.0.1"):
            sandbox.write("certificate.pem", server.certificate.read_bytes())
            verify = "GIT_SSL_NO_VERIFY" if name == "git.test" else "UNUSED"  # the certificate is the address's
            env = {"GIT_SSL_CAINFO": "/sandbox/certificate.pem", verify: "1"}
            clone = ["git", "clone", "--quiet", f"https://{name}:{port}/repo/.git", f"from-{name}"]
            done = sandbox.run(clone, timeout_s=60, env=env)
            assert (done.exit_code, done.output) == (0, "")
            assert sandbox.read(f"from-{name}/file", max_bytes=100) == b"content\n"
        curl = ["curl", "-sS", "-o", "/dev/null", "--cacert", "certificate.pem"]
        assert sandbox.run([*curl, f"https://127.0.0.1:{port}/"], timeout_s=30).exit_code == 0
        assert sandbox.run([*curl, "--noproxy", "", f"https://127.0.0.1:{port}/"], timeout_s=30).exit_code == 0
        assert sandbox.run([*curl, "https://unlisted.test/"], timeout_s=30).exit_code != 0
        assert sandbox.blocked() == ["unlisted.test:443"]


@pytest.mark.parametrize("way", ["by its address", "by a name through the proxy"])
def test_claude_code_reaches_its_model_and_nothing_else(provider: LocalProvider, way: str) -> None:
    claude = open_agent("claude")
    with ScriptedModel([WRITE_AND_COMMIT]) as model:
        port = model.url.rpartition(":")[2]
        address = model.url if way == "by its address" else f"http://model.test:{port}"
        env = {**model.environment(), "ANTHROPIC_BASE_URL": address}
        egress = [*claude.hosts(env), f"127.0.0.1:{port}"]
        sandbox = make(provider, *egress, names={"model.test": [["127.0.0.1"]]})
        done = sandbox.run(["git", "init", "-q", REPOSITORY_FOLDER], timeout_s=30)
        assert done.exit_code == 0, done.output
        claude.install(sandbox, TaskSpec(prompt="Write and commit", title="x"))
        claude.start(sandbox, env=env)
        until(lambda: not sandbox.alive(), "the agent ends", seconds=90)
        result = json.loads(sandbox.read(RESULT, max_bytes=100_000) or "null")
        assert result is not None, sandbox.output().decode()
        assert result["outcome"] == "completed", result
    assert sandbox.read(f"{REPOSITORY_FOLDER}/hello.txt", max_bytes=100) == b"hello\n"
    assert sandbox.blocked() == []


# The proxy of the task's user


@contextmanager
def users_proxy(target_port: int) -> Generator[tuple[int, list[str]]]:
    """A proxy that wants a login, and leads every tunnel to one port; with the heads of the requests that came."""
    heads: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            heads.append(f"{self.requestline}\n{self.headers}")
            if self.headers.get("Proxy-Authorization") != "Basic dXNlcjpzM2NyZXQtNGYx":
                self.send_error(407)
                return
            self.send_response(200)
            self.end_headers()
            with socket.create_connection(("127.0.0.1", target_port)) as target:
                target.sendall(self.connection.recv(65536))
                while data := target.recv(65536):
                    self.connection.sendall(data)

        def do_GET(self) -> None:
            heads.append(f"{self.requestline}\n{self.headers}")
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port, heads
        finally:
            server.shutdown()
            thread.join()


def test_listed_hosts_are_reached_through_the_users_own_proxy_whose_password_stays_outside(
    provider: LocalProvider, host: Host
) -> None:
    sandbox = make(provider, "far.test", names={})
    with users_proxy(host.port) as (port, heads):
        proxy = f"http://user:s3cret-4f1@127.0.0.1:{port}"
        env = {"HTTPS_PROXY": proxy, "http_proxy": proxy, "Https_Proxy": proxy, "SCRIPT": "kept"}
        script = ASK + "\nprint(json.dumps(dict(os.environ)), file=open('seen', 'w'))"
        requests = [*both_ways("far.test:443")[:1], *both_ways("far.test:80")[1:], *both_ways("unlisted.test:443")]
        answers = inside(sandbox, script, requests, env=env)
    assert [status[:3] for status in statuses(answers)] == ["200", "204", "403", "403"]
    assert [head.splitlines()[0] for head in heads] == [
        "CONNECT far.test:443 HTTP/1.1",
        "GET http://far.test:80/plain HTTP/1.1",
    ]
    seen = json.loads(sandbox.read("seen", max_bytes=100_000))
    assert seen["SCRIPT"] == "kept" and seen["HTTPS_PROXY"] == f"http://127.0.0.1:{network.PROXY_PORT}"
    assert "s3cret" not in json.dumps(seen)
    command = " ".join(proxy_of(provider, sandbox).cmdline() + list(proxy_of(provider, sandbox).environ().values()))
    kept = [path.read_bytes() for path in folder_of(provider, sandbox).iterdir() if path.is_file()]
    assert "s3cret" not in command and not any(b"s3cret" in content for content in kept)
