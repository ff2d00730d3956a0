"""The tables, as peewee models. Rows never leave this package; `migrations/` makes the tables.

The models here have no database of their own: `Tables` binds a set of them to one, so that a process can hold several.
"""

# pyright: basic
from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from typing import Any, TypeVar

from peewee import (
    BigAutoField,
    BigIntegerField,
    BlobField,
    BooleanField,
    CharField,
    CompositeKey,
    Database,
    DoubleField,
    Field,
    IntegerField,
    JSONField,
    Model,
    Node,
    SqliteDatabase,
    TextField,
)

UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
"""What Postgres refuses in text: NUL, and halves of surrogate pairs."""


def storable(text: str) -> str:
    """The text with U+FFFD in place of what a database cannot keep."""
    return UNSTORABLE.sub("\ufffd", text)


def storable_json(value: Any) -> Any:
    """The same for JSON; a number that JSON cannot express becomes null. Raises RecursionError when nested too deep."""
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {storable(str(key)): storable_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [storable_json(item) for item in value]
    return value


class Text(TextField):
    """Text of any origin: what the database could not keep is replaced."""

    def db_value(self, value: Any) -> Any:
        return storable(value) if isinstance(value, str) else value


class Json(JSONField):
    """JSON of any origin: JSONB on Postgres, text on SQLite."""

    def db_value(self, value: Any) -> Any:
        return super().db_value(value if isinstance(value, Node) else storable_json(value))


class Utc(Field):
    """A moment. TIMESTAMPTZ on Postgres; on SQLite text of one format, so that it sorts and compares as a time does."""

    field_type = "TIMESTAMPTZ"

    def db_value(self, value: Any) -> Any:
        if not isinstance(value, datetime):
            return value
        try:
            value = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
        except OverflowError:
            value = value.replace(
                tzinfo=UTC
            )  # the first or last day that there is, told by a sandbox with an odd clock
        if isinstance(self.model._meta.database, SqliteDatabase):
            return value.replace(tzinfo=None).isoformat(" ", "milliseconds")
        return value

    def python_value(self, value: Any) -> Any:
        if isinstance(value, str):
            return datetime.fromisoformat(value).replace(tzinfo=UTC)
        return value if value is None else value.astimezone(UTC)


class AccountRow(Model):
    account_id = CharField(64, primary_key=True)
    created_at = Utc()


class TaskRow(Model):
    task_id = CharField(40, primary_key=True)
    account_id = CharField(64)
    status = CharField(16)
    phase = CharField(16, null=True)
    verdict = CharField(16, null=True)
    spec = Json()
    repository = Text()
    tags = Json()
    """These two are the spec's, once more: lists are filtered by them."""
    base_sha = Text(null=True)
    model = Text(null=True)
    provider = Text(null=True)
    parent_task_id = CharField(40, null=True)
    schedule_id = CharField(40, null=True)
    created_at = Utc()
    started_at = Utc(null=True)
    completed_at = Utc(null=True)
    result = Json(null=True)
    error = Json(null=True)
    usage = Json(null=True)
    question = Text(null=True)
    asked = Json(null=True)
    """The question's id, and what there is to choose from."""
    asked_at = Utc(null=True)
    credentials = BlobField(null=True)
    """Sealed; gone when the task has ended."""
    git_credentials = BlobField(null=True)
    """The same, for git alone: the agent never sees them."""
    attempt = IntegerField(default=0)
    owner = Text(null=True)
    lease_until = Utc(null=True)
    """Null while nobody holds the task: before the first claim, after a release, after the end."""
    lost_leases = IntegerField(default=0)
    """How many leases in a row ran out without a new line in the log."""
    rung_at = Utc(null=True)
    cancel_requested_at = Utc(null=True)
    sandbox_id = Text(null=True)
    sandbox_nonce = Text(null=True)
    log_offset = BigIntegerField(default=0)
    running_seconds = DoubleField(default=0.0)
    last_seq = BigIntegerField(default=0)
    """The number of the last line in the log. Only an UPDATE of this row hands out more: none is missing or double."""
    idempotency_key = CharField(255, null=True)
    arguments_digest = Text(null=True)
    """Of everything that was submitted with the key."""
    waits_since = Utc(null=True)
    """What the order of the queue goes by: `created_at`, earlier or later by the priority."""
    not_before = Utc(null=True)
    """A task that was given back since something did not answer is left alone until then."""
    sandbox_place = Text(null=True)
    """Where the sandbox is, if only workers of that place reach it."""
    sandbox_made_at = Utc(null=True)
    sandbox_losses = IntegerField(null=True)
    """How many sandboxes have died under this task; null in rows of the version before."""
    retries_used = IntegerField(null=True)
    failed_verify = Json(null=True)
    """What the last of the retries is for."""
    retry_of = CharField(40, null=True)
    config = BlobField(null=True)
    """The repository's own settings: the file as it was at the base."""
    manifests = CharField(64, null=True)
    """A digest of what decides what its set-up installs."""
    expired_at = Utc(null=True)
    """Since when its log and blobs count as gone; they are deleted after that, in small steps."""
    source_key = Text(null=True)
    """The same for all tasks of one repository, as far as that can be told; null where there is none."""
    touches = Json(null=True)
    """The files that its agent has changed or meant to, and at its end those that it did change; null for none."""
    kept_bytes = BigIntegerField(null=True)
    """What its log and blobs take up, measured once after its end; 0 when they are deleted."""
    candidate = IntegerField(null=True)
    """Which of its parent's candidates it is, from 1; null for what is none, whatever `parent_task_id` says."""
    best_of = IntegerField(null=True)
    """How many candidates it has: it is their parent, and no worker takes it."""
    best = Json(null=True)
    """The best of them, once all have ended: its number and id."""

    class Meta:
        indexes = (
            (("account_id", "created_at", "task_id"), False),
            (("status",), False),
            (("status", "account_id"), False),
            (("account_id", "idempotency_key"), True),
            (("schedule_id", "status"), False),
            (("expired_at", "kept_bytes"), False),
            (("parent_task_id", "candidate"), False),
        )


class EventRow(Model):
    task_id = CharField(40)
    seq = BigIntegerField()
    timestamp = Utc()
    level = CharField(16)
    kind = CharField(16)
    message = Text()
    raw_json = TextField(null=True)
    """As text: it is only ever read back whole, and Postgres need not parse it."""

    class Meta:
        primary_key = CompositeKey("task_id", "seq")


class BlobRow(Model):
    task_id = CharField(40)
    kind = CharField(16)
    data = BlobField()
    """Compressed with zlib."""
    size = BigIntegerField()
    """Bytes before that."""

    class Meta:
        primary_key = CompositeKey("task_id", "kind")


class MessageRow(Model):
    number = BigAutoField()
    message_id = CharField(40, unique=True)
    task_id = CharField(40)
    text = Text()
    answers = CharField(64, null=True)
    """The id of the question that it is the answer to."""
    created_at = Utc()
    delivered_at = Utc(null=True)

    class Meta:
        indexes = ((("task_id", "number"), False),)


class WorkerRow(Model):
    name = CharField(255, primary_key=True)
    place = Text()
    version = Text()
    concurrency = IntegerField()
    started_at = Utc()
    seen_at = Utc()
    swept_at = Utc(null=True)


class ApiKeyRow(Model):
    key_id = CharField(40, primary_key=True)
    account_id = CharField(64)
    name = Text()
    digest = CharField(64, unique=True)
    """A keyed hash of the token."""
    hint = CharField(4)
    created_at = Utc()
    expires_at = Utc(null=True)
    revoked_at = Utc(null=True)
    last_used_at = Utc(null=True)


class ScheduleRow(Model):
    schedule_id = CharField(40, primary_key=True)
    account_id = CharField(64)
    name = Text()
    cron = Text()
    timezone = Text()
    enabled = BooleanField(default=True)
    spec = Json()
    credentials = BlobField(null=True)
    """Sealed, and bound to the schedule's id."""
    created_at = Utc()
    updated_at = Utc()
    next_due_at = Utc(null=True)
    """The due time that nobody has answered yet; null while the schedule is paused."""
    revision = IntegerField(default=0)
    """Raised by each change that a user makes: nothing is fired as it was before."""

    class Meta:
        indexes = ((("account_id", "created_at", "schedule_id"), False), (("next_due_at",), False))


class ScheduleRunRow(Model):
    schedule_id = CharField(40)
    due_at = Utc()
    outcome = CharField(16)
    reason = Text(null=True)
    task_id = CharField(40, null=True)
    created_at = Utc()

    class Meta:
        primary_key = CompositeKey("schedule_id", "due_at")


class TemplateRow(Model):
    account_id = CharField(64)
    provider = CharField(64)
    key = CharField(64)
    template = Text()
    """The provider's own name of it."""
    created_at = Utc()
    last_used_at = Utc()

    class Meta:
        primary_key = CompositeKey("account_id", "provider", "key")
        indexes = ((("last_used_at",), False),)


class UploadRow(Model):
    upload_id = CharField(40, primary_key=True)
    account_id = CharField(64)
    base_sha = CharField(64)
    commits = TextField()
    """Ids that spaces separate, the newest first."""
    root = Text(null=True)
    """The first commit of its history; null in rows of the version before."""
    notes = Json()
    config = BlobField(null=True)
    manifests = CharField(64)
    data = BlobField()
    """A whole bundle as it is: git has compressed it."""
    size = BigIntegerField()
    used_at = Utc()

    class Meta:
        indexes = ((("account_id", "base_sha"), True), (("used_at",), False))


M = TypeVar("M", bound=Model)


class Tables:
    """The models, bound to one database."""

    def __init__(self, database: Database) -> None:
        def bound(model: type[M], table_name: str) -> type[M]:
            options: dict[str, Any] = {"database": database, "table_name": table_name}
            if isinstance(key := model._meta.primary_key, CompositeKey):
                options["primary_key"] = CompositeKey(*key.field_names)
            return type(model)(model.__name__, (model,), {"Meta": type("Meta", (), options)})

        self.accounts = bound(AccountRow, "accounts")
        self.tasks = bound(TaskRow, "tasks")
        self.events = bound(EventRow, "events")
        self.blobs = bound(BlobRow, "blobs")
        self.messages = bound(MessageRow, "messages")
        self.workers = bound(WorkerRow, "workers")
        self.api_keys = bound(ApiKeyRow, "api_keys")
        self.schedules = bound(ScheduleRow, "schedules")
        self.schedule_runs = bound(ScheduleRunRow, "schedule_runs")
        self.templates = bound(TemplateRow, "templates")
        self.uploads = bound(UploadRow, "uploads")

    @property
    def all(self) -> tuple[type[Model], ...]:
        of_tasks = (self.accounts, self.tasks, self.events, self.blobs, self.messages)
        others = (self.workers, self.api_keys, self.schedules, self.schedule_runs, self.templates, self.uploads)
        return (*of_tasks, *others)
