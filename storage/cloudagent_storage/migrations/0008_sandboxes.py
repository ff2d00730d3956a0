"""A task may outlive its sandbox: how old that is, and how many have died under it."""

# pyright: basic
# ruff: noqa: INP001 - a folder of scripts, run by playhouse.migrations, and no package
from peewee import Field, IntegerField


class Utc(Field):
    field_type = "TIMESTAMPTZ"


def up(migrator, db):
    migrator.migrate(
        migrator.add_column("tasks", "sandbox_made_at", Utc(null=True)),
        migrator.add_column("tasks", "sandbox_losses", IntegerField(null=True)),
    )
