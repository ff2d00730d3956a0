"""Runs Claude Code inside a sandbox. This file is copied there and stands alone: standard library and claude_agent_sdk.

    python run/runner.py            run/request.json in; run/events.jsonl while it works; its `result` file last
    python run/runner.py session    collect the conversation's files into run/session.json, where that was not done at
                                    the end because the runner was killed

The working directory is the sandbox's root. `request.json` holds `prompt`, `cwd`, `number` (of this run among the
task's), `result` (the file, of this run alone, that says how it ended), and, each may be null or absent, `resume` (the
id of the session in run/earlier_session.json), `used` (what is added to the usage), `model`, `max_turns`,
`max_budget_usd`, `system_append`. The user's words never get onto a command line.

The result is `{outcome: completed|failed|stopped, error: {code, message}|null, summary, session_id, model, usage}`.
Claude Code counts cost, tokens and model time over a session's whole life, so they go on where a resumed one stopped.

`inbox/*.json` is read, oldest first: `{"kind": "message", "text"}` goes to the agent, once for each name of a file;
`{"kind": "answer", "question_id", "text"}` as well, to the tool with which it has asked; `{"kind": "stop", "reason",
"number"}` ends the run of that number. A file that has been dealt with is renamed to `*.read`.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import anyio
import claude_agent_sdk as sdk

RUN = Path("run")
EVENTS, SESSION_ID = RUN / "events.jsonl", RUN / "session_id"
CONFIG = Path("claude")
"""Claude Code's own folder (CLAUDE_CONFIG_DIR): sessions, memory."""

POLL_S = 0.25
STOP_S = 4.0
"""How long an interrupted agent has to come to rest. The worker kills after ten seconds, and closing takes some too."""
BACKGROUND_S = 600.0
"""How long an agent that is done may wait for commands that it left in the background; Claude Code's own limit."""
CLOSE_S = 15.0
MAX_CHOICES, MAX_CHOICE = 10, 100
ASKING = {
    "type": "object",
    "properties": {
        "question": {"type": "string", "description": "With all that your user needs to know to answer it."},
        "choices": {
            "type": "array",
            "items": {"type": "string"},
            "maxItems": MAX_CHOICES,
            "description": "Short answers to choose from, where there are few; left out, any words will do.",
        },
    },
    "required": ["question"],
}
MAX_TEXT, MAX_LINE, MAX_RAW, MAX_SESSION = 10_000, 200, 200_000, 50_000_000
ALREADY_RUNNING = 75

NOISE = frozenset({"session_state_changed", "thinking_tokens", "status", "background_tasks_changed", "task_progress"})
POINTLESS_TOOLS = ["CronCreate", "CronDelete", "CronList", "ScheduleWakeup", "EnterWorktree", "ExitWorktree"]
"""The run ends with the agent's answer, so nothing could wake it later; and work in another worktree would be lost."""
NOBODY_THERE = ["AskUserQuestion"]
"""It asks whoever sits at a terminal; `ask_user` takes its place."""
ENVIRONMENT = {
    "IS_SANDBOX": "1",  # or Claude Code refuses to bypass permissions as root
    "DISABLE_AUTOUPDATER": "1",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "CLAUDE_CODE_EMIT_SESSION_STATE_EVENTS": "1",  # how we learn that no further turn is owed
    "CLAUDE_CODE_SDK_MCP_TOOL_IDLE_TIMEOUT": "86400000",  # ms; the worker says when a question has waited long enough
    "CLAUDE_CODE_PRINT_BG_WAIT_CEILING_MS": "5000",  # after its input is closed; before that we wait ourselves
    "GIT_TERMINAL_PROMPT": "0",
}


