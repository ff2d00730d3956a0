"""One database: its connections, transactions, clock and errors. How SQLite and Postgres differ is told here."""

# pyright: basic
from __future__ import annotations

import logging
import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import peewee
import psycopg2
from filelock import FileLock, Timeout
from playhouse.migrations import MigrationError, Runner
from playhouse.pool import MaxConnectionsExceeded, PooledSqliteDatabase
from psycopg2.extensions import parse_dsn

from cloudagent_storage.errors import CloudAgentError, DatabaseBusy, DatabaseUnavailable, Internal, StorageFull
from cloudagent_storage.store.postgres import PATIENT, Patience, PatientPool
from cloudagent_storage.store.reserve import Reserve
from cloudagent_storage.tables import Tables

log = logging.getLogger(__name__)

CONNECTIONS = 20
"""Per process, unless it asks for more. One is held for a single transaction, so that many more threads share them."""
MIGRATE_WAIT_S = 120
"""The longest wait for another process that migrates."""
CHANNEL = "cloudagent_tasks"
"""Where Postgres is told which task has changed."""
LONGEST_MIGRATION_S = 600
"""The longest that one statement of a migration may take."""
MIGRATIONS = Path(__file__).parent.parent / "migrations"
MIGRATION_LOCK = 7_166_025_518_011_390_465
"""The advisory lock's number: `cloudagent` shares a server with whoever else takes such locks."""

SERVER_SETTINGS = {
    "TimeZone": "UTC",
    # A worker that is stopped in the middle of a transaction must not keep its row locked from the next attempt.
    "idle_in_transaction_session_timeout": "15s",
}
# A network that swallows packets must not hold a thread for the hours that TCP allows.
KEEPALIVE = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}

NOW_POSTGRES = "clock_timestamp()"
NOW_SQLITE = "strftime('%Y-%m-%d %H:%M:%f', 'now')"
LATER_SQLITE = "strftime('%Y-%m-%d %H:%M:%f', 'now', ?)"
AFTER_SQLITE = "strftime('%Y-%m-%d %H:%M:%f', max({column}), '+0.001 seconds')"
FULL_SQLITE = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)
"""The second is a new connection's that has no room for its part of the write-ahead log's index."""
FULL_POSTGRES = "53100"


