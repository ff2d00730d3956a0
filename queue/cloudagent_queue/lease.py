"""A worker's hold on a task: renewed on a thread of its own, and given up before anyone else may take it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from cloudagent_storage.errors import CloudAgentError, DatabaseUnavailable, LeaseLost
from cloudagent_storage.records import Claim, Signals
from cloudagent_storage.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timers:
    """Every duration that matters to a running task, in seconds. Tests scale them down."""

    lease_s: float = 60.0
    heartbeat_s: float = 15.0
    let_go_s: float = 45.0
    """A worker that could not renew for this long lets go: earlier than the lease ends, so that two never overlap."""
    signals_s: float = 1.0
    """How often a cancel is looked for, at most and, while changes are not told of, at least."""
    watch_s: float = 1.0
    """How long one look at the runner's log waits for something new."""
    poll_s: float = 0.2
    """How long the log is left alone after something new was taken from it."""
    idle_s: float = 15 * 60.0
    idle_in_tool_s: float = 60 * 60.0
    """The idle limit while a tool call of the agent runs."""
    question_s: float = 30 * 60.0
    """How long an agent's question waits for an answer; then it is told to decide by itself."""
    stop_grace_s: float = 10.0
    """How long an agent that was asked to stop may take."""
    setup_s: float = 15 * 60.0
    verify_s: float = 30 * 60.0
    fetch_s: float = 10 * 60.0
    checkpoint_s: float = 180.0
    ring_again_s: float = 30.0
    """A task that waits longer than this is rung for once more."""
    sweep_s: float = 10.0
    pause_s: float = 10.0
    """How long a task is left alone that was given back since its sandbox or the database did not answer."""
    patience_s: float = 600.0
    """How long a task waits for the machine that its sandbox is on."""
    prune_s: float = 3600.0
    """How often what finished tasks have left is pruned; also at a worker's start."""
    drain_s: float = 8.0
    """How long a stopping worker waits for its threads to let go of their tasks."""


class Lease:
    """Held for the time of one attempt, as a context manager.

    `signals` is the newest that the store said. `check` raises `LeaseLost` once the lease may belong to another.
    """

    def __init__(self, store: Store, claim: Claim, timers: Timers) -> None:
        self._store = store
        self._claim = claim
        self._timers = timers
        self._ended = threading.Event()
        self._changed = threading.Event()
        self._changed.set()  # whatever has happened since the claim is looked at first
        self._lost = False
        self._renewed = time.monotonic()
        self._interrupt: Callable[[], None] | None = None
        self._interrupt_at = self._interrupt_pause_s = 0.0
        self._guard = threading.Lock()
        self.signals = Signals(cancel_requested=claim.cancel_requested)
        self._thread = threading.Thread(target=self._beat, name=f"lease {claim.task.task_id}", daemon=True)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def check(self) -> None:
        """Raises `LeaseLost` when this worker must not touch the task any more."""
        if self._lost or time.monotonic() - self._renewed > self._timers.let_go_s:
            self._lost = True
            raise LeaseLost()

    def renewed(self, signals: Signals) -> None:
        """A write to the store has renewed the lease."""
        self._renewed = time.monotonic()
        self.signals = signals

    @contextmanager
    def interruptible(self, interrupt: Callable[[], None]) -> Generator[None]:
        """From a cancel on until the block ends, call `interrupt` from the lease's thread, again and again.

        For work that waits on long calls and cannot look at `signals` itself. Once would not do: the call that is to
        be interrupted may not have begun. And each pause is twice as long as the one before, as a call in a sandbox
        that is asked how it ended may be cut by the interrupt, too.
        """
        with self._guard:
            self._interrupt = interrupt
            self._interrupt_at, self._interrupt_pause_s = 0.0, self._timers.signals_s
        try:
            yield
        finally:
            with self._guard:
                self._interrupt = None

    def _beat(self) -> None:
        with self._store.changes.watch([self._claim.task.task_id], self._changed.set):
            while not self._ended.wait(min(self._timers.signals_s, self._timers.heartbeat_s)):
                try:
                    self._look()
                    self.check()
                except LeaseLost:
                    self._lost = True
                    log.warning("lost the lease of %s, attempt %d", self._claim.task.task_id, self._claim.attempt)
                    return
                if self.signals.cancel_requested:
                    self._call_interrupt()

    def _look(self) -> None:
        """Renew the lease when that is due, and learn what is new of the task where something may be."""
        task_id, attempt = self._claim.task.task_id, self._claim.attempt
        try:
            if time.monotonic() - self._renewed >= self._timers.heartbeat_s:
                self.renewed(self._store.tasks.renew(task_id, attempt, lease_s=self._timers.lease_s))
            elif self._changed.is_set() or not self._store.changes.prompt:
                self._changed.clear()
                self.signals = self._store.tasks.signals(task_id, attempt)
        except DatabaseUnavailable:
            self._changed.set()
            log.warning("could not renew the lease of %s; trying again", task_id)

    def _call_interrupt(self) -> None:
        with self._guard:
            if self._interrupt is not None and time.monotonic() >= self._interrupt_at:
                try:
                    self._interrupt()
                except CloudAgentError as error:
                    log.warning("could not interrupt %s: %s", self._claim.task.task_id, error)
                self._interrupt_at = time.monotonic() + self._interrupt_pause_s
                self._interrupt_pause_s = min(self._interrupt_pause_s * 2, self._timers.stop_grace_s / 2)
