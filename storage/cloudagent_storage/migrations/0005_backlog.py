"""Several workers on several machines: who they are, where a sandbox is, and which task comes next."""

# pyright: basic
# ruff: noqa: INP001 - a folder of scripts, run by playhouse.migrations, and no package
from peewee import CharField, Field, IntegerField, Model, TextField


class Utc(Field):
    field_type = "TIMESTAMPTZ"


def up(migrator, db):
    class Worker(Model):
        name = CharField(255, primary_key=True)
        place = TextField()
        version = TextField()
        concurrency = IntegerField()
        started_at = Utc()
        seen_at = Utc()
        swept_at = Utc(null=True)

        class Meta:
            database = db
            table_name = "workers"

    Worker.create_table(safe=False)
    migrator.migrate(
        # All of them null where the version before has written the row.
        migrator.add_column("tasks", "waits_since", Utc(null=True)),
        migrator.add_column("tasks", "not_before", Utc(null=True)),
        migrator.add_column("tasks", "sandbox_place", TextField(null=True)),
        migrator.add_column("tasks", "retry_of", CharField(40, null=True)),
        migrator.add_index("tasks", ("status", "account_id")),
    )
