"""Which files a task touches, and by what two tasks of the same repository are known."""

# pyright: basic
# ruff: noqa: INP001 - a folder of scripts, run by playhouse.migrations, and no package
from peewee import JSONField, TextField


def up(migrator, db):
    migrator.migrate(
        migrator.add_column("tasks", "source_key", TextField(null=True)),
        migrator.add_column("tasks", "touches", JSONField(null=True)),
        migrator.add_column("uploads", "root", TextField(null=True)),
    )
