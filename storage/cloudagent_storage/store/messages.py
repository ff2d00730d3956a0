"""What users say to agents, and what agents ask them."""

# pyright: basic
from __future__ import annotations

from collections.abc import Sequence

from cloudagent_storage.errors import LeaseLost, QuestionClosed, SeveralAgents, TaskEnded
from cloudagent_storage.records import TERMINAL, EventDraft, Message, PendingQuestion, TaskStatus, new_id
from cloudagent_storage.store.change import change, change_held
from cloudagent_storage.store.database import Database
from cloudagent_storage.store.row import (
    ACTIVE,
    asked_of,
    asking,
    find,
    held_by,
    message_of,
    spec_of,
)
from cloudagent_storage.tables import storable


class Messages:
    """The messages to tasks. A worker learns of them with every `Signals`, in their order, until they are delivered."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def add(self, account_id: str, task_id: str, text: str, *, question_id: str | None = None) -> Message:
        """Leave a message for a task's agent, also before it has started; the answer, where it asks something.

        An answer closes the question in the same step: whatever comes next is none. With a `question_id` it is the
        answer to that one or nothing; said again, word for word, it is the same message. Raises `TaskNotFound`,
        `TaskEnded`, `SeveralAgents`, and `QuestionClosed` when that question is not open.
        """
        text = storable(text)
        rows = self._db.tables.messages
        with self._db.writing():
            # Locked: a message to a task that ends in this moment is refused, or the task's worker still learns of it.
            row = find(self._db, account_id, task_id, lock=True)
            asked = asked_of(row)
            answers = None if asked is None else asked.question_id
            if question_id is not None and question_id != answers:
                said = rows.select().where(rows.task_id == task_id, rows.answers == storable(question_id))
                if (earlier := said.where(rows.text == text).first()) is not None:
                    return message_of(earlier)
            if TaskStatus(row.status).terminal:
                raise TaskEnded()
            if row.best_of is not None:
                raise self._several(task_id)
            if question_id is not None and question_id != answers:
                raise QuestionClosed()
            message = self._insert(task_id, text, answers)
            closed = {} if answers is None else asking(self._db, None)
            if closed:
                change(self._db, task_id, self._db.tables.tasks.task_id == task_id, **closed)
            self._db.announce(task_id)
        return message

    def give_up(self, task_id: str, attempt: int, question_id: str, *, told: str, line: EventDraft) -> None:
        """Close a question that nobody has answered: the agent is told so, as it would be told the answer.

        Nothing happens where its user answers in this moment. Raises `LeaseLost`.
        """
        tasks = self._db.tables.tasks
        with self._db.writing():
            still = held_by(self._db, attempt) & (tasks.asked["question_id"] == question_id)
            if change(self._db, task_id, still, lines=[line], **asking(self._db, None)) is not None:
                self._insert(task_id, told, question_id)
            elif not tasks.select().where(tasks.task_id == task_id, held_by(self._db, attempt)).exists():
                raise LeaseLost()

    def delivered(self, task_id: str, attempt: int, message_ids: Sequence[str]) -> None:
        """The agent has them: no worker learns of them again. Raises `LeaseLost`."""
        rows = self._db.tables.messages
        with self._db.writing():
            change_held(self._db, task_id, attempt)
            mine = rows.update(delivered_at=self._db.now).where(
                rows.task_id == task_id, rows.message_id.in_(message_ids)
            )
            mine.where(rows.delivered_at.is_null()).execute()

    def pending(self, account_id: str, *, limit: int) -> Sequence[PendingQuestion]:
        """The questions to an account that nobody has answered, those that wait longest first."""
        rows = self._db.tables.tasks
        query = rows.select().where(
            rows.account_id == account_id, rows.status.in_(ACTIVE), rows.question.is_null(False)
        )
        with self._db.reading():
            return [
                PendingQuestion(
                    task_id=row.task_id,
                    candidate=row.candidate,
                    title=spec_of(row).title,
                    question=row.question,
                    **dict(asked),
                )
                for row in query.order_by(rows.asked_at).limit(limit)
                if (asked := asked_of(row)) is not None and row.question is not None
            ]

    def _several(self, task_id: str) -> SeveralAgents:
        """The refusal of a message to a task with candidates, which names those that would hear one."""
        rows = self._db.tables.tasks
        mine = (rows.parent_task_id == task_id) & rows.candidate.is_null(False)
        open_ones = rows.select().where(mine, rows.status.not_in(list(TERMINAL))).order_by(rows.candidate)
        named = [f"{row.task_id} (candidate {row.candidate}, {row.status})" for row in open_ones]
        return SeveralAgents(remedy=f"Send it to one of them: {', '.join(named)}.")

    def _insert(self, task_id: str, text: str, answers: str | None) -> Message:
        message = Message(message_id=new_id("msg"), text=text, answers=answers)
        self._db.tables.messages.insert(
            message_id=message.message_id,
            task_id=task_id,
            text=message.text,
            answers=message.answers,
            created_at=self._db.now,
        ).execute()
        return message
