"""The operations as Python calls: in this very process, or over REST with the same names, arguments and answers."""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from anyio.from_thread import start_blocking_portal

from cloudagent_mcp.app import App
from cloudagent_mcp.bridge import Bridge
from cloudagent_mcp.hand_over import for_server
from cloudagent_mcp.operations import marks_of
from cloudagent_mcp.operations.backlog import Backlog
from cloudagent_mcp.operations.messages import Messages
from cloudagent_mcp.operations.results import Results
from cloudagent_mcp.operations.review import Review
from cloudagent_mcp.operations.schedules import Schedules
from cloudagent_mcp.operations.tasks import Tasks
from cloudagent_mcp.operations.verification import Verification
from cloudagent_mcp.remote_server import RemoteServer
from cloudagent_mcp.session_home import SessionHome
from cloudagent_mcp.settings import Settings
from cloudagent_storage import errors
from cloudagent_storage.records import ID_LENGTH

MARKS = marks_of(Tasks, Results, Messages, Review, Schedules, Backlog, Verification)
PAGES_SEARCHED = 10
T = TypeVar("T")
Told = Callable[[float, float, str], None]
"""Hears how many bytes have gone, of how many, and what happens."""


class Client(Protocol):
    """Calls operations by name; answers are what REST answers, as plain JSON values."""

    def call(self, name: str, /, **arguments: Any) -> dict[str, Any]:
        """Raises the errors of the error tree."""
        ...

    def apply(self, task_id: str, **arguments: Any) -> dict[str, Any]:
        """`apply_task` on this machine, wherever the task is kept."""
        ...

    def apply_in_order(self, task_ids: Sequence[str], **arguments: Any) -> dict[str, Any]:
        """`apply_tasks` on this machine, wherever the tasks are kept."""
        ...

    def resume(self, task_id: str, directory: Path, candidate: int | None = None) -> dict[str, Any]:
        """Put a task's session where this machine's Claude Code finds it. Raises errors under `SessionRefused`."""
        ...

    def resolve(self, prefix: str) -> str:
        """The task whose id begins so. Raises `TaskNotFound` or `AmbiguousId`."""
        ...

    def close(self) -> None: ...


def open_client(settings: Settings, told: Told | None = None) -> Client:
    """The server that `CLOUDAGENT_URL` names, or this process. `told` hears of uploads to it."""
    return HttpClient(settings, told) if settings.cloudagent_url else LocalClient(App(settings))


def log_lines(
    api: Client,
    name: str,
    *,
    after: int = 0,
    level: str | None = None,
    kinds: tuple[str, ...] = (),
    follow: bool = False,
) -> Iterator[dict[str, Any]]:
    """A task's log lines from `after` on; with `follow` until it has ended."""
    while True:
        # Looked at first: what is in the log after the end was seen is all that there will ever be.
        ended = not follow or api.call("get_task", task_id=name, log_lines=0)["completed_at"] is not None
        page = api.call("get_task_logs", task_id=name, after=after, level=level, kinds=list(kinds), limit=1000)
        yield from page["lines"]
        after = page["next_after"]
        if not page["more"]:
            if ended:
                return
            time.sleep(0.3)


def resolve_schedule(api: Client, name: str) -> str:
    """The id of the schedule of that id, name or unique beginning of an id, with or without `sch_`.

    Raises `ScheduleNotFound`, and `AmbiguousId` when there are several.
    """
    schedules = api.call("list_schedules")["schedules"]
    bare = name.removeprefix("sch_")
    named = [found["schedule_id"] for found in schedules if name in (found["schedule_id"], found["name"])]
    begun = [
        found["schedule_id"] for found in schedules if len(bare) >= 4 and found["schedule_id"][4:].startswith(bare)
    ]
    match named or begun:
        case [only]:
            return only
        case []:
            raise errors.ScheduleNotFound()
        case _:
            raise errors.AmbiguousId("Several schedules are called so.", field="schedule_id")


