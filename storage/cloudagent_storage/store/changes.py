"""Who waits for a task or a schedule is told when it changes, and holds no connection meanwhile.

One thread for each process listens, and only while somebody waits: on Postgres with LISTEN on a connection of its own,
on SQLite by looking whether the file has changed. What is told is a hint and may be too much; whoever is told looks.
"""

# pyright: basic
from __future__ import annotations

import contextlib
import logging
import select
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager

import psycopg2

from cloudagent_storage.store.database import CHANNEL, Database

log = logging.getLogger(__name__)

LOOK_S = 0.02
"""How often SQLite's file is looked at."""
QUIET_S = 0.05
"""After a change of SQLite's file those that come at once are told of together."""
LINGER_S = 30.0
"""How long it goes on listening after the last who waited has left."""
RECONNECT_S = 1.0


class Changes:
    """Tells of changed tasks and schedules."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._guard = threading.Lock()
        self._watchers: dict[str, list[Callable[[], None]]] = {}
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self._bell: tuple[socket.socket, socket.socket] | None = None
        self._last_left = time.monotonic()
        self.prompt = False
        """Is every change told of at this moment? While it is not, whoever waits has to look by itself."""

    @contextmanager
    def watch(self, task_ids: Iterable[str], tell: Callable[[], None]) -> Generator[None]:
        """While the block runs, `tell` is called after any of these tasks, or schedules, may have changed.

        On a thread of this object's: `tell` must return at once. Look at them after the block has begun, as what
        changed before is not told.
        """
        watched = list(dict.fromkeys(task_ids))
        with self._guard:
            for task_id in watched:
                self._watchers.setdefault(task_id, []).append(tell)
            if self._thread is None and not self._closed.is_set():
                self._bell = socket.socketpair()
                self._thread = threading.Thread(target=self._listen, name="changes", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._guard:
                for task_id in watched:
                    telling = self._watchers[task_id]
                    telling.remove(tell)
                    if not telling:
                        del self._watchers[task_id]
                self._last_left = time.monotonic()

    def close(self) -> None:
        """Stop listening."""
        self._closed.set()
        with self._guard:
            thread, bell = self._thread, self._bell
            if bell is not None:
                bell[1].send(b"x")
        if thread is not None:
            thread.join()
        self._closed.clear()

    # -- on the thread -----------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        while True:
            try:
                if self._db.file is None:
                    self._follow_postgres()
                else:
                    self._follow_sqlite()
            except (psycopg2.Error, sqlite3.Error, OSError) as error:
                log.warning("changes are not told of at once, for now: %s", type(error).__name__)
            self.prompt = False
            with self._guard:
                if self._done():
                    assert self._bell is not None
                    for end in self._bell:
                        end.close()
                    self._thread = self._bell = None
                    return
            self._closed.wait(RECONNECT_S)

    def _done(self) -> bool:
        return self._closed.is_set() or (not self._watchers and time.monotonic() - self._last_left > LINGER_S)

    def _follow_postgres(self) -> None:
        assert self._bell is not None
        with contextlib.closing(self._db.connect_apart()) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(f"LISTEN {CHANNEL}")
            self.prompt = True
            self._tell_all()  # of what has changed while nobody listened
            while not self._done():
                select.select([connection, self._bell[0]], [], [], LINGER_S / 3)
                connection.poll()
                changed = {notice.payload for notice in connection.notifies}
                connection.notifies.clear()
                for task_id in changed:
                    self._tell(task_id)

    def _follow_sqlite(self) -> None:
        with contextlib.closing(sqlite3.connect(f"file:{self._db.file}?mode=ro", uri=True)) as connection:
            seen = None
            while not self._done():
                (version,) = connection.execute("PRAGMA data_version").fetchone()
                changed, seen = version != seen, version
                self.prompt = True
                if changed:
                    self._tell_all()
                self._closed.wait(QUIET_S if changed else LOOK_S)

    def _tell(self, task_id: str) -> None:
        with self._guard:
            telling = list(self._watchers.get(task_id, ()))
        for tell in telling:
            tell()

    def _tell_all(self) -> None:
        with self._guard:
            telling = [tell for tells in self._watchers.values() for tell in tells]
        for tell in telling:
            tell()
