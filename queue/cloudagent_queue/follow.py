"""Reading what the runner wrote: its log, line by line, and how it ended. All of it is hostile input."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast, get_args

from pydantic import ValidationError

from cloudagent_queue.agents import result_of
from cloudagent_queue.redact import Redactor
from cloudagent_queue.sandboxes import Sandbox
from cloudagent_queue.touches import Touches
from cloudagent_storage.errors import CloudAgentError
from cloudagent_storage.records import (
    EventDraft,
    EventKind,
    Level,
    Question,
    TaskError,
    TaskErrorCode,
    TaskStatus,
    Usage,
)

CHUNK = 1_000_000
"""Bytes read from the log at a time; a single longer line is left out and said to be."""
RESULT_MAX = 1_000_000
SUMMARY_MAX = 20_000
KINDS = frozenset(get_args(EventKind))
QUESTION_ID = re.compile(r"[a-z0-9_]{1,40}")
QUESTION_MAX, CHOICES_MAX, CHOICE_MAX = 4000, 10, 100
"""Characters of a question, choices of one, characters of a choice."""
REMEDIES: dict[TaskErrorCode, str] = {
    # What the runner may report; anything else counts as the last.
    "max_turns": "The work so far is saved; submit again with a higher max_turns.",
    "budget_exceeded": "The work so far is saved; submit again with a higher max_budget_usd.",
    "credential_rejected": "Check ANTHROPIC_API_KEY or CLAUDE_CODE_OAUTH_TOKEN, and submit the task again.",
    "agent_error": "The work so far is saved; the end of the log tells what happened.",
}

FAILED_BY: dict[str, TaskErrorCode] = {
    # Codes of the error tree, and how a task ends of them; of any other it is "internal".
    "repository_unreachable": "repository_unreachable",
    "repository_not_found": "repository_unreachable",
    "repository_not_allowed": "repository_unreachable",
    "repository_empty": "repository_unreachable",
    "repository_too_large": "repository_unreachable",
    "credentials_in_url": "repository_unreachable",
    "ref_not_found": "repository_unreachable",
    "invalid_repository_config": "setup_failed",
    "invalid_egress": "sandbox_unavailable",
    "credential_missing": "credential_missing",
    "sandbox_unavailable": "sandbox_unavailable",
}


@dataclass(frozen=True)
class Ending:
    """How a task's agent ended."""

    status: TaskStatus
    error: TaskError | None = None
    summary: str | None = None
    usage: Usage | None = None
    model: str | None = None
    """The model that spoke, as the agent names it."""
    stopped: bool = False
    """Did it end because it was asked to?"""
    retry_error: TaskError | None = None
    """Why an agent was not done that had been done before, and went on after a failed verify."""

    @classmethod
    def failed(cls, code: TaskErrorCode, message: str, remedy: str) -> Ending:
        return cls(TaskStatus.FAILED, TaskError(code=code, message=message, remedy=remedy))

    @classmethod
    def failed_by(cls, error: CloudAgentError) -> Ending:
        """What kept the agent from being started, or its work from being seen."""
        return cls.failed(FAILED_BY.get(error.code, "internal"), error.message, error.remedy)

    @classmethod
    def cancelled(cls) -> Ending:
        remedy = "What the agent had done until then is saved."
        return cls(
            TaskStatus.CANCELLED, TaskError(code="cancelled_by_user", message="The task was cancelled.", remedy=remedy)
        )

    @property
    def why(self) -> str:
        if self.retry_error is not None:
            return f"Its last retry was cut short: {self.retry_error.message}"
        return "" if self.error is None else self.error.message

    def of_a_retry(self, earlier: Ending | None) -> Ending:
        """How a task ends whose agent had been done before: as completed, unless somebody cancelled it."""
        ending = self if earlier is None or self.summary else replace(self, summary=earlier.summary)
        if ending.status is not TaskStatus.FAILED:
            return ending
        return replace(ending, status=TaskStatus.COMPLETED, error=None, retry_error=ending.error)

    def with_summary_of(self, other: Ending | None) -> Ending:
        """This ending, with the last words and the usage of the agent that was stopped."""
        if other is None:
            return self
        return replace(self, summary=other.summary, usage=other.usage, model=other.model)


