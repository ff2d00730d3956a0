"""The SDK's server, with handlers that know who asks: its own for resources and completion are not told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from mcp.server import MCPServer
from mcp.server.caching import CacheableMethod, CacheHint
from mcp.server.extension import Extension
from mcp.server.request_state import RequestStateCodec, RequestStateSecurity
from mcp.server.subscriptions import InMemorySubscriptionBus
from mcp.shared.exceptions import MCPError
from mcp.types import (
    CompleteRequestParams,
    CompleteResult,
    InputRequiredResult,
    ListResourcesResult,
    ListResourceTemplatesResult,
    PaginatedRequestParams,
    ReadResourceRequestParams,
    ReadResourceResult,
    SubscriptionsListenRequestParams,
)
from mcp.types import Completion as Completed
from mcp_types.jsonrpc import INTERNAL_ERROR, INVALID_PARAMS
from mcp_types.version import MODERN_PROTOCOL_VERSIONS

from cloudagent_mcp.completion import MAX, Completion
from cloudagent_mcp.operations import Caller
from cloudagent_mcp.resources import TEMPLATES, Resources
from cloudagent_mcp.subscriptions import Listening
from cloudagent_mcp.tasks_extension import RequestContext, TasksExtension
from cloudagent_storage.errors import CloudAgentError, Internal, NotFound
from cloudagent_storage.store import Store

log = logging.getLogger(__name__)

NOT_THERE_BEFORE_2026 = -32002
"""Of a resource that is not there, until 2025-11-25; then it became `INVALID_PARAMS` (SEP-2164)."""
REFUSED = -32000
"""Of a resource that is there and cannot be read now; the error's data says why and what to do."""

LISTS = CacheHint(ttl_ms=300_000, scope="private")
"""What changes with a new version of the server, or seldom. Private: a list may depend on who asks."""
CACHE: dict[CacheableMethod, CacheHint] = {
    "server/discover": LISTS,
    "tools/list": LISTS,
    "prompts/list": CacheHint(ttl_ms=10_000, scope="private"),
    "resources/templates/list": LISTS,
    "resources/list": CacheHint(ttl_ms=1000, scope="private"),
    "resources/read": CacheHint(ttl_ms=1000, scope="private"),
}


class Face(MCPServer[Any]):
    """The MCP server. Tools, prompts and resources of anybody's can be added to it as to the SDK's."""

    def __init__(
        self,
        *,
        caller: Callable[[RequestContext], Caller],
        resources: Resources,
        completion: Completion,
        store: Callable[[], Store],
        tasks: TasksExtension | None = None,
        request_state: RequestStateCodec | None = None,
        extensions: Sequence[Extension] = (),
        **sdk: Any,
    ) -> None:
        """`caller` says who asks. `request_state` is shared by the processes behind one address: any of them can go on
        with what another has begun, on behalf of the same account only.
        """
        self._caller = caller
        self._own_resources = resources
        self._own_completion = completion
        security = None
        if request_state is not None:
            security = RequestStateSecurity(codec=request_state, bind_principal=lambda ctx: caller(ctx).account_id)
        bus = InMemorySubscriptionBus()
        super().__init__(
            cache_hints=CACHE,
            subscriptions=bus,
            request_state_security=security,
            extensions=[*([] if tasks is None else [tasks]), *extensions],
            **sdk,
        )
        handle = self._lowlevel_server.add_request_handler
        handle("completion/complete", CompleteRequestParams, self._handle_complete)
        handle("subscriptions/listen", SubscriptionsListenRequestParams, Listening(store, caller, bus, tasks))

    async def _handle_list_resources(
        self, ctx: RequestContext, params: PaginatedRequestParams | None
    ) -> ListResourcesResult:
        try:
            own = await self._own_resources.list(self._caller(ctx))
        except CloudAgentError as error:
            raise _translated(ctx, error) from None
        return ListResourcesResult(resources=[*own, *await self.list_resources()])

    async def _handle_list_resource_templates(
        self, ctx: RequestContext, params: PaginatedRequestParams | None
    ) -> ListResourceTemplatesResult:
        return ListResourceTemplatesResult(resource_templates=[*TEMPLATES, *await self.list_resource_templates()])

    async def _handle_read_resource(
        self, ctx: RequestContext, params: ReadResourceRequestParams
    ) -> ReadResourceResult | InputRequiredResult:
        uri = str(params.uri)
        try:
            found = await self._own_resources.read(self._caller(ctx), uri)
            return found if found is not None else await super()._handle_read_resource(ctx, params)
        except CloudAgentError as error:
            raise _translated(ctx, error, uri=uri) from None
        except MCPError as error:
            if error.code != INVALID_PARAMS or ctx.protocol_version in MODERN_PROTOCOL_VERSIONS:
                raise
            raise MCPError(NOT_THERE_BEFORE_2026, error.message, error.error.data) from None

    async def _handle_complete(self, ctx: RequestContext, params: CompleteRequestParams) -> CompleteResult:
        try:
            argument = params.argument
            found = await self._own_completion.complete(self._caller(ctx), params.ref, argument.name, argument.value)
        except CloudAgentError as error:
            raise _translated(ctx, error) from None
        return CompleteResult(completion=Completed(values=found[:MAX], has_more=len(found) >= MAX))


def _translated(ctx: RequestContext, error: CloudAgentError, *, uri: str | None = None) -> MCPError:
    """An error of ours as the protocol's, with code and remedy, and never with what was asked for but its address."""
    if isinstance(error, Internal):
        log.error("%s failed: %s", ctx.method, error.message)
        code = INTERNAL_ERROR
    elif isinstance(error, NotFound):
        code = INVALID_PARAMS if ctx.protocol_version in MODERN_PROTOCOL_VERSIONS else NOT_THERE_BEFORE_2026
    else:
        code = REFUSED
    data = {**error.as_dict(), **({} if uri is None else {"uri": uri})}
    return MCPError(code, f"{error.message} {error.remedy}", data)
