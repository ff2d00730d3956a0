"""What the MCP face costs, as ratios to a bare server of the same SDK on the same transport. Gates nothing."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import anyio
import anyio.to_thread
import httpx2
import psutil
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from cloudagent_mcp import __version__
from cloudagent_mcp.embedded import only_worker
from cloudagent_storage.records import LOCAL_ACCOUNT
from tests.benchmarks.test_one_machine import BARE_HTTP, BARE_STDIO, free_port, over_http, over_stdio, reachable, timed
from tests.support.installation import ADMIN_KEY, Installation
from tests.support.stored import queued
from tests.support.worlds import World, until

pytestmark = [pytest.mark.benchmark, pytest.mark.anyio]

READS: list[tuple[str, dict[str, Any]]] = [
    ("get_task", {"task_id": "<task>"}),
    ("wait_tasks", {"task_ids": ["<task>"], "timeout_seconds": 0}),
    ("list_tasks", {"limit": 1}),
    ("get_task_logs", {"task_id": "<task>"}),
    ("list_schedules", {}),
    ("get_queue", {}),
    ("list_pending_questions", {}),
]
WRITES: list[tuple[str, dict[str, Any]]] = [
    ("submit_task", {"prompt": "x", "repository": "none"}),
    ("cancel_task", {"task_id": "<task>"}),
    ("get_task", {"task_id": "<task>"}),  # it has ended now, and is in no queue
]
WAITING = 500


@pytest.fixture
def servers(world: World) -> Generator[tuple[int, int, int]]:
    """The ports of ours and of a bare one, and the process of ours. No worker takes the tasks."""
    with only_worker(world.home, version=__version__):
        port, bare_port = free_port(), free_port()
        environment = {**world.environment, "ADMIN_API_KEY": "key"}
        ours = subprocess.Popen(
            [sys.executable, "-m", "cloudagent_mcp", "serve", "--port", str(port)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        bare = subprocess.Popen(
            [sys.executable, "-c", BARE_HTTP, str(bare_port)], env=environment, stderr=subprocess.DEVNULL
        )
        try:
            for number in (port, bare_port):
                until(lambda number=number: reachable(number), "the server is up")
            yield port, bare_port, ours.pid
        finally:
            for process in (ours, bare):
                process.terminate()
                process.wait(10)


async def compare(client: Client, bare: Client, transport: str) -> None:
    submitted = await client.call_tool("submit_task", {"prompt": "x", "repository": "none"})
    task_id = cast("dict[str, Any]", submitted.structured_content)["task_id"]
    print(f"\nmedians over {transport}")
    for tool, given in [*READS, *WRITES]:
        arguments = json.loads(json.dumps(given).replace("<task>", task_id))
        ours: list[float] = []
        floor: list[float] = []
        for _ in range(60):  # in turns, so that what else the machine does meets both
            floor += await timed(1, lambda: bare.call_tool("echo", {"text": "x"}))
            ours += await timed(1, lambda arguments=arguments, tool=tool: client.call_tool(tool, arguments))
        one, other = statistics.median(ours), statistics.median(floor)
        aim = "aim 2x" if (tool, given) not in WRITES[:2] else "no aim"
        print(f"  {tool}: {one * 1000:.2f} ms against {other * 1000:.2f} ms, {one / other:.2f}x ({aim})")


async def test_the_size_of_the_list_of_tools(world: World) -> None:
    async with over_stdio(["-m", "cloudagent_mcp", "mcp"], world.environment) as client:
        tools = [
            tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in (await client.list_tools()).tools
        ]
    seen = [{name: tool[name] for name in ("name", "description", "inputSchema")} for tool in tools]
    for what, listed in (("on the wire", tools), ("as a model sees them", seen)):
        size = len(json.dumps(listed, separators=(",", ":")))
        print(f"\n{len(listed)} tools {what}: {size} bytes, about {size / 4:.0f} tokens")


async def test_each_tool_against_a_bare_one_over_stdio(world: World) -> None:
    with only_worker(world.home, version=__version__):
        async with over_stdio(["-c", BARE_STDIO], world.environment) as bare:
            async with over_stdio(["-m", "cloudagent_mcp", "mcp"], world.environment) as client:
                await compare(client, bare, "stdio")


async def test_each_tool_against_a_bare_one_over_http(servers: tuple[int, int, int]) -> None:
    port, bare_port, _ = servers
    async with over_http(bare_port) as bare, over_http(port) as client:
        await compare(client, bare, "HTTP")


@asynccontextmanager
async def clients(port: int, count: int) -> AsyncGenerator[list[Client]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(over_http(port)) for _ in range(count)]


async def per_second(port: int, count: int, tool: str, arguments: dict[str, Any], seconds: float = 4.0) -> float:
    done = 0
    async with clients(port, count) as all_of_them:
        until_then = time.perf_counter() + seconds

        async def call(client: Client) -> None:
            nonlocal done
            while time.perf_counter() < until_then:
                assert not (await client.call_tool(tool, arguments)).is_error
                done += 1

        async with anyio.create_task_group() as group:
            for client in all_of_them:
                group.start_soon(call, client)
    return done / seconds


async def test_requests_a_second_with_one_client_and_with_sixteen(servers: tuple[int, int, int]) -> None:
    port, bare_port, _ = servers
    for count in (1, 16):
        ours = await per_second(port, count, "list_tasks", {"limit": 1})
        bare = await per_second(bare_port, count, "echo", {"text": "x"})
        print(
            f"\n{count} clients over HTTP: {ours:.0f} list_tasks a second, {ours / bare:.2f}x a bare tool's {bare:.0f}"
        )


async def test_what_five_hundred_waiting_calls_hold(servers: tuple[int, int, int], world: World) -> None:
    port, _, pid = servers
    server, database = psutil.Process(pid), str(world.home / "cloudagent.db")

    def held() -> tuple[float, int, int]:
        files = [Path(file.path).name for file in server.open_files() if file.path == database]
        return server.memory_full_info().uss / 1e6, server.num_threads(), len(files)

    async with clients(port, 16) as all_of_them:
        task = await all_of_them[0].call_tool("submit_task", {"prompt": "x", "repository": "none"})
        waited = {"task_id": cast("dict[str, Any]", task.structured_content)["task_id"], "wait_seconds": 50}
        for client in all_of_them:
            await client.call_tool("list_tasks", {})
        before = during = held()
        async with anyio.create_task_group() as group:
            for number in range(WAITING):
                group.start_soon(all_of_them[number % 16].call_tool, "get_task", waited)
            await anyio.sleep(15)
            during = held()
            await all_of_them[0].call_tool("cancel_task", {"task_id": waited["task_id"]})
    names = ("MB", "threads", "open database files")
    for name, one, other in zip(names, before, during, strict=True):
        print(f"\n{WAITING} waiting calls: {one:.0f} {name} before, {other:.0f} while they wait")


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
async def test_how_soon_a_client_is_told_of_what_another_process_has_changed(
    database: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    made = Installation.make(
        tmp_path, database="sqlite" if database == "sqlite" else request.getfixturevalue("postgres_url")
    )
    _, url = made.start_server()
    took: list[float] = []
    async with httpx2.AsyncClient(headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=60) as http:
        async with Client(streamable_http_client(f"{url}/mcp", http_client=http)) as client:
            asked = await timed(20, lambda: client.call_tool("list_tasks", {"limit": 1}))
            for _ in range(20):
                task_id = queued(made.store)
                async with client.listen(resource_subscriptions=[f"task://{task_id}"]) as told:
                    await anyio.sleep(0.5)  # it looks once more when it begins
                    began = time.perf_counter()
                    await anyio.to_thread.run_sync(made.store.tasks.request_cancel, LOCAL_ACCOUNT, task_id)
                    await anext(told)
                    took.append(time.perf_counter() - began)
    made.close()
    one, other = statistics.median(took), statistics.median(asked)
    print(
        f"\nfrom a change to the notification, {database}: p50 {one * 1000:.0f} ms, at most {max(took) * 1000:.0f} ms; "
        f"{one / other:.1f}x a call of list_tasks"
    )
