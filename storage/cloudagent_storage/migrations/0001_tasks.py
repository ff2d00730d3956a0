"""Accounts, tasks, and what belongs to a task. The models are frozen copies: those of today may differ."""

# pyright: basic
# ruff: noqa: INP001 - a folder of scripts, run by playhouse.migrations, and no package
from peewee import (
    SQL,
    BigAutoField,
    BigIntegerField,
    BlobField,
    CharField,
    CompositeKey,
    DoubleField,
    Field,
    IntegerField,
    JSONField,
    Model,
    TextField,
)


class Utc(Field):
    field_type = "TIMESTAMPTZ"


def of_task():
    return CharField(40, constraints=[SQL("REFERENCES tasks (task_id) ON DELETE CASCADE")])


def up(migrator, db):
    class Account(Model):
        account_id = CharField(64, primary_key=True)
        created_at = Utc()

        class Meta:
            database = db
            table_name = "accounts"

    class Task(Model):
        task_id = CharField(40, primary_key=True)
        account_id = CharField(64, constraints=[SQL("REFERENCES accounts (account_id)")])
        status = CharField(16)
        phase = CharField(16, null=True)
        verdict = CharField(16, null=True)
        spec = JSONField()
        repository = TextField()
        tags = JSONField()
        base_sha = TextField(null=True)
        model = TextField(null=True)
        provider = TextField(null=True)
        parent_task_id = CharField(40, null=True)
        schedule_id = CharField(40, null=True)
        created_at = Utc()
        started_at = Utc(null=True)
        completed_at = Utc(null=True)
        result = JSONField(null=True)
        error = JSONField(null=True)
        usage = JSONField(null=True)
        question = TextField(null=True)
        credentials = BlobField(null=True)
        attempt = IntegerField()
        owner = TextField(null=True)
        lease_until = Utc(null=True)
        lost_leases = IntegerField()
        rung_at = Utc(null=True)
        cancel_requested_at = Utc(null=True)
        sandbox_id = TextField(null=True)
        sandbox_nonce = TextField(null=True)
        log_offset = BigIntegerField()
        running_seconds = DoubleField()
        last_seq = BigIntegerField()

        class Meta:
            database = db
            table_name = "tasks"
            indexes = ((("account_id", "created_at", "task_id"), False), (("status",), False))

    class Event(Model):
        task_id = of_task()
        seq = BigIntegerField()
        timestamp = Utc()
        level = CharField(16)
        kind = CharField(16)
        message = TextField()
        raw_json = TextField(null=True)

        class Meta:
            database = db
            table_name = "events"
            primary_key = CompositeKey("task_id", "seq")

    class Blob(Model):
        task_id = of_task()
        kind = CharField(16)
        data = BlobField()
        size = BigIntegerField()

        class Meta:
            database = db
            table_name = "blobs"
            primary_key = CompositeKey("task_id", "kind")

    class Message(Model):
        number = BigAutoField()
        message_id = CharField(40, unique=True)
        task_id = of_task()
        text = TextField()
        created_at = Utc()
        delivered_at = Utc(null=True)

        class Meta:
            database = db
            table_name = "messages"
            indexes = ((("task_id", "number"), False),)

    for model in (Account, Task, Event, Blob, Message):
        model.create_table(safe=False)
