"""What time brings: schedules that are due, lost doorbells, leases that ran out, sandboxes of nobody, tasks grown old.

A plain thread in every worker, never a queued job: a sweep that hangs on the queue could not mend the queue.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cloudagent_queue.lease import Timers
from cloudagent_queue.sandboxes import Provider
from cloudagent_queue.schedules import fire_due
from cloudagent_queue.task_queue import TaskQueue
from cloudagent_storage.errors import CloudAgentError, SandboxError, SandboxGone, SandboxUnreachable
from cloudagent_storage.secrets import Keyring
from cloudagent_storage.store import Store

log = logging.getLogger(__name__)

RINGS_MAX = 100
"""Messages that may wait in the queue before the sweeper adds none."""
SET_UP_UNUSED_S = 30 * 86_400.0
"""A finished set-up that no task has asked for within this time is deleted where it is kept."""
FORGOTTEN_AT_ONCE = 20
"""How many of them one turn deletes, each in a call of its own, while schedules wait."""
WAKE_S = 0.5
"""The longest that a sweeper which is woken goes on waiting."""


@dataclass(frozen=True)
class Kept:
    """How much is kept of finished tasks; 0 is without limit."""

    days: float
    megabytes: int
    """For one account, in millions of bytes."""


def sweep_forever(
    store: Store,
    queue: TaskQueue,
    providers: Sequence[Callable[[], Provider]],
    *,
    keyring: Keyring,
    ring: Callable[[str], None],
    deployment: str,
    kept: Kept,
    timers: Timers,
    stopping: threading.Event,
    wake: threading.Event,
    report: Callable[[bool], None],
) -> None:
    """Sweep every `timers.sweep_s`, and when `wake` is set, until `stopping` is. What fails is tried at the next turn.

    `ring` tells the queue of a task and raises nothing. `report` is told of every turn, and whether all of it was done.
    """
    pruned_at: float | None = None

    def age() -> int:
        nonlocal pruned_at
        store.keep_reserve()
        if pruned_at is not None and time.monotonic() - pruned_at < timers.prune_s:
            return 0
        count = prune(store, kept, stopping)
        for open in providers:
            _try(lambda open=open: forget_unused(store, open()))
        pruned_at = time.monotonic()
        return count

    duties: list[Callable[[], object]] = [
        # First, so that no queue and no sandbox provider that hangs makes a schedule late.
        functools.partial(fire_due, store, keyring, ring),
        store.candidates.settle,
        functools.partial(ring_again, store, queue, timers),
        *(lambda open=open: kill_orphans(store, open(), deployment=deployment) for open in providers),
        age,
    ]
    while True:
        wake.clear()
        done = [_try(duty) for duty in duties]
        _try(functools.partial(report, None not in done))
        more = bool(done[0])
        waits_until = time.monotonic() + timers.sweep_s
        while not (more or wake.is_set()) and (left := waits_until - time.monotonic()) > 0:
            if stopping.wait(min(left, WAKE_S)):
                break
        if stopping.is_set():
            return


def _try(duty: Callable[[], object]) -> object:
    """What it answers; None when it failed, which keeps none of the others from being done."""
    try:
        return duty()
    except CloudAgentError as error:
        log.warning("sweep: %s", error)
    except Exception:
        log.exception("sweep")
    return None


def prune(store: Store, kept: Kept, stopping: threading.Event) -> int:
    """Let go of old uploads, and of what finished tasks have left beyond what is kept. Returns of how many tasks."""
    if uploads := store.uploads.prune():
        log.info("%d uploads that nobody has used for a day are deleted", uploads)
    count = store.retention.prune(
        max_age_s=kept.days * 86_400 or None,
        max_bytes=kept.megabytes * 1_000_000 or None,
        go_on=lambda: not stopping.is_set(),
    )
    if count:
        log.info("%d tasks have expired: their logs, diffs and bundles are deleted", count)
    return count


def forget_unused(store: Store, provider: Provider, *, for_s: float = SET_UP_UNUSED_S) -> int:
    """Delete a provider's finished set-ups that nobody uses any more. Returns how many.

    The provider first: a task that was just given one finds it missing, and runs its set-up. The other way round, a
    crash in between would leave what nobody knows of any more, and somebody pays for.
    """
    forgotten = 0
    for kept in store.templates.unused(provider.name, for_s=for_s, limit=FORGOTTEN_AT_ONCE):
        try:
            provider.forget(kept.template)
        except SandboxUnreachable:
            raise
        except SandboxError as error:
            log.warning("could not delete a set-up that nobody uses at %s: %s", provider.name, error)
            continue
        forgotten += store.templates.forget(kept)
    if forgotten:
        log.info("%d set-ups that nobody has used for long are deleted at %s", forgotten, provider.name)
    return forgotten


def ring_again(store: Store, queue: TaskQueue, timers: Timers) -> int:
    """Ring for every task whose message was lost or whose worker is gone. Returns how many.

    No more than the queue has room for: a thousand that wait their turn need no thousand messages more every half
    minute, as a worker that is rung for goes on until nothing is left.
    """
    room = RINGS_MAX - queue.waiting()
    due = store.tasks.due(waited_s=timers.ring_again_s, limit=room) if room > 0 else ()
    for task_id in due:
        queue.put(task_id)
    return len(due)


def kill_orphans(store: Store, provider: Provider, *, deployment: str) -> int:
    """Kill the sandboxes of this deployment that no living task owns. Returns how many.

    The row decides who owns a sandbox, through its id or the nonce that was committed before it was created. The
    list is taken first: a sandbox in it had its nonce in the row by then.
    """
    killed = 0
    for info in provider.list({"deployment": deployment}):
        if store.tasks.owns_sandbox(info.metadata.get("task", ""), info.id, info.metadata.get("nonce", "")):
            continue
        log.info("killing the orphan sandbox %s", info.id)
        try:
            provider.connect(info.id).kill()
        except SandboxGone:
            continue
        except CloudAgentError as error:
            log.warning("could not kill %s: %s", info.id, error)
            continue
        killed += 1
    return killed
