"""Which task comes next, for whom, and how long that will take.

The order is fair between accounts and within them. Between accounts, whoever has the fewest tasks running comes first,
so that one with a thousand waiting does not keep another from its first. Within an account, whoever has waited longest
comes first; a priority counts as minutes that a task has waited already, so that nothing is overtaken for ever. What
has been begun comes before everything: its sandbox costs money.
"""

# pyright: basic
from __future__ import annotations

import statistics
from datetime import timedelta
from typing import Any

from peewee import Case, Expression, fn

from cloudagent_storage.overview import Overview, Place, Running, Waiting
from cloudagent_storage.records import (
    Claim,
    EventDraft,
    Level,
    Phase,
    TaskError,
    TaskStatus,
    VerifyResult,
)
from cloudagent_storage.store.change import change
from cloudagent_storage.store.database import Database
from cloudagent_storage.store.row import ACTIVE, ended, find, spec_of, task_of
from cloudagent_storage.store.workers import workers
from cloudagent_storage.tables import TaskRow

LOST_LEASES = 3
"""A task whose lease ran out so many times in a row, with nothing new in its log, is poisoned."""
PATIENCE_S = 600
"""How long a task waits for the machine that its sandbox is on, before another worker may end it."""
ALIVE_S = 60
"""A worker that reported within so many seconds counts for an estimate."""
SAMPLE = 50
"""So many of the last tasks tell how long one takes."""
SHOWN = 200

POISONED = TaskError(
    code="poisoned",
    message=f"{LOST_LEASES} workers in a row were lost while they ran this task.",
    remedy="Look at the end of its log and at the workers' logs; then try it again with retry_task.",
)


