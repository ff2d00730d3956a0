"""What the product costs beside its floor, measured in the same run. Prints ratios, asserts nothing.

uv run pytest -m benchmark -n 0 -s
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import claude_agent_sdk
import psutil
import pytest
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client

from cloudagent_mcp import __version__
from cloudagent_mcp.embedded import only_worker
from cloudagent_mcp.scripted_model import Rule, ScriptedModel, Text, Turn
from tests.support.worlds import World, until

pytestmark = [pytest.mark.benchmark, pytest.mark.anyio, pytest.mark.timeout(600)]

BARE = """
from mcp.server import MCPServer
server = MCPServer("bare", log_level="WARNING")
@server.tool()
def echo(text: str) -> str:
    "Say it again."
    return text
"""
BARE_STDIO = BARE + "server.run('stdio')"
BARE_HTTP = BARE + (
    "import sys\nserver.run('streamable-http', host='127.0.0.1', port=int(sys.argv[1]), stateless_http=True)"
)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def tell(what: str, ours: list[float], floor: list[float], aim: str) -> None:
    a, b = statistics.median(ours), statistics.median(floor)
    print(f"\n{what}: {a * 1000:.1f} ms against {b * 1000:.1f} ms, {a / b:.2f}x (aim {aim}; medians of {len(ours)})")


@asynccontextmanager
async def over_stdio(arguments: list[str], env: dict[str, str]) -> AsyncGenerator[Client]:
    server = StdioServerParameters(command=sys.executable, args=arguments, env=env)
    async with Client(server) as client:
        yield client


async def timed(count: int, call: Callable[[], Awaitable[Any]]) -> list[float]:
    taken: list[float] = []
    for _ in range(count):
        started = time.perf_counter()
        await call()
        taken.append(time.perf_counter() - started)
    return taken


async def test_start_of_the_stdio_server_to_the_answer_of_tools_list(world: World) -> None:
    async def start(arguments: list[str]) -> None:
        async with over_stdio(arguments, world.environment) as client:
            await client.list_tools()

    ours: list[float] = []
    floor: list[float] = []
    for _ in range(7):
        ours += await timed(1, lambda: start(["-m", "cloudagent_mcp", "mcp"]))
        floor += await timed(1, lambda: start(["-c", BARE_STDIO]))
    tell("stdio start to tools/list", ours, floor, "1.3x")


async def test_submit_over_stdio_and_http_against_a_bare_tool_call(world: World, stack: ExitStack) -> None:
    environment = world.environment
    submit = {"prompt": "x", "repository": "none"}

    async def measure(client: Client, tool: str, arguments: dict[str, Any]) -> list[float]:
        for _ in range(5):
            assert not (await client.call_tool(tool, arguments)).is_error
        return await timed(60, lambda: client.call_tool(tool, arguments))

    # It looks as if a worker ran, so that the tasks stay where they are and the submit alone is measured.
    stack.enter_context(only_worker(world.home, version=__version__))
    async with over_stdio(["-c", BARE_STDIO], environment) as bare:
        floor = await measure(bare, "echo", {"text": "x"})
    async with over_stdio(["-m", "cloudagent_mcp", "mcp"], environment) as client:
        ours = await measure(client, "submit_task", submit)
        reads = await measure(client, "list_tasks", {"limit": 1})
    tell("submit_task over stdio", ours, floor, "3x")
    tell("list_tasks over stdio", reads, floor, "-")

    port, bare_port = free_port(), free_port()
    serving = [
        subprocess.Popen([sys.executable, "-c", BARE_HTTP, str(bare_port)], env=environment, stderr=subprocess.DEVNULL),
        subprocess.Popen(
            [sys.executable, "-m", "cloudagent_mcp", "serve", "--port", str(port)],
            env={**environment, "ADMIN_API_KEY": "key"},
        ),
    ]
    try:
        for number in (port, bare_port):
            until(lambda number=number: reachable(number), "the server is up")
        async with over_http(bare_port) as bare:
            floor = await measure(bare, "echo", {"text": "x"})
        async with over_http(port) as client:
            ours = await measure(client, "submit_task", submit)
        tell("submit_task over HTTP", ours, floor, "3x")
    finally:
        for process in serving:
            process.terminate()
            process.wait(10)


@asynccontextmanager
async def over_http(port: int) -> AsyncGenerator[Client]:
    async with create_mcp_http_client(headers={"Authorization": "Bearer key"}) as http:
        async with Client(streamable_http_client(f"http://127.0.0.1:{port}/mcp", http_client=http)) as client:
            yield client


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def reachable(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def test_submit_to_the_first_word_of_the_agent_against_the_same_cli_by_hand(world: World, repo: Path) -> None:
    binary = Path(claude_agent_sdk.__file__).parent / "_bundled" / "claude"
    with ScriptedModel([Rule(prompt="Hello", turns=(Turn(blocks=(Text(text="Hello."),)),))]) as model:
        world = world.with_model(model.environment())
        world.start_worker()
        by_hand = {
            **model.environment(),
            "HOME": world.environment["HOME"],
            "PATH": os.environ["PATH"],
            "IS_SANDBOX": "1",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        }
        ours: list[float] = []
        floor: list[float] = []
        with world.client(repo) as client:
            for _ in range(7):
                started = time.perf_counter()
                process = subprocess.Popen(
                    [binary, "-p", "Hello", "--output-format", "stream-json", "--verbose"],
                    cwd=repo,
                    env=by_hand,
                    stdout=subprocess.PIPE,
                    stdin=subprocess.DEVNULL,
                )
                assert process.stdout is not None
                for line in process.stdout:
                    if json.loads(line)["type"] == "assistant":
                        break
                floor.append(time.perf_counter() - started)
                process.communicate()

                started = time.perf_counter()
                task_id = client.call("submit_task", prompt="Hello")["task_id"]
                until(
                    lambda task_id=task_id: client.call("get_task_logs", task_id=task_id, kinds=["text"])["lines"],
                    "the agent speaks",
                )
                ours.append(time.perf_counter() - started)
                world.wait(client, task_id)
    tell("submit to the first event of the agent", ours, floor, "1.2x")


async def test_idle_memory_of_server_and_worker(world: World, stack: ExitStack) -> None:
    stack.enter_context(only_worker(world.home, version=__version__))
    port = free_port()
    environment = {**world.environment, "ADMIN_API_KEY": "key"}
    worker = world.start_worker(concurrency=10)
    server = subprocess.Popen([sys.executable, "-m", "cloudagent_mcp", "serve", "--port", str(port)], env=environment)
    bare = subprocess.Popen([sys.executable, "-c", BARE_HTTP, str(free_port())], env=environment)
    try:
        until(lambda: reachable(port), "the server is up")
        settled = time.monotonic() + 3
        until(lambda: time.monotonic() > settled, "it has settled")
        floor = psutil.Process(bare.pid).memory_full_info().uss
        for name, process in (("server", server), ("worker", worker)):
            used = psutil.Process(process.pid).memory_full_info().uss
            print(f"\nidle memory of the {name}: {used / 1e6:.0f} MB, {used / floor:.2f}x a bare MCP server")
    finally:
        for process in (server, bare):
            process.terminate()
            process.wait(10)
