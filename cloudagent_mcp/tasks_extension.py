"""The tasks extension (`io.modelcontextprotocol/tasks`, SEP-2663): a call that takes long answers with a handle.

Only for clients that declare it in the request's capabilities, which the 2026-07-28 protocol alone has; all others
notice nothing. What the protocol asks for is here; what a task is comes from a `TaskSource`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, Protocol, cast

from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.extension import Extension, MethodBinding
from mcp.shared.exceptions import MCPError
from mcp.shared.inbound import MCP_METHOD_HEADER, MCP_NAME_HEADER, decode_header_value
from mcp.types import CallToolRequestParams, NotificationParams, RequestParams
from mcp_types.jsonrpc import HEADER_MISMATCH, INVALID_PARAMS, MISSING_REQUIRED_CLIENT_CAPABILITY
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from cloudagent_storage.errors import NotFound

IDENTIFIER = "io.modelcontextprotocol/tasks"

RequestContext = ServerRequestContext[Any, Any]


class McpTask(BaseModel):
    """A task as the extension shows it (`DetailedTask`). Times are in UTC; `ttl_ms` None is without limit."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)

    task_id: str
    status: Literal["working", "input_required", "completed", "cancelled", "failed"]
    """`failed` is a JSON-RPC error; a tool's own failure is `completed`, and its result says so."""
    status_message: str | None = None
    created_at: datetime
    last_updated_at: datetime
    ttl_ms: int | None = None
    poll_interval_ms: int = 5000
    result: dict[str, Any] | None = None
    """Of a completed one: what the call would have answered."""
    error: dict[str, Any] | None = None
    """Of a failed one."""
    input_requests: dict[str, Any] | None = None
    """What the client has to answer before it goes on. A key never comes back with another meaning."""

    def on_the_wire(self, *, seed: bool = False) -> dict[str, Any]:
        """As JSON; the `seed` of a new task has no more than the fields of every task."""
        details = {"result", "error", "input_requests"}
        plain = self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=details if seed else None)
        return {**plain, "ttlMs": self.ttl_ms}


class TaskSource(Protocol):
    """Where tasks come from, and whose they are: each method checks who asks.

    Those that take an id raise a `NotFound` for one that is unknown or another's.
    """

    async def call(
        self, ctx: RequestContext, params: CallToolRequestParams, call_next: CallNext
    ) -> McpTask | HandlerResult:
        """A tool's call by a client that can hold tasks: the task, committed, or what `call_next` answers."""
        ...

    async def get(self, ctx: RequestContext, task_id: str) -> McpTask: ...

    async def answer(self, ctx: RequestContext, task_id: str, responses: dict[str, Any]) -> None:
        """Answers to input requests; those to none that is open are passed over."""
        ...

    async def cancel(self, ctx: RequestContext, task_id: str) -> None:
        """Ask for its end. After the end nothing happens."""
        ...


class TaskParams(RequestParams):
    task_id: str


class AnswerParams(TaskParams):
    input_responses: dict[str, Any] = Field(default_factory=dict)


class TaskNotification(BaseModel):
    """`notifications/tasks`: all that tasks/get would answer now."""

    method: Literal["notifications/tasks"] = "notifications/tasks"
    params: dict[str, Any]

    @classmethod
    def of(cls, task: McpTask, meta: dict[str, Any]) -> TaskNotification:
        stamped = NotificationParams(_meta=meta).model_dump(mode="json", by_alias=True, exclude_none=True)
        return cls(params={**task.on_the_wire(), **stamped})


def declares_tasks(ctx: RequestContext) -> bool:
    """Does this request's client hold tasks?"""
    declared = ctx.session.client_capabilities
    extensions = None if declared is None else declared.extensions
    return ctx.protocol_version in MODERN_PROTOCOL_VERSIONS and IDENTIFIER in (extensions or {})


def require_tasks(ctx: RequestContext) -> None:
    """Raises the protocol's error for a client that does not declare the extension."""
    if not declares_tasks(ctx):
        raise MCPError(
            MISSING_REQUIRED_CLIENT_CAPABILITY,
            f"The client did not declare the extension {IDENTIFIER}.",
            {"requiredCapabilities": {"extensions": {IDENTIFIER: {}}}},
        )


class TasksExtension(Extension):
    """The extension, for whatever has tasks."""

    identifier = IDENTIFIER

    def __init__(self, source: TaskSource) -> None:
        self.source = source

    def methods(self) -> Sequence[MethodBinding]:
        versions = frozenset(MODERN_PROTOCOL_VERSIONS)
        return [
            MethodBinding("tasks/get", TaskParams, self._get, versions),
            MethodBinding("tasks/update", AnswerParams, self._update, versions),
            MethodBinding("tasks/cancel", TaskParams, self._cancel, versions),
        ]

    async def intercept_tool_call(
        self, params: CallToolRequestParams, ctx: RequestContext, call_next: CallNext
    ) -> HandlerResult:
        if not declares_tasks(ctx):
            return await call_next(ctx)
        answer = await self.source.call(ctx, params, call_next)
        if isinstance(answer, McpTask):
            return {**answer.on_the_wire(seed=True), "resultType": "task"}
        return answer

    async def get(self, ctx: RequestContext, task_id: str) -> McpTask:
        """A task of the caller's. Raises the protocol's error for any other."""
        try:
            return await self.source.get(ctx, task_id)
        except NotFound as error:
            raise _no_task(error) from None

    async def _get(self, ctx: RequestContext, params: TaskParams) -> HandlerResult:
        _check(ctx, params)
        return (await self.get(ctx, params.task_id)).on_the_wire()

    async def _update(self, ctx: RequestContext, params: AnswerParams) -> HandlerResult:
        _check(ctx, params)
        try:
            await self.source.answer(ctx, params.task_id, params.input_responses)
        except NotFound as error:
            raise _no_task(error) from None
        return {}

    async def _cancel(self, ctx: RequestContext, params: TaskParams) -> HandlerResult:
        _check(ctx, params)
        try:
            await self.source.cancel(ctx, params.task_id)
        except NotFound as error:
            raise _no_task(error) from None
        return {}


def _no_task(error: NotFound) -> MCPError:
    return MCPError(INVALID_PARAMS, f"{error.message} {error.remedy}", error.as_dict())


def _check(ctx: RequestContext, params: TaskParams) -> None:
    """Over HTTP the routing headers say what the body says (SEP-2243, SEP-2663); the SDK knows its own methods only."""
    require_tasks(ctx)
    headers = getattr(ctx.request, "headers", None)
    if headers is None:
        return
    for header, wanted in ((MCP_METHOD_HEADER, ctx.method), (MCP_NAME_HEADER, params.task_id)):
        given = cast("str | None", headers.get(header))
        if given is None or decode_header_value(given) != wanted:
            said = "is missing" if given is None else "says something else than the body"
            raise MCPError(HEADER_MISMATCH, f"The header {header} {said}.")
