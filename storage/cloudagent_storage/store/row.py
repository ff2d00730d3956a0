"""The row of a task: how it is found, how it is changed, and what it looks like from outside."""

# pyright: basic
from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from peewee import Expression

from cloudagent_storage.errors import TaskExpired, TaskNotFound
from cloudagent_storage.records import (
    TERMINAL,
    Asked,
    Best,
    EventDraft,
    Message,
    Phase,
    Question,
    Result,
    Signals,
    Task,
    TaskError,
    TaskSpec,
    TaskStatus,
    Usage,
    Verdict,
    VerifyResult,
    branch_name,
)
from cloudagent_storage.store.database import Database
from cloudagent_storage.store.log import write_lines
from cloudagent_storage.tables import MessageRow, TaskRow

ACTIVE = (TaskStatus.RUNNING, TaskStatus.WAITING)
TASK_ID = re.compile(r"task_[a-z2-7]{26}")
NOTHING_ASKED = {"question": None, "asked": None, "asked_at": None}
UNSEEN = frozenset({"lease_until", "rung_at", "log_offset", "running_seconds", "usage", "lost_leases", "touches"})
"""What changes so often that nobody is told: whoever waits for a task does not wait for these."""


def find(db: Database, account_id: str, task_id: str, *, lock: bool = False, columns: Sequence[Any] = ()) -> TaskRow:
    """An account's task; with `lock`, nobody else changes it before the transaction ends.

    Raises `TaskNotFound`, the same whether the id is malformed, unknown or another account's.
    """
    rows = db.tables.tasks
    row = None
    if TASK_ID.fullmatch(task_id):
        query = rows.select(*columns).where(rows.task_id == task_id, rows.account_id == account_id)
        row = (db.locked(query) if lock else query).first()
    if row is None:
        raise TaskNotFound()
    return row


def find_kept(db: Database, account_id: str, task_id: str, *, columns: Sequence[Any] = ()) -> TaskRow:
    """An account's task whose log and blobs are still kept. Raises `TaskNotFound` and `TaskExpired`."""
    row = find(db, account_id, task_id, columns=[*columns, db.tables.tasks.expired_at])
    if row.expired_at is not None:
        raise TaskExpired()
    return row


def held_by(db: Database, attempt: int) -> Expression:
    """The fence: this attempt has the task, and has not given it back."""
    rows = db.tables.tasks
    return (rows.attempt == attempt) & rows.status.in_(ACTIVE) & rows.lease_until.is_null(False)


def update_row(
    db: Database,
    task_id: str,
    where: Expression,
    *,
    lines: Sequence[EventDraft] = (),
    whole: bool = False,
    **changes: Any,
) -> TaskRow | None:
    """Change a task's row if it is as `where` says, and add lines to its log, within the caller's transaction.

    Every change of a task goes through this one UPDATE, nearly always by way of `change`: what it finds and what it
    leaves behind are one step, and it hands out the numbers of the lines. Returns the row (`whole`, or what its callers
    need), or None when it was not so.
    """
    rows = db.tables.tasks
    query = rows.update(last_seq=rows.last_seq + len(lines), **changes).where(rows.task_id == task_id, where)
    brief = (rows.last_seq, rows.cancel_requested_at, rows.candidate)
    changed = list(query.returning(rows) if whole else query.returning(*brief))
    if not changed:
        return None
    write_lines(db, task_id, changed[0].last_seq, lines)
    if lines or not changes.keys() <= UNSEEN:
        db.announce(task_id)
    return changed[0]


def signals(db: Database, task_id: str, row: TaskRow) -> Signals:
    """What the worker of a task ought to know."""
    messages = db.tables.messages
    waiting = messages.select().where(messages.task_id == task_id, messages.delivered_at.is_null())
    return Signals(
        cancel_requested=row.cancel_requested_at is not None,
        messages=tuple(message_of(message) for message in waiting.order_by(messages.number)),
    )


def message_of(row: MessageRow) -> Message:
    return Message(message_id=row.message_id, text=row.text, answers=row.answers)


def asking(db: Database, question: Question | None) -> dict[str, Any]:
    """What the row of a task looks like whose agent asks this, or asks nothing any more."""
    if question is None:
        return {"status": TaskStatus.RUNNING, **NOTHING_ASKED}
    asked = question.model_dump(mode="json", include={"question_id", "choices"})
    return {"status": TaskStatus.WAITING, "question": question.text, "asked": asked, "asked_at": db.now}


def asked_of(row: TaskRow) -> Asked | None:
    return None if row.asked is None else Asked.model_validate({**row.asked, "asked_at": row.asked_at})


def spec_of(row: TaskRow) -> TaskSpec:
    return TaskSpec.model_validate(row.spec)


def usage_of(row: TaskRow) -> Usage:
    # A number that JSON cannot express was kept as null.
    return Usage.model_validate({name: value for name, value in (row.usage or {}).items() if value is not None})


def task_of(row: TaskRow) -> Task:
    """The record that users see."""
    spec = spec_of(row)
    best = None if row.best is None else Best.model_validate(row.best)
    return Task(
        task_id=row.task_id,
        status=TaskStatus(row.status),
        phase=None if row.phase is None else Phase(row.phase),
        verdict=None if row.verdict is None else Verdict(row.verdict),
        title=spec.title,
        prompt=spec.prompt,
        repository=spec.repository,
        base_ref=spec.base_ref,
        base_sha=row.base_sha,
        branch=branch_name(row.task_id if best is None else best.task_id),
        agent=spec.agent,
        model=row.model or spec.model,
        provider=row.provider or spec.provider,
        tags=spec.tags,
        priority=spec.priority,
        attempt=row.attempt,
        retries_used=row.retries_used or 0,
        parent_task_id=row.parent_task_id,
        candidate=row.candidate,
        best_of=row.best_of,
        best=best,
        retry_of=row.retry_of,
        schedule_id=row.schedule_id,
        created_at=row.created_at,
        started_at=row.started_at,
        completed_at=row.completed_at,
        expired_at=row.expired_at,
        result=None if row.result is None else Result.model_validate(row.result),
        error=None if row.error is None else TaskError.model_validate(row.error),
        usage=usage_of(row),
        question=row.question,
        asked=asked_of(row),
    )


def ended(db: Database, status: TaskStatus, *, error: TaskError | None) -> dict[str, Any]:
    """What the row of every task that has ended looks like."""
    if status not in TERMINAL:
        raise ValueError("a task ends in a terminal status")
    return {
        "status": status,
        "error": json_of(error),
        "completed_at": db.now,
        "phase": None,
        **NOTHING_ASKED,
        "owner": None,
        "lease_until": None,
        "credentials": None,
        "git_credentials": None,
    }


def json_of(record: Result | TaskError | TaskSpec | Usage | VerifyResult | None) -> dict[str, Any] | None:
    """A record as its column keeps it."""
    return None if record is None else record.model_dump(mode="json")
