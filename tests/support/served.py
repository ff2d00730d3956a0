"""`ca serve` as a process of its own, for clients that come over HTTP."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Generator

from cloudagent_mcp import __version__
from cloudagent_mcp.embedded import only_worker
from tests.support.worlds import World

KEY = "a-key-for-the-tests"


@contextlib.contextmanager
def served(world: World) -> Generator[str]:
    """A running server's address; it wants `KEY`. It starts no worker, so that tasks wait for one of the test's."""
    with only_worker(world.home, version=__version__):
        server = subprocess.Popen(
            [sys.executable, "-m", "cloudagent_mcp", "serve", "--port", "0"],
            env={**world.environment, "ADMIN_API_KEY": KEY},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert server.stdout is not None
        try:
            with server.stdout as printed:
                yield printed.readline().split("MCP at ")[1].split("/mcp ")[0]
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(15) in (0, -signal.SIGTERM)
