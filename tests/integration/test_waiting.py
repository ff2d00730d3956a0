"""A call that waits tells of progress to who asks for it, and ends with its caller; the task goes on."""

from __future__ import annotations

from typing import Any

import anyio
import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from cloudagent_mcp.server import mcp_server
from cloudagent_storage.records import Phase, TaskSpec, TaskStatus, Usage
from tests.support.installation import ADMIN_KEY, Installation
from tests.support.stored import claimed, line, queued
from tests.support.worlds import World

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("mode", ["auto", "legacy"])
@pytest.mark.parametrize("tool", ["get_task", "wait_tasks"])
async def test_progress_tells_phase_last_line_and_the_share_of_the_budget(
    installation: Installation, mode: Any, tool: str
) -> None:
    _, url = installation.start_server()
    store = installation.store
    spec = TaskSpec(prompt="x", title="Fix it", max_budget_usd=2.0)
    task_id = queued(store, spec=spec)
    attempt = claimed(store, task_id).attempt
    store.tasks.update(task_id, attempt, phase=Phase.AGENT, usage=Usage(cost_usd=0.5))
    store.events.add(task_id, line("Reading\x1b[31m the\n tests."), attempt=attempt)
    told: list[tuple[float, float | None, str | None]] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        told.append((progress, total, message))

    asked: dict[str, Any] = {"task_id": task_id, "wait_seconds": 50}
    if tool == "wait_tasks":
        asked = {"task_ids": [task_id], "timeout_seconds": 50}
    async with httpx2.AsyncClient(headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=120) as http:
        async with Client(streamable_http_client(f"{url}/mcp", http_client=http), mode=mode) as client:
            async with anyio.create_task_group() as group:

                async def wait() -> None:
                    await client.call_tool(tool, asked, progress_callback=note)

                group.start_soon(wait)
                with anyio.fail_after(30):
                    while not told:
                        await anyio.sleep(0.05)
                store.tasks.finish(task_id, attempt, status=TaskStatus.COMPLETED)
    assert told[0][1] == 50 and 0 < told[0][0] < 50
    assert told[0][2] == "Fix it: running, agent, 25% of $2; text: Reading[31m the tests."


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_cancelled_call_ends_at_once_and_the_task_goes_on(world: World, mode: Any) -> None:
    app = world.app()
    task_id = queued(app.store)
    watchers: dict[str, Any] = getattr(app.store.changes, "_watchers")  # noqa: B009
    async with Client(mcp_server(app, remote=False), mode=mode) as client:
        for tool, asked in (
            ("get_task", {"task_id": task_id, "wait_seconds": 50}),
            ("wait_tasks", {"task_ids": [task_id]}),
            ("delegate", {"prompt": "x", "repository": "none"}),
        ):
            async with anyio.create_task_group() as group:
                group.start_soon(client.call_tool, tool, asked)
                with anyio.fail_after(20):
                    while not watchers:
                        await anyio.sleep(0.02)
                group.cancel_scope.cancel()
            with anyio.fail_after(20):
                while watchers:
                    await anyio.sleep(0.02)
    page = app.store.tasks.list("local")
    assert [task.status for task in page.tasks] == [TaskStatus.QUEUED] * 2  # the one that was delegated as well
