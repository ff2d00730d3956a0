"""What an agent and its user say to each other while a worker follows it: questions out, answers and messages in."""

from __future__ import annotations

import time

from cloudagent_queue.follow import LogReader
from cloudagent_queue.placement import Placement
from cloudagent_storage.records import EventDraft, Level

QUESTIONS_MAX = 30
"""While so many questions of a task wait for their answers, no time counts: an agent must not live on asking."""
UNANSWERED = "Nobody has answered. Decide by yourself, and say in your last message what you decided."


class Talk:
    """The worker's part in it. Each message is handed on once, whatever dies when: see `Agent.tell`."""

    def __init__(self, attempt: Placement, reader: LogReader) -> None:
        self._attempt = attempt
        self._reader = reader
        self._told: set[str] = set()
        """The ids of messages that the agent has; the lease may have read them before that was written down."""
        self._closed: set[str] = set()
        """The questions that were answered, or given up."""
        self._current: str | None = None if reader.question is None else reader.question.question_id
        self._since = time.monotonic() - attempt.claim.question_age_s
        """When the current question was asked."""
        self._new = False
        earlier = attempt.worker.store.events.list(
            attempt.claim.account_id, attempt.task_id, kinds=["question"], limit=QUESTIONS_MAX + 1
        )
        self._earlier = len(earlier.lines)

    @property
    def waits(self) -> bool:
        """Does the agent wait for its user, so that its time does not count?"""
        return self._open() is not None and self._earlier + self._reader.asked <= QUESTIONS_MAX

    def is_new(self) -> bool:
        """Is the question one of which this was not asked before?"""
        new, self._new = self._new, False
        return new

    def hand_on(self) -> None:
        """Tell the agent what its user has said, or that its question stays unanswered. Raises `LeaseLost`."""
        at, store = self._attempt, self._attempt.worker.store
        if (question_id := self._open()) and time.monotonic() - self._since > at.timers.question_s:
            line = f"Nobody has answered for {at.timers.question_s / 60:g} minutes: the agent is to decide by itself."
            store.messages.give_up(
                at.task_id,
                at.claim.attempt,
                question_id,
                told=UNANSWERED,
                line=EventDraft(kind="status", level=Level.WARNING, message=line),
            )
            self._closed.add(question_id)
        fresh = [message for message in at.lease.signals.messages if message.message_id not in self._told]
        for message in fresh:
            said = {"kind": "message", "text": message.text}
            if message.answers is not None:
                said = {"kind": "answer", "question_id": message.answers, "text": message.text}
                self._closed.add(message.answers)
            at.agent.tell(at.box, message.message_id, said)
            self._told.add(message.message_id)
        if fresh:
            store.messages.delivered(at.task_id, at.claim.attempt, [message.message_id for message in fresh])

    def _open(self) -> str | None:
        """The id of the question that waits for an answer."""
        question = self._reader.question
        if question is None or question.question_id in self._closed:
            return None
        if question.question_id != self._current:
            self._current, self._since, self._new = question.question_id, time.monotonic(), True
        return question.question_id
