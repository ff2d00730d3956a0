"""Schedules, and a row for each of their due times."""

# pyright: basic
# ruff: noqa: INP001 - a folder of scripts, run by playhouse.migrations, and no package
from peewee import (
    SQL,
    BlobField,
    BooleanField,
    CharField,
    CompositeKey,
    Field,
    IntegerField,
    JSONField,
    Model,
    TextField,
)


class Utc(Field):
    field_type = "TIMESTAMPTZ"


def up(migrator, db):
    class Schedule(Model):
        schedule_id = CharField(40, primary_key=True)
        account_id = CharField(64, constraints=[SQL("REFERENCES accounts (account_id)")])
        name = TextField()
        cron = TextField()
        timezone = TextField()
        enabled = BooleanField()
        spec = JSONField()
        credentials = BlobField(null=True)
        created_at = Utc()
        updated_at = Utc()
        next_due_at = Utc(null=True)
        revision = IntegerField()

        class Meta:
            database = db
            table_name = "schedules"
            indexes = ((("account_id", "created_at", "schedule_id"), False), (("next_due_at",), False))

    class ScheduleRun(Model):
        # Its rows go with the schedule; the tasks that it made stay.
        schedule_id = CharField(40, constraints=[SQL("REFERENCES schedules (schedule_id) ON DELETE CASCADE")])
        due_at = Utc()
        outcome = CharField(16)
        reason = TextField(null=True)
        task_id = CharField(40, null=True)
        created_at = Utc()

        class Meta:
            database = db
            table_name = "schedule_runs"
            primary_key = CompositeKey("schedule_id", "due_at")

    for model in (Schedule, ScheduleRun):
        model.create_table(safe=False)
    migrator.migrate(migrator.add_index("tasks", ("schedule_id", "status")))
