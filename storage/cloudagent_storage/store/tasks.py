"""The tasks: how they are asked for, taken by workers, and ended."""

# pyright: basic
from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from types import EllipsisType
from typing import Any, TypedDict, Unpack

from peewee import Expression

from cloudagent_storage.errors import AmbiguousId, IdempotencyMismatch, InvalidCursor, LeaseLost, TaskNotFound
from cloudagent_storage.records import (
    ID_LENGTH,
    TERMINAL,
    BlobKind,
    CandidateDraft,
    Claim,
    EventDraft,
    Idempotency,
    Phase,
    Question,
    Result,
    Signals,
    Task,
    TaskError,
    TaskHead,
    TaskPage,
    TaskSpec,
    TaskStatus,
    Usage,
    Verdict,
    VerifyResult,
    new_id,
)
from cloudagent_storage.store.backlog import is_for_workers, take
from cloudagent_storage.store.blobs import WRITES_WITHIN_S, packed, write_blob
from cloudagent_storage.store.candidates import lock_candidates, lock_siblings
from cloudagent_storage.store.change import change, change_held
from cloudagent_storage.store.database import Database
from cloudagent_storage.store.log import write_lines
from cloudagent_storage.store.row import (
    ACTIVE,
    TASK_ID,
    asking,
    ended,
    find,
    held_by,
    json_of,
    signals,
    spec_of,
    task_of,
)
from cloudagent_storage.tables import TaskRow, storable

NEVER = datetime(9000, 1, 1, tzinfo=UTC)
PREFIX = re.compile(rf"[a-z2-7]{{4,{ID_LENGTH}}}")

CANCELLED = TaskError(
    code="cancelled_by_user",
    message="The task was cancelled before it started.",
    remedy="Submit it again if it is still wanted.",
)


class Changes(TypedDict, total=False):
    """What a worker can change of its task on the way. What is left out stays."""

    phase: Phase | None
    base_sha: str | None
    config: bytes | None
    manifests: str | None
    """Kept before the `input` blob is: whoever finds that takes these for what belongs to it."""
    source_key: str | None
    model: str | None
    provider: str | None
    sandbox_id: str | None
    sandbox_losses: int
    retries_used: int
    failed_verify: VerifyResult
    touches: Sequence[str]
    """What it touches is known from the result now; empty for nothing."""
    usage: Usage
    running_seconds: float


