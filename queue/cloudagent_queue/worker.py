"""What a worker is to the tasks that it runs."""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cloudagent_queue.lease import Timers
from cloudagent_queue.sandboxes import Provider
from cloudagent_queue.sandboxes.circuit import Circuit
from cloudagent_queue.sandboxes.prices import Prices
from cloudagent_storage.secrets import Keyring
from cloudagent_storage.store import Store

FULL_BYTES = 1_000_000
"""A disk with less free space than this is full."""


@dataclass(frozen=True)
class Worker:
    """What a worker process brings to every task that it runs."""

    name: str
    place: str
    """Where it runs: it reaches the sandboxes that are bound to this place."""
    store: Store
    keyring: Keyring
    providers: Sequence[str]
    """Where sandboxes come from, by name, the preferred one first."""
    open_provider: Callable[[str], Provider]
    deployment: str
    """Names this installation in a sandbox's metadata, so that it only ever kills its own."""
    cache_folder: Path
    git_environment: Mapping[str, str]
    """What git may know of the worker's own environment when it fetches: its user's ssh keys and credential helpers."""
    ring: Callable[[str], None]
    """Tells the queue of a task that another worker should take now."""
    stopping: threading.Event
    timers: Timers
    circuit: Circuit = field(default_factory=Circuit)
    prices: Prices = field(default_factory=Prices.read)
    running_max: int | None = None
    """How many tasks one account may have running at once, in the whole installation; None for any number."""

    def disk_is_full(self, error: Exception) -> bool:
        """Is a full disk of this machine behind a failure? Most of what fails is git, which says no more than that it
        failed: so the disks are asked."""
        cause = error if isinstance(error, OSError) else error.__cause__
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        for folder in (self.cache_folder.parent, Path(tempfile.gettempdir())):
            with contextlib.suppress(OSError):
                full = full or shutil.disk_usage(folder).free < FULL_BYTES
        return full
