"""The operations as MCP tools: derived, never written twice."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.tools.base import Tool
from mcp.server.mcpserver.utilities.func_metadata import func_metadata
from mcp.types import CallToolResult, InputRequiredResult, TextContent, ToolAnnotations
from pydantic import Field, TypeAdapter

from cloudagent_mcp.elicitation import Asking, asking
from cloudagent_mcp.operations import Caller, Marked, Operation, plain_schema
from cloudagent_mcp.operations.delegation import Delegated
from cloudagent_mcp.operations.diffs import Diff
from cloudagent_mcp.operations.messages import QuestionList
from cloudagent_mcp.operations.results import Applied
from cloudagent_mcp.operations.tasks import TaskList
from cloudagent_mcp.untrusted import clean, cut, fence
from cloudagent_storage.errors import CloudAgentError, Internal
from cloudagent_storage.records import LogPage, Record, TaskPage
from cloudagent_storage.schedule import ScheduleList

log = logging.getLogger(__name__)

ANSWER_MAX = 30_000
"""Bytes of UTF-8, of which a token has three or more: under 10,000, so that no answer floods its reader's context."""
LEAST_SAID = 32
"""Characters of each text that are shown at least; an id has no more."""
ESSENTIAL = {"task_id", "status", "verdict", "title", "prompt", "repository", "branch", "agent", "created_at"}
"""Of many tasks that are waited for, when they say too much: what their schema wants, and what was waited for."""
TEXT_ANSWERS = (LogPage, Diff)
ONLY_REST = {
    "submit_task": ("session",),
    "get_task_logs": ("raw", "tail"),
    "list_tasks": ("offset", "candidates"),
    "comment_task": ("message",),
}
"""Arguments that models are not told of."""


