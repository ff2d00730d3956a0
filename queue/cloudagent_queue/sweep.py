"""What time brings: schedules that are due, doorbells that were lost, leases that ran out, sandboxes that nobody owns.

A plain thread in every worker, never a queued job: a sweep that hangs on the queue could not mend the queue.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable

from cloudagent_queue.lease import Timers
from cloudagent_queue.sandboxes import Provider
from cloudagent_queue.schedules import fire_due
from cloudagent_queue.task_queue import TaskQueue
from cloudagent_storage.errors import CloudAgentError, SandboxGone
from cloudagent_storage.secrets import Keyring
from cloudagent_storage.store import Store

log = logging.getLogger(__name__)

WAKE_S = 0.5
"""The longest that a sweeper which is woken goes on waiting."""


def sweep_forever(
    store: Store,
    queue: TaskQueue,
    providers: Iterable[Callable[[], Provider]],
    *,
    keyring: Keyring,
    ring: Callable[[str], None],
    deployment: str,
    timers: Timers,
    stopping: threading.Event,
    wake: threading.Event,
) -> None:
    """Sweep every `timers.sweep_s`, and when `wake` is set, until `stopping` is. What fails is tried at the next turn.

    `ring` tells the queue of a task and raises nothing.
    """
    fire = functools.partial(fire_due, store, keyring, ring)
    steps = [functools.partial(ring_again, store, queue, timers)]
    steps += [functools.partial(_kill_orphans, store, provider, deployment) for provider in providers]
    while True:
        wake.clear()
        # First, and not to be stopped by a queue that does not answer.
        more = _attempt(fire)
        for step in steps:
            _attempt(step)
        waits_until = time.monotonic() + timers.sweep_s
        while not (more or wake.is_set()) and (left := waits_until - time.monotonic()) > 0:
            if stopping.wait(min(left, WAKE_S)):
                break
        if stopping.is_set():
            return


def _attempt(step: Callable[[], object]) -> bool:
    """Did the step do something? It does not when it fails."""
    try:
        return bool(step())
    except CloudAgentError as error:
        log.warning("sweep: %s", error)
    except Exception:
        log.exception("sweep")
    return False


def _kill_orphans(store: Store, provider: Callable[[], Provider], deployment: str) -> int:
    return kill_orphans(store, provider(), deployment=deployment)


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
