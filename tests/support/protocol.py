"""Any order of submits, claims, deaths, zombies, cancels and sweeps, against a model that is written beside it.

Real are the store and its database. The workers are hands: what a claim handed out, to write with whenever one likes,
so that a hand which lost its task is a zombie of which every write must be refused. The time is the database's, and
passes by moving the moments in the rows into the past. All that passes are whole hours, and every deadline lies half an
hour off them, so that how long a test really takes decides nothing.
"""

# pyright: basic
from __future__ import annotations

import json
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)
from peewee import SqliteDatabase

from cloudagent_storage import records
from cloudagent_storage.errors import IdempotencyMismatch, LeaseLost, NotNow
from cloudagent_storage.records import (
    LOCAL_ACCOUNT,
    TERMINAL,
    Claim,
    Idempotency,
    Result,
    TaskSpec,
    TaskStatus,
    new_id,
)
from cloudagent_storage.store import Store
from cloudagent_storage.store.database import Database
from tests.support.stored import at_once, line

HOUR = 3600
LEASE = 1.5 * HOUR
RING_AGAIN = 0.5 * HOUR
LOST_LEASES = 3
SPEC = TaskSpec(prompt="x", title="x")
ONE_HOUR = timedelta(hours=1)
LEASES = st.sampled_from([LEASE, LEASE, -0.5 * HOUR])
SUBMITS = 5
ROW = "status attempt lost_leases log_offset phase question sandbox_id sandbox_nonce credentials owner".split()
A_TASK = Bundle("tasks")
ENDS = st.sampled_from(sorted(TERMINAL))
QUEUED, RUNNING, WAITING = TaskStatus.QUEUED, TaskStatus.RUNNING, TaskStatus.WAITING
FAILED, CANCELLED = TaskStatus.FAILED, TaskStatus.CANCELLED


@dataclass
class Modelled:
    """What a task's row and log must be."""

    task_id: str
    status: TaskStatus = QUEUED
    attempt: int = 0
    lease_until: float | None = None
    lost_leases: int = 0
    rung_at: float | None = None
    cancelled: bool = False
    log: list[str] = field(default_factory=lambda: ["Queued."])
    offset: int = 0
    phase: str | None = None
    question: str | None = None
    nonce: str | None = None
    sandbox_id: str | None = None
    undelivered: list[str] = field(default_factory=list)
    summary: str | None = None
    error: str | None = None
    blob: bytes | None = None

    @property
    def active(self) -> bool:
        return self.status in (RUNNING, WAITING)

    @property
    def ended(self) -> bool:
        return self.status in TERMINAL

    def end(self, status: TaskStatus) -> None:
        self.status, self.phase, self.question, self.lease_until = status, None, None, None


@dataclass
class Hand:
    """A worker's hold on a task, or what it believes to be one."""

    task: Modelled
    claim: Claim
    offset: int
    """How far this worker has read the runner's log; a line of it is a byte here."""
    life: Generator[None] | None = None
    box: Box | None = None

    @property
    def holds(self) -> bool:
        return self.task.active and self.task.lease_until is not None and self.task.attempt == self.claim.attempt


@dataclass(eq=False)
class Box:
    """A sandbox. It runs one agent in its life."""

    box_id: str
    task: Modelled
    nonce: str
    started: bool = False


def said(value: Any, name: str) -> object:
    """A field of a column of JSON, which the driver of one database reads and that of the other does not."""
    found = json.loads(value) if isinstance(value, str) else value
    return (found or {}).get(name)


def by_hand(**drawn: Any) -> Callable[[Any], Any]:
    """A rule about a hand: mostly the newest of a task, sometimes one of before."""

    def decorate(step: Callable[..., None]) -> Any:
        def with_hand(self: Protocol, task: Modelled, back: int, **values: Any) -> None:
            step(self, self.hand(task, back), **values)

        with_hand.__name__ = step.__name__
        return rule(task=A_TASK, back=st.sampled_from([0, 0, 0, 1, 2]), **drawn)(with_hand)

    return decorate


