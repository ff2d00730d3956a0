"""The only way out of a sandbox with a network of its own: a proxy that keeps the sandbox's allow-list.

A process of its own on the host, one for each sandbox, started by `network.py`; it lives as long as the sandbox's
folder, which is its working directory. Nobody can connect to it over the network. Instead the first program inside
(`network.INSIDE`) listens there, and hands the listening sockets out, so that connections are made in the sandbox's
network and accepted in here. One conversation on `egress.sock`, in messages:

    worker     {"lasting": …, "upstream": {…}}    the proxy of the task's user, if there is one; never written down
    inside     [[host, port], …] and the sockets: the first is the proxy's, others stand for ports of this machine
    we         "ok"; without `lasting`, the sockets are closed when the other side is

It speaks HTTP (RFC 9110, RFC 9112): CONNECT, and requests in absolute form for http://. All that comes in is hostile.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import json
import os
import re
import socket
import ssl
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from cloudagent_queue.sandboxes.egress import (
    Address,
    AllowList,
    address_of,
    canonical_host,
    join_host,
    split_host,
)

CONNECTIONS_MAX = 256
"""Of one sandbox at once; the next ones are refused."""
HEAD_MAX = 32_768
"""Bytes of a request before its body."""
HEAD_S = 20.0
"""How long a client may take for that."""
LINGER_S = 2.0
"""How long one that was refused may go on sending."""
CONNECT_S = 15.0
RESOLVE_S = 20.0
IDLE_S = 1800.0
"""A connection on which nobody says anything for that long is closed. An answer of a model can take many minutes."""
BLOCKED_MAX = 200
"""Hosts that are remembered as blocked."""
BLOCKED = "blocked.txt"
ABOUT = "meta.json"

_CHUNK = 65_536
_LOOK_S = 5.0
_REQUEST = re.compile(rb"([A-Z]{1,20}) ([\x21-\x7e]+) HTTP/1\.([01])")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
_OF_THIS_HOP = {b"host", b"connection", b"proxy-connection", b"proxy-authorization", b"keep-alive", b"te", b"upgrade"}

Resolve = Callable[[str, int], Awaitable[Sequence[Address]]]


class Refused(Exception):
    """What the client is told instead of an answer."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


async def resolve(name: str, port: int) -> Sequence[Address]:
    """The addresses of a name. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found))


class Blocked:
    """What was wanted and refused, each once, in a file of lines `host:port`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = set(path.read_text().splitlines()) if path.exists() else set[str]()

    def add(self, host: str, port: int) -> None:
        line = join_host(host, port)
        if line not in self._seen and len(self._seen) < BLOCKED_MAX:
            self._seen.add(line)
            with contextlib.suppress(OSError), self._path.open("a") as file:
                file.write(f"{line}\n")


@dataclass(frozen=True)
class Upstream:
    """The proxies that the task's user has to go through, as the usual variables name them."""

    http: str | None = None
    https: str | None = None
    without: tuple[str, ...] = ()
    """Hosts and domains that are reached without them."""

    @classmethod
    def read(cls, variables: Mapping[str, str]) -> Upstream:
        """From HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY."""
        names = re.split(r"[\s,]+", variables.get("NO_PROXY", "").lower())
        any_scheme = variables.get("ALL_PROXY")
        return cls(
            http=variables.get("HTTP_PROXY") or any_scheme,
            https=variables.get("HTTPS_PROXY") or any_scheme,
            without=tuple(name.removeprefix("*").removeprefix(".") for name in names if name.strip(".")),
        )

    def proxy_for(self, host: str, port: int, *, tunnel: bool) -> str | None:
        """The address of the proxy for a host; None where it is reached without one."""
        address = address_of(host)
        if host == "localhost" or (address is not None and address.is_loopback):
            return None
        for name in self.without:
            bare, _, only_port = name.partition(":") if name.count(":") == 1 else (name, "", "")
            if only_port in ("", str(port)) and (not bare or host == bare or host.endswith(f".{bare}")):
                return None
        return self.https if tunnel else self.http


