"""The operations as REST routes under /api/v1: derived, never written twice."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable
from typing import Any, cast, get_origin

from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cloudagent_mcp.operations import Caller, Operation, in_thread
from cloudagent_storage.errors import (
    CloudAgentError,
    CredentialMissing,
    Forbidden,
    Internal,
    InvalidInput,
    InvalidJson,
    NotFound,
    NotNow,
    OutOfRange,
    RepositoryTooLarge,
    StorageFull,
    TaskExpired,
    Unauthorized,
    Unavailable,
    WrongType,
)
from cloudagent_storage.records import Record

log = logging.getLogger(__name__)

BODY_MAX = 4 * 1024 * 1024
STATUS: tuple[tuple[type[CloudAgentError], int], ...] = (
    (Unauthorized, 401),
    (Forbidden, 403),
    (NotFound, 404),
    (TaskExpired, 410),
    (NotNow, 409),
    (RepositoryTooLarge, 413),
    (CredentialMissing, 422),
    (InvalidInput, 422),
    (StorageFull, 507),
    (Unavailable, 503),
)
ALIASES = {"repository_url": "repository"}
"""Names that REST also takes."""


def make_routes(
    operations: Iterable[Operation],
    caller: Callable[[Request], Caller],
    bundle: Callable[[Caller, str, Any, int | None], bytes | None],
    session: Callable[[Caller, str, int | None], bytes],
) -> list[Route]:
    """A route for every operation that has one, and the downloads of a task's bundles and session.

    `caller` authenticates, or raises.
    """
    routes = [_route(operation, caller) for operation in operations if operation.marked.path]
    return [*routes, _bundle_route(caller, bundle), _session_route(caller, session)]


def _route(operation: Operation, caller: Callable[[Request], Caller]) -> Route:
    async def endpoint(request: Request) -> Response:
        try:
            who = caller(request)
            bodiless = request.method in ("GET", "DELETE")
            arguments = _query(request, operation) if bodiless else await json_body(request)
            arguments |= request.path_params
            answer = await operation.call(who, arguments)
        except CloudAgentError as error:
            return problem(error)
        except Exception:
            log.exception("%s failed in a way that nobody foresaw", operation.name)
            return problem(Internal())
        return _json_response(answer, status=operation.marked.status)

    return Route(operation.marked.path, endpoint, methods=[operation.marked.method], name=operation.name)


def _bundle_route(
    caller: Callable[[Request], Caller], bundle: Callable[[Caller, str, Any, int | None], bytes | None]
) -> Route:
    async def endpoint(request: Request) -> Response:
        try:
            who = caller(request)
            kind = request.query_params.get("kind", "result")
            if kind not in ("input", "result"):
                raise OutOfRange("kind must be input or result.", field="kind")
            candidate = _candidate(request)
            data = await in_thread(lambda: bundle(who, request.path_params["task_id"], kind, candidate))
        except CloudAgentError as error:
            return problem(error)
        if data is None:
            return Response(status_code=204)
        return Response(data, media_type="application/x-git-bundle")

    return Route("/tasks/{task_id}/bundle", endpoint, methods=["GET"], name="get_task_bundle")


def _session_route(caller: Callable[[Request], Caller], session: Callable[[Caller, str, int | None], bytes]) -> Route:
    async def endpoint(request: Request) -> Response:
        try:
            who = caller(request)
            candidate = _candidate(request)
            data = await in_thread(lambda: session(who, request.path_params["task_id"], candidate))
        except CloudAgentError as error:
            return problem(error)
        return Response(data, media_type="application/json", headers={"Repr-Digest": repr_digest(data)})

    return Route("/tasks/{task_id}/session", endpoint, methods=["GET"], name="get_task_session")


def _candidate(request: Request) -> int | None:
    """Which of a task's candidates a download is of. Raises `WrongType`."""
    given = request.query_params.get("candidate")
    if given is None:
        return None
    if not re.fullmatch("[0-9]{1,3}", given):
        raise WrongType("candidate must be a whole number.", field="candidate")
    return int(given)


def repr_digest(data: bytes) -> str:
    """The value of a Repr-Digest header (RFC 9530, section 3)."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"


def _query(request: Request, operation: Operation) -> dict[str, Any]:
    """The query's texts as the types that the operation wants; what cannot be read stays text and is refused there."""
    arguments: dict[str, Any] = {}
    for given in request.query_params:
        name, values = ALIASES.get(given, given), request.query_params.getlist(given)
        arguments[name] = values[-1]
        field = operation.arguments.model_fields.get(name)
        if field is None:
            continue
        if get_origin(field.annotation) is list:
            arguments[name] = [item for value in values for item in value.split(",")]
            continue
        with contextlib.suppress(ValidationError):
            # The bare type: limits are checked with the other arguments, and refused in the same words.
            arguments[name] = TypeAdapter(cast("type[Any]", field.annotation)).validate_strings(values[-1])
    return arguments


async def json_body(request: Request) -> dict[str, Any]:
    """The one JSON object that a request brings; empty where it brings nothing. Raises errors under `InvalidInput`."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_MAX:
            raise OutOfRange(f"The body is larger than {BODY_MAX} bytes.")
    if not body:
        return {}
    try:
        found = json.loads(body, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise InvalidJson() from None
    if not isinstance(found, dict):
        raise WrongType("The body is not a JSON object.")
    return _renamed(cast("dict[str, Any]", found))


def _renamed(given: dict[str, Any]) -> dict[str, Any]:
    """With the operations' own names, also in an object that is one of the arguments."""
    return {
        ALIASES.get(name, name): _renamed(cast("dict[str, Any]", value)) if isinstance(value, dict) else value
        for name, value in given.items()
    }


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate name")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def problem(error: CloudAgentError, *, status: int | None = None) -> JSONResponse:
    """An error as problem details (RFC 9457), with our code, remedy and field."""
    status = status or next((status for kind, status in STATUS if isinstance(error, kind)), 500)
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(
        {"title": error.code, "status": status, **error.as_dict()},
        status_code=status,
        headers=headers,
        media_type="application/problem+json",
    )


def _json_response(answer: Any, *, status: int) -> Response:
    text = answer.model_dump_json() if isinstance(answer, Record) else json.dumps(answer)
    return Response(text, status_code=status, media_type="application/json")