class Protocol(RuleBasedStateMachine):
    """The rules draw nothing that depends on who wins a race, so that a run can be repeated."""

    def __init__(self, store: Store, database: Database) -> None:
        super().__init__()
        self.store = store
        self.database = database
        self.mark = "?" if isinstance(database.tables.tasks._meta.database, SqliteDatabase) else "%s"
        self.now = 0.0
        self.submits = 0
        self.tasks: list[Modelled] = []
        self.keys: dict[str, Modelled] = {}
        self.boxes: list[Box] = []
        self.all_hands: list[Hand] = []
        self.before: dict[str, dict[str, Any]] = {}
        with database.writing():
            for table in reversed(database.tables.all):
                table.delete().execute()
        store.accounts.ensure(LOCAL_ACCOUNT)

    # -- the database, looked at from beside the store ---------------------------------------------------------------

    def rows(self, query: str, *values: object) -> list[dict[str, Any]]:
        """What a query finds. In plain SQL, which here is four times as fast as having it written by the library."""
        with self.database.reading():
            cursor = self.database.tables.tasks._meta.database.execute_sql(query, values)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def everything(self, task: Modelled) -> list[list[dict[str, Any]]]:
        """Every row of every table that has to do with a task."""
        mark = self.mark
        return [
            self.rows(f"SELECT * FROM {table} WHERE task_id = {mark} ORDER BY {order}", task.task_id)
            for table, order in (("tasks", 1), ("events", 2), ("blobs", 2), ("messages", 1))
        ]

    def written(self, hand: Hand, write: Callable[[], Any]) -> tuple[bool, Any]:
        """Write with a hand. True and the answer where it holds the task; else it was refused and changed nothing."""
        if hand.holds:
            return True, write()
        before = self.everything(hand.task)
        with pytest.raises(LeaseLost):
            write()
        assert self.everything(hand.task) == before, "a write that was refused has changed something"
        return False, None

    def heard(self, task: Modelled, signals: records.Signals) -> None:
        assert signals.cancel_requested == task.cancelled
        assert [message.message_id for message in signals.messages] == task.undelivered

    # -- users ---------------------------------------------------------------------------------------------------

    def _add(self, key: str | None) -> records.Task:
        idempotency = None if key is None else Idempotency(key=key, digest="same")
        return self.store.tasks.add(
            LOCAL_ACCOUNT, SPEC, credentials=b"sealed", lines=[line("Queued.")], idempotency=idempotency
        )

    def _added(self, key: str | None, *ids: str) -> Modelled:
        task = None if key is None else self.keys.get(key)
        if task is None:
            task = Modelled(ids[0])
            self.tasks.append(task)
            if key is not None:
                self.keys[key] = task
        assert set(ids) == {task.task_id}
        return task

    @precondition(lambda self: self.submits < SUBMITS)
    @rule(target=A_TASK, key=st.sampled_from([None, None, "a", "b"]), at_once_too=st.booleans())
    def submit(self, key: str | None, at_once_too: bool) -> Modelled:
        self.submits += 1
        calls = [lambda: self._add(key).task_id] * (1 if key is None or not at_once_too else 2)
        task = self._added(key, *(at_once(*calls) if len(calls) > 1 else [calls[0]()]))
        if key is not None:
            before = self.everything(task)
            with pytest.raises(IdempotencyMismatch):
                self.store.tasks.add(LOCAL_ACCOUNT, SPEC, idempotency=Idempotency(key=key, digest="other"))
            assert self.everything(task) == before
        return task

    @rule(task=A_TASK, racing=st.sampled_from([False, False, True]))
    def cancel(self, task: Modelled, racing: bool) -> None:
        """Cancel a task; a queued one sometimes in the moment in which a worker claims it."""
        if not racing or task.status is not QUEUED:
            self._cancelled(task, self._cancel(task))
            return
        claim: Any
        cancel: Any
        claim, cancel = at_once(lambda: self._claim(task), lambda: self._cancel(task))
        hand = None if claim is None else self._claimed(task, claim)
        self._cancelled(task, cancel)
        if hand is not None:
            # So that it has ended, and nobody has a hand on it, whoever was first.
            self.end(hand, CANCELLED)
            self.all_hands.remove(hand)

    def _cancel(self, task: Modelled) -> tuple[records.Task, bool]:
        return self.store.tasks.request_cancel(LOCAL_ACCOUNT, task.task_id)

    def _cancelled(self, task: Modelled, answer: tuple[records.Task, bool]) -> None:
        shown, changed = answer
        assert changed == (not task.ended and not task.cancelled)
        if changed:
            task.cancelled = True
            task.log.append("Cancel requested." if task.active else "Cancelled before it started.")
            if not task.active:
                task.end(CANCELLED)
                task.error = "cancelled_by_user"
        assert shown.status is task.status

    @rule(task=A_TASK)
    def say(self, task: Modelled) -> None:
        if not task.ended:
            task.undelivered.append(self.store.messages.add(LOCAL_ACCOUNT, task.task_id, "hello").message_id)
            # An answer closes the question.
            task.question, task.status = None, task.status if task.status is QUEUED else RUNNING
        else:
            with pytest.raises(NotNow):
                self.store.messages.add(LOCAL_ACCOUNT, task.task_id, "hello")

    # -- time and the sweeper ----------------------------------------------------------------------------------------

    @rule(hours=st.sampled_from([1, 2, 5]))
    def time_passes(self, hours: int) -> None:
        self.now += hours * HOUR
        rows = self.database.tables.tasks
        with self.database.writing():
            for row in rows.select(rows.task_id, rows.lease_until, rows.rung_at):
                past = {
                    name: moment - hours * ONE_HOUR
                    for name in ("lease_until", "rung_at")
                    if (moment := getattr(row, name)) is not None
                }
                if past:
                    rows.update(**past).where(rows.task_id == row.task_id).execute()

    def expired(self, task: Modelled) -> bool:
        return task.active and task.lease_until is not None and task.lease_until < self.now

    def wants_a_worker(self, task: Modelled) -> bool:
        return task.status is QUEUED or (task.active and task.lease_until is None) or self.expired(task)

    @rule()
    def sweep(self) -> None:
        due = [
            task
            for task in self.tasks
            if self.wants_a_worker(task) and (task.rung_at is None or task.rung_at < self.now - RING_AGAIN)
        ]
        assert self.store.tasks.due(waited_s=RING_AGAIN) == [task.task_id for task in due]
        for task in due:
            task.rung_at = self.now
        self.sweep_sandboxes()

    @rule(task=A_TASK)
    def ring(self, task: Modelled) -> None:
        self.store.tasks.rung(task.task_id)
        task.rung_at = self.now

    def orphans(self) -> list[Box]:
        """The sandboxes that the store says nobody owns; the model has to say the same."""
        found: list[Box] = []
        for box in self.boxes:
            task = box.task
            owned = self.store.tasks.owns_sandbox(task.task_id, box.box_id, box.nonce)
            assert owned == (not task.ended and (task.sandbox_id == box.box_id or task.nonce == box.nonce))
            assert owned or not any(hand.box is box and hand.holds for hand in self.all_hands), "somebody works in it"
            if not owned:
                found.append(box)
        return found

    def sweep_sandboxes(self) -> None:
        for box in self.orphans():
            self.boxes.remove(box)

    # -- workers -----------------------------------------------------------------------------------------------------

    def _claim(self, task: Modelled) -> Claim | None:
        return self.store.tasks.claim(task.task_id, worker="worker", lease_s=LEASE)

    def _claimed(self, task: Modelled, *claims: Claim | None) -> Hand | None:
        """What one claim, or several at once, must have answered, and what they leave."""
        got = [claim for claim in claims if claim is not None]
        if not self.wants_a_worker(task):
            assert not got
            return None
        lost = self.expired(task)
        if lost:
            task.lost_leases += 1
        if task.lost_leases >= LOST_LEASES and lost:
            assert not got
            task.end(FAILED)
            task.error = "poisoned"
            task.log.append("3 workers in a row were lost while they ran this task.")
            return None
        assert len(got) == 1, "a task has one worker"
        task.status = RUNNING if task.question is None else WAITING
        task.lease_until, task.rung_at = self.now + LEASE, None
        task.attempt += 1
        (claim,) = got
        assert claim.attempt == task.attempt and claim.log_offset == task.offset
        assert (claim.sandbox_id, claim.sandbox_nonce) == (task.sandbox_id, task.nonce)
        assert claim.cancel_requested == task.cancelled and claim.credentials == b"sealed"
        hand = Hand(task, claim, claim.log_offset)
        hand.life = self._life(hand)
        self.all_hands.append(hand)
        return hand

    @rule(task=A_TASK, rivals=st.sampled_from([1, 1, 1, 3]))
    def claim(self, task: Modelled, rivals: int) -> None:
        calls = [lambda: self._claim(task)] * rivals
        self._claimed(task, *(at_once(*calls) if rivals > 1 else [calls[0]()]))

    def hand(self, task: Modelled, back: int) -> Hand:
        """A hand on a task; on another where nobody ever had this one, so that something happens in every step."""
        hands = [hand for hand in self.all_hands if hand.task is task]
        if not hands and self.wants_a_worker(task):
            hands = [self._claimed(task, self._claim(task))]
        hands = hands or self.all_hands
        if not hands:
            task = self._added(None, self._add(None).task_id)
            hands = [self._claimed(task, self._claim(task))]
        hand = hands[max(0, len(hands) - 1 - back)]
        assert hand is not None
        return hand

    @rule(task=A_TASK, times=st.integers(1, LOST_LEASES + 1))
    def take_over(self, task: Modelled, times: int) -> None:
        """Claims of which each waits until the lease of the one before has run out."""
        for _ in range(times):
            self.time_passes(2)
            self._claimed(task, self._claim(task))

    @by_hand(steps=st.integers(1, 6))
    def work_on(self, hand: Hand, steps: int) -> None:
        """Take the next steps of what a worker does about sandboxes."""
        assert hand.life is not None
        for _ in range(steps):
            next(hand.life, None)
            self.orphans()

    def _life(self, hand: Hand) -> Generator[None]:
        task, claim = hand.task, hand.claim
        old = [
            box
            for box in self.boxes
            if (box.box_id == claim.sandbox_id if claim.sandbox_id else box.nonce == claim.sandbox_nonce)
        ]
        if claim.sandbox_id is not None and claim.task.phase is records.Phase.AGENT:
            if hand.holds:
                (hand.box,) = old  # nobody may have killed it
                yield
                hand.box.started = True
            return
        for box in old:
            self.boxes.remove(box)
        yield
        nonce = new_id("sbx")
        task_id, attempt = task.task_id, hand.claim.attempt
        sandbox = {"nonce": nonce, "provider": "local", "place": None}
        if not self.written(hand, lambda: self.store.tasks.begin_sandbox(task_id, attempt, **sandbox))[0]:
            return
        task.nonce, task.sandbox_id = nonce, None
        task.question, task.status = None, RUNNING
        task.offset = hand.offset = 0
        yield
        hand.box = Box(new_id("sbx"), task, nonce)
        self.boxes.append(hand.box)
        yield
        if not self._update(hand, sandbox_id=hand.box.box_id):
            return
        task.sandbox_id = hand.box.box_id
        yield
        if not self._update(hand, phase=records.Phase.AGENT):
            return
        task.phase = "agent"
        yield
        hand.box.started = True

    def _update(self, hand: Hand, **changes: Any) -> bool:
        return self.written(hand, lambda: self.store.tasks.update(hand.task.task_id, hand.claim.attempt, **changes))[0]

    @by_hand(lease_s=LEASES)
    def renew(self, hand: Hand, lease_s: float) -> None:
        done, signals = self.written(
            hand, lambda: self.store.tasks.renew(hand.task.task_id, hand.claim.attempt, lease_s=lease_s)
        )
        if done:
            hand.task.lease_until = self.now + lease_s
            self.heard(hand.task, signals)

    @by_hand(count=st.integers(0, 3), lease_s=LEASES)
    def follow(self, hand: Hand, count: int, lease_s: float) -> None:
        lines = [f"line {number}" for number in range(hand.offset, hand.offset + count)]
        done, signals = self.written(
            hand,
            lambda: self.store.tasks.follow(
                hand.task.task_id,
                hand.claim.attempt,
                [line(text) for text in lines],
                log_offset=hand.offset + count,
                lease_s=lease_s,
            ),
        )
        if done:
            hand.offset = hand.task.offset = hand.offset + count
            hand.task.log += lines
            hand.task.lease_until = self.now + lease_s
            if count:
                hand.task.lost_leases = 0
            self.heard(hand.task, signals)

    @by_hand(what=st.sampled_from(["signals", "line", "blob", "message"]))
    def do(self, hand: Hand, what: str) -> None:
        task, task_id, attempt = hand.task, hand.task.task_id, hand.claim.attempt
        if what == "signals":
            done, signals = self.written(hand, lambda: self.store.tasks.signals(task_id, attempt))
            if done:
                self.heard(task, signals)
        elif what == "line":
            if self.written(hand, lambda: self.store.events.add(task_id, line("a note"), attempt=attempt))[0]:
                task.log.append("a note")
        elif what == "blob":
            data = str(attempt).encode()
            if self.written(hand, lambda: self.store.blobs.put(task_id, "diff", data, attempt=attempt))[0]:
                task.blob = data
        else:
            first = task.undelivered[:1]
            if self.written(hand, lambda: self.store.messages.delivered(task_id, attempt, first))[0]:
                del task.undelivered[:1]

    @by_hand(question=st.sampled_from([None, "Which?"]))
    def ask(self, hand: Hand, question: str | None) -> None:
        asked = None if question is None else records.Question(question_id="q_1", text=question)
        at = {"log_offset": hand.offset, "lease_s": LEASE, "question": asked}
        done, signals = self.written(
            hand, lambda: self.store.tasks.follow(hand.task.task_id, hand.claim.attempt, [], **at)
        )
        if done:
            hand.task.lease_until = self.now + LEASE
            self.heard(hand.task, signals)
            hand.task.question, hand.task.status = question, RUNNING if question is None else WAITING

    @by_hand()
    def release(self, hand: Hand) -> None:
        if self.written(
            hand, lambda: self.store.tasks.release(hand.task.task_id, hand.claim.attempt, line=line("given back"))
        )[0]:
            hand.task.log.append("given back")
            hand.task.lease_until = hand.task.rung_at = None

    def _finish(self, hand: Hand, end: TaskStatus) -> records.Task:
        return self.store.tasks.finish(
            hand.task.task_id,
            hand.claim.attempt,
            status=end,
            result=Result(summary=f"of attempt {hand.claim.attempt}"),
            events=[line("The end.")],
        )

    def _finished(self, hand: Hand, end: TaskStatus) -> None:
        hand.task.end(end)
        hand.task.log.append("The end.")
        hand.task.summary = f"of attempt {hand.claim.attempt}"

    @by_hand(end=ENDS, racing=st.booleans())
    def finish(self, hand: Hand, end: TaskStatus, racing: bool) -> None:
        """End a task; sometimes in the moment in which its user cancels it."""
        if not racing or not hand.holds:
            self.end(hand, end)
            return
        cancel: Any
        _, cancel = at_once(lambda: self._finish(hand, end), lambda: self._cancel(hand.task))
        shown, cancel_was_first = cancel
        if cancel_was_first:
            self._cancelled(hand.task, cancel)
        assert cancel_was_first or hand.task.cancelled or shown.status is end
        self._finished(hand, end)

    def end(self, hand: Hand, end: TaskStatus) -> None:
        if self.written(hand, lambda: self._finish(hand, end))[0]:
            self._finished(hand, end)

    # -- what must be so after every step ------------------------------------------------------------------------------

    @invariant()
    def the_rows_are_as_the_model_says(self) -> None:
        rows = {row["task_id"]: row for row in self.rows("SELECT * FROM tasks")}
        logs: dict[str, list[tuple[int, str]]] = {task.task_id: [] for task in self.tasks}
        for row in self.rows("SELECT task_id, seq, message FROM events ORDER BY seq"):
            logs[row["task_id"]].append((row["seq"], row["message"]))
        assert set(rows) == {task.task_id for task in self.tasks}
        for task in self.tasks:
            row, log = rows[task.task_id], logs[task.task_id]
            assert [seq for seq, _ in log] == list(range(1, len(log) + 1)), "the log has a gap or a duplicate"
            assert [text for _, text in log] == task.log
            assert row["last_seq"] == len(log)
            found = {name: row[name] for name in ROW}
            found["held"], found["cancelled"] = row["lease_until"] is not None, row["cancel_requested_at"] is not None
            found["rung"] = row["rung_at"] is not None
            found["summary"], found["error"] = said(row["result"], "summary"), said(row["error"], "code")
            found["credentials"] = None if row["credentials"] is None else bytes(row["credentials"])
            held = task.lease_until is not None
            assert found == {
                "status": task.status,
                "attempt": task.attempt,
                "lost_leases": task.lost_leases,
                "log_offset": task.offset,
                "phase": task.phase,
                "question": task.question,
                "sandbox_id": task.sandbox_id,
                "sandbox_nonce": task.nonce,
                "credentials": None if task.ended else b"sealed",
                "owner": "worker" if held else None,
                "held": held,
                "cancelled": task.cancelled,
                "rung": task.rung_at is not None,
                "summary": task.summary,
                "error": task.error,
            }
            self.it_only_went_forward(row)

    def it_only_went_forward(self, row: dict[str, Any]) -> None:
        """Told by the rows alone, should the model be wrong too."""
        before = self.before.get(row["task_id"])
        self.before[row["task_id"]] = row
        if before is None:
            return
        same_sandbox = row["sandbox_nonce"] == before["sandbox_nonce"]
        for name in ("attempt", "last_seq", *(["log_offset"] if same_sandbox else [])):
            assert row[name] >= before[name], f"{name} went back"
        if TaskStatus(before["status"]).terminal:
            for name in ("status", "result", "error", "completed_at", "attempt", "log_offset"):
                assert row[name] == before[name], f"{name} changed after the end"

    @invariant()
    def one_agent_lives_for_a_task(self) -> None:
        for task in self.tasks:
            assert sum(box.started for box in self.boxes if box.task is task) <= 1
            assert sum(hand.holds for hand in self.all_hands if hand.task is task) <= 1

    def teardown(self) -> None:
        """However it was left: the sweeper finds what wants a worker, and workers bring it to its end."""
        for _ in range(LOST_LEASES + 1):
            self.time_passes(5)
            due = self.store.tasks.due(waited_s=RING_AGAIN)
            assert due == [task.task_id for task in self.tasks if not task.ended]
            for task in self.tasks:
                task.rung_at = self.now if not task.ended else task.rung_at
                if not task.ended and (hand := self._claimed(task, self._claim(task))) is not None:
                    self.end(hand, TaskStatus.COMPLETED)
        self.the_rows_are_as_the_model_says()
        assert self.store.tasks.unfinished() == 0
        for task in self.tasks:
            assert self.store.blobs.get(LOCAL_ACCOUNT, task.task_id, "diff") == task.blob
        self.sweep_sandboxes()
        assert not self.boxes