class Backlog:
    """The tasks that want a worker."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._rows = db.tables.tasks

    def claim_next(
        self, *, worker: str, place: str, lease_s: float, running_max: int | None = None, patience_s: float = PATIENCE_S
    ) -> Claim | None:
        """Take the task that comes next, for a worker at `place`; None when there is none that it may have.

        A task whose sandbox is at another place is left to the workers there, until none of them was heard of for
        `patience_s`. No account gets more than `running_max` tasks at once.
        """
        while True:
            # A transaction for each, too: one that ends as poisoned may be a candidate, and hold its parent's row.
            with self._db.writing():
                if (task_id := self._begun(place, patience_s)) is None:
                    accounts = self._accounts(running_max)
                    break
                if (claim := take(self._db, task_id, worker=worker, lease_s=lease_s)) is not None:
                    return claim
        for account_id in accounts:
            # A transaction for each: whoever held two accounts' rows could wait for whoever holds them in reverse.
            with self._db.writing():
                if running_max is not None and not self._has_room(account_id, running_max):
                    continue
                while (task_id := self._oldest(account_id)) is not None:
                    if (claim := take(self._db, task_id, worker=worker, lease_s=lease_s)) is not None:
                        return claim
        return None

    def place_of(self, account_id: str, task_id: str, *, running_max: int | None = None) -> Place | None:
        """Where a task stands in the queue; None when it does not wait in it. Raises `TaskNotFound`."""
        rows = self._rows
        with self._db.reading():
            row = find(self._db, account_id, task_id)
            if row.status != TaskStatus.QUEUED or row.best_of is not None:
                return None
            waiting = {found.account_id: found for found in self._waiting()}
            earlier = (rows.account_id == account_id) & _before(rows, row)
            ahead = rows.select().where(rows.status == TaskStatus.QUEUED, rows.best_of.is_null(), earlier).count()
            alive = workers(self._db, within_s=ALIVE_S)
            typical = self._typical_s()
        mine = waiting.pop(account_id, None)
        running = 0 if mine is None else mine.running
        # It is taken when so many tasks of its account run; until then the others get what they have fewer of.
        level = running + ahead
        position = 1 + ahead
        for other in waiting.values():
            tie = other.oldest_at is not None and other.oldest_at < row.created_at
            position += min(other.queued, max(0, level - other.running + tie))
        slots = sum(found.concurrency for found in alive)
        free = slots - sum(found.running for found in alive)
        over = 0 if running_max is None else level + 1 - running_max
        if not alive:
            return Place(position=position, waiting_for="a worker: none is running", starts_in_seconds=None)
        waits = [(position - free) / slots]
        if running_max is not None:
            waits.append(over / running_max)
        rounds = max(0.0, *waits)
        reason = "a worker that is free"
        if over > 0:
            reason = f"the account's other tasks: it may have {running_max} running at once"
        estimate = 0.0 if rounds == 0 else None if typical is None else round(rounds * typical, 1)
        return Place(position=position, waiting_for=reason, starts_in_seconds=estimate)

    def overview(self) -> Overview:
        """Everything that waits, runs and went wrong."""
        rows = self._rows
        with self._db.reading():
            runs = rows.best_of.is_null()
            active = rows.select().where(rows.status.in_(ACTIVE), runs).order_by(rows.started_at).limit(SHOWN)
            dead = rows.select().where(rows.status == TaskStatus.FAILED, runs, rows.error["code"] == POISONED.code)
            found = workers(self._db)
            swept = [worker.swept_at for worker in found if worker.swept_at is not None]
            return Overview(
                accounts=tuple(self._waiting()),
                running=tuple(_running(row) for row in active),
                workers=tuple(found),
                dead_letters=tuple(task_of(row) for row in dead.order_by(rows.completed_at.desc()).limit(20)),
                last_sweep_at=max(swept, default=None),
            )

    # -- what comes next ---------------------------------------------------------------------------------------------

    def _begun(self, place: str, patience_s: float) -> str | None:
        """The oldest task that was begun and that nobody has now."""
        rows, places = self._rows, self._db.tables.workers
        unheld = rows.lease_until.is_null() | (rows.lease_until < self._db.now)
        peopled = places.select(places.place).where(places.seen_at >= self._db.later(-patience_s))
        ours = rows.sandbox_place.is_null() | (rows.sandbox_place == place) | rows.sandbox_place.not_in(peopled)
        query = rows.select(rows.task_id).where(rows.status.in_(ACTIVE), unheld, ours, self._ready())
        return self._first(query.order_by(rows.created_at))

    def _oldest(self, account_id: str) -> str | None:
        rows = self._rows
        wanted = (rows.status == TaskStatus.QUEUED) & (rows.account_id == account_id)
        query = rows.select(rows.task_id).where(wanted, rows.cancel_requested_at.is_null(), self._ready())
        return self._first(query.order_by(_since(rows), rows.created_at))

    def _first(self, query: Any) -> str | None:
        # What somebody else is taking in this moment is skipped, not waited for.
        row = self._db.locked(query.limit(1), skip=True).first()
        return None if row is None else row.task_id

    def _ready(self) -> Expression:
        return is_for_workers(self._db)

    def _accounts(self, running_max: int | None) -> list[str]:
        """Whose task may be next: the account with the fewest running first."""
        waiting = [found for found in self._waiting() if found.queued]
        waiting.sort(key=lambda found: (found.running, found.oldest_at))
        return [found.account_id for found in waiting if running_max is None or found.running < running_max]

    def _has_room(self, account_id: str, running_max: int) -> bool:
        """Still, now that nobody else can claim for the account before this transaction ends?"""
        accounts, rows = self._db.tables.accounts, self._rows
        self._db.locked(accounts.select().where(accounts.account_id == account_id)).first()
        mine = (rows.account_id == account_id) & rows.best_of.is_null()
        running = rows.select().where(mine, rows.status.in_(ACTIVE)).count()
        return running < running_max

    def _waiting(self) -> list[Waiting]:
        """What each account has queued and running."""
        rows = self._rows
        queued = rows.status == TaskStatus.QUEUED
        query: Any = rows.select(
            rows.account_id,
            fn.SUM(Case(None, [(queued, 1)], 0)),
            fn.SUM(Case(None, [(rows.status.in_(ACTIVE), 1)], 0)),
            fn.MIN(Case(None, [(queued, rows.created_at)], None)),
        ).where(rows.status.in_([TaskStatus.QUEUED, *ACTIVE]), rows.best_of.is_null())
        return [
            Waiting(
                account_id=account_id, queued=count, running=running, oldest_at=rows.created_at.python_value(oldest)
            )
            for account_id, count, running, oldest in query.group_by(rows.account_id).order_by(rows.account_id).tuples()
        ]

    # -- how long it takes -------------------------------------------------------------------------------------------

    def _typical_s(self) -> float | None:
        """How long a task ran lately, from its first claim to its end."""
        rows = self._rows
        done = rows.status.in_([TaskStatus.COMPLETED, TaskStatus.FAILED]) & rows.started_at.is_null(False)
        done &= rows.best_of.is_null()
        query = rows.select(rows.started_at, rows.completed_at).where(done, rows.completed_at.is_null(False))
        took = [
            (row.completed_at - row.started_at).total_seconds()
            for row in query.order_by(rows.completed_at.desc()).limit(SAMPLE)
        ]
        return statistics.median(took) if took else None


def is_for_workers(db: Database) -> Expression:
    """The tasks that a worker may be given now: not those with candidates, nor what is to be left alone for a while."""
    rows = db.tables.tasks
    return rows.best_of.is_null() & (rows.not_before.is_null() | (rows.not_before <= db.now))


def take(db: Database, task_id: str, *, worker: str, lease_s: float) -> Claim | None:
    """Claim one task, within the caller's transaction; see `Tasks.claim`."""
    rows = db.tables.tasks
    active = rows.status.in_(ACTIVE) & rows.best_of.is_null()
    released = active & rows.lease_until.is_null()
    expired = active & rows.lease_until.is_null(False) & (rows.lease_until < db.now)
    queued = (rows.status == TaskStatus.QUEUED) & rows.cancel_requested_at.is_null() & rows.best_of.is_null()
    if change(
        db,
        task_id,
        expired & (rows.lost_leases >= LOST_LEASES - 1),
        lines=[EventDraft(kind="error", level=Level.ERROR, message=POISONED.message)],
        **ended(db, TaskStatus.FAILED, error=POISONED),
        lost_leases=rows.lost_leases + 1,
    ):
        return None
    row = change(
        db,
        task_id,
        queued | released | expired,
        whole=True,
        # A question outlives the worker that brought it.
        status=Case(None, [(rows.question.is_null(False), TaskStatus.WAITING)], TaskStatus.RUNNING),
        attempt=rows.attempt + 1,
        owner=worker,
        lease_until=db.later(lease_s),
        lost_leases=Case(None, [(expired, rows.lost_leases + 1)], rows.lost_leases),
        started_at=fn.COALESCE(rows.started_at, db.now),
        not_before=None,
        rung_at=None,  # so that a lease which runs out is seen at once
    )
    return None if row is None else claim_of(row, lease_s=lease_s)


