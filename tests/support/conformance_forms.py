"""Forms for the tools of the conformance server, and what people write into them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from mcp.types import ElicitRequest, ElicitRequestFormParams, ElicitResult


def form(message: str, *, kind: str = "string", **fields: str) -> ElicitRequest:
    """A form; each of its `fields` is named for what it asks."""
    properties = {name: {"type": kind, "description": said} for name, said in fields.items()}
    schema = {"type": "object", "properties": properties, "required": [*fields]}
    return ElicitRequest(params=ElicitRequestFormParams(message=message, requested_schema=schema))


def asked(request: ElicitRequest) -> dict[str, Any]:
    """A form as it goes over the wire."""
    return request.model_dump(mode="json", by_alias=True, exclude_none=True)


def field_of(answer: object, name: str) -> str:
    """What somebody wrote into a field of a form."""
    if isinstance(answer, ElicitResult):
        content: object = answer.content
    else:
        content = cast("Mapping[str, Any]", answer).get("content") if isinstance(answer, Mapping) else None
    return str(cast("Mapping[str, Any]", content).get(name)) if isinstance(content, Mapping) else "nothing"
