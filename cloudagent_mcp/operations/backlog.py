"""What whoever operates an installation can see of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cloudagent_mcp.operations import Caller, operation
from cloudagent_storage.errors import Forbidden
from cloudagent_storage.overview import Overview

if TYPE_CHECKING:
    from cloudagent_storage.store import Store


class Backlog:
    """The queue as a whole."""

    def __init__(self, store: Callable[[], Store]) -> None:
        """`store` is opened when it is first needed."""
        self._store = store

    @operation("GET", "/queue", title="Look at the queue", read_only=True, idempotent=True)
    def get_queue(self, caller: Caller) -> Overview:
        """For operators: what waits, what runs where, the workers, and the dead letters, for retry_task.

        Raises `Forbidden` for whoever is no operator.
        """
        if not caller.operator:
            raise Forbidden()
        return self._store().backlog.overview()
