"""What crosses a boundary: frozen records, the same in the store, the queue, the tools, REST and the client."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

ID_LENGTH = 26
"""Characters after an id's prefix: base32 of 128 random bits, so that an id cannot be guessed."""

LOCAL_ACCOUNT = "local"
"""The one account of a single-user installation."""


def new_id(prefix: Literal["task", "sch", "key", "upl", "msg", "sbx"]) -> str:
    """A fresh id such as `task_` and 26 lower-case base32 characters."""
    return f"{prefix}_{base64.b32encode(secrets.token_bytes(16)).decode().rstrip('=').lower()}"


def short_id(task_id: str) -> str:
    """The eight characters by which people and branches name a task."""
    return task_id.partition("_")[2][:8]


def branch_name(task_id: str) -> str:
    """The branch that a task's result is on."""
    return f"task/{short_id(task_id)}"


class Record(BaseModel):
    """A frozen value."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class TaskStatus(StrEnum):
    """Where a task stands. Nothing leaves a terminal status."""

    QUEUED = "queued"
    RUNNING = "running"
    WAITING = "waiting"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return self in TERMINAL


TERMINAL = frozenset({TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED})


class Phase(StrEnum):
    """How far a running task is."""

    SANDBOX = "sandbox"
    REPOSITORY = "repository"
    SETUP = "setup"
    AGENT = "agent"
    SAVE = "save"
    VERIFY = "verify"
    PUSH = "push"


class Verdict(StrEnum):
    """What the `verify` command said of the result; "done" is not "succeeded"."""

    PASSED = "passed"
    FAILED = "failed"
    UNVERIFIED = "unverified"


class Level(StrEnum):
    """How loud a line of the log is; a filter by level is a minimum."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"

    @property
    def rank(self) -> int:
        return list(Level).index(self)


EventKind = Literal[
    "status", "text", "thinking", "tool_use", "tool_result", "question", "answer", "user", "usage", "stderr", "error"
]

TaskErrorCode = Literal[
    "timed_out",
    "budget_exceeded",
    "max_turns",
    "idle",
    "agent_error",
    "setup_failed",
    "push_rejected",
    "sandbox_lost",
    "sandbox_unavailable",
    "credential_missing",
    "credential_rejected",
    "repository_unreachable",
    "interrupted",
    "poisoned",
    "cancelled_by_user",
    "storage_full",
    "internal",
]

BlobKind = Literal["input", "result", "diff", "session"]
"""`input` and `result` are git bundles, `diff` is text, `session` is JSON of the agent's transcript files."""


class TaskSpec(Record):
    """What was asked for. It never changes after the submit."""

    prompt: str
    title: str
    repository: str = "none"
    """An https or ssh address, a folder's path (its content is then the `input` blob), or `none`."""
    base_ref: str | None = None
    agent: str = "claude"
    model: str | None = None
    provider: str | None = None
    verify: str | None = None
    setup: str | None = None
    timeout_minutes: float = 60.0
    max_turns: int | None = None
    max_budget_usd: float | None = None
    tags: tuple[str, ...] = ()


class Idempotency(Record):
    """A submit that is sent again with the same key is the same submit."""

    key: str
    digest: str
    """Of everything else that was asked for; the key with another digest is an error."""


class Artifacts(Record):
    """What the agent changed, in numbers."""

    branch: str
    commits: int = 0
    pr_url: str | None = None
    files_changed: int = 0
    insertions: int = 0
    deletions: int = 0


class VerifyResult(Record):
    """How the `verify` command ended in a clean checkout of the result."""

    command: str
    exit_code: int | None
    """None when it did not end in time."""
    output: str
    """The last lines that it printed."""


class Result(Record):
    """What a task brought back."""

    summary: str | None = None
    """The agent's last words. Untrusted text."""
    artifacts: Artifacts | None = None
    verify: VerifyResult | None = None


class Usage(Record):
    """What a task has cost so far."""

    input_tokens: int = 0
    """All of them, also those read from or written to the prompt cache."""
    output_tokens: int = 0
    cost_usd: float = 0.0
    turns: int = 0
    model_ms: int = 0
    sandbox_seconds: float = 0.0
    sandbox_cost_usd: float = 0.0


class TaskError(Record):
    """Why a task failed or was cancelled."""

    code: TaskErrorCode
    message: str
    remedy: str


class Task(Record):
    """One prompt for one agent on one repository: what users see of it. Absent is null, never missing."""

    task_id: str
    status: TaskStatus
    phase: Phase | None = None
    verdict: Verdict | None = None
    title: str
    prompt: str
    repository: str
    base_ref: str | None = None
    base_sha: str | None = None
    """The commit that the agent started from."""
    branch: str
    agent: str
    model: str | None = None
    provider: str | None = None
    tags: tuple[str, ...] = ()
    attempt: int = 0
    parent_task_id: str | None = None
    schedule_id: str | None = None
    created_at: datetime
    started_at: datetime | None = None
    completed_at: datetime | None = None
    expired_at: datetime | None = None
    """Since when its log, diff and bundles are gone."""
    result: Result | None = None
    error: TaskError | None = None
    usage: Usage = Usage()
    question: str | None = None
    next_action: str | None = None
    poll_after_seconds: float | None = None


class EventDraft(Record):
    """A line of a task's log before the store has numbered it."""

    kind: EventKind
    message: str
    level: Level = Level.INFO
    raw: Mapping[str, Any] | None = None
    timestamp: datetime | None = None
    """When it happened, by the clock of the sandbox; the store's clock where absent."""


class Event(Record):
    """One line of a task's log. `seq` counts from 1 without gaps."""

    seq: int
    timestamp: datetime
    level: Level
    kind: EventKind
    message: str
    raw: Mapping[str, Any] | None = Field(default=None, exclude_if=lambda raw: raw is None)


class LogPage(Record):
    """A part of a task's log. `after=next_after` gives what follows."""

    task_id: str
    lines: tuple[Event, ...]
    next_after: int
    more: bool


class TaskPage(Record):
    """A part of a list of tasks, newest first."""

    tasks: tuple[Task, ...]
    total: int
    limit: int
    offset: int
    next_cursor: str | None


class Message(Record):
    """Something that a user said to a running agent."""

    message_id: str
    text: str


class Signals(Record):
    """What a worker learns whenever it renews its lease."""

    cancel_requested: bool = False
    messages: tuple[Message, ...] = ()


class Claim(Record):
    """A task in the hands of one worker. Every write carries `attempt`: it is the fencing token."""

    task: Task
    spec: TaskSpec
    account_id: str
    attempt: int
    sandbox_id: str | None
    """The sandbox of an earlier attempt; it may still live and hold the work."""
    sandbox_nonce: str | None
    """Committed before a sandbox is created; a sandbox that carries it belongs to this task."""
    log_offset: int
    """How far into the runner's log the store has read, in bytes."""
    running_seconds: float
    """How long earlier attempts have had an agent running; it counts toward the time limit."""
    credentials: bytes | None
    """The task's sealed credentials (see secrets.py)."""
    cancel_requested: bool


class Account(Record):
    """Who owns tasks."""

    account_id: str
    created_at: datetime
