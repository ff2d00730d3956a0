"""Our tasks as the tasks extension wants them: the row is the task, and its id is the extension's, too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, cast

from mcp.server.context import CallNext, HandlerResult
from mcp.types import CallToolRequestParams, CallToolResult

from cloudagent_mcp.elicitation import question_form
from cloudagent_mcp.operations import Caller, Operation, check_arguments
from cloudagent_mcp.operations.delegation import Delegated
from cloudagent_mcp.operations.tasks import Submitted, TaskDetail
from cloudagent_mcp.tasks_extension import McpTask, RequestContext
from cloudagent_mcp.tools import refusal, result_of
from cloudagent_mcp.untrusted import clean
from cloudagent_storage.errors import CloudAgentError, QuestionClosed, TaskEnded
from cloudagent_storage.records import Task, TaskStatus

STATUSES = {
    TaskStatus.QUEUED: "working",
    TaskStatus.RUNNING: "working",
    TaskStatus.WAITING: "input_required",
    TaskStatus.COMPLETED: "completed",
    # The call came to its end, and its result says that the agent failed.
    TaskStatus.FAILED: "completed",
    TaskStatus.CANCELLED: "cancelled",
}
POLL_MS = 5000
DECLINED = "The user gave no answer. Decide yourself, or end here and say what is missing."
"""What the agent is told when a person does not want to answer."""


class AgentTasks:
    """The source of tasks behind `submit_task` and `delegate`."""

    def __init__(self, operations: Mapping[str, Operation], caller: Callable[[RequestContext], Caller]) -> None:
        self._operations = operations
        self._caller = caller

    async def call(
        self, ctx: RequestContext, params: CallToolRequestParams, call_next: CallNext
    ) -> McpTask | HandlerResult:
        if params.name not in ("submit_task", "delegate"):
            return await call_next(ctx)
        caller = self._caller(ctx)
        try:
            # Refused like the tool itself would; a client that holds the task needs no call that waits for its end.
            own = self._operations[params.name].arguments
            given = params.arguments or {}
            check_arguments(own, given)
            submitted: Submitted = await self._operations["submit_task"].call(caller, given)
        except CloudAgentError as error:
            return refusal(error)
        return await self.get(ctx, submitted.task_id)

    async def get(self, ctx: RequestContext, task_id: str) -> McpTask:
        caller = self._caller(ctx)
        task: TaskDetail = await self._call("get_task", caller, task_id=task_id, log_lines=1)
        status = STATUSES[task.status]
        pause = POLL_MS if task.poll_after_seconds is None else int(task.poll_after_seconds * 1000)
        return McpTask.model_validate(
            {
                "task_id": task.task_id,
                "status": status,
                "status_message": _message(task),
                "created_at": task.created_at,
                "last_updated_at": task.completed_at or task.updated_at or task.started_at or task.created_at,
                "poll_interval_ms": pause,
                "result": _result(task) if status == "completed" else None,
                "input_requests": _questions(task) if status == "input_required" else None,
            }
        )

    async def answer(self, ctx: RequestContext, task_id: str, responses: dict[str, Any]) -> None:
        caller = self._caller(ctx)
        task: TaskDetail = await self._call("get_task", caller, task_id=task_id, log_lines=0)
        response = None if task.asked is None else responses.get(task.asked.question_id)
        if task.asked is None or not isinstance(response, Mapping):
            return
        if (said := _answer_of(cast("Mapping[str, Any]", response))) is not None:
            asked = {"task_id": task_id, "question_id": task.asked.question_id, "message": said}
            with contextlib.suppress(QuestionClosed, TaskEnded):  # somebody else was quicker
                await self._call("send_message", caller, **asked)

    async def cancel(self, ctx: RequestContext, task_id: str) -> None:
        await self._call("cancel_task", self._caller(ctx), task_id=task_id)

    async def _call(self, name: str, caller: Caller, **arguments: Any) -> Any:
        return await self._operations[name].call(caller, arguments)


def _questions(task: Task) -> dict[str, Any]:
    """The agent's open question, under its own id: no other question of the task has that."""
    if task.asked is None:
        return {}
    form = question_form(task)
    params = {"mode": "form", "message": form.message, "requestedSchema": form.schema}
    return {task.asked.question_id: {"method": "elicitation/create", "params": params}}


def _answer_of(response: Mapping[str, Any]) -> str | None:
    """What the agent is told; None where the person has only put the question aside.

    A client may have named the field as it liked: its first text is taken then.
    """
    if response.get("action") == "decline":
        return DECLINED
    content = response.get("content")
    if response.get("action") != "accept" or not isinstance(content, Mapping):
        return None
    fields = cast("Mapping[str, Any]", content)
    said = fields.get("answer", next(iter(fields.values()), None))
    return said if isinstance(said, str) and said.strip() else None


def _message(task: TaskDetail) -> str:
    said = f"{task.status}" + (f", {task.phase}" if task.phase else "")
    if task.verdict is not None:
        said += f", verdict {task.verdict}"
    if task.error is not None:
        said += f": {task.error.code}"
    if task.log and not task.status.terminal:
        said += f"; {task.log[-1]}"
    return clean(said)[:300]


def _result(task: Task) -> dict[str, Any]:
    """What the call would have answered, whichever of the two it was: their output schemas are alike."""
    fields = {name: value for name, value in dict(task).items() if name in Delegated.model_fields}
    result: CallToolResult = result_of(Delegated.model_validate(fields))
    return result.model_dump(mode="json", by_alias=True, exclude_none=True)
