"""What time brings: doorbells that were lost, leases that ran out, sandboxes that nobody owns, tasks that grow old.

A plain thread in every worker, never a queued job: a sweep that hangs on the queue could not mend the queue.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cloudagent_queue.lease import Timers
from cloudagent_queue.sandboxes import Provider
from cloudagent_queue.task_queue import TaskQueue
from cloudagent_storage.errors import CloudAgentError, SandboxGone
from cloudagent_storage.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """How much is kept of finished tasks; 0 is without limit."""

    days: float
    megabytes: int
    """For one account, in millions of bytes."""


def sweep_forever(
    store: Store,
    queue: TaskQueue,
    providers: Iterable[Callable[[], Provider]],
    *,
    deployment: str,
    kept: Kept,
    timers: Timers,
    stopping: threading.Event,
) -> None:
    """Sweep every `timers.sweep_s` until `stopping` is set. What fails is tried again at the next turn."""
    providers = list(providers)
    pruned_at: float | None = None

    def orphans() -> None:
        for provider in providers:
            kill_orphans(store, provider(), deployment=deployment)

    def old() -> None:
        nonlocal pruned_at
        store.keep_reserve()
        if pruned_at is None or time.monotonic() - pruned_at >= timers.prune_s:
            prune(store, kept, stopping)
            pruned_at = time.monotonic()

    while True:
        # One that fails, such as the bell of a dead Redis, keeps none of the others from its work.
        for duty in (lambda: ring_again(store, queue, timers), orphans, old):
            try:
                duty()
            except CloudAgentError as error:
                log.warning("sweep: %s", error)
            except Exception:
                log.exception("sweep")
        if stopping.wait(timers.sweep_s):
            return


def prune(store: Store, kept: Kept, stopping: threading.Event) -> int:
    """Let go of what finished tasks have left beyond what is kept. Returns how many tasks that were."""
    count = store.retention.prune(
        max_age_s=kept.days * 86_400 or None,
        max_bytes=kept.megabytes * 1_000_000 or None,
        go_on=lambda: not stopping.is_set(),
    )
    if count:
        log.info("%d tasks have expired: their logs, diffs and bundles are deleted", count)
    return count


def ring_again(store: Store, queue: TaskQueue, timers: Timers) -> int:
    """Ring for every task whose message was lost or whose worker is gone. Returns how many."""
    due = store.tasks.due(waited_s=timers.ring_again_s)
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
