"""The life of one task, from claim to finish: `run_task` is the whole story; attempt.py has its steps."""

from __future__ import annotations

import logging

from cloudagent_queue.attempt import Attempt
from cloudagent_queue.lease import Lease
from cloudagent_queue.placement import Draining
from cloudagent_queue.worker import Worker
from cloudagent_storage.errors import (
    CloudAgentError,
    DatabaseUnavailable,
    Internal,
    LeaseLost,
    ProviderBusy,
    SandboxGone,
    SandboxUnreachable,
)
from cloudagent_storage.records import Claim, EventDraft, Level, TaskError, TaskStatus

log = logging.getLogger(__name__)


def run_waiting(worker: Worker, rung_for: str) -> None:
    """Somebody rang: run one task after the other, until none is left that this worker may have.

    Which task was rung for does not matter: the store knows whose turn it is, and a message may be late or double.
    """
    while not worker.stopping.is_set():
        if not run_task(worker):
            return
    worker.ring(rung_for)


def run_task(worker: Worker) -> bool:
    """Run the task whose turn it is to its end, or as far as this worker may. False when there was none to have.

    Whatever happens, one of three things is true afterwards: the task is in a terminal status with its work saved; or
    our lease was lost, and nothing was touched since; or the lease was given back with the sandbox alive, for the next
    attempt to adopt.
    """
    try:
        claim = worker.store.backlog.claim_next(
            worker=worker.name,
            place=worker.place,
            lease_s=worker.timers.lease_s,
            running_max=worker.running_max,
            patience_s=worker.timers.patience_s,
        )
    except DatabaseUnavailable as error:
        log.warning("no task can be claimed: %s", error)
        return False
    if claim is None:
        return False
    task_id = claim.task.task_id
    log.info("claimed %s, attempt %d", task_id, claim.attempt)
    try:
        with Lease(worker.store, claim, worker.timers) as lease:
            attempt = Attempt(worker, claim, lease)
            ending = attempt.work()
            saved = attempt.save()
            while saved and ending.status is TaskStatus.COMPLETED:
                ending = attempt.verify(ending)
                if not attempt.may_retry(ending):
                    break
                ending = attempt.work(again_after=ending)
                saved = attempt.save()
            attempt.finish(ending)
        attempt.discard_sandbox()
    except LeaseLost:
        log.warning("%s belongs to another attempt now; attempt %d lets go", task_id, claim.attempt)
    except Draining:
        give_back(worker, claim)
        worker.ring(task_id)
    except (SandboxGone, SandboxUnreachable, ProviderBusy, DatabaseUnavailable) as reason:
        log.warning("%s has to wait: %s", task_id, reason)
        pause_s = worker.timers.pause_s if isinstance(reason, SandboxUnreachable) else 0.0
        if isinstance(reason, ProviderBusy):
            pause_s = reason.retry_after_s or worker.timers.pause_s
        give_back(worker, claim, pause_s=pause_s)
    except Exception:
        log.exception("%s failed in a way that nobody foresaw", task_id)
        give_up(worker, claim)
    return True


def give_back(worker: Worker, claim: Claim, *, pause_s: float = 0) -> None:
    """Let another attempt go on, after `pause_s`; the sweeper rings for it.

    A database that is away is waited for: else, once it is back, nobody could follow the task, or cancel it, before
    the lease has run out.
    """
    while True:
        try:
            worker.store.tasks.release(claim.task.task_id, claim.attempt, pause_s=pause_s)
            return
        except CloudAgentError as error:
            if not isinstance(error, DatabaseUnavailable) or worker.stopping.wait(worker.timers.signals_s):
                log.warning("could not release %s: %s", claim.task.task_id, error)
                return


def give_up(worker: Worker, claim: Claim) -> None:
    """End a task that no step could end: trying it again would fail again."""
    error = TaskError(code="internal", message=Internal().message, remedy=Internal.remedy)
    line = EventDraft(kind="error", level=Level.ERROR, message=error.message)
    try:
        worker.store.tasks.finish(
            claim.task.task_id, claim.attempt, status=TaskStatus.FAILED, error=error, events=[line]
        )
    except CloudAgentError as refused:
        log.warning("could not end %s: %s", claim.task.task_id, refused)
