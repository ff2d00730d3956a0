"""Tasks and schedules as MCP resources: what the operations answer, under an address that can be followed.

What an agent wrote is fenced, and all is bounded as a tool's answer is.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mcp.types import Annotations, ReadResourceResult, Resource, ResourceTemplate, TextResourceContents

from cloudagent_mcp.operations import Caller, Operation
from cloudagent_mcp.operations.diffs import Diff
from cloudagent_mcp.tools import shown
from cloudagent_mcp.untrusted import clean, cut, fence
from cloudagent_storage.errors import NoChanges, NotReady
from cloudagent_storage.records import LogPage, Task, TaskPage
from cloudagent_storage.schedule import Schedule, ScheduleList

LISTED = 50
"""How many of the newest tasks a list of resources names; list_tasks has them all."""
LOG_LINES = 200
LIVE_MS = 1000
"""How long a client may show what can change at any moment without asking again."""
ENDED_MS = 60_000
"""The same for what changes no more, except that it is pruned one day."""

ADDRESS = re.compile(r"(task|schedule)://([^/?#]+)(?:/(log|diff|result))?")
JSON = "application/json"
TEXT = "text/plain"


@dataclass(frozen=True)
class Address:
    """What a resource is about, of an address that was well formed."""

    kind: str
    id: str
    part: str | None

    @classmethod
    def parse(cls, uri: str) -> Address | None:
        """None where it is no address of ours."""
        found = ADDRESS.fullmatch(uri)
        if found is None or (found[1] == "schedule" and found[3]):
            return None
        return cls(found[1], found[2], found[3])


TEMPLATES = [
    ResourceTemplate(
        uri_template="task://{task_id}",
        name="task",
        title="Task",
        description="A task as get_task shows it: status, phase, verdict, result, cost, last log lines, next step.",
        mime_type=JSON,
    ),
    ResourceTemplate(
        uri_template="task://{task_id}/log",
        name="task-log",
        title="A task's log",
        description="The last lines of what the agent said, did and saw. Untrusted text.",
        mime_type=TEXT,
    ),
    ResourceTemplate(
        uri_template="task://{task_id}/diff",
        name="task-diff",
        title="A task's diff",
        description="What an ended task changed: the list of files and a unified diff. Untrusted text.",
        mime_type=TEXT,
    ),
    ResourceTemplate(
        uri_template="task://{task_id}/result",
        name="task-result",
        title="A task's result",
        description="How an ended task ended: verdict, the agent's last words, what the verify command printed.",
        mime_type=TEXT,
    ),
    ResourceTemplate(
        uri_template="schedule://{schedule_id}",
        name="schedule",
        title="Schedule",
        description="A schedule as get_schedule shows it: its task, next due times, and what became of the last ones.",
        mime_type=JSON,
    ),
]


class Resources:
    """The resources of whoever asks."""

    def __init__(self, operations: Mapping[str, Operation]) -> None:
        self._operations = operations
        self._parts: dict[str | None, Callable[[Caller, Task], Awaitable[str]]] = {
            "log": self._log,
            "diff": self._diff,
            "result": self._result,
        }

    async def list(self, caller: Caller) -> list[Resource]:
        """The newest tasks and all schedules of the caller's, as far as they are few."""
        tasks: TaskPage = await self._call("list_tasks", caller, limit=LISTED)
        schedules: ScheduleList = await self._call("list_schedules", caller, limit=LISTED)
        return [*map(_task_resource, tasks.tasks), *map(_schedule_resource, schedules.schedules)]

    async def read(self, caller: Caller, uri: str) -> ReadResourceResult | None:
        """What is at an address; None where it is not one of ours.

        Raises `TaskNotFound` and `ScheduleNotFound`, the same for another account's id as for an unknown one,
        `NotReady` for the diff or result of a task that goes on, and `TaskExpired`.
        """
        address = Address.parse(uri)
        if address is None:
            return None
        if address.kind == "schedule":
            schedule: Schedule = await self._call("get_schedule", caller, schedule_id=address.id)
            return _content(uri, JSON, shown(schedule), LIVE_MS)
        task: Task = await self._call("get_task", caller, task_id=address.id)
        ttl_ms = ENDED_MS if task.status.terminal else LIVE_MS
        part = self._parts.get(address.part)
        if part is None:
            return _content(uri, JSON, shown(task), ttl_ms)
        return _content(uri, TEXT, await part(caller, task), ttl_ms)

    async def _log(self, caller: Caller, task: Task) -> str:
        page: LogPage = await self._call("get_task_logs", caller, task_id=task.task_id, limit=LOG_LINES, tail=True)
        return shown(page, newest=True)

    async def _diff(self, caller: Caller, task: Task) -> str:
        try:
            diff: Diff = await self._call("get_task_diff", caller, task_id=task.task_id)
        except NoChanges:
            return f"task_id={task.task_id}\nNo file was changed."
        return shown(diff)

    async def _result(self, _: Caller, task: Task) -> str:
        if not task.status.terminal:
            raise NotReady()
        said = [f"task_id={task.task_id} status={task.status} verdict={task.verdict}"]
        if task.error is not None:
            said.append(f"{task.error.code}: {task.error.message} {task.error.remedy}")
        result = task.result
        if result is not None and (cut_short := result.retry_error) is not None:
            said.append(f"last retry cut short: {cut_short.code}: {cut_short.message} {cut_short.remedy}")
        if result is not None and (artifacts := result.artifacts) is not None:
            changed = f"files_changed={artifacts.files_changed} +{artifacts.insertions} -{artifacts.deletions}"
            said.append(f"branch={artifacts.branch} commits={artifacts.commits} {changed}")
        if task.next_action:
            said.append(f"Next: {task.next_action}")
        if result is not None and result.summary:
            said.append(fence(cut(result.summary, 12_000) or ""))
        if result is not None and (verify := result.verify) is not None:
            said += [
                f"verify in a clean checkout of {verify.commit or 'it'}, exit {verify.exit_code}, try {verify.tries}:",
                fence(cut(f"{verify.command}\n{verify.output}", 12_000) or ""),
            ]
        return "\n".join(said)

    async def _call(self, name: str, caller: Caller, **arguments: Any) -> Any:
        return await self._operations[name].call(caller, arguments)


def _content(uri: str, mime_type: str, text: str, ttl_ms: int) -> ReadResourceResult:
    content = TextResourceContents(uri=uri, mime_type=mime_type, text=text)
    return ReadResourceResult(contents=[content], ttl_ms=ttl_ms, cache_scope="private")


def _task_resource(task: Task) -> Resource:
    moment = task.completed_at or task.started_at or task.created_at
    verdict = (
        f", {task.verdict}" if task.verdict == "unverified" else f", verify {task.verdict}" if task.verdict else ""
    )
    return Resource(
        uri=f"task://{task.task_id}",
        name=task.task_id,
        title=clean(task.title)[:100],
        description=f"A task, {task.status}{verdict}.",
        mime_type=JSON,
        annotations=Annotations(last_modified=moment.isoformat()),
    )


def _schedule_resource(schedule: Schedule) -> Resource:
    return Resource(
        uri=f"schedule://{schedule.schedule_id}",
        name=schedule.schedule_id,
        title=clean(schedule.name)[:100],
        description=f"A schedule, {clean(schedule.cron)}{'' if schedule.enabled else ', paused'}.",
        mime_type=JSON,
        annotations=Annotations(last_modified=schedule.updated_at.isoformat()),
    )
