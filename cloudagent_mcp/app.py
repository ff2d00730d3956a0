"""The composition root: settings in, everything that a process needs out.

Databases, queues and what they import are opened when they are first needed: a client that only lists the tools of a
stdio server waits for none of them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cloudagent_mcp import __version__
from cloudagent_mcp.operations import Caller, Operation, operations_of
from cloudagent_mcp.operations.backlog import Backlog
from cloudagent_mcp.operations.credentials import Credentials
from cloudagent_mcp.operations.delegation import Delegation
from cloudagent_mcp.operations.in_order import InOrder
from cloudagent_mcp.operations.messages import Messages
from cloudagent_mcp.operations.results import Results
from cloudagent_mcp.operations.review import Review
from cloudagent_mcp.operations.schedules import Schedules
from cloudagent_mcp.operations.sessions import Sessions
from cloudagent_mcp.operations.submission import Allowed
from cloudagent_mcp.operations.tasks import Tasks
from cloudagent_mcp.operations.verification import Verification
from cloudagent_mcp.settings import Settings
from cloudagent_storage.errors import CloudAgentError
from cloudagent_storage.records import LOCAL_ACCOUNT

if TYPE_CHECKING:
    from cloudagent_queue.sandboxes import Provider
    from cloudagent_queue.task_queue import TaskQueue
    from cloudagent_storage.store import Store

log = logging.getLogger(__name__)

TASKS_PER_CONNECTION = 8
"""A running task writes a batch of its log every now and then, and renews its lease."""


class App:
    """What one process works with."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.keeps_tasks = True
        """Is the store ours to open? That of a bridge is a server's."""
        self.brief = True
        """Do people wait for what this process does? A worker sets it to False before it opens the store."""
        self.tasks_at_once = 0
        """How many tasks run in this process; a worker says so before it opens the store."""

    @cached_property
    def store(self) -> Store:
        from cloudagent_storage.store import BRIEF, CONNECTIONS, PATIENT, Store

        self.settings.make_home()
        store = Store.open(
            self.settings.store_url,
            patience=BRIEF if self.brief else PATIENT,
            connections=max(CONNECTIONS, self.tasks_at_once // TASKS_PER_CONNECTION),
        )
        store.migrate()
        store.accounts.ensure(LOCAL_ACCOUNT)
        return store

    @cached_property
    def queue(self) -> TaskQueue:
        from cloudagent_queue.task_queue import TaskQueue

        self.settings.make_home()
        return TaskQueue(self.settings.task_queue_url)

    @cached_property
    def providers(self) -> list[str]:
        """The configured sandbox providers, the preferred one first."""
        return [name.strip() for name in self.settings.sandbox_provider.split(",") if name.strip()]

    def open_provider(self, name: str) -> Provider:
        """A sandbox provider with what the environment says for it. Raises `UnknownProvider`, naming the choices."""
        from cloudagent_queue.sandboxes import entry_of, open_provider

        env = self.settings.pick([*entry_of(name).environment])
        return open_provider(name, data_folder=self.settings.cloudagent_home, env=env)

    @cached_property
    def allowed(self) -> Allowed:
        return Allowed(providers=self.providers, egress=self.settings.sandbox_egress_tasks)

    @cached_property
    def credentials(self) -> Credentials:
        """The operator's own."""
        key, token = self.settings.system_anthropic_api_key, self.settings.system_github_token
        return Credentials(
            anthropic_api_key=None if key is None else key.get_secret_value(),
            github_token=None if token is None else token.get_secret_value(),
        )

    @cached_property
    def tasks(self) -> Tasks:
        return Tasks(
            lambda: self.store,
            lambda: self.settings.keyring,
            self.sessions,
            allowed=self.allowed,
            credentials=self.credentials,
            running_max=self.settings.account_running_max,
            ring=self.ring,
        )

    @cached_property
    def sessions(self) -> Sessions:
        return Sessions(lambda: self.store, lambda: self.settings.keyring)

    @cached_property
    def results(self) -> Results:
        return Results(lambda: self.store, self.sessions, state_folder=self.settings.cloudagent_home / "apply")

    @cached_property
    def verification(self) -> Verification:
        return Verification(
            lambda: self.store, lambda: self.settings.keyring, credentials=self.credentials, ring=self.ring
        )

    @cached_property
    def schedules(self) -> Schedules:
        return Schedules(
            lambda: self.store,
            lambda: self.settings.keyring,
            submit_task=operations_of(self.tasks)["submit_task"],
            allowed=self.allowed,
            credentials=self.credentials,
            ring=self.ring,
            ensure_worker=self.ensure_worker,
        )

    @cached_property
    def operations(self) -> dict[str, Operation]:
        tasks = operations_of(self.tasks)
        messages, backlog = Messages(lambda: self.store), Backlog(lambda: self.store)
        review = Review(lambda: self.store, tasks["submit_task"])
        plain = tasks | operations_of(self.results, messages, review, self.schedules, backlog, self.verification)
        return plain | composed(plain)

    def local_caller(self) -> Caller:
        """The user of this machine, working in the current folder."""
        return Caller(local=True, operator=True, folder=Path.cwd(), environment=self.settings.environment)

    def remote_caller(self, account_id: str, *, operator: bool = False) -> Caller:
        """Somebody with a key; the credentials are the server's."""
        return Caller(account_id=account_id, operator=operator, environment=self.settings.environment)

    def ring(self, task_id: str) -> None:
        """See to it that a worker takes a committed task. What fails here costs seconds, never the task."""
        try:
            self.queue.put(task_id)
        except CloudAgentError as error:
            log.warning("the queue was not told of %s, the sweeper will: %s", task_id, error)
        self.ensure_worker()

    def ensure_worker(self) -> None:
        """Where the worker is ours to start, start it unless it runs."""
        if not self.settings.embedded:
            return
        from cloudagent_mcp.embedded import ensure_worker

        try:
            ensure_worker(self.settings, version=__version__)
        except (CloudAgentError, OSError) as error:
            log.warning("could not start a worker: %s", error)

    def close(self) -> None:
        """Let go of connections."""
        for name in ("store", "queue"):
            if name in self.__dict__:
                getattr(self, name).close()


def composed(operations: Mapping[str, Operation]) -> dict[str, Operation]:
    """The operations that are made of others, wherever those are done."""
    return operations_of(
        Delegation(operations["submit_task"], operations["get_task"]),
        InOrder(operations["apply_task"], operations["verify_task"], operations["get_task"]),
    )
