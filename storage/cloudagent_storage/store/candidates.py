"""Several tries at one prompt: candidates, which are tasks like all others, and their parent, which no worker takes.

What becomes of the parent is decided in the transactions that change its candidates, so that no crash comes between.
Locks are taken in one order: candidates by their numbers, then the parent. Whoever has the parent's row wants no other,
so that two candidates that end in one moment come one after the other: the second sees how the first has ended.
"""

# pyright: basic
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peewee import fn

from cloudagent_storage.errors import InvalidInput, NotReady, OutOfRange
from cloudagent_storage.records import (
    Best,
    Candidate,
    EventDraft,
    Level,
    Result,
    Task,
    TaskError,
    TaskStatus,
    Usage,
    Verdict,
)
from cloudagent_storage.store.database import Database
from cloudagent_storage.store.row import TASK_ID, ended, find, json_of, spec_of, task_of, update_row, usage_of
from cloudagent_storage.tables import TaskRow

STATUSES = (TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED)
VERDICTS = (Verdict.PASSED, Verdict.UNVERIFIED, Verdict.FAILED)

ALL_CANCELLED = TaskError(
    code="cancelled_by_user",
    message="Its candidates were cancelled.",
    remedy="Submit it again if it is still wanted.",
)
LOST = TaskError(
    code="cancelled_by_user",
    message="Another candidate had passed before this one started.",
    remedy="Leave cancel_losers out to have all of them run to their end.",
)


