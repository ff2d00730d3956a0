"""How often a failing verify went back to a task's agent, and what it had said."""

# pyright: basic
# ruff: noqa: INP001 - a folder of scripts, run by playhouse.migrations, and no package
from peewee import IntegerField, JSONField


def up(migrator, db):
    migrator.migrate(
        migrator.add_column("tasks", "retries_used", IntegerField(null=True)),
        migrator.add_column("tasks", "failed_verify", JSONField(null=True)),
    )
