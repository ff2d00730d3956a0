"""The worker process: takes tasks from the queue and runs them until it is asked to stop."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import signal
import socket
import threading
from contextlib import ExitStack
from urllib.parse import urlsplit

from cloudagent_mcp import __version__
from cloudagent_mcp.app import App
from cloudagent_mcp.embedded import IDLE_S, only_worker, stop_when_idle
from cloudagent_queue.lease import Timers
from cloudagent_queue.run import Worker, run_task
from cloudagent_queue.sandboxes import Provider, open_provider
from cloudagent_queue.sweep import Kept, sweep_forever
from cloudagent_storage.errors import CloudAgentError

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
    settings = app.settings
    settings.make_home()
    app.brief = False
    app.queue.check()

    def stop(*_: object) -> None:
        stopping.set()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
    with ExitStack() as stack:
        lock = stack.enter_context(only_worker(settings.cloudagent_home, version=__version__)) if embedded else None
        app.store.keep_reserve()
        provider = functools.cache(functools.partial(_provider, app))
        worker = Worker(
            name=f"{socket.gethostname()}/{os.getpid()}",
            store=app.store,
            keyring=settings.keyring,
            open_provider=provider,
            deployment=deployment(settings.store_url),
            cache_folder=settings.cloudagent_home / "repositories",
            git_environment=settings.git_environment,
            ring=functools.partial(_ring, app),
            stopping=stopping,
            timers=timers,
        )
        helpers = [
            threading.Thread(
                target=functools.partial(
                    sweep_forever,
                    app.store,
                    app.queue,
                    [functools.partial(provider, name) for name in app.providers],
                    deployment=worker.deployment,
                    kept=Kept(days=settings.retention_days, megabytes=settings.retention_mb),
                    timers=timers,
                    stopping=stopping,
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
        count = concurrency or settings.worker_concurrency
        log.info("worker %s of version %s takes up to %d tasks at once", worker.name, __version__, count)
        run = functools.partial(run_task, worker)
        if not app.queue.consume(run, concurrency=count, stopping=stopping, grace_s=timers.drain_s):
            log.warning("some tasks did not let go in time; their leases run out by themselves")
        log.info("worker %s stops", worker.name)


def deployment(store_url: str) -> str:
    """Names an installation by its database, without the credentials in its address."""
    parts = urlsplit(store_url)
    return hashlib.sha256(f"{parts.scheme}|{parts.hostname}|{parts.port}|{parts.path}".encode()).hexdigest()[:16]


def _provider(app: App, name: str) -> Provider:
    return open_provider(name, data_folder=app.settings.cloudagent_home)


def _ring(app: App, task_id: str) -> None:
    try:
        app.queue.put(task_id)
    except CloudAgentError as error:
        log.warning("the queue was not told of %s, the sweeper will: %s", task_id, error)