class Log:
    """events.jsonl: one line a message, each written whole. It goes on where a runner that died left off."""

    def __init__(self) -> None:
        self._file = os.open(EVENTS, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        written = EVENTS.read_bytes()
        whole = written.rfind(b"\n") + 1
        os.ftruncate(self._file, whole)  # half a line can only be the last words of a runner that was killed
        self._seq = written.count(b"\n")

    def add(self, kind: str, message: str, *, level: str = "info", raw: Mapping[str, Any] | None = None) -> None:
        self._seq += 1
        if raw is not None and len(text := json.dumps(raw, default=str)) > MAX_RAW:
            raw = {**{key: raw[key] for key in ("id", "tool_use_id") if key in raw}, "cut": text[: MAX_RAW // 4]}
        event = {
            "seq": self._seq,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "kind": kind,
            "level": level,
            "message": message[:MAX_TEXT],
            "raw": raw,
        }
        line = json.dumps(event, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"
        while line:
            line = line[os.write(self._file, line) :]


class Run:
    """One agent, from its prompt to its result."""

    def __init__(self, request: Mapping[str, Any], log: Log) -> None:
        self.request = request
        self.log = log
        self.cwd = Path(request["cwd"]).resolve()
        self.client = sdk.ClaudeSDKClient(self._options())
        self.talk = anyio.CancelScope()
        self.send, self.receive = anyio.create_memory_object_stream[dict[str, Any]](1000)
        self.unanswered: set[str] = set()
        self.one_question = anyio.Lock()
        self.question_id: str | None = None
        """Of the question that waits for its answer."""
        self.answer, self.answered = "", anyio.Event()
        self.state: str | None = None
        self.background = 0
        self.last_message = time.monotonic()
        self.closed = False
        self.stopping = False
        self.rejected: str | None = None
        self.result: sdk.ResultMessage | None = None
        self.session_id: str | None = request.get("resume")
        self.model: str | None = request.get("model")
        self.last_text: str | None = None
        self.turns = 0
        self.usage: dict[str, Any] = {}

    def _options(self) -> sdk.ClaudeAgentOptions:
        arguments: dict[str, str | None] = {}
        if model := self.request.get("model"):
            arguments["model"] = model  # here, because it binds a value that begins with a dash
        if extra := self.request.get("system_append"):
            (RUN / "system.txt").write_text(extra)
            arguments["append-system-prompt-file"] = str((RUN / "system.txt").resolve())
        return sdk.ClaudeAgentOptions(
            cwd=self.cwd,
            env={**ENVIRONMENT, "CLAUDE_CONFIG_DIR": str(CONFIG.resolve())},
            permission_mode="bypassPermissions",
            # The agent is to work as it would in the user's own checkout, with the repository's CLAUDE.md, skills and
            # hooks. They may do nothing here that the repository's tests could not do as well: the sandbox is the wall.
            setting_sources=["project"],
            system_prompt={"type": "preset", "preset": "claude_code"},
            disallowed_tools=[*POINTLESS_TOOLS, *NOBODY_THERE],
            mcp_servers={"user": self._ask_server()},
            resume=self.request.get("resume"),
            max_turns=self.request.get("max_turns"),
            max_budget_usd=self.request.get("max_budget_usd"),
            max_buffer_size=64 * 1024 * 1024,
            stderr=lambda line: self.log.add("stderr", line, level="warning"),
            extra_args=arguments,
        )

    def _ask_server(self) -> sdk.McpSdkServerConfig:
        """The tool with which the agent asks its user, in this very process."""

        @sdk.tool("ask_user", "Ask your user a question, and wait for the answer.", ASKING)
        async def ask_user(arguments: dict[str, Any]) -> dict[str, Any]:
            asked: list[Any] = arguments.get("choices") or []
            choices = [str(choice)[:MAX_CHOICE] for choice in asked[:MAX_CHOICES]]
            answer = await self._ask(str(arguments["question"]), choices)
            return {"content": [{"type": "text", "text": answer}]}

        server = sdk.create_sdk_mcp_server("user", tools=[ask_user])
        # Else it would have to be searched for before it can be called.
        return cast(sdk.McpSdkServerConfig, {**server, "alwaysLoad": True})

    async def _ask(self, question: str, choices: list[str]) -> str:
        """Log a question, and wait until the inbox has the answer."""
        async with self.one_question:
            raw: dict[str, Any] = {"question_id": f"q_{uuid.uuid4().hex[:12]}", "choices": choices}
            self.question_id, self.answered = raw["question_id"], anyio.Event()
            self.log.add("question", question, raw=raw)
            try:
                await self.answered.wait()
                return self.answer
            finally:
                if not self.answered.is_set():
                    self.log.add("answer", "(The agent waits no longer.)", level="debug", raw=raw)
                self.question_id = None

    async def run(self) -> dict[str, Any]:
        """Talk with the agent until nothing more is to come. Returns what result.json holds."""
        problem: str | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch)
            tasks.start_soon(self._obey_signals)
            with self.talk:
                try:
                    await self.client.connect(self._prompts())
                    async for message in self.client.receive_messages():
                        self._take(message)
                except Exception as error:  # whatever the SDK raises ends in a result that says so
                    problem = describe(error)
                finally:
                    await self.client.disconnect()
            tasks.cancel_scope.cancel()
        return self._conclude(problem)

    async def _prompts(self) -> AsyncIterator[dict[str, Any]]:
        """What the user says. At its end the SDK closes Claude Code's input, which then ends when no work is left."""
        yield self._say(self.request["prompt"])
        async for message in self.receive:
            yield message

    def _say(self, text: str) -> dict[str, Any]:
        name = str(uuid.uuid4())
        self.unanswered.add(name)  # a result names the messages that it answers, also those taken in while it worked
        content = {"role": "user", "content": text}
        return {"type": "user", "message": content, "parent_tool_use_id": None, "session_id": "default", "uuid": name}

    async def _watch(self) -> None:
        """Read the inbox, and notice when nothing more is to come."""
        while True:
            for file in sorted((RUN / "inbox").glob("*.json"), key=age):
                await self._read_message(file)
            if self.rejected:
                await self._interrupt()
            quiet = time.monotonic() - self.last_message
            resting = self.state != "running"
            if self.closed and resting and quiet > CLOSE_S:
                self.talk.cancel()
            elif self.question_id:
                pass
            elif self.result and resting and not self.unanswered and (not self.background or quiet > BACKGROUND_S):
                # A result alone is no end: a subagent or command in the background may still wake the agent.
                self.closed = True
                self.send.close()
            await anyio.sleep(POLL_S)

    async def _read_message(self, file: Path) -> None:
        if self.closed:
            return  # it stays there, so that it can be seen that the agent never got it
        done = file.with_suffix(".json.read")
        again = done.exists()
        try:
            content = json.loads(file.read_bytes())
            file.replace(done)
            kind, text = content["kind"], str(content["reason" if content["kind"] == "stop" else "text"])
        except (OSError, ValueError, KeyError, TypeError):
            self.log.add("error", "A message could not be read.", level="warning", raw={"message_id": file.stem})
            file.unlink(missing_ok=True)
            return
        if kind == "stop":
            if content.get("number", 1) == self.request.get("number", 1):  # not one that was for an earlier run
                await self._stop(text)
        elif again:
            return
        elif kind == "answer" and content.get("question_id") == self.question_id:
            self.log.add("answer", text, raw={"message_id": file.stem, "question_id": self.question_id})
            self.answer = text
            self.answered.set()
        else:
            self.log.add("user", text, raw={"message_id": file.stem})
            await self.send.send(self._say(text))

    async def _obey_signals(self) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                await self._stop("The runner was asked to end.")

    async def _stop(self, reason: str) -> None:
        if self.stopping or self.closed:
            return
        self.stopping = True
        self.log.add("status", f"Stopping: {reason}")
        await self._interrupt()

    async def _interrupt(self) -> None:
        try:
            with anyio.move_on_after(STOP_S):
                await self.client.interrupt()
                await anyio.sleep_forever()  # the result that follows cancels the conversation, and us with it
        except Exception:
            self.log.add("status", "The agent could not be interrupted.", level="debug")
        self.talk.cancel()

    def _take(self, message: sdk.Message) -> None:
        """Log one message and learn from it."""
        self.last_message = time.monotonic()
        for kind, level, line, raw in read(message, self.cwd):
            self.log.add(kind, line, level=level, raw=raw)
        if isinstance(message, sdk.SystemMessage):
            self._learn(message.subtype, message.data)
        elif isinstance(message, sdk.AssistantMessage) and message.parent_tool_use_id is None:
            self.result = None  # the next turn has begun; if it breaks off, the last one's result is not the end
            texts = [block.text for block in message.content if isinstance(block, sdk.TextBlock)]
            self.last_text = "\n".join(texts) or self.last_text
            if message.error == "authentication_failed":
                self.rejected = self.last_text or "The model's API refused the credential."
        elif isinstance(message, sdk.ResultMessage):
            self.result = message
            self.session_id = message.session_id
            self.turns += message.num_turns
            counted = count(message, self.turns)
            used: Mapping[str, float] = self.request.get("used") or {}
            self.usage = {name: value + used.get(name, 0) for name, value in counted.items()}
            if message.user_message_uuids is not None:
                self.unanswered.difference_update(message.user_message_uuids)
            elif message.origin is None:
                self.unanswered.clear()  # a result that names no message, and was not caused by work in the background
            tokens = f"{self.usage['input_tokens']:,} input and {self.usage['output_tokens']:,} output tokens"
            line = f"So far {tokens}, turns: {self.usage['turns']}, cost: ${self.usage['cost_usd']:.4f}"
            self.log.add("usage", line, raw={**jsonable(message), "usage": self.usage})
            if message.is_error:
                if not self.stopping and not self.rejected:
                    self.log.add("error", failure(message)[1], level="error")
                self.talk.cancel()

    def _learn(self, subtype: str, data: Mapping[str, Any]) -> None:
        if subtype == "init":
            self.model = data.get("model") or self.model
            if (session_id := data.get("session_id")) and session_id != self.session_id:
                self.session_id = session_id
            SESSION_ID.write_text(self.session_id or "")
        elif subtype == "session_state_changed":
            self.state = data.get("state")
        elif subtype == "background_tasks_changed":
            self.background = len(data.get("tasks") or ())
        elif subtype == "api_retry" and data.get("error_status") in (401, 403):
            # Claude Code would try for minutes; a key that was refused once stays refused. `_watch` interrupts it.
            self.rejected = f"The model's API refused the credential (HTTP {data['error_status']})."

    def _conclude(self, problem: str | None) -> dict[str, Any]:
        outcome, error = "completed", None
        if self.rejected:
            outcome, error = "failed", ("credential_rejected", self.rejected)
        elif self.stopping:
            outcome = "stopped"
        elif self.result is None:
            outcome, error = "failed", ("agent_error", problem or "Claude Code ended without a result.")
        elif self.result.is_error:
            outcome, error = "failed", failure(self.result)
        if error and (self.rejected or not (self.result and self.result.is_error)):
            self.log.add("error", error[1], level="error")
        summary = (self.result.result if self.result and not self.result.is_error else None) or self.last_text
        return {
            "outcome": outcome,
            "error": {"code": error[0], "message": error[1]} if error else None,
            "summary": summary[:MAX_TEXT] if summary else None,
            "session_id": self.session_id,
            "model": self.model,
            "usage": self.usage,
        }


async def converse(request: Mapping[str, Any], log: Log) -> dict[str, Any]:
    return await Run(request, log).run()


def read(message: sdk.Message, cwd: Path) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    """The log's lines for a message: kind, level, one readable line, the raw message."""
    if isinstance(message, sdk.AssistantMessage | sdk.UserMessage):
        blocks = [sdk.TextBlock(message.content)] if isinstance(message.content, str) else message.content
        for block in blocks:
            raw = {**jsonable(block), "message": jsonable(replace(message, content=[]))}
            match block:
                case sdk.TextBlock(text=text) if isinstance(message, sdk.UserMessage):
                    yield "status", "debug", shorten(text), raw  # what Claude Code itself tells the agent
                case sdk.TextBlock(text=text) if isinstance(message, sdk.AssistantMessage) and message.error:
                    yield "error", "error", text, raw
                case sdk.TextBlock(text=text):
                    yield "text", "info", text, raw
                case sdk.ThinkingBlock(thinking=thinking):
                    yield "thinking", "debug", thinking, raw
                case sdk.ToolUseBlock(name=name, input=arguments) | sdk.ServerToolUseBlock(name=name, input=arguments):
                    yield "tool_use", "info", shorten(f"{name}: {main_argument(arguments, cwd)}"), raw
                case sdk.ToolResultBlock(content=content, is_error=is_error):
                    yield "tool_result", "warning" if is_error else "info", shorten(plain(content)), raw
                case sdk.ServerToolResultBlock():
                    yield "tool_result", "info", "(a result)", raw
    elif isinstance(message, sdk.SystemMessage) and message.subtype not in NOISE:
        data = message.data
        match message.subtype:
            case "init":
                line = f"Claude Code {data.get('claude_code_version')} works with {data.get('model')}"
                yield "status", "info", line, jsonable(message)
            case "api_retry":
                line = f"The model's API answered {data.get('error_status') or data.get('error')}; trying again"
                line += f" ({data.get('attempt')} of {data.get('max_retries')})"
                yield "status", "warning", line, jsonable(message)
            case "task_started" | "task_notification":
                line = f"In the background: {data.get('description') or data.get('summary')}"
                yield "status", "info", shorten(line), jsonable(message)
            case subtype:
                yield "status", "debug", subtype.replace("_", " "), jsonable(message)
    elif isinstance(message, sdk.RateLimitEvent):
        status = message.rate_limit_info.status
        yield "status", "debug" if status == "allowed" else "warning", f"Rate limit: {status}", jsonable(message)


def jsonable(message: Any) -> dict[str, Any]:
    fields = {key: value for key, value in asdict(message).items() if value is not None}
    return {"type": type(message).__name__, **fields}


def age(file: Path) -> tuple[int, str]:
    try:
        return file.stat().st_mtime_ns, file.name
    except OSError:
        return 0, file.name


def shorten(text: str) -> str:
    lines = text.strip().splitlines() or ["(nothing)"]
    cut = lines[0][:MAX_LINE]
    return cut if [cut] == lines else f"{cut} …"


def plain(content: str | list[dict[str, Any]] | None) -> str:
    if isinstance(content, list):
        return "\n".join(str(part.get("text", f"({part.get('type')})")) for part in content)
    return content or ""


def main_argument(arguments: Mapping[str, Any], cwd: Path) -> str:
    """What a person wants to see of a tool call: its command, file, pattern or description."""
    for name in (
        "command",
        "file_path",
        "notebook_path",
        "pattern",
        "url",
        "query",
        "question",
        "description",
        "skill",
    ):
        if value := arguments.get(name):
            return str(value).removeprefix(f"{cwd}/")
    return json.dumps(arguments, ensure_ascii=False)


def count(message: sdk.ResultMessage, turns: int) -> dict[str, Any]:
    """The usage so far, subagents included: a result's own `usage` knows its last turn alone."""
    models = cast(list[dict[str, Any]], list((message.model_usage or {}).values()))
    kinds = ("inputTokens", "cacheReadInputTokens", "cacheCreationInputTokens")
    return {
        "input_tokens": sum(model.get(kind, 0) for model in models for kind in kinds),
        "output_tokens": sum(model.get("outputTokens", 0) for model in models),
        "cost_usd": message.total_cost_usd or 0.0,
        "turns": turns,
        "model_ms": message.duration_api_ms,
    }


def failure(message: sdk.ResultMessage) -> tuple[str, str]:
    """Code and text of a result that is an error. Its subtype may well be "success"."""
    text = "; ".join(message.errors or ()) or message.result or message.terminal_reason or message.subtype
    if message.subtype == "error_max_turns":
        return "max_turns", text
    if message.subtype == "error_max_budget_usd":
        return "budget_exceeded", text
    return "credential_rejected" if message.api_error_status in (401, 403) else "agent_error", text


def describe(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = cast(BaseException, error.exceptions[0])
    return f"{type(error).__name__}: {error}"


def write_whole(path: Path, content: Mapping[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(json.dumps(content, ensure_ascii=False).encode("utf-8", "replace"))
    part.replace(path)


def end_agent() -> None:
    """Kill whatever of the agent's still runs.

    When a runner is killed, Claude Code works on without it, up to its answer; and a tool can outlive Claude Code.
    """
    mark = f"CLAUDE_CONFIG_DIR={CONFIG.resolve()}\0".encode()
    for _ in range(50):  # again, for what was started meanwhile
        found = False
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes():
                    os.kill(int(folder.name), signal.SIGKILL)
                    found = True
            except OSError:
                continue  # it has ended, or it is not ours
        if not found:
            return
        time.sleep(0.02)


def place_session(cwd: Path) -> None:
    """Put the files of an earlier conversation where Claude Code looks for them: its project is named after `cwd`."""
    files = json.loads((RUN / "earlier_session.json").read_bytes())["files"]
    project = CONFIG / "projects" / re.sub("[^a-zA-Z0-9]", "-", str(cwd))
    for name, text in files.items():
        path = project / name.partition("/")[2]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8", "replace"))


def collect_session() -> None:
    """Write the conversation's files to run/session.json; the main one first, others while there is room."""
    session_id = SESSION_ID.read_text() if SESSION_ID.exists() else ""
    projects, files, room = CONFIG / "projects", {}, MAX_SESSION
    main = sorted(projects.glob(f"*/{session_id}.jsonl")) if session_id else []
    beside = [path for file in main for path in sorted(file.with_suffix("").rglob("*")) if path.is_file()]
    for path in main + beside:
        content = path.read_bytes()
        if path.suffix == ".jsonl":
            content = content[: content.rfind(b"\n") + 1]  # a line that is being written is left for the next time
        if len(content) <= room:
            room -= len(content)
            files[str(path.relative_to(projects))] = content.decode("utf-8", "replace")
    write_whole(RUN / "session.json", {"session_id": session_id or None, "files": files})


def main(arguments: list[str]) -> int:
    if arguments == ["session"]:
        collect_session()
        return 0
    lock = os.open(RUN / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("Another runner is at work in this sandbox.", file=sys.stderr)
        return ALREADY_RUNNING
    request: dict[str, Any] = {}
    unreadable: Exception | None = None
    try:
        request = json.loads((RUN / "request.json").read_bytes())
    except (OSError, ValueError) as error:
        unreadable = error
    result_file = Path(request.get("result", RUN / "result.json"))
    if result_file.exists():
        return 0
    end_agent()  # an earlier runner's: there is never more than one
    log = Log()
    try:
        if unreadable is not None:
            raise unreadable
        if request.get("resume"):
            place_session(Path(request["cwd"]).resolve())
        result = anyio.run(converse, request, log)
    except Exception as error:
        message = describe(error)
        log.add("error", message, level="error")
        result = {"outcome": "failed", "error": {"code": "agent_error", "message": message}, "summary": None}
        result |= {"session_id": None, "model": None, "usage": {}}
    end_agent()
    try:
        collect_session()  # here, where Python has started already
    except OSError as error:
        log.add("error", f"The session could not be collected: {describe(error)}", level="warning")
    write_whole(result_file, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
