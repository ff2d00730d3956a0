"""What all tests share: an environment without the product's variables, real databases, a real Redis."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cloudagent_storage.records import LOCAL_ACCOUNT
from cloudagent_storage.store import Store
from tests.support.e2b_server.client import E2bServer
from tests.support.postgres import PostgresServer
from tests.support.valkey import ValkeyServer

PRODUCT_VARIABLES = re.compile(
    "(ANTHROPIC|CLAUDE|CLOUDAGENT|NOVITA|E2B|GIT|GH|GITHUB|SANDBOX|SYSTEM|AWS|GOOGLE|VERTEX|WORKER|RETENTION)_.*"
    "|CLAUDECODE|DATABASE_URL|REDIS_URL|QUEUE_URL|PUBLIC_URL|ENCRYPTION_KEY|ADMIN_API_KEY|PG[A-Z]+"
)


class RealProvider(NamedTuple):
    """A provider to run the contract suite against, with a real account."""

    name: str
    environment: dict[str, str]


REAL_PROVIDER = RealProvider(real, dict(os.environ)) if (real := os.environ.get("CLOUDAGENT_TEST_PROVIDER")) else None

# Before anything is imported that might look: a developer's own keys and databases are not for tests.
for variable in list(os.environ):
    if PRODUCT_VARIABLES.fullmatch(variable):
        del os.environ[variable]


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """The Postgres of this process, started when a test first asks for it."""
    server = PostgresServer()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def migrated_database(postgres: PostgresServer) -> str:
    """A database on that server with all tables: emptied after each test, which is ten times faster than another."""
    name = postgres.create_database()
    store = Store.open(postgres.url(name))
    store.migrate()
    store.close()
    return name


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> Iterator[str]:
    """The address of an empty Postgres database."""
    name = postgres.create_database()
    yield postgres.url(name)
    postgres.drop_database(name)


@pytest.fixture(scope="session")
def valkey() -> Iterator[ValkeyServer]:
    """The Valkey of this process, started when a test first asks for it."""
    server = ValkeyServer()
    yield server
    server.stop()


@pytest.fixture
def valkey_url(valkey: ValkeyServer) -> str:
    """The address of an empty Redis."""
    valkey.flush()
    return valkey.url


@pytest.fixture(scope="session")
def cloud_of_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[E2bServer]:
    """The cloud of this process, started when a test first asks for it."""
    server = E2bServer(tmp_path_factory.mktemp("cloud") / "server")
    yield server
    server.stop()


@pytest.fixture
def cloud(cloud_of_session: E2bServer) -> Iterator[E2bServer]:
    """A cloud without sandboxes and faults, in which what a test changes lasts for that test."""
    yield cloud_of_session
    cloud_of_session.clear()


@pytest.fixture(params=["sqlite", "postgres"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty database, of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.db'}"
    return request.getfixturevalue("postgres_url")


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of a database, of either kind, with all tables and the account `local`."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'store.db'}"
    else:
        postgres: PostgresServer = request.getfixturevalue("postgres")
        name: str = request.getfixturevalue("migrated_database")
        request.addfinalizer(lambda: postgres.empty_database(name))
        url = postgres.url(name)
    store = Store.open(url)
    store.migrate()
    store.accounts.ensure(LOCAL_ACCOUNT)
    store.close()
    return url


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """An open store, on SQLite and on Postgres in turn."""
    store = Store.open(store_url)
    yield store
    store.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-snapshots", action="store_true", help="Write tests/snapshots/ anew from the code.")
    parser.addoption("--full", action="store_true", help="Run every fault, not only those of each commit.")
    parser.addoption("--soak", type=float, metavar="MINUTES", help="Throw random faults for that long.")
    parser.addoption("--seed", type=int, help="The seed of `--soak`; left out, one is chosen and printed.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `full` unless all faults are asked for, and the soak unless that is."""
    full, soak = config.getoption("--full"), config.getoption("--soak") is not None

    def is_left_out(item: pytest.Item) -> bool:
        if item.get_closest_marker("soak"):
            return not soak
        parameters = set(item.name.partition("[")[2].rstrip("]").split("-"))
        wanted = [set(which.split("-")) for mark in item.iter_markers("full") for which in mark.args or ("",)]
        return not full and any(which <= {*parameters, ""} for which in wanted)

    left_out = [item for item in items if is_left_out(item)]
    config.hook.pytest_deselected(items=left_out)
    # The mutants take the longest of all: begun last, they would have a processor to themselves at the end.
    items[:] = sorted((item for item in items if item not in left_out), key=lambda item: "mutants" not in item.nodeid)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Any]:
    """An installation of its own: data folder, a user with a credential, no worker yet."""
    from tests.support.worlds import World

    home = tmp_path / "data"
    home.mkdir(mode=0o700)
    user = tmp_path / "user"
    user.mkdir()
    environment = {
        "CLOUDAGENT_HOME": str(home),
        "HOME": str(user),
        "PATH": os.environ["PATH"],
        "ANTHROPIC_API_KEY": "sk-ant-test-0123456789abcdef",
    }
    world = World(home, environment)
    yield world
    world.close()


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository with one commit: a program, and a test of it that fails."""
    from tests.support.worlds import make_repository

    return make_repository(tmp_path / "repo")
