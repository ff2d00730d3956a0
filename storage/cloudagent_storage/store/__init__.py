"""The store: the truth about every task. One file per noun; what users may ask takes their account, always."""

from __future__ import annotations

from datetime import datetime

from cloudagent_storage.store.accounts import Accounts
from cloudagent_storage.store.backlog import Backlog
from cloudagent_storage.store.blobs import MAX_BLOB_BYTES, Blobs
from cloudagent_storage.store.candidates import Candidates
from cloudagent_storage.store.changes import Changes as Feed
from cloudagent_storage.store.database import CONNECTIONS, Database
from cloudagent_storage.store.events import Events
from cloudagent_storage.store.keys import Keys
from cloudagent_storage.store.messages import Messages
from cloudagent_storage.store.overlaps import Overlaps
from cloudagent_storage.store.postgres import BRIEF, PATIENT, Patience
from cloudagent_storage.store.retention import Retention
from cloudagent_storage.store.schedules import ScheduleChanges, Schedules
from cloudagent_storage.store.tasks import Changes, Tasks
from cloudagent_storage.store.templates import Templates
from cloudagent_storage.store.uploads import Uploads
from cloudagent_storage.store.workers import Workers

__all__ = ["BRIEF", "CONNECTIONS", "MAX_BLOB_BYTES", "PATIENT", "Changes", "Patience", "ScheduleChanges", "Store"]


class Store:
    """Everything that is kept, in one database. Safe to use from any thread.

    Each call is one transaction, and holds a connection only for its length. Every one of them raises
    `DatabaseUnavailable` when the database does not answer in time; what it was to do may then be tried again. Those
    that write raise `StorageFull`, which is one, when the database's disk is full.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.accounts = Accounts(database)
        self.tasks = Tasks(database)
        self.candidates = Candidates(database)
        self.events = Events(database)
        self.blobs = Blobs(database)
        self.messages = Messages(database)
        self.backlog = Backlog(database)
        self.workers = Workers(database)
        self.changes = Feed(database)
        self.keys = Keys(database)
        self.schedules = Schedules(database, self.tasks)
        self.retention = Retention(database)
        self.templates = Templates(database)
        self.uploads = Uploads(database)
        self.overlaps = Overlaps(database)

    @classmethod
    def open(cls, url: str, *, patience: Patience = PATIENT, connections: int = CONNECTIONS) -> Store:
        """The store at `sqlite:////absolute/path.db` or `postgresql://…`; nothing is connected to yet.

        `patience` is how long its calls wait: `BRIEF` where people wait for the answer. `connections` is how
        many it has at most; they are opened when they are first needed.
        Raises `DatabaseUnavailable` when the address is of neither kind.
        """
        return cls(Database(url, patience=patience, connections=connections))

    def migrate(self) -> None:
        """Bring the tables up to date. Any number of processes may do so at once; one works, the others wait."""
        self._database.migrate()

    def now(self) -> datetime:
        """This moment, by the database's clock."""
        with self._database.reading():
            return self._database.read_clock()

    def check(self) -> None:
        """Raises `DatabaseUnavailable` when the database does not answer."""
        self._database.check()

    def keep_reserve(self) -> None:
        """Keep some space of the database's disk in reserve, for the time when it is full. Raises nothing."""
        self._database.keep_reserve()

    def close(self) -> None:
        """Close every connection, also those in use. A call after it connects again."""
        self.changes.close()
        self._database.close()
