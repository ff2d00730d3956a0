"""A server for the conformance harness: the product's own, with the tools, prompts and resources that it asks for.

    python -m tests.support.conformance_server     # prints its address; stop it with a signal

What each one is called and answers is fixed by the harness's scenarios. It keeps sessions and replays streams, which
the product does not, so that the scenarios about them have something to look at.
"""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import anyio
import uvicorn
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.prompts.base import Prompt, UserMessage
from mcp.server.streamable_http import EventCallback, EventMessage, EventStore
from mcp.server.transport_security import TransportSecuritySettings
from mcp.shared.exceptions import MCPError
from mcp.types import (
    MISSING_REQUIRED_CLIENT_CAPABILITY,
    AudioContent,
    CreateMessageRequest,
    CreateMessageRequestParams,
    CreateMessageResult,
    EmbeddedResource,
    EmptyResult,
    ImageContent,
    InputRequest,
    InputRequiredResult,
    JSONRPCMessage,
    ListRootsRequest,
    ListRootsResult,
    SamplingMessage,
    SetLevelRequestParams,
    SubscribeRequestParams,
    TextContent,
    TextResourceContents,
    UnsubscribeRequestParams,
)
from pydantic import BaseModel, Field

from cloudagent_mcp.app import App
from cloudagent_mcp.server import mcp_server
from cloudagent_mcp.settings import Settings
from tests.support.conformance_forms import field_of, form
from tests.support.conformance_tasks import add_tasks

Ctx = Context[Any, Any]

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8DwHwAFBQIAX8jx0gAAAABJRU5ErkJggg=="
WAV = "UklGRiYAAABXQVZFZm10IBAAAAABAAEAQB8AAAB9AAACABAAZGF0YQIAAAA="
RETRY_MS = 100


def fixture_server(app: App) -> MCPServer[Any]:
    """The product's server, with all that the scenarios ask for."""
    server = mcp_server(app, remote=False)
    for add in (
        _contents,
        _reports,
        _asks,
        _asks_in_the_result,
        _schemas,
        _changes,
        _resources,
        _prompts,
        _legacy,
        add_tasks,
    ):
        add(server)
    return server


def _contents(server: MCPServer[Any]) -> None:
    """Tools that answer with each kind of content."""

    @server.tool()
    def test_simple_text() -> str:
        """Answers with text."""
        return "This is a simple text response for testing."

    @server.tool()
    def test_image_content() -> list[ImageContent]:
        """Answers with an image."""
        return [_image()]

    @server.tool()
    def test_audio_content() -> list[AudioContent]:
        """Answers with a sound."""
        return [AudioContent(type="audio", data=WAV, mime_type="audio/wav")]

    @server.tool()
    def test_embedded_resource() -> list[EmbeddedResource]:
        """Answers with a resource."""
        return [_embedded("test://embedded-resource", "This is an embedded resource content.")]

    @server.tool()
    def test_multiple_content_types() -> list[TextContent | ImageContent | EmbeddedResource]:
        """Answers with text, an image and a resource."""
        mixed = _embedded("test://mixed-content-resource", '{"test": "data", "value": 123}', "application/json")
        return [TextContent(type="text", text="Multiple content types test:"), _image(), mixed]

    @server.tool()
    def test_error_handling() -> str:
        """Fails."""
        raise RuntimeError("This tool intentionally returns an error for testing")


def _reports(server: MCPServer[Any]) -> None:
    """Tools that say something while they work."""

    @server.tool()
    async def test_tool_with_logging(ctx: Ctx) -> str:
        """Logs three lines."""
        for line in ("Tool execution started", "Tool processing data", "Tool execution completed"):
            await ctx.info(line)  # pyright: ignore[reportDeprecated]
            await anyio.sleep(0.05)
        return "Tool with logging executed successfully"

    @server.tool()
    async def test_tool_with_progress(ctx: Ctx) -> str:
        """Reports its progress three times."""
        for done in (0, 50, 100):
            await ctx.report_progress(done, 100, f"Completed step {done} of 100")
            await anyio.sleep(0.05)
        return "Done."

    @server.tool()
    async def test_reconnection(ctx: Ctx) -> str:
        """Closes its stream in the middle, so that the client has to come back for the answer."""
        await ctx.close_sse_stream()
        await anyio.sleep(2 * RETRY_MS / 1000)
        return "Reconnection test completed"


class Answer(BaseModel):
    """What a person is asked for."""

    response: str = Field(description="User's response")


