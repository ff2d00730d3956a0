"""The 2026-07-28 protocol as it goes over HTTP, for what a client of the SDK cannot be made to say."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any

import anyio
import httpx2

VERSION = "2026-07-28"
TASKS = "io.modelcontextprotocol/tasks"


class Wire:
    """One caller of one server. `tasks` says whether it declares the tasks extension."""

    def __init__(self, url: str, key: str, *, tasks: bool = True) -> None:
        self._url = f"{url}/mcp"
        self._key = key
        self._tasks = tasks

    async def ask(
        self,
        method: str,
        params: dict[str, Any],
        *,
        tasks: bool | None = None,
        headers: Mapping[str, str | None] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """The whole answer, `result` or `error`; `headers` replace those of the request, or with None leave one out."""
        async with httpx2.AsyncClient(timeout=60) as http:
            request = self._request(method, params, self._tasks if tasks is None else tasks, headers)
            response = await http.post(self._url, **request)
        if response.headers["content-type"].startswith("text/event-stream"):
            return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")][-1]
        return response.json()

    async def call(self, name: str, arguments: dict[str, Any], *, tasks: bool | None = None) -> dict[str, Any]:
        """The result of a tool's call."""
        return (await self.ask("tools/call", {"name": name, "arguments": arguments}, tasks=tasks))["result"]

    @asynccontextmanager
    async def listen(self, **notifications: Any) -> AsyncGenerator[AsyncIterator[dict[str, Any]]]:
        """What the server says on a stream; the first is its acknowledgement."""
        async with httpx2.AsyncClient(timeout=60) as http:
            request = self._request("subscriptions/listen", {"notifications": notifications}, self._tasks, {})
            async with http.stream("POST", self._url, **request) as response:
                yield self._messages(response)

    @staticmethod
    async def _messages(response: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
        if not response.headers["content-type"].startswith("text/event-stream"):
            yield json.loads(await response.aread())
            return
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                yield json.loads(line[6:])

    def _request(
        self, method: str, params: dict[str, Any], tasks: bool, headers: Mapping[str, str | None]
    ) -> dict[str, Any]:
        capabilities: dict[str, Any] = {"extensions": {TASKS: {}}, "elicitation": {}} if tasks else {}
        meta: dict[str, Any] = {
            "io.modelcontextprotocol/protocolVersion": VERSION,
            "io.modelcontextprotocol/clientCapabilities": capabilities,
            "io.modelcontextprotocol/clientInfo": {"name": "wire", "version": "1"},
        }
        name = params.get("taskId") or params.get("uri") or params.get("name")
        said = {
            "Authorization": f"Bearer {self._key}",
            "Accept": "application/json, text/event-stream",
            "MCP-Protocol-Version": VERSION,
            "Mcp-Method": method,
            **({"Mcp-Name": name} if name else {}),
            **headers,
        }
        body: dict[str, Any] = {"jsonrpc": "2.0", "id": 1, "method": method, "params": {"_meta": meta, **params}}
        return {"json": body, "headers": {name: value for name, value in said.items() if value is not None}}


async def next_of(messages: AsyncIterator[dict[str, Any]], seconds: float = 20) -> dict[str, Any]:
    """The next that the server says. Raises TimeoutError."""
    with anyio.fail_after(seconds):
        return await anext(messages)