class Candidates:
    """The candidates of tasks."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._rows = db.tables.tasks

    def of(self, account_id: str, task_id: str) -> Sequence[Candidate]:
        """A task's candidates: those that have ended, the best first, then the others; () where it has none.

        Raises `TaskNotFound`.
        """
        with self._db.reading():
            find(self._db, account_id, task_id, columns=[self._rows.task_id])
            return compared(_members(self._db, task_id))

    def usage(self, account_id: str, task_id: str) -> Usage:
        """What all candidates of a task have cost so far. Raises `TaskNotFound`."""
        with self._db.reading():
            find(self._db, account_id, task_id, columns=[self._rows.task_id])
            return _sum_of(_members(self._db, task_id))

    def choose(self, account_id: str, task_id: str, candidate: int | None = None) -> Task:
        """The task whose result is meant: that candidate of it, the best one where none is named, or itself.

        Raises `TaskNotFound`, `NotReady` while nobody can tell which is the best, and errors under `InvalidInput` for
        a candidate that there is not.
        """
        with self._db.reading():
            row = find(self._db, account_id, task_id)
            if row.best_of is None:
                if candidate is not None:
                    raise InvalidInput("That task has no candidates.", remedy="Leave it out.", field="candidate")
                return task_of(row)
            if candidate is None:
                if row.best is None:
                    raise NotReady(
                        "Which of its candidates is the best shows when all have ended.",
                        remedy="Wait for it with get_task(wait_seconds=50); or name a candidate that has ended.",
                    )
                candidate = Best.model_validate(row.best).candidate
            members = {member.candidate: member for member in _members(self._db, task_id)}
            if candidate not in members:
                raise OutOfRange(f"It has the candidates 1 to {row.best_of}.", field="candidate")
            return task_of(members[candidate])

    def settle(self) -> int:
        """End every parent whose candidates have all ended; returns how many there were.

        Their own ends do that. But while an installation is updated, a worker of the version before may end a
        candidate, and knows nothing of parents.
        """
        rows = self._rows
        members = rows.alias()
        of_parent = (members.parent_task_id == rows.task_id) & members.candidate.is_null(False)
        running = members.select().where(of_parent, members.status.not_in(list(STATUSES)))
        left = rows.best_of.is_null(False) & rows.status.not_in(list(STATUSES))
        with self._db.reading():
            query = rows.select(rows.task_id).where(left, ~fn.EXISTS(running))
            found = [row.task_id for row in query]
        for task_id in found:
            with self._db.writing():
                parent = self._db.locked(rows.select().where(rows.task_id == task_id, left)).first()
                if parent is not None and (members := _members(self._db, task_id)):
                    _change_parent(self._db, parent, members, [])
        return len(found)


def compared(rows: Sequence[TaskRow]) -> Sequence[Candidate]:
    """The candidates of one task as a table: ranked as far as they have ended, then the others by number."""
    over = sorted((row for row in rows if TaskStatus(row.status).terminal), key=_merit)
    going_on = [row for row in rows if not TaskStatus(row.status).terminal]
    ranks = [*range(1, len(over) + 1), *(None for _ in going_on)]
    return tuple(_candidate_of(row, rank) for row, rank in zip([*over, *going_on], ranks, strict=True))


def _merit(row: TaskRow) -> tuple[float, ...]:
    """Smaller is better: completed ones first, then by verdict, size of the diff, and cost.

    Of two with one verdict the one that changed nothing comes last: it is the smallest, and most often did not try.
    """
    status = TaskStatus(row.status)
    verdict = Verdict.UNVERIFIED if row.verdict is None else Verdict(row.verdict)
    files, insertions, deletions = _size(row)
    return (
        STATUSES.index(status),
        VERDICTS.index(verdict),
        files == 0,
        insertions + deletions,
        usage_of(row).cost_usd,
        _number(row),
    )


def _number(row: TaskRow) -> int:
    assert row.candidate is not None
    return row.candidate


def _size(row: TaskRow) -> tuple[int, int, int]:
    artifacts = None if row.result is None else Result.model_validate(row.result).artifacts
    if artifacts is None:
        return 0, 0, 0
    return artifacts.files_changed, artifacts.insertions, artifacts.deletions


def _candidate_of(row: TaskRow, rank: int | None) -> Candidate:
    files, insertions, deletions = _size(row)
    spec = spec_of(row)
    return Candidate(
        candidate=_number(row),
        task_id=row.task_id,
        rank=rank,
        status=TaskStatus(row.status),
        verdict=None if row.verdict is None else Verdict(row.verdict),
        model=row.model or spec.model,
        provider=row.provider or spec.provider,
        files_changed=files,
        insertions=insertions,
        deletions=deletions,
        cost_usd=usage_of(row).cost_usd,
    )


# -- within the transactions of others -----------------------------------------------------------------------------


def lock_candidates(db: Database, task_id: str) -> None:
    """Hold the rows of a task's candidates that have not ended, before the task's own, until the transaction ends."""
    rows = db.tables.tasks
    if not TASK_ID.fullmatch(task_id):
        return
    mine = rows.select(rows.task_id).where(
        rows.parent_task_id == task_id, rows.candidate.is_null(False), rows.status.not_in(list(STATUSES))
    )
    list(db.locked(mine.order_by(rows.candidate)))


def lock_siblings(db: Database, task_id: str) -> None:
    """The same for all candidates of the parent of a candidate, itself among them; nothing for any other task."""
    rows = db.tables.tasks
    row = rows.select(rows.parent_task_id).where(rows.task_id == task_id, rows.candidate.is_null(False)).first()
    if row is not None:
        lock_candidates(db, row.parent_task_id)


def tell_parent(db: Database, task_id: str, *, claimed: bool, asks: bool) -> None:
    """A candidate's status was just written: its parent's log says so, and its parent begins and ends with it.

    `claimed` and `asks` say that a worker has taken it, and that its agent has asked something. One that may have
    passed holds its siblings since before it was written (see `lock_siblings`), as they may be cancelled here.
    """
    rows = db.tables.tasks
    row = rows.select().where(rows.task_id == task_id).get()
    status, name = TaskStatus(row.status), f"Candidate {row.candidate}, {row.task_id}"
    if status.terminal:
        lines = [_ended_line(row, name)]
    elif asks:
        said = f"{name}, asks something; answer it there with send_message (`ca task send`)."
        lines = [EventDraft(kind="status", level=Level.WARNING, message=said)]
    elif claimed and row.attempt == 1:
        lines = [EventDraft(kind="status", message=f"{name}, has started.")]
    else:
        return
    parent = db.locked(rows.select().where(rows.task_id == row.parent_task_id)).first()
    if parent is None or TaskStatus(parent.status).terminal:
        return
    if not status.terminal:
        begun = {"status": TaskStatus.RUNNING, "started_at": db.now} if parent.status == TaskStatus.QUEUED else {}
        update_row(db, parent.task_id, rows.task_id == parent.task_id, lines=lines, **begun)
        return
    # Read now that the parent is ours: whoever has ended before has committed.
    members = _members(db, parent.task_id)
    if row.verdict == Verdict.PASSED and status is TaskStatus.COMPLETED and spec_of(parent).cancel_losers:
        lines += _cancel_losers(db, members, _number(row))
        members = _members(db, parent.task_id)
    _change_parent(db, parent, members, lines)


def _cancel_losers(db: Database, members: Sequence[TaskRow], winner: int) -> list[EventDraft]:
    """Cancel all that go on; the parent's lines about those that had not begun, and so end here."""
    lines: list[EventDraft] = []
    for member in members:
        if TaskStatus(member.status).terminal or member.cancel_requested_at is not None:
            continue
        changes: dict[str, Any] = {"cancel_requested_at": db.now}
        said = f"Cancel requested: candidate {winner} has passed."
        if member.status == TaskStatus.QUEUED:
            changes |= ended(db, TaskStatus.CANCELLED, error=LOST)
            said = f"Cancelled before it started: candidate {winner} has passed."
            name = f"Candidate {member.candidate}, {member.task_id}"
            lines.append(EventDraft(kind="status", message=f"{name}, was cancelled before it started."))
        mine = [EventDraft(kind="status", message=said)]
        update_row(db, member.task_id, db.tables.tasks.task_id == member.task_id, lines=mine, **changes)
    return lines


