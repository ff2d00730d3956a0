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


MAX_CANDIDATES = 8
"""Of one task."""


def new_id(prefix: Literal["task", "sch", "key", "upl", "msg", "sbx"]) -> str:
    """A fresh id such as `task_` and 26 lower-case base32 characters."""
    return f"{prefix}_{base64.b32encode(secrets.token_bytes(16)).decode().rstrip('=').lower()}"


def short_id(task_id: str) -> str:
    """The eight characters by which people and branches name a task."""
    return task_id.partition("_")[2][:8]


def branch_name(task_id: str) -> str:
    """The branch that a task's result is on."""
    return f"task/{short_id(task_id)}"


def bound_for_git(task_id: str) -> str:
    """What a task's git credentials are sealed for: they do not open in the place of those that its agent gets."""
    return f"{task_id} git"


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

BlobKind = Literal["input", "start", "checkpoint", "result", "diff", "conversation", "session"]
"""`input`, `checkpoint` (of a task that runs) and `result` are git bundles, `diff` is text, `session` is sealed JSON of
the agent's transcript files. A task that goes on from another one has that one's result as its `start`, and its session
as the `conversation`."""

OnInterrupt = Literal["resume", "restart", "fail"]
"""What becomes of a task whose sandbox dies: it goes on from its last checkpoint, starts again, or fails."""


class Priority(StrEnum):
    """How long a task pretends to have waited already: nothing that waits is overtaken for ever."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"

    @property
    def head_start_s(self) -> float:
        """Seconds by which it counts as submitted earlier."""
        return {Priority.LOW: -900.0, Priority.NORMAL: 0.0, Priority.HIGH: 900.0}[self]


RETRIES_MAX = 5
"""A check that has failed so often is not mended by telling once more."""


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
    retries: int | None = None
    """How often a failing verify goes back to the agent; None where the repository may say, and is 0 if it does not."""
    setup: str | None = None
    on_interrupt: OnInterrupt = "resume"
    timeout_minutes: float = 60.0
    max_turns: int | None = None
    max_budget_usd: float | None = None
    tags: tuple[str, ...] = ()
    priority: Priority = Priority.NORMAL
    egress: tuple[str, ...] = ()
    """Hosts that its sandbox may reach beside those that the operator allows."""
    best_of: int | None = None
    """How many candidates try it; None where it is tried by itself."""
    models: tuple[str, ...] = ()
    """The candidates' models and providers, which they take in turn."""
    providers: tuple[str, ...] = ()
    cancel_losers: bool = False
    """Are the others cancelled as soon as one has passed?"""
    budget_shares: int = 1
    """Of a candidate: among how many the budget is divided that its repository sets."""


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
    commit: str | None = None
    """The one that was checked out."""
    seconds: float | None = None
    """How long it took."""
    tries: int = 1
    """How many results it was run on: one, and one for each time that it had failed and the agent went on."""


class TaskError(Record):
    """Why a task failed or was cancelled."""

    code: TaskErrorCode
    message: str
    remedy: str


class Result(Record):
    """What a task brought back."""

    summary: str | None = None
    """The agent's last words. Untrusted text."""
    artifacts: Artifacts | None = None
    verify: VerifyResult | None = None
    """Always of this result. What had failed before a retry is in the log."""
    retry_error: TaskError | None = None
    """Why the agent was not done when it last went on after a failed verify. What it left is the result."""
    blocked_hosts: tuple[str, ...] = ()
    """What its processes wanted to reach and may not, where that can be told. Untrusted text."""


class Usage(Record):
    """What a task has cost so far."""

    input_tokens: int = 0
    """All of them, also those read from or written to the prompt cache."""
    output_tokens: int = 0
    cost_usd: float = 0.0
    turns: int = 0
    model_ms: int = 0
    sandbox_seconds: float = 0.0
    sandbox_cost_usd: float | None = None
    """None where nobody knows what its provider asks for; what costs nothing is 0."""


class Asked(Record):
    """Since when a task waits for an answer to its `question`, and what would be one."""

    question_id: str
    choices: tuple[str, ...] = ()
    """What its user is to choose from; empty where any words will do. Untrusted text, as the question is."""
    asked_at: datetime | None = None


class Question(Asked):
    """What an agent asks its user."""

    text: str


class Overlap(Record):
    """Another task that is under way and touches the same files."""

    task_id: str
    files: tuple[str, ...]
    """Untrusted names, in order."""


class Candidate(Record):
    """One of several independent tries at the same prompt, as they are compared."""

    candidate: int
    task_id: str
    rank: int | None = None
    """1 is the best of those that have ended; None until then."""
    status: TaskStatus
    verdict: Verdict | None = None
    model: str | None = None
    provider: str | None = None
    files_changed: int = 0
    insertions: int = 0
    deletions: int = 0
    cost_usd: float = 0.0
    """What its model has cost so far."""