@dataclass(frozen=True)
class _Request:
    method: bytes
    host: str
    port: int
    path: bytes
    """With the query; empty for CONNECT."""
    version: bytes
    fields: Sequence[tuple[bytes, bytes]]

    @property
    def tunnel(self) -> bool:
        return self.method == b"CONNECT"


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Proxy:
    """Serves one sandbox."""

    def __init__(self, allowed: AllowList, blocked: Blocked, *, resolve: Resolve = resolve) -> None:
        self._allowed = allowed
        self._blocked = blocked
        self._resolve = resolve
        self._connections = 0
        self._running: set[asyncio.Task[None]] = set()
        self._lasting: list[asyncio.Server] = []

    async def serve(self, control: socket.socket, *, until: Callable[[], bool]) -> None:
        """Take conversations on a listening socket until `until` says that the sandbox is gone."""
        asyncio.get_running_loop().set_exception_handler(_ignore)
        accepting = asyncio.create_task(self._accept(control))
        while not until() and not accepting.done():
            await asyncio.wait([accepting], timeout=_LOOK_S)

    async def _accept(self, control: socket.socket) -> None:
        control.setblocking(False)
        while True:
            conversation, _ = await asyncio.get_running_loop().sock_accept(control)
            self._spawn(self._converse(conversation))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _converse(self, conversation: socket.socket) -> None:
        servers: list[asyncio.Server] = []
        clients: set[asyncio.Task[None]] = set()
        with contextlib.suppress(OSError, ValueError, KeyError), conversation:
            conversation.setblocking(False)
            asked = json.loads((await _receive(conversation))[0])
            upstream = Upstream.read(asked["upstream"])
            message, files = await _receive(conversation)
            listeners = [socket.socket(fileno=file) for file in files]
            for number, (listener, (host, port)) in enumerate(zip(listeners, json.loads(message), strict=True)):
                target = None if number == 0 else (str(host), int(port))
                if target is not None and target not in self._allowed.of_this_machine:
                    raise ValueError("not listed")

                async def client(
                    reader: asyncio.StreamReader,
                    writer: asyncio.StreamWriter,
                    target: tuple[str, int] | None = target,
                ) -> None:
                    task = asyncio.current_task()
                    assert task is not None
                    clients.add(task)
                    try:
                        await self._client((reader, writer), upstream, target)
                    finally:
                        clients.discard(task)

                servers.append(await asyncio.start_server(client, sock=listener, limit=HEAD_MAX, backlog=512))
            conversation.send(b"ok")
            if asked["lasting"]:
                self._lasting += servers
                return
            await _receive(conversation)  # its end
        for server in servers:
            server.close()
        for task in list(clients):
            task.cancel()

    async def _client(self, client: Connection, upstream: Upstream, target: tuple[str, int] | None) -> None:
        self._connections += 1
        try:
            if self._connections > CONNECTIONS_MAX:
                raise Refused(503, "Too many connections")
            if target is not None:
                await _join(client, await _connect([ipaddress.ip_address(target[0])], target[1]))
            else:
                await self._answer(client, upstream)
        except Refused as refused:
            if target is None:
                with contextlib.suppress(OSError, TimeoutError):
                    await _refuse(client, refused)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass  # one side is gone
        finally:
            self._connections -= 1
            client[1].close()

    async def _answer(self, client: Connection, upstream: Upstream) -> None:
        try:
            async with asyncio.timeout(HEAD_S):
                head = await client[0].readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            raise Refused(431, "Request header too large") from None
        except TimeoutError:
            raise Refused(408, "Request timeout") from None
        request = _parse(head)
        server = await self._open(request, upstream)
        if request.tunnel:
            client[1].write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await _join(client, server)

    async def _open(self, request: _Request, upstream: Upstream) -> Connection:
        """A connection on which the request, if it is no tunnel, was sent already."""
        host, port = request.host, request.port
        if not self._allowed.lists(host, port):
            self._blocked.add(host, port)
            raise Refused(403, "Not on this sandbox's list of allowed hosts")
        proxy = upstream.proxy_for(host, port, tunnel=request.tunnel)
        if proxy is not None and (address := address_of(host)) is not None and not self._allowed.admits(address, port):
            proxy = None  # refused below
        if proxy is not None:
            return await _through(proxy, request)
        server = await _connect(await self._addresses(host, port), port)
        if not request.tunnel:
            server[1].write(_forwarded(request, request.path))
        return server

    async def _addresses(self, host: str, port: int) -> Sequence[Address]:
        """Where a listed host is. The connection goes to one of these: a name is resolved once."""
        found: Sequence[Address]
        if (address := address_of(host)) is not None:
            found = [address]
        else:
            try:
                async with asyncio.timeout(RESOLVE_S):
                    found = await self._resolve(host, port)
            except (OSError, UnicodeError, TimeoutError):
                raise Refused(502, "The host's name could not be resolved") from None
        admitted = [address for address in found if self._allowed.admits(address, port)]
        if found and not admitted:
            self._blocked.add(host, port)
            raise Refused(403, "The host's address is not public and not on this sandbox's list")
        return admitted


def _parse(head: bytes) -> _Request:
    first, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    found = _REQUEST.fullmatch(first)
    fields = [_FIELD.fullmatch(line) for line in lines]
    if found is None or None in fields:
        raise Refused(400, "Bad request")
    method, target, minor = found.groups()
    try:
        if method == b"CONNECT":
            place, path, default = target.decode(), b"", None
        else:
            if not target[:7].lower() == b"http://":
                raise Refused(400, "This is a proxy: send http:// requests in absolute form, others by CONNECT")
            authority = re.split(rb"[/?#]", target[7:], maxsplit=1)[0]
            rest = target[7 + len(authority) :].partition(b"#")[0]
            place, path, default = authority.decode(), rest if rest.startswith(b"/") else b"/" + rest, 80
        name, port = split_host(place, default_port=default)
        host = canonical_host(name)
    except ValueError:
        raise Refused(400, "Bad host") from None
    if port is None:
        raise Refused(400, "A port is missing")
    return _Request(method, host, port, path, b"1." + minor, [(field[1], field[2]) for field in fields if field])


