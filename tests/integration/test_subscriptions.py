"""Two server processes behind one address: who listens on one is told of what any other process has changed."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.subscriptions import ResourceUpdated

from cloudagent_mcp.api_keys import create_key
from cloudagent_mcp.server import mcp_server
from cloudagent_mcp.settings import Settings
from cloudagent_storage.records import TaskStatus
from tests.support.installation import ADMIN_KEY, Installation
from tests.support.stored import claimed, line, queued
from tests.support.wire import Wire, next_of
from tests.support.worlds import World

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def client_of(url: str, key: str = ADMIN_KEY) -> AsyncGenerator[Client]:
    async with httpx2.AsyncClient(headers={"Authorization": f"Bearer {key}"}, timeout=60) as http:
        async with Client(streamable_http_client(f"{url}/mcp", http_client=http)) as client:
            yield client


def key_of(installation: Installation, account_id: str) -> str:
    keyring = Settings.read(installation.environment()).keyring
    return create_key(installation.store, keyring, account_id=account_id, name="test")[1]


async def test_a_listener_of_each_server_is_told_of_what_another_process_changes(installation: Installation) -> None:
    (_, one), (_, two) = installation.start_server(), installation.start_server()
    task_id = queued(installation.store)
    uris = [f"task://{task_id}", f"task://{task_id}/log", f"task://{task_id}/diff", f"task://{task_id}/result"]
    async with client_of(one) as first, client_of(two) as second:
        async with (
            first.listen(resource_subscriptions=uris) as on_first,
            second.listen(resource_subscriptions=uris) as on_second,
        ):
            for subscription in (on_first, on_second):
                assert subscription.honored.resource_subscriptions == uris

            async def told(subscription: Any, expected: set[str]) -> None:
                seen: set[str] = set()
                with anyio.fail_after(20):
                    while not expected <= seen:
                        event = await anext(subscription)
                        assert isinstance(event, ResourceUpdated)
                        seen.add(event.uri)
                assert seen == expected

            async def both(expected: set[str]) -> None:
                async with anyio.create_task_group() as group:
                    group.start_soon(told, on_first, expected)
                    group.start_soon(told, on_second, expected)

            claim = await anyio.to_thread.run_sync(claimed, installation.store, task_id)
            await both({uris[0]})
            installation.store.events.add(task_id, line("said"), attempt=claim.attempt)
            await both({uris[0], uris[1]})
            installation.store.tasks.finish(task_id, claim.attempt, status=TaskStatus.COMPLETED)
            await both({uris[0], uris[2], uris[3]})


async def test_a_change_of_a_schedule_is_told_of_by_the_other_server(installation: Installation) -> None:
    (_, one), (_, two) = installation.start_server(), installation.start_server()
    async with client_of(one) as first, client_of(two) as second:
        asked = {"name": "Nightly", "cron": "0 3 * * *", "task": {"prompt": "x", "repository": "none"}}
        made: Any = (await first.call_tool("create_schedule", asked)).structured_content
        uri = f"schedule://{made['schedule_id']}"
        async with first.listen(resource_subscriptions=[uri]) as subscription:
            for name, arguments in (
                ("update_schedule", {"enabled": False}),
                ("run_schedule", {}),
                ("delete_schedule", {}),
            ):
                done = await second.call_tool(name, {"schedule_id": made["schedule_id"], **arguments})
                assert not done.is_error, done.content
                with anyio.fail_after(20):
                    assert await anext(subscription) == ResourceUpdated(uri)


async def test_nobody_hears_of_anothers_task(installation: Installation) -> None:
    _, url = installation.start_server()
    mine = queued(installation.store)
    other = key_of(installation, "other")
    foreign = queued(installation.store, account_id="other")
    uris = [f"task://{mine}", f"task://{foreign}", "task://" + "task_" + "a" * 26]
    async with client_of(url) as me, client_of(url, other) as them:
        async with me.listen(resource_subscriptions=uris) as own, them.listen(resource_subscriptions=uris) as theirs:
            assert own.honored.resource_subscriptions == [uris[0]]
            assert theirs.honored.resource_subscriptions == [uris[1]]
            claimed(installation.store, foreign)
            with anyio.fail_after(20):
                assert await anext(theirs) == ResourceUpdated(uris[1])
            claimed(installation.store, mine)
            with anyio.fail_after(20):
                assert await anext(own) == ResourceUpdated(uris[0])  # and nothing before it


async def test_task_notifications_carry_the_whole_task_and_only_to_who_declares_the_extension(
    installation: Installation,
) -> None:
    (_, one), (_, two) = installation.start_server(), installation.start_server()
    made = await Wire(one, ADMIN_KEY).call("submit_task", {"prompt": "x", "repository": "none"})
    task_id = made["taskId"]
    unasked = queued(installation.store)
    installation.store.accounts.ensure("other")
    hidden = queued(installation.store, account_id="other")
    async with Wire(two, ADMIN_KEY, tasks=False).listen(taskIds=[task_id]) as refused:
        assert (await next_of(refused))["error"]["code"] == -32021
    async with Wire(two, ADMIN_KEY).listen(taskIds=[task_id, hidden]) as messages:
        acknowledged = await next_of(messages)
        assert acknowledged["method"] == "notifications/subscriptions/acknowledged"
        assert acknowledged["params"]["notifications"] == {"taskIds": [task_id]}
        claim = claimed(installation.store, task_id)
        claimed(installation.store, unasked)
        claimed(installation.store, hidden)
        running = await next_of(messages)
        assert running["method"] == "notifications/tasks" and running["params"]["taskId"] == task_id
        assert running["params"]["status"] == "working" and running["params"]["_meta"]
        installation.store.tasks.finish(task_id, claim.attempt, status=TaskStatus.COMPLETED)
        over = (await next_of(messages))["params"]
    same = (await Wire(one, ADMIN_KEY).ask("tasks/get", {"taskId": task_id}))["result"]
    assert over["status"] == "completed" and over["result"]["structuredContent"]["task_id"] == task_id
    assert {**over, "_meta": 0, "resultType": 0} == {**same, "_meta": 0, "resultType": 0}


async def test_a_hundred_listeners_hold_no_thread_and_no_connection(world: World) -> None:
    app = world.app()
    task_id = queued(app.store)
    watchers: dict[str, Any] = getattr(app.store.changes, "_watchers")  # noqa: B009
    async with Client(mcp_server(app, remote=False)) as client:
        async with client.listen(resource_subscriptions=[f"task://{task_id}"]):
            async with anyio.create_task_group() as group:
                told: list[object] = []
                ready: list[int] = []

                async def listen() -> None:
                    async with client.listen(resource_subscriptions=[f"task://{task_id}"]) as subscription:
                        ready.append(1)
                        told.append(await anext(subscription))

                for _ in range(100):
                    group.start_soon(listen)
                with anyio.fail_after(30):
                    while len(ready) < 100:
                        await anyio.sleep(0.02)
                with anyio.fail_after(10):
                    while anyio.to_thread.current_default_thread_limiter().borrowed_tokens:
                        await anyio.sleep(0.02)
                assert len(watchers[task_id]) == 101
                claimed(app.store, task_id)
                with anyio.fail_after(30):
                    while len(told) < 100:
                        await anyio.sleep(0.02)
        with anyio.fail_after(10):
            while watchers:
                await anyio.sleep(0.02)


async def test_a_server_with_open_streams_stops_when_it_is_asked_to(installation: Installation) -> None:
    server, url = installation.start_server()
    task_id = queued(installation.store)
    async with Wire(url, ADMIN_KEY).listen(resourceSubscriptions=[f"task://{task_id}"]) as messages:
        assert (await next_of(messages))["params"]["notifications"]
        await anyio.to_thread.run_sync(lambda: server.stop(within=30))
    assert not server.alive


async def test_one_stream_follows_not_more_than_it_can(installation: Installation) -> None:
    _, url = installation.start_server()
    many = [f"task://task_{number:026d}" for number in range(201)]
    async with Wire(url, ADMIN_KEY).listen(resourceSubscriptions=many) as messages:
        assert (await next_of(messages))["error"]["code"] == -32602
    async with Wire(url, ADMIN_KEY).listen(taskIds=[1]) as messages:
        assert (await next_of(messages))["error"]["code"] == -32602


async def test_the_time_from_a_change_to_its_notification_is_short(installation: Installation) -> None:
    """Printed, not judged: the machine is shared."""
    _, url = installation.start_server()
    task_id = queued(installation.store)
    claim = claimed(installation.store, task_id)
    took: list[float] = []
    async with client_of(url) as client:
        async with client.listen(resource_subscriptions=[f"task://{task_id}/log"]) as subscription:
            for _ in range(10):
                await anyio.sleep(0.4)
                started = time.monotonic()
                installation.store.events.add(task_id, line(), attempt=claim.attempt)
                with anyio.fail_after(20):
                    await anext(subscription)
                took.append(time.monotonic() - started)
    print(f"change to notification: median {sorted(took)[5] * 1000:.0f} ms, most {max(took) * 1000:.0f} ms")