class Best(Record):
    """The candidate whose result is its parent's."""

    candidate: int
    task_id: str


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
    priority: Priority = Priority.NORMAL
    attempt: int = 0
    retries_used: int = 0
    """How often its agent has gone on since `verify` had failed."""
    parent_task_id: str | None = None
    """Of a candidate its parent; else the task that this one goes on from."""
    candidate: int | None = None
    """Which of its parent's candidates it is, from 1."""
    best_of: int | None = None
    """How many candidates it has. What it brought back is the best one's; it cost what all have cost."""
    best: Best | None = None
    """The best of them, once all have ended."""
    asking: tuple[str, ...] = ()
    """Those of its candidates that wait for an answer, where a single task is looked at."""
    retry_of: str | None = None
    """The task that this one tries once more."""
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
    """What the agent asks its user; the task waits. Untrusted text."""
    asked: Asked | None = None
    overlaps: tuple[Overlap, ...] = ()
    """Others that are under way and touch the same files, as far as is known while they are."""
    next_action: str | None = None
    poll_after_seconds: float | None = None

    @property
    def submitted_as(self) -> str:
        """Under whose id that is kept which it was submitted with: a candidate shares what its parent has."""
        return self.task_id if self.candidate is None or self.parent_task_id is None else self.parent_task_id


class TaskHead(Record):
    """How far a task is: whoever follows many compares these, and looks at the task when one has changed."""

    status: TaskStatus
    phase: Phase | None
    question_id: str | None
    last_seq: int
    """The number of the last line in its log."""
    expired: bool


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
    """Something that a user said to an agent."""

    message_id: str
    text: str
    answers: str | None = None
    """The id of the question that it is the answer to."""


class PendingQuestion(Asked):
    """A question of an agent that nobody has answered."""

    task_id: str
    candidate: int | None = None
    title: str
    question: str
    """Untrusted text."""
    next_action: str | None = None


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
    sandbox_place: str | None
    """Where that sandbox is, if only workers of that place reach it."""
    sandbox_age_s: float = 0.0
    """How old it was when the task was claimed."""
    question_age_s: float = 0.0
    """How long its question, if there is one, had not been answered by then."""
    sandbox_losses: int = 0
    """How many sandboxes have died under this task."""
    failed_verify: VerifyResult | None = None
    """What its agent was told when it went on last; None while there was no retry."""
    log_offset: int
    """How far into the runner's log the store has read, in bytes."""
    running_seconds: float
    """How long earlier attempts have had an agent running; it counts toward the time limit."""
    credentials: bytes | None
    """The task's sealed credentials (see secrets.py)."""
    git_credentials: bytes | None = None
    """The same, for git alone: the agent never sees them."""
    config: bytes | None = None
    """The repository's `.cloudagent.toml`, once its files are kept; None where it has none."""
    manifests: str | None = None
    """A digest of the files that decide what its set-up installs, once they are known."""
    touches: tuple[str, ...] = ()
    """The files that earlier attempts are known to have touched."""
    cancel_requested: bool


class CandidateDraft(Record):
    """One of the candidates with which a task is submitted."""

    task_id: str
    spec: TaskSpec
    credentials: bytes | None = None
    """Sealed and bound to the candidate's id, as those of any task."""
    git_credentials: bytes | None = None


class TaskDraft(Record):
    """What a schedule's task has that its `TaskSpec` does not say."""

    task_id: str
    base_sha: str | None = None
    bundle: bytes | None = None
    """The `input` blob."""
    config: bytes | None = None
    manifests: str | None = None
    """As a `Claim` has them."""
    source_key: str | None = None
    credentials: bytes | None = None
    """Sealed and bound to the task's id."""
    git_credentials: bytes | None = None
    """Sealed as well, see `bound_for_git`."""
    candidates: tuple[CandidateDraft, ...] = ()
    lines: tuple[EventDraft, ...] = ()


class Upload(Record):
    """What an account has uploaded, for the tasks that will start from it."""

    upload_id: str
    base_sha: str
    """The commit that they start from."""
    notes: tuple[str, ...] = ()
    """What of the folder is not in it, in sentences of whoever uploaded it."""
    config: bytes | None = None
    manifests: str
    """These two as a `Claim` has them."""
    root: str | None = None
    """The first commit of its history, where it is known."""


class KeptTemplate(Record):
    """What a provider's sandboxes can start from, with a set-up already done in it."""

    account_id: str
    provider: str
    key: str
    """What it was made from (see `setup_key`)."""
    template: str
    """The provider's own name of it."""


class Account(Record):
    """Who owns tasks."""

    account_id: str
    created_at: datetime


class ApiKey(Record):
    """A key with which an account comes in over HTTP. The token itself was shown once, and is nowhere kept."""

    key_id: str
    account_id: str
    name: str
    hint: str
    """The token's last four characters, to tell keys apart by."""
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None
    """Within a minute."""
