"""What the harness's scenarios about the tasks extension call: tasks in memory, behind the product's extension."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import anyio
from mcp.server import MCPServer
from mcp.server.context import CallNext, HandlerResult
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import CallToolRequestParams, CallToolResult, InputRequiredResult, TextContent
from mcp_types.jsonrpc import INTERNAL_ERROR

from cloudagent_mcp.tasks_extension import McpTask, RequestContext, TasksExtension, TaskSource, require_tasks
from cloudagent_storage.errors import TaskNotFound
from tests.support.conformance_forms import asked, field_of, form

Ask = Callable[..., Awaitable[dict[str, Any]]]
"""Parks the task until each of the forms is answered, and gives the answers by the forms' names."""


async def slow_compute(arguments: dict[str, Any], ask: Ask) -> str:
    await anyio.sleep(float(arguments.get("seconds", 0)))
    return "computed"


async def failing_job(arguments: dict[str, Any], ask: Ask) -> str:
    await anyio.sleep(0.2)
    raise ToolError("The job failed, as it always does.")


async def protocol_error_job(arguments: dict[str, Any], ask: Ask) -> str:
    raise RuntimeError


async def confirm_delete(arguments: dict[str, Any], ask: Ask) -> str:
    answers = await ask(confirm=form(f"Delete {arguments['filename']}?", kind="boolean", confirm="confirm"))
    return f"deleted: {field_of(answers['confirm'], 'confirm')}"


async def multi_input(arguments: dict[str, Any], ask: Ask) -> str:
    answers = await ask(name=form("Your name?", name="name"), sure=form("Sure?", kind="boolean", confirm="confirm"))
    return f"{field_of(answers['name'], 'name')}: {field_of(answers['sure'], 'confirm')}"


BODIES = {body.__name__: body for body in (slow_compute, failing_job, protocol_error_job, confirm_delete, multi_input)}


class Job:
    """One call that goes on after it was answered."""

    def __init__(self, body: Callable[[dict[str, Any], Ask], Awaitable[str]], arguments: dict[str, Any]) -> None:
        now = datetime.now(UTC)
        self.shown = McpTask(
            task_id=f"held_{secrets.token_hex(8)}",
            status="working",
            created_at=now,
            last_updated_at=now,
            ttl_ms=600_000,
            poll_interval_ms=100,
        )
        self._answers: dict[str, Any] = {}
        self._answered = asyncio.Event()
        self._run = asyncio.create_task(self._work(body, arguments))

    async def _work(self, body: Callable[[dict[str, Any], Ask], Awaitable[str]], arguments: dict[str, Any]) -> None:
        try:
            self._turn("completed", result=_result(await body(arguments, self._ask)))
        except asyncio.CancelledError:
            self._turn("cancelled")
        except ToolError as error:
            self._turn("completed", result={**_result(str(error)), "isError": True})
        except Exception:
            self._turn("failed", error={"code": INTERNAL_ERROR, "message": "Internal error"})

    async def _ask(self, **forms: Any) -> dict[str, Any]:
        names = {f"{name}-{secrets.token_hex(4)}": name for name in forms}
        wanted = {key: asked(forms[name]) for key, name in names.items()}
        while open_ := {key: form for key, form in wanted.items() if key not in self._answers}:
            self._turn("input_required", input_requests=open_)
            self._answered.clear()
            await self._answered.wait()
        self._turn("working")
        return {name: self._answers[key] for key, name in names.items()}

    def answer(self, responses: dict[str, Any]) -> None:
        self._answers |= {key: said for key, said in responses.items() if key in (self.shown.input_requests or {})}
        self._answered.set()

    def cancel(self) -> None:
        self._run.cancel()

    def _turn(self, status: str, **more: Any) -> None:
        cleared = {"result": None, "error": None, "input_requests": None}
        changed = {"status": status, "last_updated_at": datetime.now(UTC), **cleared, **more}
        self.shown = self.shown.model_copy(update=changed)


class WithJobs(TaskSource):
    """The product's tasks, and these."""

    def __init__(self, product: TaskSource) -> None:
        self._product = product
        self._jobs: dict[str, Job] = {}

    async def call(
        self, ctx: RequestContext, params: CallToolRequestParams, call_next: CallNext
    ) -> McpTask | HandlerResult:
        body = BODIES.get(params.name)
        if params.name == "test_tool_with_task":
            # It asks first, and the answer to that is what the task is made of.
            answer = await call_next(ctx)
            if not isinstance(answer, CallToolResult):
                return answer
            said = answer.content[0]
            assert isinstance(said, TextContent)
            body = _saying(said.text)
        if body is None:
            return await self._product.call(ctx, params, call_next)
        job = Job(body, params.arguments or {})
        self._jobs[job.shown.task_id] = job
        return job.shown

    async def get(self, ctx: RequestContext, task_id: str) -> McpTask:
        return self._job(task_id).shown if task_id.startswith("held_") else await self._product.get(ctx, task_id)

    async def answer(self, ctx: RequestContext, task_id: str, responses: dict[str, Any]) -> None:
        self._job(task_id).answer(responses)

    async def cancel(self, ctx: RequestContext, task_id: str) -> None:
        if not task_id.startswith("held_"):
            await self._product.cancel(ctx, task_id)
            return
        self._job(task_id).cancel()

    def _job(self, task_id: str) -> Job:
        if task_id not in self._jobs:
            raise TaskNotFound()
        return self._jobs[task_id]


def add_tasks(server: MCPServer[Any]) -> None:
    """Add the tools; clients that hold tasks get them from the product's extension, others as far as they can."""
    extension = next(
        found
        for found in server._extensions  # pyright: ignore[reportPrivateUsage]
        if isinstance(found, TasksExtension)
    )
    extension.source = WithJobs(extension.source)

    @server.tool()
    def greet(name: str) -> str:
        """Greets at once."""
        return f"Hello, {name}!"

    @server.tool(name="slow_compute")
    async def compute(seconds: float = 0) -> str:
        """Takes as long as it is told to."""
        return await slow_compute({"seconds": seconds}, _nobody)

    @server.tool()
    async def test_tool_with_task(ctx: Context[Any, Any]) -> str | InputRequiredResult:
        """Asks, and then is a task."""
        require_tasks(ctx.request_context)
        answers = ctx.input_responses or {}
        if "user_name" not in answers:
            return InputRequiredResult(input_requests={"user_name": form("What is your name?", name="name")})
        return f"Hello, {field_of(answers['user_name'], 'name')}!"

    def only_as_a_task(name: str, said: str) -> None:
        async def tool(ctx: Context[Any, Any], filename: str = "") -> str:
            require_tasks(ctx.request_context)
            raise ToolError("It is a task.")

        server.add_tool(tool, name=name, description=said)

    only_as_a_task("failing_job", "Fails after a while.")
    only_as_a_task("protocol_error_job", "Breaks.")
    only_as_a_task("confirm_delete", "Asks before it deletes.")
    only_as_a_task("multi_input", "Asks two things at once.")


async def _nobody(**_: Any) -> dict[str, Any]:
    raise ToolError("There is nobody to ask.")


def _saying(text: str) -> Callable[[dict[str, Any], Ask], Awaitable[str]]:
    async def body(_: dict[str, Any], __: Ask) -> str:
        return text

    return body


def _result(text: str) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": text}], "structuredContent": {"result": text}}