def _change_parent(db: Database, parent: TaskRow, members: Sequence[TaskRow], lines: Sequence[EventDraft]) -> None:
    """Write down what its candidates have cost; and once all have ended, how it ends itself."""
    rows = db.tables.tasks
    changes: dict[str, Any] = {"usage": json_of(_sum_of(members))}
    if all(TaskStatus(member.status).terminal for member in members):
        best = min(members, key=_merit)
        status = TaskStatus(best.status)
        if status is not TaskStatus.COMPLETED and parent.cancel_requested_at is not None:
            status = TaskStatus.CANCELLED
        error = None if best.error is None else TaskError.model_validate(best.error)
        changes |= {
            **ended(db, status, error=ALL_CANCELLED if status is TaskStatus.CANCELLED else error),
            "verdict": best.verdict,
            "result": best.result,
            "base_sha": best.base_sha or parent.base_sha,
            "model": best.model or spec_of(best).model,
            "provider": best.provider or spec_of(best).provider,
            "best": Best(candidate=_number(best), task_id=best.task_id).model_dump(),
        }
        said = f"{status.value.capitalize()}. The best of {len(members)} is candidate {best.candidate}."
        level = Level.INFO if status is TaskStatus.COMPLETED else Level.WARNING
        lines = [*lines, EventDraft(kind="status", level=level, message=said)]
    update_row(db, parent.task_id, rows.task_id == parent.task_id, lines=lines, **changes)


def _ended_line(row: TaskRow, name: str) -> EventDraft:
    files, insertions, deletions = _size(row)
    said = f"{name}: {row.status}"
    if row.error is not None:
        said += f" ({TaskError.model_validate(row.error).code})"
    said += f", {row.verdict}" if row.verdict is not None else ""
    said += f", +{insertions} -{deletions}" if files else ", no file changed"
    level = Level.INFO if row.status == TaskStatus.COMPLETED else Level.WARNING
    return EventDraft(kind="status", level=level, message=f"{said}, ${usage_of(row).cost_usd:.4f}.")


def _members(db: Database, task_id: str) -> list[TaskRow]:
    rows = db.tables.tasks
    mine = rows.select().where(rows.parent_task_id == task_id, rows.candidate.is_null(False))
    return list(mine.order_by(rows.candidate))


def _sum_of(members: Sequence[TaskRow]) -> Usage:
    """What all of them have cost. What a sandbox cost is known only where it is of every one that had any."""
    usages = [usage_of(member) for member in members]
    paid = [usage.sandbox_cost_usd for usage in usages if usage.sandbox_seconds or usage.sandbox_cost_usd is not None]
    known = [cost for cost in paid if cost is not None]
    return Usage(
        input_tokens=sum(usage.input_tokens for usage in usages),
        output_tokens=sum(usage.output_tokens for usage in usages),
        cost_usd=sum(usage.cost_usd for usage in usages),
        turns=sum(usage.turns for usage in usages),
        model_ms=sum(usage.model_ms for usage in usages),
        sandbox_seconds=sum(usage.sandbox_seconds for usage in usages),
        sandbox_cost_usd=sum(known) if known and len(known) == len(paid) else None,
    )
