"""Faults that tests switch on, put around the whole server; and the count of all that it was asked."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

KINDS = ("answer", "answer_after", "hang", "hang_after", "delay", "cut", "half_close", "stall", "trickle")


@dataclass
class Fault:
    """What is to happen to the next requests that fit. It is told in `client.py` what each kind means."""

    kind: str
    path: str
    method: str | None = None
    sandbox: str | None = None
    count: int | None = 1
    skip: int = 0
    after_bytes: int = 0
    seconds: float = 0.0
    bytes_per_s: float = 1.0
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict[str, str])
    body: Any = None
    fired: int = 0

    def takes(self, scope: Any, sandbox: str | None) -> bool:
        """Is that request for it? Counts down."""
        if not re.fullmatch(self.path, scope["path"]) or self.method not in (None, scope["method"]):
            return False
        if self.sandbox not in (None, sandbox) or self.count == 0:
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.count is not None:
            self.count -= 1
        return True


class Faults:
    """An ASGI application around another one; what begins with `/_` goes to the switches, and never suffers."""

    def __init__(self, inner: Any, switches: Any) -> None:
        self._inner = inner
        self._switches = switches
        self.faults: dict[str, Fault] = {}
        self.requests: Counter[str] = Counter()
        self.streams = 0
        """The requests to the data plane's streams that have no end yet."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        if scope["path"].startswith("/_"):
            await self._switches(scope, receive, send)
            return
        sandbox = dict(scope["headers"]).get(b"e2b-sandbox-id", b"").decode() or None
        self.requests[f"{scope['method']} {re.sub('/(i[a-z0-9]{19})(?=/|$)', '/{id}', scope['path'])}"] += 1
        fault = next((fault for fault in self.faults.values() if fault.takes(scope, sandbox)), None)
        is_stream = scope["path"] in ("/process.Process/Start", "/process.Process/Connect")
        self.streams += is_stream
        try:
            if fault is None:
                await self._inner(scope, receive, send)
            else:
                await _suffer(fault, self._inner, scope, receive, send)
        finally:
            self.streams -= is_stream


async def _suffer(fault: Fault, inner: Any, scope: Any, receive: Any, send: Any) -> None:
    match fault.kind:
        case "answer":
            fault.fired += 1
            await _drain(receive)
            await _answer(fault, send)
        case "answer_after":
            await inner(scope, receive, _ignore)
            fault.fired += 1
            await _answer(fault, send)
        case "hang":
            fault.fired += 1
            await until_closed(receive)
        case "hang_after":
            await inner(scope, receive, _ignore)
            fault.fired += 1
            await until_closed(receive)
        case "delay":
            fault.fired += 1
            whole = await _drain(receive)  # before: it is done also where whoever asked has hung up meanwhile
            await asyncio.sleep(fault.seconds)
            await inner(scope, _again(whole, receive), send)
        case _:
            await inner(scope, receive, _Hurt(fault, receive, send))


class _Hurt:
    """A `send` that misbehaves in the midst of the body."""

    def __init__(self, fault: Fault, receive: Any, send: Any) -> None:
        self._fault, self._receive, self.send = fault, receive, send
        self._sent = 0
        self._broken = False

    async def __call__(self, message: Any) -> None:
        fault = self._fault
        if self._broken:
            return
        body: bytes = message.get("body", b"")
        if fault.kind == "trickle" and message["type"] == "http.response.body":
            fault.fired += not self._sent
            self._sent += len(body)
            for number in range(len(body)):
                await self.send({"type": "http.response.body", "body": body[number : number + 1], "more_body": True})
                await asyncio.sleep(1 / fault.bytes_per_s)
            await self.send({**message, "body": b""})
            return
        whole = message["type"] != "http.response.body" or self._sent + len(body) < fault.after_bytes
        if whole and message.get("more_body", True):
            self._sent += len(body)
            await self.send(message)
            return
        rest = body[: fault.after_bytes - self._sent]
        await self.send({"type": "http.response.body", "body": rest, "more_body": True})
        self._broken = True
        fault.fired += 1
        transport = transport_of(self.send)
        if fault.kind == "cut":
            reset(transport)
        elif fault.kind == "half_close":
            transport.write_eof()
        await until_closed(self._receive)


def transport_of(send: Any) -> Any:
    """The connection behind uvicorn's `send`."""
    while isinstance(send, _Hurt):
        send = send.send
    return send.__self__.transport


def reset(transport: Any) -> None:
    """End a connection with a reset, after what was sent."""
    connection = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


async def _answer(fault: Fault, send: Any) -> None:
    body = {"code": fault.status, "message": "a fault of the test server"} if fault.body is None else fault.body
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    kind = "text/html" if isinstance(body, str) else "application/json"
    headers = {"content-type": kind, "content-length": str(len(data)), **fault.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": fault.status, "headers": raw})
    await send({"type": "http.response.body", "body": data})


async def _ignore(message: Any) -> None:
    return


async def _drain(receive: Any) -> bytes:
    """The body of a request."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


def _again(body: bytes, receive: Any) -> Any:
    """A `receive` that begins with this body."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Any:
        return messages.pop() if messages else await receive()

    return replay


async def until_closed(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
