"""Records of what waits and what runs, for whoever waits and for whoever operates the installation."""

from __future__ import annotations

from datetime import datetime

from cloudagent_storage.records import Phase, Record, Task


class Place(Record):
    """Where a queued task stands, as far as can be told in this moment."""

    position: int
    """1 is taken next."""
    waiting_for: str
    """What keeps it from being taken."""
    starts_in_seconds: float | None
    """An estimate from how long the last tasks took; null when there is nothing to estimate from."""


class WorkerInfo(Record):
    """A worker process, as it has last reported."""

    name: str
    place: str
    version: str
    concurrency: int
    running: int
    """How many tasks it holds."""
    started_at: datetime
    seen_at: datetime
    swept_at: datetime | None
    """When its sweeper last went through to the end."""


class Waiting(Record):
    """What one account waits for and has running."""

    account_id: str
    queued: int
    running: int
    oldest_at: datetime | None
    """When the oldest task that waits was submitted."""


class Running(Record):
    """A task that has begun and not ended."""

    task_id: str
    account_id: str
    title: str
    candidate: int | None = None
    phase: Phase | None
    attempt: int
    worker: str | None
    """None while no worker has it: the last one gave it back."""
    lease_until: datetime | None
    lost_leases: int
    started_at: datetime | None


class Overview(Record):
    """The whole installation in one moment, for whoever operates it."""

    accounts: tuple[Waiting, ...]
    running: tuple[Running, ...]
    workers: tuple[WorkerInfo, ...]
    dead_letters: tuple[Task, ...]
    """The newest tasks that ended as poisoned."""
    last_sweep_at: datetime | None
