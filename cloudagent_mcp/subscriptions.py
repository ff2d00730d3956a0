"""`subscriptions/listen` (2026-07-28): told of tasks and schedules that whatever process has changed.

The SDK's own handler knows what happens in this process, and not who may hear of what. Here a stream is fed by the
store's change feed, holds neither a thread nor a connection meanwhile, and is told of its account's rows alone.

The older protocol's `resources/subscribe` is not offered: over HTTP it needs a session in one process's memory and a
stream apart from any request, and this server keeps neither, so that any of its processes can answer any request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import anyio
from mcp.server.subscriptions import SUBSCRIPTION_ID_META_KEY, ResourceUpdated, ServerEvent, SubscriptionBus
from mcp.shared.exceptions import MCPError
from mcp.shared.subscriptions import event_matches, event_to_notification
from mcp.types import (
    ServerNotification,
    SubscriptionFilter,
    SubscriptionsAcknowledgedNotification,
    SubscriptionsAcknowledgedNotificationParams,
    SubscriptionsListenRequestParams,
    SubscriptionsListenResult,
)
from mcp_types.jsonrpc import INTERNAL_ERROR, INVALID_PARAMS, INVALID_REQUEST

from cloudagent_mcp.operations import Caller, in_thread
from cloudagent_mcp.resources import Address
from cloudagent_mcp.tasks_extension import RequestContext, TaskNotification, TasksExtension, require_tasks
from cloudagent_storage.errors import Internal, ScheduleNotFound, Unavailable
from cloudagent_storage.records import TaskHead
from cloudagent_storage.schedule import Schedule
from cloudagent_storage.store import Store

log = logging.getLogger(__name__)

STREAMS_MAX = 1024
"""Streams of one process."""
FOLLOWED_MAX = 200
"""Tasks and schedules of one stream."""
STREAM_MAX_S = 3600.0
"""A stream ends then, and its client listens anew: with a key that is looked at again."""
TOGETHER_S = 0.2
"""Changes that come at once are told of together."""
POLL_S = 1.0
"""How often it looks by itself while changes are not told of."""
SURE_S = 30.0
"""How often it looks by itself while they are."""

Head = TaskHead | Schedule | None


class Listening:
    """Serves streams of notifications."""

    def __init__(
        self,
        store: Callable[[], Store] | None,
        caller: Callable[[RequestContext], Caller],
        bus: SubscriptionBus,
        tasks: TasksExtension | None,
    ) -> None:
        """`bus` has what is published in this process, such as a changed list of prompts."""
        self._open_store = store
        self._caller = caller
        self._bus = bus
        self._tasks = tasks
        self._streams = 0

    async def __call__(
        self, ctx: RequestContext, params: SubscriptionsListenRequestParams
    ) -> SubscriptionsListenResult:
        """One stream, until its client leaves. Raises the protocol's errors."""
        if ctx.request_id is None:
            raise MCPError(INVALID_REQUEST, "subscriptions/listen needs a request id.")
        uris, task_ids = _wanted(params.notifications)
        if task_ids:
            require_tasks(ctx)
        if len(uris) + len(task_ids) > FOLLOWED_MAX:
            raise MCPError(INVALID_PARAMS, f"One stream follows at most {FOLLOWED_MAX} tasks and resources.")
        if self._streams >= STREAMS_MAX:
            raise MCPError(INTERNAL_ERROR, "Too many streams are open; close one, or poll.")
        self._streams += 1
        try:
            stream = _Stream(ctx, params.notifications, uris, task_ids, self._tasks)
            with anyio.move_on_after(STREAM_MAX_S):
                await stream.serve(self._open_store, self._caller(ctx), self._bus)
        finally:
            self._streams -= 1
        return SubscriptionsListenResult(_meta=stream.meta)