class Defaults(BaseModel):
    """One field of each primitive type, each with a default (SEP-1034)."""

    name: str = Field(default="John Doe", description="User name")
    age: int = Field(default=30, description="User age")
    score: float = Field(default=95.5, description="User score")
    status: str = Field(default="active", json_schema_extra={"enum": ["active", "inactive", "pending"]})
    verified: bool = Field(default=True, description="Verification status")


def _titled(**titles: str) -> list[Any]:
    return [{"const": value, "title": title} for value, title in titles.items()]


class Choices(BaseModel):
    """Each way to write a choice (SEP-1330)."""

    untitledSingle: str = Field(json_schema_extra={"enum": ["active", "inactive", "pending"]})
    titledSingle: str = Field(json_schema_extra={"oneOf": _titled(low="Low", medium="Medium", high="High")})
    untitledMulti: list[str] = Field(json_schema_extra={"items": {"type": "string", "enum": ["read", "write"]}})
    titledMulti: list[str] = Field(json_schema_extra={"items": {"anyOf": _titled(feature="Feature", bug="Bug")}})
    legacyEnum: str = Field(json_schema_extra={"enum": ["small", "large"], "enumNames": ["Small Size", "Large Size"]})


def _asks(server: MCPServer[Any]) -> None:
    """Tools that ask the client in the middle of a call, as was done until 2025-11-25."""

    async def elicit(ctx: Ctx, message: str, form: type[BaseModel]) -> str:
        result = await ctx.elicit(message=message, schema=form)
        content = result.data.model_dump_json() if result.action == "accept" else "{}"
        return f"action={result.action}, content={content}"

    @server.tool()
    async def test_sampling(prompt: str, ctx: Ctx) -> str:
        """Asks the client's model."""
        result = await ctx.session.create_message(  # pyright: ignore[reportDeprecated]
            messages=[SamplingMessage(role="user", content=TextContent(type="text", text=prompt))],
            max_tokens=100,
            related_request_id=ctx.request_id,
        )
        return f"LLM response: {result.content.text if isinstance(result.content, TextContent) else ''}"

    @server.tool()
    async def test_elicitation(message: str, ctx: Ctx) -> str:
        """Asks the person at the client."""
        return await elicit(ctx, message, Answer)

    @server.tool()
    async def test_elicitation_sep1034_defaults(ctx: Ctx) -> str:
        """Asks with defaults."""
        return await elicit(ctx, "Please provide user information", Defaults)

    @server.tool()
    async def test_elicitation_sep1330_enums(ctx: Ctx) -> str:
        """Asks for choices."""
        return await elicit(ctx, "Please choose", Choices)

    @server.tool()
    async def test_missing_capability(ctx: Ctx) -> str:
        """Wants a client that declares sampling."""
        capabilities = ctx.session.client_capabilities
        if capabilities is None or capabilities.sampling is None:
            raise MCPError(
                code=MISSING_REQUIRED_CLIENT_CAPABILITY,
                message="This tool requires the client's sampling capability",
                data={"requiredCapabilities": {"sampling": {}}},
            )
        return "The client declared sampling."


def _sample(text: str) -> CreateMessageRequest:
    message = SamplingMessage(role="user", content=TextContent(type="text", text=text))
    return CreateMessageRequest(params=CreateMessageRequestParams(messages=[message], max_tokens=100))


