"""The bridge: `ca mcp` with CLOUDAGENT_URL set. The same operations, done by the server that it names.

What concerns this machine is done here: a result is written into the working tree, and a folder that is named as the
repository becomes what the server finds it by. All faces stand on `operations`, so that they need not know.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from cloudagent_mcp.app import App, composed
from cloudagent_mcp.hand_over import for_server
from cloudagent_mcp.operations import Caller, Operation, check_arguments
from cloudagent_mcp.operations.credentials import arguments_of
from cloudagent_mcp.operations.tasks import changed
from cloudagent_mcp.remote_server import RemoteServer
from cloudagent_mcp.settings import Settings
from cloudagent_mcp.untrusted import clean, cut
from cloudagent_storage.errors import InvalidInput, ServerOutdated, Unavailable
from cloudagent_storage.records import Task

if TYPE_CHECKING:
    from cloudagent_queue.task_queue import TaskQueue
    from cloudagent_storage.store import Store

STEP_S = 5.0
"""How long the server is asked to wait at a time, so that whoever waits here is told how it goes."""


class Bridge(App):
    """What a process works with whose tasks are a server's. It keeps no database and starts no worker."""

    def __init__(self, settings: Settings, *, send_credentials: bool = False) -> None:
        """With `send_credentials` each task is given what the environment has for the model and for GitHub."""
        super().__init__(settings)
        self.keeps_tasks = False
        self.server = RemoteServer(settings)
        self._send_credentials = send_credentials

    @cached_property
    def operations(self) -> dict[str, Operation]:
        credentials = arguments_of(self.settings.environment) if self._send_credentials else {}
        own = super().operations
        marks = {name: operation.marked for name, operation in own.items()}
        of_a_task = frozenset(own["submit_task"].arguments.model_fields)
        remote: dict[str, Operation] = {
            name: RemoteOperation(
                **{field.name: getattr(operation, field.name) for field in fields(operation)},
                server=self.server,
                marks=marks,
                known=of_a_task | frozenset(operation.arguments.model_fields),
                credentials=credentials,
            )
            for name, operation in own.items()
        }
        # Made of two others, so that whoever waits here is told how it goes.
        return remote | composed(remote)

    @cached_property
    def store(self) -> Store:
        raise Unavailable("The tasks are kept by the server that CLOUDAGENT_URL names.")

    @cached_property
    def queue(self) -> TaskQueue:
        raise Unavailable("The tasks are kept by the server that CLOUDAGENT_URL names.")

    def ensure_worker(self) -> None:
        """The server's workers do it."""


@dataclass(frozen=True)
class RemoteOperation(Operation):
    """An operation whose arguments are checked here, and which is done there."""

    server: RemoteServer
    marks: Mapping[str, Any]
    known: frozenset[str]
    """The names of its arguments, and of those of a task within them."""
    credentials: Mapping[str, str]

    async def call(self, caller: Caller, arguments: Mapping[str, Any]) -> Any:
        """Raises errors of the error tree alone, as the server would, and those of `RemoteServer`."""
        checked = check_arguments(self.arguments, arguments)
        # Not `checked`: an older server refuses what it does not know, and need not be told of defaults.
        given = {name: value for name, value in arguments.items() if value is not None}
        match self.name:
            case "apply_task" if caller.folder is not None:
                return await self.server.apply_task(caller.folder, self.marks, **given)
            case "submit_task":
                given = await self._for_server(caller, given)
            case "verify_task" if checked["repository"] is not None:
                given = await self._for_server(caller, {**given, "allow_secrets": None})
            case "create_schedule" | "update_schedule" if isinstance(given.get("task"), dict):
                task: Mapping[str, Any] = given["task"]
                new = self.name == "create_schedule"
                given["task"] = await self._for_server(caller, task, new=new, within="task.")
            case "get_task" if checked["wait_seconds"] > STEP_S:
                return await self._wait_for_change(caller, given, checked["wait_seconds"])
            case "wait_tasks" if checked["timeout_seconds"] > STEP_S:
                return await self._wait_for_end(caller, given, checked["timeout_seconds"])
            case _:
                pass
        return await self._ask(given)

    async def _ask(self, given: Mapping[str, Any]) -> Any:
        said = await self.server.call(self.name, self.marks[self.name], given, known=self.known)
        try:
            return TypeAdapter(self.answer).validate_python(said)
        except ValidationError:
            raise ServerOutdated(
                f"The cloudagent server answers {self.name} in a way that this program does not understand.",
                remedy="Update whichever of the two is older; `ca doctor` tells both versions.",
            ) from None

    async def _wait_for_change(self, caller: Caller, given: Mapping[str, Any], seconds: float) -> Any:
        """In steps; what the status was at first decides what a change is."""
        started, before = time.monotonic(), await self._ask({**given, "wait_seconds": 0})
        found = before
        while not found.status.terminal and not changed(before, found):
            left = seconds - (time.monotonic() - started)
            if left <= 0:
                break
            if found is not before:
                await _report(caller, started, seconds, [found], found.log[-1] if found.log else "")
            found = await self._ask({**given, "wait_seconds": min(STEP_S, left)})
        return found

    async def _wait_for_end(self, caller: Caller, given: Mapping[str, Any], seconds: float) -> Any:
        started = time.monotonic()
        while True:
            left = max(0.0, seconds - (time.monotonic() - started))
            found = await self._ask({**given, "timeout_seconds": min(STEP_S, left)})
            if found.finished or left <= STEP_S:
                return found
            await _report(caller, started, seconds, found.tasks)

    async def _for_server(
        self, caller: Caller, task: Mapping[str, Any], *, new: bool = True, within: str = ""
    ) -> dict[str, Any]:
        """A task's arguments with nothing in them that only this machine knows; those of a schedule are `within`."""
        given = {**(self.credentials if self.name != "verify_task" else {}), **task}
        name = given.get("repository")
        if name is None and (not new or given.get("continue_task_id")):
            return given  # it stays what it is
        folder, allowed = caller.folder or Path.cwd(), given.pop("allow_secrets", ())
        try:
            place = await for_server(
                self.server,
                folder,
                name,
                given.get("base_ref"),
                may_upload=not within,
                allow_secrets=allowed,
                tell=caller.progress,
            )
        except InvalidInput as error:
            error.field = f"{within}{error.field}" if error.field else None
            raise
        return {name: value for name, value in {**given, **place}.items() if value is not None or name not in place}


async def _report(caller: Caller, started: float, seconds: float, tasks: Any, line: str = "") -> None:
    if caller.progress is None:
        return
    told = "; ".join(_told(task) for task in tasks[:5])
    passed = min(seconds, time.monotonic() - started)
    await caller.progress(passed, seconds, f"{told}: {cut(clean(line), 200)}" if line else told)


def _told(task: Task) -> str:
    return f"{clean(task.title)[:60]}: {task.status}" + (f", {task.phase}" if task.phase else "")
