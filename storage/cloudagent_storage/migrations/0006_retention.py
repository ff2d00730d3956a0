"""What finished tasks leave behind is pruned: since when it is gone, and how much there is of it."""

# pyright: basic
# ruff: noqa: INP001 - a folder of scripts, run by playhouse.migrations, and no package
from peewee import BigIntegerField, Field


class Utc(Field):
    field_type = "TIMESTAMPTZ"


def up(migrator, db):
    migrator.migrate(
        migrator.add_column("tasks", "expired_at", Utc(null=True)),
        migrator.add_column("tasks", "kept_bytes", BigIntegerField(null=True)),
        # For what is to be measured, and what is to be deleted.
        migrator.add_index("tasks", ("expired_at", "kept_bytes")),
    )
