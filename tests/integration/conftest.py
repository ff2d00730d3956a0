"""One installation with several server processes behind its address."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.installation import Installation


@pytest.fixture(params=["sqlite", "postgres"])
def installation(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Installation]:
    """On SQLite and on Postgres in turn, without a process yet."""
    database = "sqlite" if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    made = Installation.make(tmp_path, database=database)
    yield made
    made.close()