class OperationTool(Tool):
    """An operation as the SDK wants a tool. Arguments are checked by the operation: the SDK drops unknown ones."""

    operation: Any = Field(exclude=True)
    caller: Callable[[Context[Any, Any]], Caller] = Field(exclude=True)
    asking: Any = Field(exclude=True)

    @cached_property
    def output_schema(self) -> dict[str, Any] | None:
        if self.operation.answer in TEXT_ANSWERS:
            return None
        schema = plain_schema(TypeAdapter(self.operation.answer).json_schema(mode="serialization"), of_arguments=False)
        # Clients made with version 1 of the TypeScript SDK hold a refusal's content against it, too, and would show
        # their user that it does not fit instead of what it says.
        schema["anyOf"] = [{"required": schema.pop("required")}, {"required": ["code", "detail", "remedy"]}]
        return schema

    async def run(self, arguments: dict[str, Any], context: Context[Any, Any], convert_result: bool = False) -> Any:
        asked = "progress_token" in (context.request_context.meta or {})
        caller = replace(self.caller(context), progress=context.report_progress if asked else None)
        try:
            answer = await self.asking(self.operation, caller, arguments, context)
            if isinstance(answer, InputRequiredResult):
                return answer
            # Shorter pages until one fits: the next one then begins where it ends.
            while (length := _length(answer)) > 1 and _size(shown(answer)) > ANSWER_MAX:
                answer = await self.operation.call(caller, {**arguments, "limit": length // 2})
        except CloudAgentError as error:
            return refusal(error)
        except Exception:
            log.exception("%s failed in a way that nobody foresaw", self.name)
            return refusal(Internal())
        return result_of(answer)


def result_of(answer: Any) -> CallToolResult:
    """An operation's answer as a result. A task that was waited for and failed is an error."""
    text = shown(answer)
    structured = None if isinstance(answer, TEXT_ANSWERS) else json.loads(text)
    failed = isinstance(answer, Delegated) and not answer.succeeded
    return CallToolResult(content=[TextContent(type="text", text=text)], structured_content=structured, is_error=failed)


def _length(answer: Any) -> int:
    """How many entries a page of a list has."""
    if isinstance(answer, TaskPage):
        return len(answer.tasks)
    return len(answer.schedules) if isinstance(answer, ScheduleList) else 0


def make_tools(operations: Iterable[Operation], caller: Callable[[Context[Any, Any]], Caller]) -> list[Tool]:
    """A tool for every operation. `caller` says who is calling, at the time of the call."""
    named = {operation.name: operation for operation in operations}
    return [_tool(operation, caller, asking(operation, named)) for operation in named.values() if operation.marked.tool]


def _tool(operation: Operation, caller: Callable[[Context[Any, Any]], Caller], asking: Asking) -> Tool:
    marked = operation.marked
    schema = operation.schema
    for name in ONLY_REST.get(operation.name, ()):
        del schema["properties"][name]

    def stand_in() -> None:
        """The SDK wants a function; `run` is what is called."""

    return OperationTool(
        fn=stand_in,
        name=operation.name,
        title=marked.title,
        description=operation.description.partition("  Raises")[0],
        parameters=schema,
        fn_metadata=func_metadata(stand_in),
        is_async=True,
        context_kwarg=None,
        annotations=_annotations(marked),
        operation=operation,
        caller=caller,
        asking=asking,
    )


def _annotations(marked: Marked) -> ToolAnnotations:
    """What is so by default is left out, but for whether it reads, writes or destroys; of what only reads, neither
    of the last two has a meaning."""
    if marked.read_only:
        return ToolAnnotations(read_only_hint=True, open_world_hint=marked.open_world)
    return ToolAnnotations(
        destructive_hint=marked.destructive,
        idempotent_hint=marked.idempotent or None,
        open_world_hint=None if marked.open_world else False,
    )


def refusal(error: CloudAgentError) -> CallToolResult:
    """An error as a result that the model can read and mend."""
    text = f"{error.code}: {error.message} {error.remedy}"
    if error.field is not None:
        text += f" (argument: {error.field})"
    said = error.as_dict()
    while len(said.get("files", ())) > 1 and _size(json.dumps(said)) > ANSWER_MAX:
        said["files"] = said["files"][: len(said["files"]) // 2]
    return CallToolResult(content=[TextContent(type="text", text=text)], structured_content=said, is_error=True)


def shown(answer: Any, *, newest: bool = False) -> str:
    """An answer as a model reads it: bounded, and without characters that steer a terminal or hide text.

    Of a log that is too long the first lines are shown, or the last with `newest`.
    """
    if isinstance(answer, LogPage):
        return _log_text(answer, newest=newest)
    if isinstance(answer, Diff):
        return _diff_text(answer)
    several = isinstance(answer, TaskPage | TaskList | ScheduleList | QuestionList)
    prompt, said = (100, 500) if several else (500, 6000)
    text = _json(answer, prompt=prompt, said=said)
    if isinstance(answer, QuestionList):
        while _size(text) > ANSWER_MAX and len(answer.questions) > 1:
            answer = QuestionList(questions=answer.questions[: len(answer.questions) // 2], more=True)
            text = _json(answer, prompt=prompt, said=said)
    if isinstance(answer, Applied):
        # `totals` says how many there are, and what needs to be named comes first.
        while _size(text) > ANSWER_MAX and len(answer.files) + len(answer.dangers) > 1:
            longer = "files" if len(answer.files) >= len(answer.dangers) else "dangers"
            fewer = getattr(answer, longer)[: len(getattr(answer, longer)) // 2]
            answer = answer.model_copy(update={longer: fewer})
            text = _json(answer, prompt=prompt, said=said)
    # A page can be asked for anew with fewer entries; of all else, less of each text is shown until it fits.
    while _size(text) > ANSWER_MAX and said > LEAST_SAID and _length(answer) <= 1:
        said = max(said // 3, LEAST_SAID)
        text = _json(answer, prompt=min(prompt, said), said=said)
    return text


def _size(text: str) -> int:
    return len(text.encode())


def _json(answer: Record, *, prompt: int, said: int) -> str:
    def brief(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: brief(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
        if isinstance(value, list):
            return [brief(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
        return clean(cut(value, said)) if isinstance(value, str) else value

    brief_tasks = said == LEAST_SAID and isinstance(answer, TaskList)
    plain = answer.model_dump(mode="json")
    if brief_tasks:
        plain["tasks"] = [{name: task[name] for name in ESSENTIAL} for task in plain["tasks"]]
    for entry in plain.get("tasks") or plain.get("schedules") or plain.get("questions") or [plain]:
        task = entry.get("task", entry)
        if "prompt" in task:
            task["prompt"] = cut(task["prompt"], 0 if brief_tasks else prompt)
    return json.dumps(brief(plain), ensure_ascii=False)


def _log_text(page: LogPage, *, newest: bool) -> str:
    """Whole lines, as many as fit; `after` then continues where they end."""
    events = page.lines[::-1] if newest else page.lines
    lines = _that_fit(
        (f"{e.seq} {e.timestamp:%H:%M:%S} {e.level} {e.kind}: {clean(cut(e.message, 2000))}" for e in events),
        ANSWER_MAX - 1000,
    )
    last, more = page.next_after, page.more
    if newest:
        lines.reverse()
    elif len(lines) < len(events):
        last, more = events[len(lines)].seq - 1, True
    head = f"task_id={page.task_id} next_after={last} more={str(more).lower()}"
    return f"{head}\n{fence(chr(10).join(lines))}" if lines else f"{head}\nNo lines."


def _that_fit(lines: Iterable[str], room: int) -> list[str]:
    """As many of the first lines as there is room for, in bytes."""
    kept: list[str] = []
    for line in lines:
        room -= _size(line) + 1
        if room < 0:
            break
        kept.append(line)
    return kept


def _diff_text(diff: Diff) -> str:
    lines = (
        f"{file.change} {clean(cut(file.path, 1000))} "
        + ("binary" if file.binary else f"+{file.insertions} -{file.deletions}")
        for file in diff.files[:200]
    )
    files = _that_fit(lines, ANSWER_MAX // 2)
    head = [f"task_id={diff.task_id} branch={diff.branch} base={diff.base_sha} files={len(diff.files)}", *files]
    if len(files) < len(diff.files):
        head.append(f"… and {len(diff.files) - len(files)} more; ask for a folder with path.")
    if diff.truncated:
        head.append("The task changed more than is kept of its diff; apply_task has it all.")
    text = "\n".join(head)
    if not diff.diff:
        return text
    body, room = diff.diff, ANSWER_MAX - _size(text) - 500
    if _size(body) > room:
        text += "\nThe diff is too long to show whole; ask for single files with path."
        body = body.encode()[:room].decode(errors="ignore")
    return f"{text}\n{fence(body)}"
