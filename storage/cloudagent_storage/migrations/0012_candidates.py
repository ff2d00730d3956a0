"""Several tries at one prompt: rows of their own, under a row that no worker takes."""

# pyright: basic
# ruff: noqa: INP001 - a folder of scripts, run by playhouse.migrations, and no package
from peewee import IntegerField, JSONField


def up(migrator, db):
    migrator.migrate(
        migrator.add_column("tasks", "candidate", IntegerField(null=True)),
        migrator.add_column("tasks", "best_of", IntegerField(null=True)),
        migrator.add_column("tasks", "best", JSONField(null=True)),
        migrator.add_index("tasks", ("parent_task_id", "candidate")),
    )
