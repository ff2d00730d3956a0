"""A model that speaks from a script: a small Messages API on loopback, for `ca demo` and for the tests.

The agent in front of it is the real Claude Code, and everything that it does is real; only the model's words are
written beforehand. It answers no one but this machine, and needs no key.

The newest prompt of a request picks a rule, and the number of answers since that prompt picks the turn. Counting tool
results instead would go wrong with parallel tools, follow-up messages, resumed sessions and subagents. News of work in
the background is no prompt: it is answered by the next turn.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field

KEY = "sk-of-the-scripted-model"
REMINDER = re.compile(r"<system-reminder>.*?</system-reminder>", re.DOTALL)
MID_TURN = re.compile(r"new message while you were working:\n(.*?)\n\nThis is how Claude Code", re.DOTALL)
"""How Claude Code hands on what its user says while it works."""
WORKING_DIRECTORY = re.compile(r"^[ -]*(?:primary )?working directory: (/.*)$", re.IGNORECASE | re.MULTILINE)


class _Scripted(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Text(_Scripted):
    """Words. `{{prompt}}`, `{{cwd}}` and `{{result}}` (of the last tool) are filled in."""

    type: Literal["text"] = "text"
    text: str


class Thinking(_Scripted):
    """Words that the model says to itself."""

    type: Literal["thinking"] = "thinking"
    thinking: str


class ToolUse(_Scripted):
    """A call of one of Claude Code's tools. Placeholders are filled in in every string of the input."""

    type: Literal["tool_use"] = "tool_use"
    name: str
    input: dict[str, Any]


Block = Annotated[Text | Thinking | ToolUse, Field(discriminator="type")]


class Turn(_Scripted):
    """One answer of the model, or a way to fail."""

    blocks: tuple[Block, ...] = ()
    fault: Literal["cut", "hang"] | int | None = None
    """`cut` drops the connection in the middle, `hang` never answers, a number is the HTTP status to answer with."""
    times: int | None = None
    """How many requests meet the fault before the blocks are said; None: every one."""
    pace_s: float = 0.0
    """Seconds between the parts of a streamed answer."""
    input_tokens: int = 100
    output_tokens: int = 20


class Rule(_Scripted):
    """What the model does about prompts that match. It says "Done." when the turns are used up."""

    prompt: str
    """A regular expression, searched in the newest prompt."""
    model: str = ""
    """One that is searched in the name of the model that is asked for."""
    turns: tuple[Turn, ...]


class Script(_Scripted):
    """Everything that the model knows. The first rule that matches counts."""

    rules: tuple[Rule, ...] = ()
    default: Turn = Turn(blocks=(Text(text="There is nothing in my script for that."),))


@dataclass(frozen=True)
class Received:
    """A request that arrived."""

    path: str
    key: str | None
    """The credential that came with it."""
    body: Mapping[str, Any]


class ScriptedModel:
    """Serves a script on 127.0.0.1 while the `with` block lasts."""

    def __init__(self, script: Script | Sequence[Rule]) -> None:
        self.script = script if isinstance(script, Script) else Script(rules=tuple(script))
        self.requests: list[Received] = []
        self.faults: Counter[str] = Counter()
        """How often each fault has fired: `cut`, `hang`, or the status."""
        self._fired: Counter[tuple[int, int]] = Counter()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.model = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="scripted-model").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.end_connections()
        self._server.server_close()

    def environment(self) -> dict[str, str]:
        """The variables that make Claude Code talk to this model."""
        return {"ANTHROPIC_BASE_URL": self.url, "ANTHROPIC_API_KEY": KEY, "NO_PROXY": "127.0.0.1"}

    def choose(self, body: Mapping[str, Any]) -> tuple[Turn, str | None, Mapping[str, str]]:
        """The turn that answers this request, the fault to meet instead if any, and the placeholders' values."""
        prompt, index, values = _read_conversation(body)
        rules = self.script.rules
        asked = str(body.get("model", ""))

        def matches(rule: Rule) -> bool:
            return bool(re.search(rule.prompt, prompt, re.DOTALL) and re.search(rule.model, asked))

        number = next((n for n, rule in enumerate(rules) if matches(rule)), None)
        if number is None:
            return self.script.default, None, values
        turns = rules[number].turns
        turn = turns[index] if index < len(turns) else Turn(blocks=(Text(text="Done."),))
        fault = None
        with self._lock:
            if turn.fault is not None and (turn.times is None or self._fired[number, index] < turn.times):
                fault = str(turn.fault)
                self._fired[number, index] += 1
                self.faults[fault] += 1
        return turn, fault, values


def _read_conversation(body: Mapping[str, Any]) -> tuple[str, int, Mapping[str, str]]:
    """The newest prompt, the number of answers since, and the values of the placeholders."""
    messages = cast(list[dict[str, Any]], body.get("messages", []))
    prompt, result, answers = "", "", 0
    previous = ""
    for message in messages:
        role = message.get("role")
        if role == "assistant":
            answers += previous != "assistant"  # one answer may be stored as several messages
        elif role == "user":
            for block in _blocks(message.get("content")):
                if block.get("type") == "tool_result":
                    result = _text(block.get("content"))
            if said := REMINDER.sub("", _text(message.get("content"))).strip():
                prompt, answers = said, 0
        elif interjected := MID_TURN.search(_text(message.get("content"))):
            prompt, answers = interjected[1], 0
        previous = str(role)
    told = [_text(message.get("content")) for message in messages if message.get("role") == "system"]
    surroundings = "\n".join([_text(body.get("system")), *told])
    found = WORKING_DIRECTORY.search(surroundings)
    cwd = found[1].strip() if found else ""
    return prompt, answers, {"prompt": prompt, "result": result, "cwd": cwd}


