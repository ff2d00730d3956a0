"""What a repository says of itself, kept with its task; templates that hold what a set-up has installed."""

# pyright: basic
# ruff: noqa: INP001 - a folder of scripts, run by playhouse.migrations, and no package
from peewee import BlobField, CharField, CompositeKey, Field, Model, TextField


class Utc(Field):
    field_type = "TIMESTAMPTZ"


def up(migrator, db):
    class Template(Model):
        account_id = CharField(64)
        provider = CharField(64)
        key = CharField(64)
        template = TextField()
        created_at = Utc()
        last_used_at = Utc()

        class Meta:
            database = db
            table_name = "templates"
            primary_key = CompositeKey("account_id", "provider", "key")

    Template.create_table(safe=False)
    migrator.migrate(
        # Null where the version before has written the row, and where there is none.
        migrator.add_column("tasks", "config", BlobField(null=True)),
        migrator.add_column("tasks", "manifests", CharField(64, null=True)),
        migrator.add_index("templates", ("last_used_at",)),
    )
