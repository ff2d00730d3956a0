"""Somebody elsewhere, who works with a server: their bridge, as a process or in this one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, cast

from mcp import Client, StdioServerParameters
from mcp.types import CallToolResult

from cloudagent_mcp.bridge import Bridge
from cloudagent_mcp.operations import Caller

ADMIN = "the-operators-own-key"


@contextlib.asynccontextmanager
async def stdio(user: dict[str, str], folder: Path, *options: str) -> AsyncGenerator[Client]:
    server = StdioServerParameters(
        command=sys.executable, args=["-m", "cloudagent_mcp", "mcp", *options], env=user, cwd=folder
    )
    async with Client(server) as client:
        yield client


def structured(result: CallToolResult) -> dict[str, Any]:
    assert not result.is_error, result.content
    return cast("dict[str, Any]", result.structured_content)


def refusal(result: CallToolResult) -> dict[str, Any]:
    assert result.is_error, result.content
    return cast("dict[str, Any]", result.structured_content)


async def call(bridge: Bridge, name: str, folder: Path, /, **arguments: Any) -> Any:
    return await bridge.operations[name].call(Caller(local=True, operator=True, folder=folder), arguments)
