"""Due times of schedules: each is answered once, with a task or with the reason why there is none."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from itertools import takewhile
from typing import TYPE_CHECKING

from cloudagent_queue import repository
from cloudagent_queue.agents import open_agent
from cloudagent_queue.candidates import Sealing
from cloudagent_queue.cron import Cron
from cloudagent_storage.errors import (
    CloudAgentError,
    CredentialMissing,
    DatabaseUnavailable,
    Internal,
)
from cloudagent_storage.records import EventDraft, TaskDraft, new_id
from cloudagent_storage.schedule import HeldSchedule, ScheduleRun, not_ended

if TYPE_CHECKING:
    from cloudagent_storage.secrets import Keyring
    from cloudagent_storage.store import Store

log = logging.getLogger(__name__)

LATEST = timedelta(minutes=10)
"""A due time that is older when somebody first sees it is missed: what it was for may be over."""
NO_WORKER = "No worker was running."
AT_A_TIME = 20
"""Schedules in one look at the store."""
MISSED_AT_A_TIME = 500
"""Due times in one transaction."""


def fire_due(store: Store, keyring: Keyring, ring: Callable[[str], None]) -> bool:
    """Answer what is due, one due time or one row of missed ones for each schedule; True when more may be left.

    Any number of workers may do so at once. `ring` tells the queue of a committed task, and raises nothing.
    Raises `DatabaseUnavailable`; what was not answered then still is due.
    """
    answered = 0
    for held in store.schedules.due(limit=AT_A_TIME):
        try:
            _answer(store, keyring, ring, held)
            answered += 1
        except DatabaseUnavailable:
            raise
        except CloudAgentError:
            log.exception("%s could not be answered", held.schedule.schedule_id)
    return answered > 0


def run_now(
    store: Store, keyring: Keyring, ring: Callable[[str], None], account_id: str, schedule_id: str
) -> ScheduleRun:
    """Submit a schedule's task at once, whatever its cron line says and whatever else is under way.

    Raises `ScheduleNotFound`, and what a submit raises; the schedule's runs then say why there was none.
    """
    while True:
        held = store.schedules.hold(account_id, schedule_id)
        try:
            draft = _draft(keyring, held)
            run = store.schedules.submit(held, draft, at_once=True)
        except DatabaseUnavailable:
            raise
        except CloudAgentError as error:
            store.schedules.refuse_now(held, _text(error))
            raise
        if run is not None and run.task_id is not None:
            _ring_for(draft, ring)
            return run


def _answer(store: Store, keyring: Keyring, ring: Callable[[str], None], held: HeldSchedule) -> None:
    assert held.due_at is not None
    schedules, schedule_id = store.schedules, held.schedule.schedule_id
    next_due_at = None
    try:
        times = Cron(held.schedule.cron, held.schedule.timezone).after(held.due_at)
        if held.due_at < held.seen_at - LATEST:
            moments, next_due_at = _missed(held.due_at, held.seen_at - LATEST, times)
            if schedules.pass_over(held, moments, "missed", NO_WORKER, next_due_at=next_due_at):
                log.warning("%s missed %d due times", schedule_id, len(moments))
            return
        next_due_at = next(times, None)
        if held.unfinished_task_id is not None:
            reason = not_ended(held.unfinished_task_id)
            schedules.pass_over(held, [held.due_at], "skipped", reason, next_due_at=next_due_at)
            return
        draft = _draft(keyring, held)
        run = schedules.submit(held, draft, next_due_at=next_due_at)
    except DatabaseUnavailable:
        raise
    except Exception as error:
        # Whatever it was would be so again, and the other schedules wait: the due time is answered with it.
        if not isinstance(error, CloudAgentError):
            log.exception("%s failed in a way that nobody foresaw", schedule_id)
        reason = _text(error if isinstance(error, CloudAgentError) else Internal())
        log.warning("%s submits nothing: %s", schedule_id, reason)
        schedules.pass_over(held, [held.due_at], "skipped", reason, next_due_at=next_due_at)
        return
    if run is not None and run.task_id is not None:
        log.info("%s submitted %s", schedule_id, run.task_id)
        _ring_for(draft, ring)


def overdue(store: Store, held: HeldSchedule) -> list[datetime] | None:
    """The due times of a schedule that nobody has answered yet, and still may; [] where there are none.

    For whoever changes its due times. None when it is to be looked at again: there were others, that were missed.
    """
    if held.due_at is None or held.due_at > held.seen_at:
        return []
    times = Cron(held.schedule.cron, held.schedule.timezone).after(held.due_at)
    if held.due_at < held.seen_at - LATEST:
        moments, next_due_at = _missed(held.due_at, held.seen_at - LATEST, times)
        store.schedules.pass_over(held, moments, "missed", NO_WORKER, next_due_at=next_due_at)
        return None
    return [held.due_at, *takewhile(lambda moment: moment <= held.seen_at, times)]


def _missed(first: datetime, until: datetime, times: Iterator[datetime]) -> tuple[list[datetime], datetime | None]:
    """The due times before `until`, as many as are written at a time, and the one that follows."""
    moments = [first]
    for moment in times:
        if moment >= until or len(moments) == MISSED_AT_A_TIME:
            return moments, moment
        moments.append(moment)
    return moments, None


def _draft(keyring: Keyring, held: HeldSchedule) -> TaskDraft:
    """The task that is to be submitted, with its folder as it is now. Raises what a submit raises."""
    schedule, task_id = held.schedule, new_id("task")
    spec = schedule.task
    if held.credentials is None:
        raise CredentialMissing()
    kept = json.loads(keyring.open(held.credentials, bound_to=schedule.schedule_id))
    open_agent(spec.agent).check_credential(kept["agent"])
    source = repository.read_source(spec.repository, spec.base_ref)
    sealing = Sealing(keyring, kept["agent"], kept["git"])
    candidates = sealing.candidates(spec)
    queued = EventDraft(kind="status", message=f"Queued by the schedule {schedule.name}.")
    return TaskDraft(
        task_id=task_id,
        base_sha=source.base_sha,
        bundle=source.bundle,
        config=source.config,
        manifests=source.manifests,
        source_key=source.key,
        credentials=None if candidates else sealing.for_agent(task_id),
        git_credentials=None if candidates else sealing.for_git(task_id),
        candidates=candidates,
        lines=(queued, *source.warnings),
    )


def _ring_for(draft: TaskDraft, ring: Callable[[str], None]) -> None:
    for task_id in [candidate.task_id for candidate in draft.candidates] or [draft.task_id]:
        ring(task_id)


def _text(error: CloudAgentError) -> str:
    return f"{error.message} {error.remedy}"