def _forwarded(request: _Request, target: bytes, *more: bytes) -> bytes:
    """The request as the next server gets it: for the host that was checked, whatever its fields say, and alone."""
    named = {
        name.strip().lower()
        for key, value in request.fields
        if key.lower() == b"connection"
        for name in value.split(b",")
    }
    place = join_host(request.host, request.port).removesuffix(":80").encode()
    lines = [b"%s %s HTTP/%s" % (request.method, target, request.version), b"Host: " + place, *more]
    lines += [b"%s: %s" % field for field in request.fields if field[0].lower() not in _OF_THIS_HOP | named]
    return b"\r\n".join([*lines, b"Connection: close", b"", b""])


async def _through(proxy: str, request: _Request) -> Connection:
    """The way to a host through the user's own proxy, which also resolves its name."""
    url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if url.scheme not in ("http", "https") or not url.hostname:
        raise Refused(502, "The proxy of the task's environment is of an unknown kind")
    login: list[bytes] = []
    if url.username is not None:
        pair = f"{unquote(url.username)}:{unquote(url.password or '')}"
        login = [b"Proxy-Authorization: Basic " + base64.b64encode(pair.encode())]
    secure = ssl.create_default_context() if url.scheme == "https" else None
    place = join_host(request.host, request.port).encode()
    try:
        async with asyncio.timeout(CONNECT_S):
            server = await asyncio.open_connection(
                url.hostname, url.port or (443 if secure else 80), ssl=secure, limit=HEAD_MAX
            )
            if not request.tunnel:
                server[1].write(_forwarded(request, b"http://" + place + request.path, *login))
                return server
            server[1].write(b"\r\n".join([b"CONNECT %s HTTP/1.1" % place, b"Host: " + place, *login, b"", b""]))
            answer = await server[0].readuntil(b"\r\n\r\n")
    except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        raise Refused(502, "The proxy of the task's environment does not answer") from None
    if not re.match(rb"HTTP/1\.[01] 2\d\d", answer):
        server[1].close()
        raise Refused(502, "The proxy of the task's environment refused the connection")
    return server


async def _connect(addresses: Sequence[Address], port: int) -> Connection:
    for address in addresses:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(CONNECT_S):
                return await asyncio.open_connection(str(address), port, limit=HEAD_MAX)
    raise Refused(502, "The host does not answer")


async def _join(one: Connection, other: Connection) -> None:
    """Carry what either side says to the other until both have ended, or nobody says anything for too long."""
    last = time.monotonic()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal last
        while data := await reader.read(_CHUNK):
            last = time.monotonic()
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()

    both = {asyncio.create_task(carry(one[0], other[1])), asyncio.create_task(carry(other[0], one[1]))}
    try:
        waiting = both
        while waiting and time.monotonic() - last < IDLE_S:
            done, waiting = await asyncio.wait(waiting, timeout=IDLE_S / 10, return_when=asyncio.FIRST_COMPLETED)
            if any(task.exception() for task in done):
                return
    finally:
        for task in both:
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)
        other[1].close()


async def _refuse(client: Connection, refused: Refused) -> None:
    reader, writer = client
    body = f"{refused.reason}.\n".encode()
    head = f"HTTP/1.1 {refused.status} {refused.reason}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
    writer.write_eof()
    async with asyncio.timeout(LINGER_S):
        # A connection that is closed with something unread is reset, and the answer may be lost with it.
        while refused.status != 503 and await reader.read(_CHUNK):
            pass


async def _receive(conversation: socket.socket) -> tuple[bytes, list[int]]:
    loop = asyncio.get_running_loop()
    while True:
        try:
            message, files, _, _ = socket.recv_fds(conversation, 1 << 16, 64)
            return message, files
        except BlockingIOError:
            readable: asyncio.Future[None] = loop.create_future()
            loop.add_reader(conversation, _wake, readable)
            try:
                await readable
            finally:
                loop.remove_reader(conversation)


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


def _ignore(loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
    """What asyncio would print is a client's fault, and there is no end to those."""


def main(resolve: Resolve = resolve) -> None:
    """Serve the sandbox of the current folder on the listening socket whose descriptor is the last argument."""
    control = socket.socket(fileno=int(sys.argv[-1]))
    proxy = Proxy(AllowList(json.loads(Path(ABOUT).read_bytes())["egress"]), Blocked(Path(BLOCKED)), resolve=resolve)
    asyncio.run(proxy.serve(control, until=_folder_is_gone))


def _folder_is_gone() -> bool:
    try:
        os.getcwd()
    except OSError:
        return True
    return False
