"""Keys for accounts, and a place of its own for what only git may use."""

# pyright: basic
# ruff: noqa: INP001 - a folder of scripts, run by playhouse.migrations, and no package
from peewee import SQL, BlobField, CharField, Field, Model, TextField


class Utc(Field):
    field_type = "TIMESTAMPTZ"


def up(migrator, db):
    class ApiKey(Model):
        key_id = CharField(40, primary_key=True)
        account_id = CharField(64, constraints=[SQL("REFERENCES accounts (account_id)")])
        name = TextField()
        digest = CharField(64, unique=True)
        hint = CharField(4)
        created_at = Utc()
        expires_at = Utc(null=True)
        revoked_at = Utc(null=True)
        last_used_at = Utc(null=True)

        class Meta:
            database = db
            table_name = "api_keys"

    ApiKey.create_table(safe=False)
    # Not in `credentials`: a worker of the version before hands all that is in there to the agent.
    migrator.migrate(migrator.add_column("tasks", "git_credentials", BlobField(null=True)))