def _blocks(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return cast(list[dict[str, Any]], content or [])


def _text(content: Any) -> str:
    return "\n".join(str(block["text"]) for block in _blocks(content) if block.get("type") == "text")


def _fill(value: Any, values: Mapping[str, str]) -> Any:
    """The value with the placeholders in all its strings filled in, once: what is filled in is not searched again."""
    if isinstance(value, str):
        return re.sub(r"\{\{(prompt|result|cwd)\}\}", lambda match: values[match[1]], value)
    if isinstance(value, dict):
        return {key: _fill(item, values) for key, item in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [_fill(item, values) for item in cast(list[Any], value)]
    return value


def _message(turn: Turn, body: Mapping[str, Any], values: Mapping[str, str]) -> dict[str, Any]:
    """A whole answer as the Messages API gives it."""
    content = [cast(dict[str, Any], _fill(block.model_dump(), values)) for block in turn.blocks]
    for block in content:
        if block["type"] == "tool_use":
            block["id"] = f"toolu_{uuid.uuid4().hex[:24]}"
        elif block["type"] == "thinking":
            block["signature"] = "scripted"
    return {
        "id": f"msg_{uuid.uuid4().hex[:24]}",
        "type": "message",
        "role": "assistant",
        "model": body.get("model", "scripted"),
        "content": content,
        "stop_reason": "tool_use" if any(block["type"] == "tool_use" for block in content) else "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": turn.input_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": turn.output_tokens,
        },
    }


def _stream(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The same answer as the events of a stream."""
    usage: dict[str, Any] = message["usage"]
    start: dict[str, Any] = {**message, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 1}}
    yield {"type": "message_start", "message": start}
    for index, block in enumerate(cast(list[dict[str, Any]], message["content"])):
        empty: dict[str, Any]
        match block["type"]:
            case "text":
                empty = {"type": "text", "text": ""}
                words = re.findall(r"\S*\s*", block["text"])[:-1]
                deltas = [{"type": "text_delta", "text": word} for word in words]
            case "thinking":
                empty = {"type": "thinking", "thinking": "", "signature": ""}
                deltas = [
                    {"type": "thinking_delta", "thinking": block["thinking"]},
                    {"type": "signature_delta", "signature": block["signature"]},
                ]
            case _:
                empty = {"type": "tool_use", "id": block["id"], "name": block["name"], "input": {}}
                deltas = [{"type": "input_json_delta", "partial_json": json.dumps(block["input"])}]
        yield {"type": "content_block_start", "index": index, "content_block": empty}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    stop = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    yield {"type": "message_delta", "delta": stop, "usage": {"output_tokens": usage["output_tokens"]}}
    yield {"type": "message_stop"}


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # joined by server_close, so that nothing is left when the `with` block ends
    model: ScriptedModel

    def __init__(self, address: tuple[str, int], handler: type[_Handler]) -> None:
        self.closing = threading.Event()
        self._connections: set[socket.socket] = set()
        super().__init__(address, handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def end_connections(self) -> None:
        """Wake every handler that waits: for a hanging answer's end, or for the client's next request."""
        self.closing.set()
        for connection in list(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it ended by itself

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        """Stay quiet."""

    def do_HEAD(self) -> None:
        self._answer(200, {})

    def do_GET(self) -> None:
        self._answer(200, {"data": [], "has_more": False})

    def do_POST(self) -> None:
        body = cast(dict[str, Any], json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}"))
        key = self.headers.get("x-api-key") or (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        model = self.server.model
        model.requests.append(Received(self.path, key, body))
        if "count_tokens" in self.path:
            self._answer(200, {"input_tokens": len(json.dumps(body)) // 4})
            return
        turn, fault, values = model.choose(body)
        if fault is not None and fault.isdigit():
            kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(int(fault))
            error = {"type": kind or ("overloaded_error" if fault == "529" else "api_error"), "message": "scripted"}
            self._answer(int(fault), {"type": "error", "error": error})
        elif fault == "hang":
            self.server.closing.wait()
            self.close_connection = True
        elif body.get("stream"):
            self._answer_stream(list(_stream(_message(turn, body, values))), turn.pace_s, cut=fault == "cut")
        elif fault == "cut":
            self.close_connection = True
        else:
            self._answer(200, _message(turn, body, values))

    def _answer(self, status: int, body: Mapping[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _answer_stream(self, events: Sequence[Mapping[str, Any]], pace_s: float, *, cut: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in events[: len(events) // 2] if cut else events:
            part = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            if pace_s and self.server.closing.wait(pace_s):
                break
        if cut or self.server.closing.is_set():
            self.close_connection = True  # without the last chunk: the client sees a broken answer
        else:
            self.wfile.write(b"0\r\n\r\n")