class Database:
    """The connections to one database, and the tables in it.

    Raises `DatabaseUnavailable` for an address that is neither SQLite's nor Postgres's.
    """

    def __init__(self, url: str, *, patience: Patience = PATIENT, connections: int = CONNECTIONS) -> None:
        self.file: Path | None = None
        """SQLite's; None on Postgres."""
        self._reserve: Reserve | None = None
        if url.startswith("sqlite:///"):
            self.file = Path(url.removeprefix("sqlite:///"))
            self._reserve = Reserve(self.file.with_name("reserve"))
            self._peewee: Any = PooledSqliteDatabase(
                str(self.file),
                max_connections=connections,
                timeout=patience.pool_s,
                autoconnect=False,
                # A transaction that reads first and writes later fails at once when another has written in between.
                lock_type="IMMEDIATE",
                pragmas={
                    "busy_timeout": int(patience.lock_s * 1000),
                    "journal_mode": "wal",
                    "synchronous": "normal",
                    "foreign_keys": 1,
                },
                # The pool hands a connection from one thread to the next, never to two at once.
                check_same_thread=False,
            )
        elif url.startswith(("postgresql://", "postgres://")):
            try:
                given = parse_dsn(url)
            except psycopg2.Error:
                raise _bad_address() from None
            settings = {
                **SERVER_SETTINGS,
                "statement_timeout": f"{int(patience.statement_s * 1000)}ms",
                "lock_timeout": f"{int(patience.lock_s * 1000)}ms",
            }
            options = [given.pop("options", ""), *(f"-c {name}={value}" for name, value in settings.items())]
            self._peewee = PatientPool(
                given.pop("dbname", None) or given.get("user") or "postgres",
                patience=patience,
                max_connections=connections,
                autoconnect=False,
                **{**KEEPALIVE, **given, "options": " ".join(options).strip()},
            )
        else:
            raise _bad_address()
        self.tables = Tables(self._peewee)

    # -- units of work --------------------------------------------------------------------------------------------

    @contextmanager
    def reading(self) -> Generator[None]:
        """A connection for queries that change nothing; each sees the newest that is committed."""
        with self._translated(), self._peewee.connection_context():
            yield

    @contextmanager
    def writing(self) -> Generator[None]:
        """A connection in a transaction, committed at the end; an exception leaves everything as it was.

        Within another one of this thread it is a part of that.
        """
        if self._peewee.in_transaction():
            yield
            return
        with self._translated(), self._peewee.connection_context(), self._peewee.atomic():
            yield

    def take_time(self, seconds: float) -> None:
        """Within a transaction: its statements may take so long, as one that writes a whole bundle does."""
        if self.file is None:
            self._peewee.execute_sql(f"SET LOCAL statement_timeout = '{int(seconds * 1000)}ms'")
            connection = self._peewee.connection()
            connection.limit_s = max(connection.limit_s, seconds)

    def announce(self, row_id: str) -> None:
        """Once the transaction is committed, whoever waits for this task or schedule is told.

        SQLite's file tells by itself.
        """
        if self.file is None:
            self._peewee.execute_sql("SELECT pg_notify(%s, %s)", (CHANNEL, row_id))

    def connect_apart(self) -> Any:
        """A connection of Postgres's that is none of the pool's; raises the driver's errors."""
        return psycopg2.connect(dbname=self._peewee.database, **self._peewee.connect_params)

    def check(self) -> None:
        with self.reading():
            self._peewee.execute_sql("SELECT 1").fetchone()

    def close(self) -> None:
        with self._translated():
            self._peewee.close_all()

    # -- the clock: the database's, as the machines that share it may disagree ---------------------------------------

    @property
    def now(self) -> peewee.Node:
        """This moment; not the transaction's beginning, as that may lie before a long wait for a lock."""
        return peewee.SQL(NOW_POSTGRES if self.file is None else NOW_SQLITE)

    def read_clock(self) -> datetime:
        """This moment, as a value."""
        if self.file is None:
            return self._peewee.execute_sql(f"SELECT {NOW_POSTGRES}").fetchone()[0].astimezone(UTC)
        text = self._peewee.execute_sql(f"SELECT {NOW_SQLITE}").fetchone()[0]
        return datetime.fromisoformat(text).replace(tzinfo=UTC)

    def later(self, seconds: float) -> peewee.Node:
        """That many seconds from now; before now where negative."""
        if self.file is None:
            return peewee.SQL("(clock_timestamp() + make_interval(secs => %s))", (seconds,))
        return peewee.SQL(LATER_SQLITE, (f"{seconds:+.3f} seconds",))

    def now_in_list(self, account_id: str) -> peewee.Node:
        """This moment, for a row that is listed by it: later than the account's newest task.

        SQLite's clock counts in milliseconds, and two tasks may be added within one.
        """
        if self.file is None:
            return self.now
        newest = f"(SELECT {AFTER_SQLITE.format(column='created_at')} FROM tasks WHERE account_id = ?)"
        return peewee.SQL(f"max({NOW_SQLITE}, coalesce({newest}, ''))", (account_id,))

    def now_in_runs(self, schedule_id: str) -> peewee.Node:
        """This moment, for a run of a schedule that no other has the time of; its row is locked by the caller."""
        if self.file is None:
            newest = "(SELECT max(due_at) + interval '1 microsecond' FROM schedule_runs WHERE schedule_id = %s)"
            return peewee.SQL(f"greatest({NOW_POSTGRES}, {newest})", (schedule_id,))
        newest = f"(SELECT {AFTER_SQLITE.format(column='due_at')} FROM schedule_runs WHERE schedule_id = ?)"
        return peewee.SQL(f"max({NOW_SQLITE}, coalesce({newest}, ''))", (schedule_id,))

    # -- row locks: on SQLite the whole database is the writer's -----------------------------------------------------

    def locked(self, query: Any, *, skip: bool = False) -> Any:
        """The query, holding its rows until the transaction ends; `skip` leaves out those that another holds."""
        if self.file is not None:
            return query
        return query.for_update("FOR UPDATE SKIP LOCKED" if skip else "FOR UPDATE")

    # -- space -----------------------------------------------------------------------------------------------------

    def octets(self, column: Any, *, blob: bool = False) -> peewee.Node:
        """A column's length in bytes, told without reading it: from the record's header, or from TOAST's."""
        if self.file is None:
            return peewee.fn.OCTET_LENGTH(column)
        return peewee.fn.LENGTH(column if blob else column.cast("BLOB"))

    def check_room(self) -> None:
        """Raises `StorageFull` where the database's disk, as far as it is ours to see, is too full for new work."""
        if self._reserve is not None and not self._reserve.room():
            raise StorageFull()

    def keep_reserve(self) -> None:
        """See to it that the disk has its reserve, unless it is too full for one."""
        if self._reserve is not None:
            self._reserve.keep()

    def shrink(self, pages: int) -> bool:
        """Give some of what was deleted back to the disk; True when there is more.

        Postgres does so by itself. A SQLite file uses its free pages again either way; one that was made before this
        had `auto_vacuum` keeps its size, until somebody runs VACUUM on it.
        """
        if self.file is None:
            return False
        with self.reading():
            ((mode,),) = self._peewee.execute_sql("PRAGMA auto_vacuum").fetchall()
            ((free,),) = self._peewee.execute_sql("PRAGMA freelist_count").fetchall()
            if mode != 2 or not free:
                return False
            # As a script: it goes one page for each step, and a cursor takes one step where there are no columns.
            self._peewee.connection().executescript(f"PRAGMA incremental_vacuum({pages})")
        return free > pages

    # -- migrations ------------------------------------------------------------------------------------------------

    def migrate(self) -> None:
        with self._translated(), self._only_migrator():
            Runner(self._peewee, str(MIGRATIONS)).up()

    @contextmanager
    def _only_migrator(self) -> Generator[None]:
        """A connection of which there is one at a time: the runner of migrations has no lock of its own."""
        if self.file is not None:
            try:
                lock = FileLock(f"{self.file}.migrate.lock", timeout=MIGRATE_WAIT_S).acquire()
                # Prompts and sealed credentials are in it; SQLite gives its other files the same mode.
                self.file.touch(mode=0o600)
            except (Timeout, OSError) as error:
                raise DatabaseUnavailable("The database's file cannot be used.") from error
            with lock, self._peewee.connection_context():
                if not self._peewee.get_tables():
                    # What is deleted can be given back to the disk (see `shrink`); only an empty file can be made so.
                    self._peewee.execute_sql("PRAGMA auto_vacuum = incremental")
                    self._peewee.execute_sql("VACUUM")
                yield
            return
        self._peewee.connect()
        try:
            self._peewee.execute_sql(f"SET lock_timeout = '{MIGRATE_WAIT_S}s'")
            self._peewee.execute_sql("SET statement_timeout = 0")
            self._peewee.connection().limit_s = LONGEST_MIGRATION_S
            self._peewee.execute_sql("SELECT pg_advisory_lock(%s)", (MIGRATION_LOCK,))
            yield
        finally:
            # Closed for good: the lock and the settings end with the connection.
            self._peewee.manual_close()

    @contextmanager
    def _translated(self) -> Generator[None]:
        """The one place where a driver's exception becomes one of ours."""
        try:
            yield
        except (*_ours(peewee), *_ours(psycopg2), *_ours(sqlite3), MigrationError) as error:
            log.error("the database refused a statement", exc_info=error)
            raise Internal() from error
        except MaxConnectionsExceeded as error:
            raise DatabaseBusy() from error
        except (peewee.PeeweeException, psycopg2.Error, sqlite3.Error) as error:
            if not _is_full(error):
                raise DatabaseUnavailable() from error
            if self._reserve is not None:
                self._reserve.give_up()
            raise StorageFull() from error


def _is_full(error: BaseException | None) -> bool:
    """Is a full disk behind this error?

    SQLite rolls back by itself then, so that what arrives here may be the complaint of a second rollback. An error of
    ours in the chain belongs to an earlier call: this one was made while that was handled.
    """
    while error is not None and not isinstance(error, CloudAgentError):
        if isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", None) in FULL_SQLITE:
            return True
        if isinstance(error, psycopg2.Error) and error.pgcode == FULL_POSTGRES:
            return True
        error = error.__cause__ or error.__context__
    return False


def _ours(driver: Any) -> tuple[type[Exception], ...]:
    """What a driver raises when the statement is at fault and the database is not."""
    return (driver.IntegrityError, driver.DataError, driver.ProgrammingError, driver.NotSupportedError)


def _bad_address() -> DatabaseUnavailable:
    return DatabaseUnavailable(
        "DATABASE_URL is not an address that can be used.",
        remedy="Set it to postgresql://USER:PASSWORD@HOST/NAME or sqlite:////ABSOLUTE/PATH.db, or unset it.",
    )