def read_result(sandbox: Sandbox, number: int = 1) -> Ending | None:
    """How the `number`-th runner says that the agent ended; None while it runs, or when it died without a word."""
    data = sandbox.read(result_of(number), max_bytes=RESULT_MAX)
    if not data:
        return None
    try:
        found = json.loads(data)
        result = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
        usage = _usage(result.get("usage"))
    except (ValueError, RecursionError):
        result, usage = {}, None
    summary = result.get("summary")
    summary = summary[:SUMMARY_MAX] if isinstance(summary, str) else None
    model = result.get("model")
    model = model[:100] if isinstance(model, str) else None
    if result.get("outcome") == "completed":
        return Ending(TaskStatus.COMPLETED, None, summary, usage, model)
    said = result.get("error")
    error = cast("dict[str, Any]", said) if isinstance(said, dict) else {}
    code: TaskErrorCode = "agent_error"
    for known in REMEDIES:
        if known == error.get("code"):
            code = known
    message = error.get("message")
    text = message[:2000] if isinstance(message, str) and message else "The agent ended without saying why."
    if code == "agent_error" and (met := sandbox.limits_met()):
        text = " ".join([text, *met])
    why = TaskError(code=code, message=text, remedy=REMEDIES[code])
    return Ending(TaskStatus.FAILED, why, summary, usage, model, stopped=result.get("outcome") == "stopped")


class LogReader:
    """Reads whole lines of the runner's log from a byte offset on."""

    def __init__(
        self, offset: int, redactor: Redactor, *, question: Question | None = None, touches: Touches | None = None
    ) -> None:
        """`question` is the one that was open there; `touches` learns of the files that tool calls name."""
        self.question = question
        """What the agent asks, and has seen no answer to."""
        self.asked = 0
        """How many questions there were."""
        self.offset = offset
        """Everything before it has been read."""
        self.moved = False
        """Did the last `take` get any further?"""
        self.tool_running = False
        self._redactor = redactor
        self._usage: Usage | None = None
        self._tools: set[str] = set()
        self._touches = Touches() if touches is None else touches

    def take(self, chunk: bytes) -> list[EventDraft]:
        """The events of the lines that are complete in what the log holds from `offset` on, `CHUNK` bytes at most."""
        end = chunk.rfind(b"\n") + 1
        self.moved = bool(end) or len(chunk) == CHUNK
        if not self.moved:
            return []
        if not end:
            self.offset += len(chunk)
            return [
                EventDraft(kind="error", level=Level.WARNING, message="A part of the log was too long and is left out.")
            ]
        self.offset += end
        return [self._event(line) for line in chunk[:end].splitlines() if line.strip()]

    def usage(self, earlier: Usage) -> Usage:
        """The newest usage that the log told of."""
        return self._usage or earlier

    def _event(self, line: bytes) -> EventDraft:
        try:
            found = self._redactor.value(json.loads(line))
            entry = cast("dict[str, Any]", found)
            kind, raw = entry["kind"], entry.get("raw")
            draft = EventDraft.model_validate(
                {
                    "kind": kind,
                    "level": entry.get("level", "info"),
                    "message": str(entry["message"]),
                    "raw": raw if isinstance(raw, dict) else None,
                    "timestamp": _plausible(entry.get("time")),
                }
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ValidationError):
            text = self._redactor.text(line[:2000].decode("utf-8", "replace"))
            return EventDraft(kind="stderr", level=Level.WARNING, message=f"Unreadable line in the log: {text}")
        self._watch(draft)
        return draft

    def _watch(self, draft: EventDraft) -> None:
        """Keep the newest usage, and whether a tool call is open: the idle limit is longer then."""
        raw = draft.raw or {}
        identity = str(raw.get("id") or raw.get("tool_use_id") or "")
        if draft.kind == "tool_use":
            self._tools.add(identity)
            self._touches.see(raw)
        elif draft.kind == "tool_result":
            self._tools.discard(identity)
        elif draft.kind == "usage":
            self._usage = _usage(raw.get("usage")) or self._usage
        elif draft.kind == "text":
            self._tools.clear()
        elif draft.kind == "question" and (question := _question(draft)) is not None:
            self.question = question
            self.asked += 1
        elif draft.kind == "answer":
            self.question = None
        self.tool_running = bool(self._tools)


def _question(draft: EventDraft) -> Question | None:
    raw = draft.raw or {}
    question_id, choices = raw.get("question_id"), raw.get("choices")
    if not isinstance(question_id, str) or not QUESTION_ID.fullmatch(question_id):
        return None
    said = cast("list[Any]", choices)[:CHOICES_MAX] if isinstance(choices, list) else []
    cut = dict.fromkeys(choice[:CHOICE_MAX] for choice in said if isinstance(choice, str) and choice.strip())
    return Question(question_id=question_id, text=draft.message[:QUESTION_MAX], choices=tuple(cut))


def _usage(value: Any) -> Usage | None:
    if not isinstance(value, dict) or not value:
        return None
    try:
        return Usage.model_validate(value)
    except ValidationError:
        return None


def _plausible(value: Any) -> datetime | None:
    """The sandbox's own time of an event, unless its clock is nonsense."""
    try:
        stamp = datetime.fromisoformat(str(value)).astimezone(UTC)
    except ValueError:
        return None
    return stamp if abs(stamp - datetime.now(UTC)) < timedelta(days=2) else None
