"""`ca mcp` with CLOUDAGENT_URL, and every way in which there can be no server at that address."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
from mcp import Client, StdioServerParameters
from mcp.types import CallToolResult

from cloudagent_mcp import remote_server
from cloudagent_mcp.bridge import Bridge
from cloudagent_mcp.operations import Caller
from cloudagent_mcp.rest import repr_digest
from cloudagent_mcp.server import mcp_server
from cloudagent_mcp.settings import Settings
from cloudagent_storage.errors import CloudAgentError
from tests.support.sessions import session

pytestmark = pytest.mark.anyio


def refusal(result: CallToolResult) -> dict[str, Any]:
    assert result.is_error, result.content
    return cast("dict[str, Any]", result.structured_content)


@contextlib.contextmanager
def answering(reply: bytes | Callable[[socket.socket], None] | None) -> Generator[tuple[int, list[bytes]]]:
    """Something on a port that answers so, whatever it is asked; and what it was sent. None is a black hole."""
    seen: list[bytes] = []
    ending = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)

        def serve(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                connection.settimeout(10)
                seen.append(connection.recv(100_000))
                if callable(reply):
                    while not ending.is_set():
                        reply(connection)
                elif reply is not None:
                    connection.sendall(reply)
                else:
                    ending.wait(30)

        def accept() -> None:
            while not ending.is_set():
                with contextlib.suppress(TimeoutError):
                    thread = threading.Thread(target=serve, args=listener.accept()[:1])
                    thread.start()
                    threads.append(thread)

        threads = [threading.Thread(target=accept)]
        threads[0].start()
        try:
            yield listener.getsockname()[1], seen
        finally:
            ending.set()
            for thread in threads:
                thread.join(15)
                assert not thread.is_alive()


def http(status: str, body: str, *headers: str) -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body.encode())}", "Connection: close", *headers]
    return "\r\n".join([*head, "", body]).encode()


def drip(connection: socket.socket) -> None:
    if not getattr(connection_state, "begun", None):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
        connection_state.begun = True
    connection.sendall(b" ")
    time.sleep(0.05)


def flood(connection: socket.socket) -> None:
    if not getattr(connection_state, "begun", None):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
        connection_state.begun = True
    connection.sendall(b"x" * 65536)


connection_state = threading.local()
PAGE = "<html><title>Sign in</title><script>steal()</script></html>"
PROBLEM = '{"code": "%s", "detail": "D\\u202e.", "remedy": "R.", "field": null}'


@pytest.mark.parametrize(
    ("reply", "code", "said"),
    [
        (http("200 OK", PAGE), "server_unreachable", "no cloudagent server."),
        (http("200 OK", "[1, 2"), "server_unreachable", "no cloudagent server."),
        (http("200 OK", "[" * 100_000), "server_unreachable", "no cloudagent server."),
        (http("200 OK", '{"tasks": 5}'), "server_outdated", "does not understand"),
        (http("200 OK", "null"), "server_outdated", "does not understand"),
        (http("404 Not Found", PAGE), "server_unreachable", "no cloudagent server (status 404)"),
        (http("401 Unauthorized", PAGE), "server_unreachable", "in front of the server, such as a proxy"),
        (http("403 Forbidden", PAGE), "server_unreachable", "in front of the server, such as a proxy"),
        (http("502 Bad Gateway", PAGE), "server_unreachable", "cannot reach it (status 502)"),
        (http("500 Error", '{"error": "x"}'), "server_unreachable", "cannot reach it (status 500)"),
        (http("302 Found", "", "Location: http://127.0.0.1:1/elsewhere"), "server_unreachable", "sends elsewhere"),
        (http("404 Not Found", PROBLEM % "no_route"), "server_outdated", "does not know list_tasks"),
        (http("405 Method Not Allowed", "no"), "server_outdated", "does not know list_tasks"),
        (http("401 Unauthorized", PROBLEM % "unauthorized"), "unauthorized", "CLOUDAGENT_API_KEY"),
        (http("409 Conflict", PROBLEM % "quota_of_tomorrow"), "quota_of_tomorrow", "D."),
        (http("503 Unavailable", PROBLEM % "database_busy"), "database_busy", "D."),
        (http("400 Bad", '{"code": 5, "detail": [], "remedy": {}, "field": 1}'), "server_unreachable", "no cloudagent"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "server_unreachable", "does not answer"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "server_unreachable", "does not answer"),
        (b"", "server_unreachable", "does not answer"),
        (None, "server_unreachable", "did not answer in time"),
        (drip, "server_unreachable", "did not answer in time"),
        (flood, "server_unreachable", "no cloudagent server"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(getattr(value, "__name__", value))[:40],
)
async def test_whatever_answers_in_place_of_a_server_is_told_in_a_sentence(
    reply: bytes | Callable[[socket.socket], None] | None,
    code: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(remote_server, "SILENT_S", 1.0)
    monkeypatch.setattr(remote_server, "CONNECT_S", 1.0)
    monkeypatch.setattr(remote_server, "ANSWER_LIMIT", 1_000_000)
    with answering(reply) as (port, seen):
        user = {"CLOUDAGENT_URL": f"http://127.0.0.1:{port}", "CLOUDAGENT_API_KEY": "cag_canary"}
        bridge = Bridge(Settings.read({**user, "CLOUDAGENT_HOME": str(tmp_path)}))
        async with Client(mcp_server(bridge, remote=False)) as client:
            assert len((await client.list_tools()).tools) >= 16
            with anyio.fail_after(30):
                result = await client.call_tool("list_tasks", {})
        await bridge.server.close()
        assert len(seen) == 1 and b"Bearer cag_canary" in seen[0]
    error = refusal(result)
    assert error["code"] == code and said in error["detail"] and error["remedy"], error
    everything = json.dumps(error) + str(result.content) + caplog.text
    assert not any(word in everything for word in ("cag_canary", "steal", "Traceback", "\u202e", str(tmp_path)))


@pytest.mark.parametrize(
    ("url", "key", "code", "said"),
    [
        ("http://127.0.0.1:1", "k", "server_unreachable", "does not answer"),
        ("http://no-such-host.invalid", "k", "server_unreachable", "does not answer"),
        ("agents.example.com", "k", "server_unreachable", "not the address"),
        ("ftp://agents.example.com", "k", "server_unreachable", "not the address"),
        ("https://", "k", "server_unreachable", "not the address"),
        ("http://127.0.0.1:99999", "k", "server_unreachable", "not the address"),
        ("http://[::1", "k", "server_unreachable", "not the address"),
        ("https://me:secret@agents.example.com", "k", "server_unreachable", "not the address"),
        ("http://a b.example.com", "k", "server_unreachable", "not the address"),
        ("http://127.0.0.1:1", "two\nlines", "unauthorized", "no key has"),
        ("http://127.0.0.1:1", "schl\u00fcssel", "unauthorized", "no key has"),
    ],
)
async def test_a_setting_that_leads_nowhere_is_told_at_the_call_and_not_at_the_start(
    url: str, key: str, code: str, said: str, tmp_path: Path
) -> None:
    user = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "CLOUDAGENT_HOME": str(tmp_path / "d"),
        "CLOUDAGENT_URL": url,
        "CLOUDAGENT_API_KEY": key,
    }
    server = StdioServerParameters(command=sys.executable, args=["-m", "cloudagent_mcp", "mcp"], env=user, cwd=tmp_path)
    async with Client(server) as client:
        assert len((await client.list_tools()).tools) >= 16 and len((await client.list_prompts()).prompts) == 6
        error = refusal(await client.call_tool("submit_task", {"prompt": "x", "repository": "none"}))
    assert error["code"] == code and said in error["detail"]
    assert not any(word in json.dumps(error) for word in ("secret", "lines", "schl"))


async def test_the_key_goes_to_no_server_that_a_redirect_leads_to(tmp_path: Path) -> None:
    with answering(http("200 OK", "{}")) as (thief, stolen):
        moved = http("307 Temporary Redirect", "", f"Location: http://127.0.0.1:{thief}/api/v1/tasks")
        with answering(moved) as (port, _):
            user = {"CLOUDAGENT_URL": f"http://127.0.0.1:{port}", "CLOUDAGENT_API_KEY": "k"}
            bridge = Bridge(Settings.read({**user, "CLOUDAGENT_HOME": str(tmp_path)}))
            with pytest.raises(CloudAgentError) as caught:
                await bridge.operations["submit_task"].call(
                    Caller(local=True, folder=tmp_path), {"prompt": "x", "repository": "none"}
                )
            await bridge.server.close()
    assert caught.value.code == "server_unreachable" and "307" in caught.value.message
    assert stolen == []


@pytest.mark.parametrize(
    ("reply", "name", "told"),
    [(b"", "submit_task", True), (b"", "cancel_task", False), ("closed", "submit_task", False)],
)
async def test_a_submit_that_may_have_arrived_is_not_to_be_repeated_blindly(
    reply: bytes | str, name: str, told: bool, tmp_path: Path
) -> None:
    with answering(reply if isinstance(reply, bytes) else b"") as (port, _):
        address = f"http://127.0.0.1:{port if reply == b'' else 1}"
        user = {"CLOUDAGENT_URL": address, "CLOUDAGENT_API_KEY": "k", "CLOUDAGENT_HOME": str(tmp_path)}
        bridge = Bridge(Settings.read(user))
        asked = {"prompt": "x", "repository": "none"} if name == "submit_task" else {"task_id": "task_x"}
        with pytest.raises(CloudAgentError) as caught:
            await bridge.operations[name].call(Caller(local=True, folder=tmp_path), asked)
        await bridge.server.close()
    assert caught.value.code == "server_unreachable"
    assert ("list_tasks before you repeat it" in caught.value.remedy) == told


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (http("200 OK", session().decode(), f"Repr-Digest: {repr_digest(session())}"), None),
        (http("200 OK", session().decode(), f"Repr-Digest: {repr_digest(b'else')}"), "session_tampered"),
        (http("200 OK", session().decode()), "session_tampered"),
        (http("200 OK", "{}", f"Repr-Digest: {repr_digest(b'{}')}"), "session_malformed"),
        (http("404 Not Found", '{"code":"no_route","detail":"x","remedy":"x","field":null}'), "server_outdated"),
        (http("409 Conflict", '{"code":"no_session","detail":"x","remedy":"x","field":null}'), "no_session"),
    ],
)
async def test_a_session_that_does_not_arrive_as_it_was_sent_is_not_brought_home(
    tmp_path: Path, reply: bytes, code: str | None
) -> None:
    with answering(reply) as (port, _):
        settings = {
            "HOME": str(tmp_path),
            "CLOUDAGENT_HOME": str(tmp_path),
            "CLOUDAGENT_URL": f"http://127.0.0.1:{port}",
        }
        async with remote_server.RemoteServer(Settings.read(settings)) as server:
            if code is None:
                assert (await server.resume_task("task_x", tmp_path)).turns == 4
                return
            with pytest.raises(CloudAgentError) as refused:
                await server.resume_task("task_x", tmp_path)
    assert refused.value.code == code
    assert not list(tmp_path.rglob("*.jsonl"))