def _asks_in_the_result(server: MCPServer[Any]) -> None:
    """Tools that ask with their result and are called again with the answers: SEP-2322, since 2026-07-28."""

    def ask(requests: Mapping[str, InputRequest], state: str | None = None) -> InputRequiredResult:
        return InputRequiredResult(input_requests={**requests}, request_state=state)

    def one_question(name: str, key: str, request: InputRequest, said: Callable[[object], str]) -> None:
        async def tool(ctx: Ctx) -> str | InputRequiredResult:
            answers = ctx.input_responses or {}
            return said(answers[key]) if key in answers else ask({key: request})

        server.add_tool(tool, name=name, description=f"Asks for {key} with its result.")

    one_question(
        "test_input_required_result_elicitation",
        "user_name",
        form("What is your name?", name="name"),
        lambda answer: f"Hello, {field_of(answer, 'name')}!",
    )
    one_question(
        "test_input_required_result_sampling",
        "capital_question",
        _sample("What is the capital of France?"),
        lambda answer: f"Model said: {answer.content if isinstance(answer, CreateMessageResult) else ''}",
    )
    one_question(
        "test_input_required_result_list_roots",
        "client_roots",
        ListRootsRequest(),
        lambda answer: f"Roots: {len(answer.roots) if isinstance(answer, ListRootsResult) else 0}",
    )

    def with_state(name: str, state: str, said: str) -> None:
        async def tool(ctx: Ctx) -> str | InputRequiredResult:
            if ctx.request_state == state and "confirm" in (ctx.input_responses or {}):
                return said
            return ask({"confirm": form("Please confirm", kind="boolean", ok="ok")}, state)

        server.add_tool(tool, name=name, description="Asks for a confirmation, and wants its state back.")

    with_state("test_input_required_result_request_state", "a state", "state-ok: confirmation received")
    with_state("test_input_required_result_tampered_state", "another state", "state-ok: untampered")

    @server.tool()
    async def test_input_required_result_multiple_inputs(ctx: Ctx) -> str | InputRequiredResult:
        """Asks for three things at once."""
        wanted: dict[str, InputRequest] = {
            "user_name": form("What is your name?", name="name"),
            "greeting": _sample("Generate a greeting"),
            "client_roots": ListRootsRequest(),
        }
        return "All inputs received." if wanted.keys() <= (ctx.input_responses or {}).keys() else ask(wanted, "three")

    @server.tool()
    async def test_input_required_result_multi_round(ctx: Ctx) -> str | InputRequiredResult:
        """Asks for a name, then for a color."""
        answers, state = ctx.input_responses or {}, json.loads(ctx.request_state or "{}")
        if state.get("step") == 2 and "step2" in answers:
            return f"{state['name']} likes {field_of(answers['step2'], 'color')}."
        if state.get("step") == 1 and "step1" in answers:
            known = {"step": 2, "name": field_of(answers["step1"], "name")}
            return ask({"step2": form("Step 2: What is your favorite color?", color="color")}, json.dumps(known))
        return ask({"step1": form("Step 1: What is your name?", name="name")}, json.dumps({"step": 1}))

    @server.tool()
    async def test_input_required_result_capabilities(ctx: Ctx) -> InputRequiredResult:
        """Asks for no more than the client says that it can answer."""
        can = ctx.client_capabilities
        wanted: dict[str, InputRequest] = {}
        if can is None or can.sampling is not None:
            wanted["sample"] = _sample("Say hello")
        if can is None or can.elicitation is not None:
            wanted["ask"] = form("What is your name?", name="name")
        return ask(wanted, "as declared")

    @server.prompt()
    async def test_input_required_result_prompt(ctx: Ctx) -> list[UserMessage] | InputRequiredResult:
        """A prompt that asks before it answers."""
        answers = ctx.input_responses or {}
        if "user_context" not in answers:
            return ask({"user_context": form("What context should the prompt use?", context="context")})
        return [_said(f"Use the following context: {field_of(answers['user_context'], 'context')}")]


SCHEMA_2020_12: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "$defs": {
        "address": {
            "$anchor": "addressDef",
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
        }
    },
    "properties": {
        "name": {"type": "string"},
        "address": {"$ref": "#/$defs/address"},
        "contactMethod": {"type": "string", "enum": ["phone", "email"]},
        "phone": {"type": "string"},
        "email": {"type": "string"},
    },
    "allOf": [{"anyOf": [{"required": ["phone"]}, {"required": ["email"]}]}],
    "if": {"properties": {"contactMethod": {"const": "phone"}}, "required": ["contactMethod"]},
    "then": {"required": ["phone"]},
    "else": {"required": ["email"]},
    "additionalProperties": False,
}
"""Every keyword that the scenario looks for (SEP-1613)."""


def _schemas(server: MCPServer[Any]) -> None:
    """Tools whose arguments are described in unusual ways."""

    @server.tool()
    def json_schema_2020_12_tool() -> str:
        """Its schema uses what JSON Schema 2020-12 brought."""
        return "json_schema_2020_12_tool"

    tool = server._tool_manager.get_tool("json_schema_2020_12_tool")  # pyright: ignore[reportPrivateUsage]
    assert tool is not None
    tool.parameters = SCHEMA_2020_12

    @server.tool()
    def test_x_mcp_header(
        region: Annotated[str, Field(description="A region", json_schema_extra={"x-mcp-header": "Region"})] = "",
    ) -> str:
        """Its argument is repeated in a header of the request (SEP-2243)."""
        return f"region={region}"


def _changes(server: MCPServer[Any]) -> None:
    """Tools that change what the server offers."""

    def dynamic() -> str:
        """Comes and goes."""
        return "dynamic"

    @server.tool()
    async def test_trigger_tool_change(ctx: Ctx) -> str:
        """Adds a tool, and takes it away."""
        server.add_tool(dynamic, name="test_dynamic_tool")
        server.remove_tool("test_dynamic_tool")
        await ctx.notify_tools_changed()
        return "tool list changed"

    @server.tool()
    async def test_trigger_prompt_change(ctx: Ctx) -> str:
        """Adds a prompt, and takes it away."""
        server.add_prompt(Prompt.from_function(dynamic, name="test_dynamic_prompt"))
        server.remove_prompt("test_dynamic_prompt")
        await ctx.notify_prompts_changed()
        return "prompt list changed"