def claim_of(row: TaskRow, *, lease_s: float) -> Claim:
    """What the worker gets that has just claimed this row for `lease_s`."""
    now = row.lease_until - timedelta(seconds=lease_s)
    age_s = 0.0 if row.sandbox_made_at is None else max(0.0, (now - row.sandbox_made_at).total_seconds())
    asked_s = 0.0 if row.asked_at is None else max(0.0, (now - row.asked_at).total_seconds())
    return Claim(
        task=task_of(row),
        spec=spec_of(row),
        account_id=row.account_id,
        attempt=row.attempt,
        sandbox_id=row.sandbox_id,
        sandbox_nonce=row.sandbox_nonce,
        sandbox_place=row.sandbox_place,
        sandbox_age_s=age_s,
        question_age_s=asked_s,
        sandbox_losses=row.sandbox_losses or 0,
        failed_verify=None if row.failed_verify is None else VerifyResult.model_validate(row.failed_verify),
        log_offset=row.log_offset,
        running_seconds=row.running_seconds,
        credentials=None if row.credentials is None else bytes(row.credentials),
        git_credentials=None if row.git_credentials is None else bytes(row.git_credentials),
        config=None if row.config is None else bytes(row.config),
        manifests=row.manifests,
        touches=tuple(row.touches or ()),
        cancel_requested=row.cancel_requested_at is not None,
    )


def _since(rows: type[TaskRow]) -> Any:
    """What the order goes by; a row of the version before has no `waits_since`."""
    return fn.COALESCE(rows.waits_since, rows.created_at)


def _before(rows: type[TaskRow], row: TaskRow) -> Expression:
    since = rows.created_at.db_value(row.waits_since or row.created_at)
    return (_since(rows) < since) | ((_since(rows) == since) & (rows.created_at < row.created_at))


def _running(row: TaskRow) -> Running:
    return Running(
        task_id=row.task_id,
        account_id=row.account_id,
        title=spec_of(row).title,
        candidate=row.candidate,
        phase=None if row.phase is None else Phase(row.phase),
        attempt=row.attempt,
        worker=row.owner,
        lease_until=row.lease_until,
        lost_leases=row.lost_leases,
        started_at=row.started_at,
    )
