"""What was uploaded, until tasks have taken it."""

# pyright: basic
# ruff: noqa: INP001 - a folder of scripts, run by playhouse.migrations, and no package
from peewee import SQL, BigIntegerField, BlobField, CharField, Field, JSONField, Model, TextField


class Utc(Field):
    field_type = "TIMESTAMPTZ"


def up(migrator, db):
    class Upload(Model):
        upload_id = CharField(40, primary_key=True)
        account_id = CharField(64, constraints=[SQL("REFERENCES accounts (account_id)")])
        base_sha = CharField(64)
        commits = TextField()
        notes = JSONField()
        config = BlobField(null=True)
        manifests = CharField(64)
        data = BlobField()
        size = BigIntegerField()
        used_at = Utc()

        class Meta:
            database = db
            table_name = "uploads"
            indexes = ((("account_id", "base_sha"), True), (("used_at",), False))

    Upload.create_table(safe=False)
