"""The worker process: takes tasks from the queue and runs them until it is asked to stop."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import signal
import socket
import threading
from contextlib import ExitStack, suppress
from urllib.parse import urlsplit

from cloudagent_mcp import __version__
from cloudagent_mcp.app import App
from cloudagent_mcp.embedded import IDLE_S, only_worker, stop_when_idle
from cloudagent_queue.lease import Timers
from cloudagent_queue.run import run_waiting
from cloudagent_queue.sandboxes import place_of
from cloudagent_queue.sandboxes.prices import Prices
from cloudagent_queue.sweep import Kept, sweep_forever
from cloudagent_queue.worker import Worker
from cloudagent_storage.errors import CloudAgentError
from cloudagent_storage.store import Store

log = logging.getLogger(__name__)


def work(
    app: App,
    *,
    embedded: bool = False,
    concurrency: int | None = None,
    timers: Timers = Timers(),  # noqa: B008
    idle_s: float = IDLE_S,
    stopping: threading.Event | None = None,
) -> None:
    """Run tasks until SIGTERM, SIGINT or, embedded, until there was nothing to do for `idle_s`.

    A stop gives running tasks back with their sandboxes alive, and takes `timers.drain_s` at most.
    Raises `Busy` when it is embedded and another worker runs for the same data folder, and `QueueUnavailable` when the
    queue does not answer, or may drop messages when its memory is full.
    """
    stopping = stopping or threading.Event()
    wake = threading.Event()
    settings = app.settings
    settings.make_home()
    count = concurrency or settings.worker_concurrency
    app.brief, app.tasks_at_once = False, count
    app.queue.check()

    def stop(*_: object) -> None:
        stopping.set()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
    with ExitStack() as stack:
        lock = stack.enter_context(only_worker(settings.cloudagent_home, version=__version__)) if embedded else None
        app.store.keep_reserve()
        provider = functools.cache(app.open_provider)
        worker = Worker(
            name=f"{socket.gethostname()}/{os.getpid()}",
            place=place_of(settings.cloudagent_home),
            store=app.store,
            keyring=settings.keyring,
            providers=app.providers,
            open_provider=provider,
            deployment=deployment(settings.store_url),
            cache_folder=settings.cloudagent_home / "repositories",
            git_environment=settings.git_environment,
            ring=functools.partial(_ring, app),
            stopping=stopping,
            timers=timers,
            prices=Prices.read(settings.sandbox_prices),
            egress=settings.sandbox_egress,
            egress_of_tasks=settings.sandbox_egress_tasks,
            running_max=settings.account_running_max,
        )
        report = functools.partial(_report, app.store, worker, count)
        helpers = [
            threading.Thread(
                target=functools.partial(
                    sweep_forever,
                    app.store,
                    app.queue,
                    [functools.partial(provider, name) for name in app.providers],
                    keyring=worker.keyring,
                    ring=worker.ring,
                    deployment=worker.deployment,
                    kept=Kept(days=settings.retention_days, megabytes=settings.retention_mb),
                    timers=timers,
                    stopping=stopping,
                    report=report,
                    wake=wake,
                ),
                name="sweeper",
                daemon=True,
            )
        ]
        if lock is not None:
            idle = functools.partial(stop_when_idle, app.store, lock, settings.cloudagent_home, stopping, idle_s=idle_s)
            helpers.append(threading.Thread(target=idle, name="idle", daemon=True))
        for thread in helpers:
            thread.start()
        log.info("worker %s of version %s takes up to %d tasks at once", worker.name, __version__, count)
        run = functools.partial(run_waiting, worker)
        if not app.queue.consume(run, concurrency=count, stopping=stopping, grace_s=timers.drain_s, tick=wake.set):
            log.warning("some tasks did not let go in time; their leases run out by themselves")
        with suppress(CloudAgentError):
            app.store.workers.leave(worker.name)
        log.info("worker %s stops", worker.name)


def deployment(store_url: str) -> str:
    """Names an installation by its database, without the credentials in its address."""
    parts = urlsplit(store_url)
    return hashlib.sha256(f"{parts.scheme}|{parts.hostname}|{parts.port}|{parts.path}".encode()).hexdigest()[:16]


def _report(store: Store, worker: Worker, concurrency: int, swept: bool) -> None:
    store.workers.report(worker.name, place=worker.place, version=__version__, concurrency=concurrency, swept=swept)


def _ring(app: App, task_id: str) -> None:
    try:
        app.queue.put(task_id)
    except CloudAgentError as error:
        log.warning("the queue was not told of %s, the sweeper will: %s", task_id, error)
