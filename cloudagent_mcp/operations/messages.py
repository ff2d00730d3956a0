"""What users and agents say to each other while a task goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from cloudagent_mcp.operations import Caller, operation
from cloudagent_mcp.operations.tasks import TaskId, advise, how_to_answer
from cloudagent_storage.errors import InvalidInput
from cloudagent_storage.records import PendingQuestion, Record, Task

if TYPE_CHECKING:
    from cloudagent_storage.store import Store

MESSAGE_MAX = 20_000
QUESTIONS_SHOWN = 50


class Sent(Task):
    """A task whose agent was told something."""

    answered: bool
    """Was it the answer to the agent's question? Otherwise the agent reads it at its next turn."""


class QuestionList(Record):
    """Questions that nobody has answered, those that wait longest first."""

    questions: tuple[PendingQuestion, ...]
    more: bool = False
    """Are there others, which are shown once these are answered?"""


class Messages:
    """Answers and other messages to agents, and their questions."""

    def __init__(self, store: Callable[[], Store]) -> None:
        """`store` is opened when it is first needed."""
        self._store = store

    @operation("POST", "/tasks/{task_id}/messages", title="Tell or answer an agent")
    def send_message(
        self,
        caller: Caller,
        *,
        task_id: TaskId,
        message: Annotated[str, Field(min_length=1, max_length=MESSAGE_MAX)],
        question_id: Annotated[str | None, Field(max_length=40, description="Answer this question or none.")] = None,
    ) -> Sent:
        """Answer a waiting task's question, or tell its agent something for its next turn.

        Before the agent has started it is kept until then. With a `question_id` it is safe to repeat.
        Raises `TaskNotFound`, `TaskEnded`, `QuestionClosed`.
        """
        if not message.strip():
            raise InvalidInput("The message is empty.", remedy="Say something.", field="message")
        store = self._store()
        said = store.messages.add(caller.account_id, task_id, message, question_id=question_id)
        task = store.tasks.get(caller.account_id, task_id)
        return Sent.model_validate({**dict(advise(task)), "answered": said.answers is not None})

    @operation("GET", "/questions", title="List agents' questions", read_only=True, idempotent=True)
    def list_pending_questions(self, caller: Caller) -> QuestionList:
        """What the agents of your waiting tasks ask you."""
        found = self._store().messages.pending(caller.account_id, limit=QUESTIONS_SHOWN + 1)
        return QuestionList(
            questions=tuple(
                question.model_copy(update={"next_action": how_to_answer(question.task_id, question)})
                for question in found[:QUESTIONS_SHOWN]
            ),
            more=len(found) > QUESTIONS_SHOWN,
        )
