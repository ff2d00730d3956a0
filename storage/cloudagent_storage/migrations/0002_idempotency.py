"""A submit that is repeated with the same key is the same task."""

# pyright: basic
# ruff: noqa: INP001 - a folder of scripts, run by playhouse.migrations, and no package
from peewee import CharField, TextField


def up(migrator, db):
    migrator.migrate(
        migrator.add_column("tasks", "idempotency_key", CharField(255, null=True)),
        migrator.add_column("tasks", "arguments_digest", TextField(null=True)),
        # Null keys are all different, on SQLite and on Postgres.
        migrator.add_index("tasks", ("account_id", "idempotency_key"), unique=True),
    )
