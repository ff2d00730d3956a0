"""What an agent asks its user, and which message is the answer."""

# pyright: basic
# ruff: noqa: INP001 - a folder of scripts, run by playhouse.migrations, and no package
from peewee import CharField, Field, JSONField


class Utc(Field):
    field_type = "TIMESTAMPTZ"


def up(migrator, db):
    migrator.migrate(
        migrator.add_column("tasks", "asked", JSONField(null=True)),
        migrator.add_column("tasks", "asked_at", Utc(null=True)),
        migrator.add_column("messages", "answers", CharField(64, null=True)),
    )
