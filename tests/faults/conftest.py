"""Installations to break."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.e2b_server.client import E2bServer
from tests.support.installation import Installation


@pytest.fixture
def make_installation(tmp_path: Path) -> Iterator[Callable[..., Installation]]:
    """Makes an installation with the arguments of `Installation.make`; closed with the test, one a test."""
    made: list[Installation] = []

    def make(**arguments: Any) -> Installation:
        made.append(Installation.make(tmp_path, **arguments))
        return made[-1]

    yield make
    for installation in made:
        installation.close()


@pytest.fixture
def on_sqlite(make_installation: Callable[..., Installation]) -> Installation:
    """An installation on SQLite files alone."""
    return make_installation()


@pytest.fixture
def on_postgres(
    make_installation: Callable[..., Installation], request: pytest.FixtureRequest, valkey_url: str
) -> Installation:
    """An installation on Postgres and Valkey."""
    return make_installation(database=request.getfixturevalue("postgres_url"), queue=valkey_url)


@pytest.fixture
def on_e2b(cloud: E2bServer, make_installation: Callable[..., Installation]) -> Installation:
    """An installation on SQLite files, with its sandboxes in a cloud."""
    return make_installation(cloud=cloud)


@pytest.fixture(params=["sqlite", "postgres"])
def installation(request: pytest.FixtureRequest) -> Installation:
    """Both in turn; or those that `EVERYWHERE` and `EITHER_SANDBOX` name."""
    return request.getfixturevalue(f"on_{request.param}")