def _resources(server: MCPServer[Any]) -> None:
    @server.resource("test://static-text", mime_type="text/plain")
    def static_text() -> str:
        """Text."""
        return "This is the content of the static text resource."

    @server.resource("test://static-binary", mime_type="image/png")
    def static_binary() -> bytes:
        """An image."""
        return base64.b64decode(PNG)

    @server.resource("test://template/{id}/data", mime_type="application/json")
    def template(id: str) -> str:
        """Named by its address."""
        return json.dumps({"id": id, "templateTest": True, "data": f"Data for ID: {id}"})

    @server.resource("test://watched-resource", mime_type="text/plain")
    def watched() -> str:
        """May be subscribed to."""
        return "Watched resource content"


def _prompts(server: MCPServer[Any]) -> None:
    @server.prompt()
    def test_simple_prompt() -> list[UserMessage]:
        """Without arguments."""
        return [_said("This is a simple prompt for testing.")]

    @server.prompt()
    def test_prompt_with_arguments(arg1: str, arg2: str) -> list[UserMessage]:
        """With arguments."""
        return [_said(f"Prompt with arguments: arg1='{arg1}', arg2='{arg2}'")]

    @server.prompt()
    def test_prompt_with_embedded_resource(resourceUri: str) -> list[UserMessage]:
        """With a resource."""
        content = _embedded(resourceUri, "Embedded resource content for testing.")
        return [UserMessage(content=content), _said("Please process the embedded resource above.")]

    @server.prompt()
    def test_prompt_with_image() -> list[UserMessage]:
        """With an image."""
        return [UserMessage(content=_image()), _said("Please analyze the image above.")]


def _legacy(server: MCPServer[Any]) -> None:
    """Requests of 2025-11-25 and before, for which `MCPServer` has no public door."""

    async def accept(_: Any, __: Any) -> EmptyResult:
        return EmptyResult()

    lowlevel = server._lowlevel_server  # pyright: ignore[reportPrivateUsage]
    lowlevel.add_request_handler("logging/setLevel", SetLevelRequestParams, accept)
    lowlevel.add_request_handler("resources/subscribe", SubscribeRequestParams, accept)
    lowlevel.add_request_handler("resources/unsubscribe", UnsubscribeRequestParams, accept)


def _said(text: str) -> UserMessage:
    return UserMessage(content=TextContent(type="text", text=text))


def _image() -> ImageContent:
    return ImageContent(type="image", data=PNG, mime_type="image/png")


def _embedded(uri: str, text: str, mime_type: str = "text/plain") -> EmbeddedResource:
    return EmbeddedResource(type="resource", resource=TextResourceContents(uri=uri, mime_type=mime_type, text=text))


class Replayed(EventStore):
    """What was sent on each stream, in memory, for clients that come back."""

    def __init__(self) -> None:
        self._sent: list[tuple[str, JSONRPCMessage | None]] = []

    async def store_event(self, stream_id: str, message: JSONRPCMessage | None) -> str:
        self._sent.append((stream_id, message))
        return str(len(self._sent) - 1)

    async def replay_events_after(self, last_event_id: str, send_callback: EventCallback) -> str | None:
        if not last_event_id.isdigit() or int(last_event_id) >= len(self._sent):
            return None
        stream_id, _ = self._sent[int(last_event_id)]
        for number, (stream, message) in enumerate(self._sent):
            if number > int(last_event_id) and stream == stream_id and message is not None:
                await send_callback(EventMessage(message, str(number)))
        return stream_id


def main() -> None:
    """Serve on a free port until a signal comes, without a key: whoever starts it is the only one who knows of it."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    hosts = [f"{name}:{port}" for name in ("127.0.0.1", "localhost")]
    asgi = fixture_server(App(Settings.read())).streamable_http_app(
        streamable_http_path="/mcp",
        event_store=Replayed(),
        retry_interval=RETRY_MS,
        transport_security=TransportSecuritySettings(
            allowed_hosts=hosts, allowed_origins=[f"http://{name}" for name in hosts]
        ),
    )
    print(f"http://127.0.0.1:{port}/mcp", flush=True)
    uvicorn.Server(uvicorn.Config(asgi, log_level="warning", timeout_graceful_shutdown=2)).run(sockets=[listener])


if __name__ == "__main__":
    main()