class Tasks:
    """All tasks. What is for users takes their account; what is for workers takes the attempt."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._rows = db.tables.tasks

    # -- for users -------------------------------------------------------------------------------------------------

    def add(
        self,
        account_id: str,
        spec: TaskSpec,
        *,
        task_id: str | None = None,
        base_sha: str | None = None,
        config: bytes | None = None,
        manifests: str | None = None,
        source_key: str | None = None,
        credentials: bytes | None = None,
        git_credentials: bytes | None = None,
        blobs: Mapping[BlobKind, bytes] | None = None,
        lines: Sequence[EventDraft] = (),
        idempotency: Idempotency | None = None,
        retry_of: str | None = None,
        parent_task_id: str | None = None,
        schedule_id: str | None = None,
        candidates: Sequence[CandidateDraft] = (),
    ) -> Task:
        """Keep a new task, with all that belongs to it, in one step; with `candidates`, as their parent.

        With an `idempotency` that the account has used before, nothing is kept, and the earlier task is the answer;
        however many submits race, there is one task. Raises `RepositoryTooLarge`, `StorageFull`, and
        `IdempotencyMismatch` for a key that was used with other arguments.
        """
        self._db.check_room()
        task_id = task_id or new_id("task")
        ready: list[tuple[BlobKind, bytes, int]] = [
            (kind, packed(data), len(data)) for kind, data in (blobs.items() if blobs else ())
        ]
        with self._db.writing():
            if ready:
                self._db.take_time(WRITES_WITHIN_S)
            start = {"base_sha": base_sha, "config": config, "manifests": manifests, "source_key": source_key}
            query = self._inserted(
                account_id,
                spec,
                task_id=task_id,
                **start,
                schedule_id=schedule_id,
                credentials=credentials,
                git_credentials=git_credentials,
                retry_of=retry_of,
                parent_task_id=parent_task_id,
                last_seq=len(lines),
                idempotency_key=None if idempotency is None else idempotency.key,
                arguments_digest=None if idempotency is None else idempotency.digest,
                best_of=len(candidates) or None,
                # No worker takes it, also none of the version before, which knows nothing of candidates.
                not_before=NEVER if candidates else None,
            )
            if idempotency is not None:
                query = query.on_conflict_ignore()
            inserted = list(query.returning(self._rows).objects(self._rows))
            if idempotency is not None and not inserted:
                return self._replayed(account_id, idempotency)
            (row,) = inserted
            write_lines(self._db, task_id, len(lines), lines)
            for kind, data, size in ready:
                write_blob(self._db, task_id, kind, data, size)
            for number, draft in enumerate(candidates, start=1):
                said = EventDraft(kind="status", message=f"Queued, as candidate {number} of {task_id}.")
                mine = {"credentials": draft.credentials, "git_credentials": draft.git_credentials}
                self._inserted(
                    account_id,
                    draft.spec,
                    task_id=draft.task_id,
                    **start,
                    **mine,
                    parent_task_id=task_id,
                    last_seq=1,
                    candidate=number,
                ).execute()
                write_lines(self._db, draft.task_id, 1, [said])
            return task_of(row)

    def replay(self, account_id: str, idempotency: Idempotency) -> Task | None:
        """The task that was submitted with this key before, or None. Raises `IdempotencyMismatch`."""
        with self._db.reading():
            if not self._rows.select().where(self._with_key(account_id, idempotency)).exists():
                return None
            return self._replayed(account_id, idempotency)

    def get(self, account_id: str, task_id: str) -> Task:
        """An account's task. Raises `TaskNotFound`, the same for another account's id as for an unknown one."""
        rows = self._rows
        with self._db.reading():
            task = task_of(find(self._db, account_id, task_id))
            if task.best_of is None or task.status.terminal:
                return task
            mine = (rows.parent_task_id == task_id) & rows.candidate.is_null(False)
            asking = rows.select(rows.task_id).where(mine, rows.status == TaskStatus.WAITING).order_by(rows.candidate)
            return task.model_copy(update={"asking": tuple(row.task_id for row in asking)})

    def spec(self, account_id: str, task_id: str) -> TaskSpec:
        """All that was asked for. Raises `TaskNotFound`."""
        with self._db.reading():
            return spec_of(find(self._db, account_id, task_id))

    def settings(self, account_id: str, task_id: str) -> tuple[bytes | None, str | None]:
        """Its repository's `.cloudagent.toml` and manifests, as a `Claim` has them. Raises `TaskNotFound`."""
        with self._db.reading():
            row = find(self._db, account_id, task_id, columns=[self._rows.config, self._rows.manifests])
        return (None if row.config is None else bytes(row.config), row.manifests)

    def source_key(self, account_id: str, task_id: str) -> str | None:
        """What its repository is known by. Raises `TaskNotFound`."""
        with self._db.reading():
            return find(self._db, account_id, task_id, columns=[self._rows.source_key]).source_key

    def version(self, account_id: str, task_id: str) -> tuple[str, ...]:
        """Something that is different whenever status, phase or log have changed. Raises `TaskNotFound`."""
        columns = [self._rows.status, self._rows.phase, self._rows.last_seq]
        with self._db.reading():
            row = find(self._db, account_id, task_id, columns=columns)
        return (row.status, row.phase or "", str(row.last_seq))

    def resolve(self, account_id: str, prefix: str) -> str:
        """The whole id of the one task that begins so: at least four characters, with or without `task_`.

        Raises `TaskNotFound`, and `AmbiguousId` when there are several.
        """
        start = prefix.removeprefix("task_")
        if not PREFIX.fullmatch(start):
            raise TaskNotFound()
        query = self._rows.select(self._rows.task_id).where(
            self._rows.account_id == account_id, self._rows.task_id.startswith(f"task_{start}")
        )
        with self._db.reading():
            found = [row.task_id for row in query.limit(2)]
        if not found:
            raise TaskNotFound()
        if len(found) > 1:
            raise AmbiguousId()
        return found[0]

    def list(
        self,
        account_id: str,
        *,
        status: TaskStatus | None = None,
        repository: str | None = None,
        tag: str | None = None,
        schedule_id: str | None = None,
        candidates: bool = False,
        limit: int = 20,
        cursor: str | None = None,
        offset: int = 0,
    ) -> TaskPage:
        """An account's tasks, newest first; those that are another's candidates only with `candidates`.

        `cursor` is the page before's `next_cursor`. Raises `InvalidCursor`.
        """
        rows = self._rows
        wanted = rows.account_id == account_id
        if status is not None:
            wanted &= rows.status == status
        if repository is not None:
            wanted &= rows.repository == storable(repository)
        if tag is not None:
            wanted &= rows.tags.contains([storable(tag)])
        if schedule_id is not None:
            wanted &= rows.schedule_id == storable(schedule_id)
        if not candidates:
            wanted &= rows.candidate.is_null()
        following = wanted
        if cursor is not None:
            created_at, task_id = _read_cursor(cursor)
            following &= (rows.created_at < created_at) | ((rows.created_at == created_at) & (rows.task_id < task_id))
        with self._db.reading():
            total = rows.select().where(wanted).count()
            query = rows.select().where(following).order_by(rows.created_at.desc(), rows.task_id.desc())
            tasks = [task_of(row) for row in query.limit(limit + 1).offset(offset)]
        more = len(tasks) > limit
        tasks = tasks[:limit]
        return TaskPage(
            tasks=tuple(tasks),
            total=total,
            limit=limit,
            offset=offset,
            next_cursor=_write_cursor(tasks[-1]) if more and tasks else None,
        )

    def heads(self, account_id: str, task_ids: Sequence[str]) -> Mapping[str, TaskHead]:
        """How far these tasks are. One that is unknown or another account's is missing."""
        rows = self._rows
        known = [task_id for task_id in task_ids if TASK_ID.fullmatch(task_id)]
        columns = [rows.task_id, rows.status, rows.phase, rows.asked, rows.last_seq, rows.expired_at]
        query = rows.select(*columns).where(rows.account_id == account_id, rows.task_id.in_(known))
        with self._db.reading():
            found = list(query)
        return {
            row.task_id: TaskHead(
                status=TaskStatus(row.status),
                phase=None if row.phase is None else Phase(row.phase),
                question_id=None if row.asked is None else row.asked["question_id"],
                last_seq=row.last_seq,
                expired=row.expired_at is not None,
            )
            for row in found
        }

    def request_cancel(self, account_id: str, task_id: str) -> tuple[Task, bool]:
        """Cancel a task: at once while it is queued, else by telling its worker. Says whether that changed anything.

        Its candidates are cancelled with it. Raises `TaskNotFound`.
        """
        with self._db.writing():
            lock_candidates(self._db, task_id)
            # Locked, so that no claim and no end comes between the look and the change.
            row = find(self._db, account_id, task_id, lock=True)
            if row.best_of is not None:
                return self._cancel_all(account_id, row)
            if row.status == TaskStatus.QUEUED:
                line = EventDraft(kind="status", message="Cancelled before it started.")
                changes = {
                    "cancel_requested_at": self._db.now,
                    **ended(self._db, TaskStatus.CANCELLED, error=CANCELLED),
                }
            elif row.status in ACTIVE and row.cancel_requested_at is None:
                line = EventDraft(kind="status", message="Cancel requested.")
                changes = {"cancel_requested_at": self._db.now}
            else:
                return task_of(row), False
            row = change(self._db, task_id, self._rows.task_id == task_id, lines=[line], whole=True, **changes)
            assert row is not None
            return task_of(row), True

    def _cancel_all(self, account_id: str, parent: TaskRow) -> tuple[Task, bool]:
        """The same for a parent, whose row and candidates the caller holds."""
        rows, task_id = self._rows, parent.task_id
        if TaskStatus(parent.status).terminal or parent.cancel_requested_at is not None:
            return task_of(parent), False
        line = EventDraft(kind="status", message="Cancel requested.")
        change(self._db, task_id, rows.task_id == task_id, lines=[line], cancel_requested_at=self._db.now)
        mine = rows.select(rows.task_id).where(rows.parent_task_id == task_id, rows.candidate.is_null(False))
        # One that has ended is not ours, and Postgres may have locked it for somebody who waits for those that are.
        for row in list(mine.where(rows.status.not_in(list(TERMINAL))).order_by(rows.candidate)):
            self.request_cancel(account_id, row.task_id)
        return task_of(find(self._db, account_id, task_id)), True

    # -- for workers -----------------------------------------------------------------------------------------------

    def claim(self, task_id: str, *, worker: str, lease_s: float) -> Claim | None:
        """Take a task that is queued, or whose worker gave it back or let its lease run out.

        None when it is not to be had: another worker has it, it has ended, or it ends here because its lease ran out
        for the third time without progress.
        """
        with self._db.writing():
            return take(self._db, task_id, worker=worker, lease_s=lease_s)

    def renew(self, task_id: str, attempt: int, *, lease_s: float) -> Signals:
        """Hold on to a task for `lease_s` from now. Raises `LeaseLost`."""
        with self._db.writing():
            return self._signals(change_held(self._db, task_id, attempt, lease_until=self._db.later(lease_s)), task_id)

    def signals(self, task_id: str, attempt: int) -> Signals:
        """What `renew` answers, without renewing. Raises `LeaseLost`."""
        rows = self._rows
        with self._db.reading():
            query = rows.select(rows.cancel_requested_at).where(rows.task_id == task_id, held_by(self._db, attempt))
            if (row := query.first()) is None:
                raise LeaseLost()
            return self._signals(row, task_id)

    def update(self, task_id: str, attempt: int, *, lease_s: float | None = None, **changes: Unpack[Changes]) -> None:
        """Change a task on the way, and renew the lease when `lease_s` is given. Raises `LeaseLost`."""
        columns: dict[str, Any] = dict(changes)
        columns |= {name: json_of(value) for name, value in columns.items() if isinstance(value, Usage | VerifyResult)}
        if "touches" in changes:
            columns["touches"] = list(changes["touches"]) or None
        if lease_s is not None:
            columns["lease_until"] = self._db.later(lease_s)
        with self._db.writing():
            change_held(self._db, task_id, attempt, **columns)

    def begin_sandbox(self, task_id: str, attempt: int, *, nonce: str, provider: str, place: str | None) -> None:
        """A new sandbox is about to be made, in the place of an earlier one: its id, log and question are forgotten.

        Raises `LeaseLost`.
        """
        with self._db.writing():
            change_held(
                self._db,
                task_id,
                attempt,
                sandbox_id=None,
                sandbox_nonce=nonce,
                provider=provider,
                sandbox_place=place,
                sandbox_made_at=self._db.now,
                log_offset=0,
                **asking(self._db, None),
            )

    def follow(
        self,
        task_id: str,
        attempt: int,
        events: Sequence[EventDraft],
        *,
        log_offset: int,
        lease_s: float,
        usage: Usage | None = None,
        running_seconds: float | None = None,
        question: Question | EllipsisType | None = ...,
        touches: Sequence[str] | None = None,
    ) -> Signals:
        """Take over a part of the runner's log that ends at byte `log_offset`, and renew the lease, in one step.

        So no line is lost or kept twice, whatever dies when. New lines are progress: earlier lost leases are forgotten.
        With a `question` the task waits, with None it runs; left out, nothing changes. `touches` are all files that
        are known by now, where there are more of them. Raises `LeaseLost`.
        """
        columns: dict[str, Any] = {"log_offset": log_offset, "lease_until": self._db.later(lease_s)}
        if events:
            columns["lost_leases"] = 0
        if usage is not None:
            columns["usage"] = json_of(usage)
        if running_seconds is not None:
            columns["running_seconds"] = running_seconds
        if not isinstance(question, EllipsisType):
            columns |= asking(self._db, question)
        if touches is not None:
            columns["touches"] = list(touches)
        with self._db.writing():
            return self._signals(change_held(self._db, task_id, attempt, lines=events, **columns), task_id)

    def release(self, task_id: str, attempt: int, *, pause_s: float = 0, line: EventDraft | None = None) -> None:
        """Give a task back as it is: no lease counts as lost, and the next worker takes it at once, or after `pause_s`.

        Raises `LeaseLost`.
        """
        lines = () if line is None else (line,)
        given_back: dict[str, Any] = {"owner": None, "lease_until": None, "rung_at": None}
        if pause_s:
            given_back["not_before"] = self._db.later(pause_s)
        with self._db.writing():
            change_held(self._db, task_id, attempt, lines=lines, **given_back)

    def finish(
        self,
        task_id: str,
        attempt: int,
        *,
        status: TaskStatus,
        verdict: Verdict | None = None,
        result: Result | None = None,
        error: TaskError | None = None,
        usage: Usage | None = None,
        events: Sequence[EventDraft] = (),
    ) -> Task:
        """End a task, for good. Its credentials are forgotten. Raises `LeaseLost`, also when it has ended before."""
        columns: dict[str, Any] = {
            "verdict": verdict,
            "result": json_of(result),
            **ended(self._db, status, error=error),
        }
        if usage is not None:
            columns["usage"] = json_of(usage)
        with self._db.writing():
            if verdict is Verdict.PASSED:
                lock_siblings(self._db, task_id)
            return task_of(change_held(self._db, task_id, attempt, lines=events, whole=True, **columns))

    def due(self, *, waited_s: float, limit: int = 100) -> Sequence[str]:
        """The tasks that want a worker and for which nobody has rung within `waited_s`, oldest first.

        They count as rung for from now on; two callers at once never get the same one.
        """
        rows = self._rows
        unheld = rows.status.in_(ACTIVE) & (rows.lease_until.is_null() | (rows.lease_until < self._db.now))
        quiet = rows.rung_at.is_null() | (rows.rung_at < self._db.later(-waited_s))
        wanted = ((rows.status == TaskStatus.QUEUED) | unheld) & quiet & is_for_workers(self._db)
        chosen = rows.select(rows.task_id).where(wanted).order_by(rows.created_at).limit(limit)
        with self._db.writing():
            # Rows that somebody else is changing are skipped: waiting for them in any order could end in a deadlock.
            query = rows.update(rung_at=self._db.now).where(rows.task_id.in_(self._db.locked(chosen, skip=True)))
            rung = list(query.returning(rows.task_id, rows.created_at))
        return [row.task_id for row in sorted(rung, key=lambda row: (row.created_at, row.task_id))]

    def rung(self, task_id: str) -> None:
        """Somebody has just rung for this task: `due` leaves it out for a while."""
        with self._db.writing():
            self._rows.update(rung_at=self._db.now).where(self._rows.task_id == task_id).execute()

    def unfinished(self) -> int:
        """How many tasks have not ended."""
        with self._db.reading():
            return self._rows.select().where(self._unfinished()).count()

    def owns_sandbox(self, task_id: str, sandbox_id: str, nonce: str) -> bool:
        """Does a task that has not ended own this sandbox, by its id or by the nonce committed before it was made?"""
        rows = self._rows
        if not TASK_ID.fullmatch(task_id):
            return False
        owned = (rows.sandbox_id == storable(sandbox_id)) | (rows.sandbox_nonce == storable(nonce))
        with self._db.reading():
            return rows.select().where(rows.task_id == task_id, self._unfinished(), owned).exists()

    # -- what they share -------------------------------------------------------------------------------------------

    def _inserted(self, account_id: str, spec: TaskSpec, **columns: Any) -> Any:
        """The INSERT of a row that was asked for so."""
        return self._rows.insert(
            account_id=account_id,
            status=TaskStatus.QUEUED,
            spec=json_of(spec),
            repository=spec.repository,
            tags=list(spec.tags),
            created_at=self._db.now_in_list(account_id),
            waits_since=self._db.later(-spec.priority.head_start_s),
            **columns,
        )

    def _with_key(self, account_id: str, idempotency: Idempotency) -> Expression:
        rows = self._rows
        return (rows.account_id == account_id) & (rows.idempotency_key == storable(idempotency.key))

    def _replayed(self, account_id: str, idempotency: Idempotency) -> Task:
        row = self._rows.select().where(self._with_key(account_id, idempotency)).get()
        if row.arguments_digest != idempotency.digest:
            raise IdempotencyMismatch()
        return task_of(row)

    def _unfinished(self) -> Expression:
        return self._rows.status.in_([status for status in TaskStatus if not status.terminal])

    def _signals(self, row: TaskRow, task_id: str) -> Signals:
        return signals(self._db, task_id, row)


def _write_cursor(task: Task) -> str:
    return base64.urlsafe_b64encode(f"{task.created_at.isoformat()} {task.task_id}".encode()).decode()


def _read_cursor(cursor: str) -> tuple[datetime, str]:
    try:
        moment, task_id = base64.b64decode(cursor, altchars=b"-_", validate=True).decode().split(" ")
        created_at = datetime.fromisoformat(moment)
        offset = created_at.utcoffset()
    except ValueError:
        raise InvalidCursor() from None
    if offset is None or offset.total_seconds() != 0 or not TASK_ID.fullmatch(task_id):
        raise InvalidCursor()
    return created_at, task_id