class LocalClient:
    """Works in this process, on the database of the data folder; the worker is a process of its own."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._portal_context = start_blocking_portal()
        self._portal = self._portal_context.__enter__()

    def call(self, name: str, /, **arguments: Any) -> dict[str, Any]:
        operation = self._app.operations[name]
        call = functools.partial(operation.call, self._app.local_caller(), arguments)
        answer = self._portal.start_task_soon(call).result()
        return answer.model_dump(mode="json")

    def apply(self, task_id: str, **arguments: Any) -> dict[str, Any]:
        return self.call("apply_task", task_id=task_id, **arguments)

    def apply_in_order(self, task_ids: Sequence[str], **arguments: Any) -> dict[str, Any]:
        return self.call("apply_tasks", task_ids=list(task_ids), **arguments)

    def resume(self, task_id: str, directory: Path, candidate: int | None = None) -> dict[str, Any]:
        caller = self._app.local_caller()
        task = self._app.store.candidates.choose(caller.account_id, task_id, candidate)
        home = self._app.sessions.bring_home(caller, task.task_id, directory)
        return home.model_dump(mode="json")

    def resolve(self, prefix: str) -> str:
        return self._app.store.tasks.resolve(self._app.local_caller().account_id, prefix)

    def close(self) -> None:
        self._portal_context.__exit__(None, None, None)
        self._app.close()


class HttpClient:
    """Works on a server. Raises what `RemoteServer` raises when it does not answer as one."""

    def __init__(self, settings: Settings, told: Told | None = None) -> None:
        """`told` hears of uploads, on another thread, while a call waits."""
        self._told = told
        self._settings = settings
        self._server = RemoteServer(settings)
        self._portal_context = start_blocking_portal()
        self._portal = self._portal_context.__enter__()

    def call(self, name: str, /, **arguments: Any) -> dict[str, Any]:
        return self._wait_for(lambda: self._call(name, arguments))

    async def _call(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        if name == "submit_task":
            arguments = await self._placed(arguments, may_upload=True)
        elif name == "verify_task" and arguments.get("repository") is not None:
            arguments = await self._placed({**arguments, "allow_secrets": None}, may_upload=True)
        elif name in ("create_schedule", "update_schedule") and arguments.get("task") is not None:
            task: Mapping[str, Any] = arguments["task"]
            if name == "create_schedule" or task.get("repository") is not None:
                arguments = {**arguments, "task": await self._placed(task, may_upload=False)}
        return await self._server.call(name, MARKS[name], arguments)

    async def _placed(self, task: Mapping[str, Any], *, may_upload: bool) -> dict[str, Any]:
        """A task's arguments, with what they say of this machine said for the server."""
        name, base_ref = task.get("repository"), task.get("base_ref")
        place = await for_server(
            self._server,
            Path.cwd(),
            name,
            base_ref,
            may_upload=may_upload,
            allow_secrets=task.get("allow_secrets", ()),
            tell=self._tell if may_upload else None,
        )
        return {**{name: value for name, value in task.items() if name != "allow_secrets"}, **place}

    async def _tell(self, done: float, total: float, message: str) -> None:
        if self._told is not None:
            self._told(done, total, message)

    def apply(self, task_id: str, **arguments: Any) -> dict[str, Any]:
        done = self._wait_for(lambda: self._server.apply_task(Path.cwd(), MARKS, task_id=task_id, **arguments))
        return done.model_dump(mode="json")

    def apply_in_order(self, task_ids: Sequence[str], **arguments: Any) -> dict[str, Any]:
        bridge = Bridge(self._settings)
        call = functools.partial(bridge.operations["apply_tasks"].call, bridge.local_caller())
        try:
            done = self._wait_for(lambda: call({"task_ids": list(task_ids), **arguments}))
        finally:
            self._portal.call(bridge.server.close)
        return done.model_dump(mode="json")

    def resume(self, task_id: str, directory: Path, candidate: int | None = None) -> dict[str, Any]:
        async def resume() -> SessionHome:
            task = await self._server.candidate(MARKS, task_id, candidate)
            return await self._server.resume_task(task["task_id"], directory)

        return self._wait_for(resume).model_dump(mode="json")

    def resolve(self, prefix: str) -> str:
        bare = prefix.removeprefix("task_")
        if len(bare) >= ID_LENGTH:
            return f"task_{bare}"
        found: set[str] = set()
        cursor: str | None = None
        with_candidates: dict[str, bool] = {"candidates": True}
        for _ in range(PAGES_SEARCHED):
            try:
                page = self.call("list_tasks", limit=100, cursor=cursor, **with_candidates)
            except errors.ServerOutdated:  # it knows of no candidates
                with_candidates = {}
                page = self.call("list_tasks", limit=100, cursor=cursor)
            found |= {task["task_id"] for task in page["tasks"] if task["task_id"][5:].startswith(bare)}
            if (cursor := page["next_cursor"]) is None:
                break
        if not found:
            raise errors.TaskNotFound()
        if len(found) > 1:
            raise errors.AmbiguousId()
        return found.pop()

    def close(self) -> None:
        self._portal.call(self._server.close)
        self._portal_context.__exit__(None, None, None)

    def _wait_for(self, start: Callable[[], Awaitable[T]]) -> T:
        future = self._portal.start_task_soon(start)
        try:
            return future.result()
        finally:
            future.cancel()  # who presses Ctrl-C waits no longer