class _Stream:
    """What one client listens to."""

    def __init__(
        self,
        ctx: RequestContext,
        wanted: SubscriptionFilter,
        uris: Sequence[str],
        task_ids: Sequence[str],
        tasks: TasksExtension | None,
    ) -> None:
        self.meta: dict[str, Any] = {SUBSCRIPTION_ID_META_KEY: ctx.request_id}
        self._ctx = ctx
        self._wanted = wanted
        self._addresses = {uri: Address.parse(uri) for uri in uris}
        self._task_ids = task_ids if tasks is not None else ()
        self._tasks = tasks
        self._changed = asyncio.Event()
        self._pending: dict[ServerEvent, None] = {}

    async def serve(self, open_store: Callable[[], Store] | None, caller: Caller, bus: SubscriptionBus) -> None:
        loop = asyncio.get_running_loop()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed in this moment
                loop.call_soon_threadsafe(self._changed.set)

        followed = {*self._task_ids, *(address.id for address in self._addresses.values() if address is not None)}
        if not followed or open_store is None:  # without a store nothing is known, and the acknowledgement says so
            await self._serve(None, {}, bus)
            return
        store = await in_thread(open_store)

        def look() -> Mapping[str, Head]:
            return _heads(store, caller.account_id, followed)

        with store.changes.watch(followed, tell):
            await self._serve((store, look), await in_thread(look), bus)

    async def _serve(
        self,
        feed: tuple[Store, Callable[[], Mapping[str, Head]]] | None,
        seen: Mapping[str, Head],
        bus: SubscriptionBus,
    ) -> None:
        honored = self._honored(seen)
        uris = frozenset(honored.resource_subscriptions or ())

        def published(event: ServerEvent) -> None:
            # Each says that something has changed, not how: told of once, however often it has.
            if event_matches(honored, uris, event):
                self._pending[event] = None
                self._changed.set()

        unsubscribe = bus.subscribe(published)
        try:
            acknowledged = SubscriptionsAcknowledgedNotificationParams(notifications=honored, _meta=self.meta)
            await self._send(SubscriptionsAcknowledgedNotification(params=acknowledged))
            looked = time.monotonic()
            while True:
                with anyio.move_on_after(self._patience(feed, looked)):
                    await self._changed.wait()
                self._changed.clear()
                if feed is not None:
                    looked = time.monotonic()
                    with contextlib.suppress(Unavailable, Internal):  # looked at again later
                        now = await in_thread(feed[1])
                        await self._tell(seen, now, uris)
                        seen = now
                while self._pending:
                    await self._send(event_to_notification(self._pending.popitem()[0], self.meta))
                await anyio.sleep(TOGETHER_S)
        finally:
            unsubscribe()

    def _patience(self, feed: tuple[Store, Any] | None, looked: float) -> float:
        if feed is None:
            return SURE_S
        return max(0.0, looked + (SURE_S if feed[0].changes.prompt else POLL_S) - time.monotonic())

    def _honored(self, seen: Mapping[str, Head]) -> SubscriptionFilter:
        """What the client will hear of. Of a task that is unknown or another's, as little is said as of any other."""
        known = {key for key, head in seen.items() if head is not None}
        uris = [uri for uri, address in self._addresses.items() if address is None or address.id in known]
        task_ids = [task_id for task_id in self._task_ids if task_id in known]
        more: dict[str, Any] = {"taskIds": task_ids} if task_ids else {}
        return SubscriptionFilter(
            tools_list_changed=self._wanted.tools_list_changed or None,
            prompts_list_changed=self._wanted.prompts_list_changed or None,
            resources_list_changed=self._wanted.resources_list_changed or None,
            resource_subscriptions=uris or None,
            **more,
        )

    async def _tell(self, seen: Mapping[str, Head], now: Mapping[str, Head], uris: frozenset[str]) -> None:
        for uri, address in self._addresses.items():
            if (
                address is not None
                and uri in uris
                and _differs(seen.get(address.id), now.get(address.id), address.part)
            ):
                await self._send(event_to_notification(ResourceUpdated(uri), self.meta))
        for task_id in self._task_ids:
            before, after = seen.get(task_id), now.get(task_id)
            if self._tasks is not None and after is not None and _differs(before, after, "status"):
                notification = TaskNotification.of(await self._tasks.get(self._ctx, task_id), self.meta)
                await self._send(cast("ServerNotification", notification))

    async def _send(self, notification: ServerNotification) -> None:
        await self._ctx.session.send_notification(notification, related_request_id=self._ctx.request_id)


def _wanted(filter_: SubscriptionFilter) -> tuple[list[str], list[str]]:
    """The resources and the tasks that a client names, each once. Raises the protocol's error."""
    task_ids = cast("list[Any]", (filter_.model_extra or {}).get("taskIds") or [])
    if type(task_ids) is not list or any(type(task_id) is not str for task_id in task_ids):
        raise MCPError(INVALID_PARAMS, "taskIds is not a list of ids.")
    return list(dict.fromkeys(filter_.resource_subscriptions or [])), list(dict.fromkeys(task_ids))


def _heads(store: Store, account_id: str, followed: set[str]) -> Mapping[str, Head]:
    """How far each is, of the account's own; None is one that is unknown, gone or another's."""
    heads: dict[str, Head] = {}
    heads |= store.tasks.heads(account_id, list(followed))
    for schedule_id in followed:
        if schedule_id.startswith("sch_"):
            try:
                heads[schedule_id] = store.schedules.get(account_id, schedule_id)
            except ScheduleNotFound:
                heads[schedule_id] = None
    return heads


def _differs(before: Head, now: Head, part: str | None) -> bool:
    """Has the part that a client follows changed between two looks?"""
    if not isinstance(before, TaskHead) or not isinstance(now, TaskHead) or part is None:
        return before != now
    if part == "status":
        return (before.status, before.phase, before.question_id) != (now.status, now.phase, now.question_id)
    if part == "log":
        return (before.last_seq, before.expired) != (now.last_seq, now.expired)
    # The diff and the result are there from the end on, and until they are pruned.
    return (before.status.terminal, before.expired) != (now.status.terminal, now.expired)
