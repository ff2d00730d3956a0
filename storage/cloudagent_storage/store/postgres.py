"""A pool of Postgres connections in which nothing waits for ever, whatever becomes of the network or the server."""

# pyright: basic
from __future__ import annotations

import re
import select
import time
from dataclasses import dataclass
from typing import Any

import psycopg2
import psycopg2.extensions
from playhouse.pool import MaxConnectionsExceeded, PooledPostgresqlDatabase

from cloudagent_storage.errors import DatabaseBusy


@dataclass(frozen=True)
class Patience:
    """How long a process waits for its database, in seconds, before it calls it unavailable."""

    connect_s: float
    """For a new connection; and for a sign of life from an idle one."""
    pool_s: float
    """For a connection, where all are in use."""
    lock_s: float
    """For another transaction's lock."""
    statement_s: float
    """For one statement, lock and all. Counted by the server, and by us with `GRACE_S` more: it may be gone."""


PATIENT = Patience(connect_s=5, pool_s=10, lock_s=10, statement_s=30)
"""A worker's. Its writes are large (bundles of many megabytes), nobody waits for them, and giving up costs an attempt.
Still well below the 45 s after which a worker that cannot renew its lease lets go."""
BRIEF = Patience(connect_s=2, pool_s=3, lock_s=5, statement_s=5)
"""That of a process which answers people: a call ends within ten seconds, and its thread is free for the next."""

GRACE_S = 1.0
QUIET_S = 1.0
"""After a silence nobody tries for so long: of many in a line for a dead server, each would wait its time in turn."""
TOO_MANY = re.compile("too many clients|connection slots are reserved|too many connections for")
"""Connecting fails with a text and no code."""


def wait(connection: Any) -> None:
    """Psycopg's way to wait for the server, made to end: libpq itself waits for as long as TCP holds a connection.

    TCP notices a network that swallows packets, and never a server that hangs or a proxy whose server is gone.
    """
    limit_s = getattr(connection, "limit_s", None)
    # A new connection has one deadline for all of it; in a statement the time starts again with every byte that moves.
    deadline = None if limit_s is None else time.monotonic() + limit_s
    while (state := connection.poll()) != psycopg2.extensions.POLL_OK:
        if limit_s is not None and connection.made:
            deadline = time.monotonic() + limit_s
        poller = select.poll()
        poller.register(
            connection.fileno(), select.POLLIN if state == psycopg2.extensions.POLL_READ else select.POLLOUT
        )
        left_ms = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        if not poller.poll(left_ms):
            connection.pool.fell_silent()
            raise psycopg2.OperationalError("no answer in time")


class PatientPool(PooledPostgresqlDatabase):
    """The pool. Raises psycopg's and peewee's errors, and `DatabaseBusy`."""

    def __init__(self, database: str, *, patience: Patience, max_connections: int, **parameters: Any) -> None:
        # One for all connections of the process; those that have no limit wait as they always did.
        psycopg2.extensions.set_wait_callback(wait)
        self._patience = patience
        self._quiet_until = 0.0
        self._suspect = False
        connection = type(
            "Connection",
            (psycopg2.extensions.connection,),
            {"pool": self, "limit_s": patience.connect_s, "made": False},
        )
        super().__init__(
            database,
            max_connections=max_connections,
            timeout=patience.pool_s,
            connection_factory=connection,
            **parameters,
        )

    def fell_silent(self) -> None:
        """A connection was not answered: those that are idle are likely to be as dead."""
        self._suspect = True
        self._quiet_until = time.monotonic() + QUIET_S

    def _connect(self) -> Any:
        # Peewee connects under two locks, so that whoever needs a connection meanwhile waits here.
        with self._pool_lock:
            self._check_quiet()
            if self._suspect:
                self._suspect = False
                self.close_idle()
            try:
                connection = super()._connect()
            except psycopg2.OperationalError as error:
                if not TOO_MANY.search(str(error)):
                    raise
                # The server has none for us; one of ours that is given back will do. Without any, waiting is vain.
                raise (MaxConnectionsExceeded() if self._in_use else DatabaseBusy()) from error
        connection.made = True
        connection.limit_s = self._patience.statement_s + GRACE_S
        return connection

    def _is_closed(self, conn: Any) -> bool:
        conn.limit_s = self._patience.connect_s
        closed = super()._is_closed(conn)
        self._check_quiet()  # it was silent, not closed: the next one would be so too
        return closed

    def _check_quiet(self) -> None:
        if time.monotonic() < self._quiet_until:
            raise psycopg2.OperationalError("it did not answer a moment ago")
