"""One installation with several server processes behind its address; and a server with somebody elsewhere."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from cloudagent_mcp import __version__
from cloudagent_mcp.embedded import only_worker
from tests.support.elsewhere import ADMIN
from tests.support.installation import Installation
from tests.support.worlds import World


@pytest.fixture(params=["sqlite", "postgres"])
def installation(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Installation]:
    """On SQLite and on Postgres in turn, without a process yet."""
    database = "sqlite" if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    made = Installation.make(tmp_path, database=database)
    yield made
    made.close()


@pytest.fixture
def url(world: World) -> Generator[str]:
    """A real server's address. It looks as if a worker ran, so that tasks stay queued."""
    with only_worker(world.home, version=__version__):
        server = subprocess.Popen(
            [sys.executable, "-m", "cloudagent_mcp", "serve", "--port", "0"],
            env={**world.environment, "ADMIN_API_KEY": ADMIN, "ANTHROPIC_API_KEY": "sk-the-servers"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert server.stdout is not None
        with server.stdout as printed:
            yield printed.readline().split("MCP at ")[1].split("/mcp ")[0]
        server.send_signal(signal.SIGTERM)
        assert server.wait(15) in (0, -signal.SIGTERM)


@pytest.fixture
def key(world: World) -> str:
    """Of an account on that server, as `ca key create` prints it."""
    done = subprocess.run(
        [sys.executable, "-m", "cloudagent_mcp", "key", "create", "laptop", "--account", "ada"],
        env=world.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture
def user(world: World, tmp_path: Path, url: str, key: str) -> dict[str, str]:
    """The environment of somebody elsewhere, who has credentials of their own."""
    return {
        "PATH": world.environment["PATH"],
        "HOME": str(tmp_path / "user"),
        "CLOUDAGENT_HOME": str(tmp_path / "elsewhere"),
        "CLOUDAGENT_URL": url,
        "CLOUDAGENT_API_KEY": key,
        "ANTHROPIC_API_KEY": "sk-the-users-own",
        "GH_TOKEN": "ghp_the-users-own",
    }
