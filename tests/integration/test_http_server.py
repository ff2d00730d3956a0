"""`ca serve` as a process, and MCP clients of both eras over real HTTP."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator
from typing import Any, Literal, cast

import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from cloudagent_mcp import __version__
from tests.support.served import KEY, served
from tests.support.worlds import World


@pytest.fixture
def url(world: World) -> Generator[str]:
    """A running server's address. Tasks stay queued."""
    with served(world) as url:
        yield url


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_client_of_either_era_submits_reads_and_cancels_over_http(
    url: str, mode: Literal["auto", "legacy"]
) -> None:
    async with httpx2.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}) as http:
        async with Client(streamable_http_client(f"{url}/mcp", http_client=http), mode=mode) as client:
            assert len((await client.list_tools()).tools) == 21
            result = await client.call_tool("submit_task", {"prompt": "x", "repository": "none"})
            task = cast("dict[str, Any]", result.structured_content)
            assert not result.is_error and task["status"] == "queued"
            refused = await client.call_tool("submit_task", {"prompt": "x", "repository": "/etc"})
            assert cast("dict[str, Any]", refused.structured_content)["code"] == "repository_not_allowed"
            assert (await client.call_tool("cancel_task", {"task_id": task["task_id"]})).is_error is False
            seen = httpx2.get(f"{url}/api/v1/tasks/{task['task_id']}", headers=http.headers).json()
            assert seen["status"] == "cancelled"


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (b"[" * 50_000, 400), (b'{"jsonrpc": "2.0"}', 400), (b" " * 5_000_000 + b"{}", 413)],
)
def test_garbage_on_the_mcp_route_is_refused_and_the_server_lives(url: str, body: bytes, status: int) -> None:
    headers = {
        "Authorization": f"Bearer {KEY}",
        "Content-Type": "application/json",
        "Accept": "application/json, text/event-stream",
    }
    response = httpx2.post(f"{url}/mcp", content=body, headers=headers)
    assert response.status_code == status
    assert "Traceback" not in response.text
    assert httpx2.get(f"{url}/health").json() == {"status": "ok", "version": __version__}


def test_the_port_of_another_server_is_refused_with_what_to_do(url: str, world: World) -> None:
    port = url.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-m", "cloudagent_mcp", "serve", "--port", port],
        env={**world.environment, "ADMIN_API_KEY": KEY},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3 and "(port_taken)" in done.stderr and "--port" in done.stderr
