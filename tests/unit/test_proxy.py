"""The proxy that other tests inject faults with does what it says."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.proxy import Proxy
from tests.support.worlds import until


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=answer, args=(client,), daemon=True).start()

    def answer(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            while data := client.recv(1000):
                client.sendall(data)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(10)


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


def test_what_passes_comes_back(echo: int) -> None:
    with Proxy(echo) as proxy, connect(proxy) as client:
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"
        assert (proxy.connections, proxy.swallowed) == (1, 0)


def test_a_black_hole_swallows_what_is_sent_also_on_old_connections(echo: int) -> None:
    with Proxy(echo) as proxy, connect(proxy) as old:
        old.sendall(b"a")
        assert old.recv(100) == b"a"
        proxy.mode = "blackhole"
        with connect(proxy) as new:
            for client in (old, new):
                client.sendall(b"lost")
            until(lambda: proxy.swallowed == 8, "both are swallowed")
            old.settimeout(0.2)
            with pytest.raises(TimeoutError):
                old.recv(100)
        old.settimeout(10)
        proxy.mode = "pass"
        with contextlib.suppress(ConnectionResetError):
            assert old.recv(100) == b""  # it has lost something, and is cut


def test_a_connection_that_lost_nothing_in_the_black_hole_goes_on(echo: int) -> None:
    with Proxy(echo) as proxy:
        proxy.mode = "blackhole"
        with connect(proxy) as client:
            until(lambda: proxy.connections == 1, "it is accepted")
            proxy.mode = "pass"
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"


def test_refused_connections_find_nobody_and_the_port_comes_back(echo: int) -> None:
    with Proxy(echo) as proxy:
        with connect(proxy) as client:
            client.sendall(b"a")
            assert client.recv(100) == b"a"
            proxy.mode = "refuse"
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(100) == b""
        with pytest.raises(ConnectionRefusedError):
            connect(proxy)
        proxy.mode = "pass"
        with connect(proxy) as client:
            client.sendall(b"b")
            assert client.recv(100) == b"b"


def test_a_slow_network_is_slow_each_way(echo: int) -> None:
    with Proxy(echo) as proxy, connect(proxy) as client:
        proxy.mode = "slow:0.2"
        started = time.monotonic()
        client.sendall(b"a")
        assert client.recv(100) == b"a"
        assert time.monotonic() - started >= 0.4


def test_a_mode_that_there_is_not_is_refused(echo: int) -> None:
    with Proxy(echo) as proxy:
        for mode in ("lossy", "slow", "pass:1", "slow:x"):
            with pytest.raises(ValueError):
                proxy.mode = mode
