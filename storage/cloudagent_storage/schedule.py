"""Schedules, as they cross a boundary: cron lines that submit tasks, and what became of each due time."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from cloudagent_storage.records import Record, TaskSpec

MAX_SCHEDULES = 100
"""Per account."""


RunOutcome = Literal["submitted", "skipped", "missed"]


class ScheduleRun(Record):
    """What became of one due time of a schedule. Each has one, whatever happened."""

    due_at: datetime
    outcome: RunOutcome
    reason: str | None = None
    """Why no task was submitted."""
    task_id: str | None = None
    created_at: datetime


def not_ended(task_id: str) -> str:
    """Why a due time is skipped while an earlier task goes on."""
    return f"The task before, {task_id}, had not ended."


class Schedule(Record):
    """A cron line that submits a task."""

    schedule_id: str
    name: str
    cron: str
    timezone: str
    enabled: bool
    task: TaskSpec
    """What is submitted. A folder is read whenever the schedule is due."""
    created_at: datetime
    updated_at: datetime
    next_due_at: tuple[datetime, ...] = ()
    """The next due times, soonest first; none while it is paused."""
    last_runs: tuple[ScheduleRun, ...] = ()
    """The newest due times and what became of them, newest first."""


class ScheduleList(Record):
    """An account's schedules, oldest first."""

    schedules: tuple[Schedule, ...]
    total: int


class HeldSchedule(Record):
    """A schedule as whoever fires or changes it needs it. `revision` is the fence: a change raises it."""

    schedule: Schedule
    account_id: str
    revision: int
    due_at: datetime | None
    """The due time that nobody has answered yet; it may lie ahead."""
    seen_at: datetime
    """When all this was read, by the database's clock."""
    credentials: bytes | None
    """Sealed and bound to the schedule's id (see secrets.py)."""
    unfinished_task_id: str | None
    """A task of this schedule that has not ended."""
