"""A TCP proxy on loopback that can lose what it carries: a network or a server that fails, as its clients see it."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time

LOOK_EVERY_S = 0.02
"""How soon a change of `mode` is felt by what is already connected."""
CHUNK = 65536


class Proxy:
    """Listens on a free port of 127.0.0.1 and forwards to `target_port` there, as a context manager.

    `mode` can be set at any time, and holds for what is connected already:

    - `pass`: everything is forwarded.
    - `blackhole`: connections are accepted and kept, and all that either side sends, an end included, is swallowed.
      The kernel acknowledges it, so that keepalives and TCP's own time-outs notice nothing, as with a hung server.
    - `refuse`: nobody listens, and what was connected is cut.
    - `slow:SECONDS`: every chunk is forwarded after so long.

    Whatever lost a byte is cut when the black hole ends; what lost none goes on. `connections` counts those that were
    ever accepted and `swallowed` the bytes that were lost, so that a test can prove that its fault was felt.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._mode = "pass"
        self._closed = False
        self._guard = threading.Lock()
        self._links: set[_Link] = set()
        self.connections = 0
        self.swallowed = 0
        # Bound and never listening: it keeps the port ours while the proxy refuses.
        self._reserved = _bound(0)
        self.port: int = self._reserved.getsockname()[1]
        self._listener: socket.socket | None = self._listen()
        self._acceptor = threading.Thread(target=self._accept, name="proxy", daemon=True)

    def __enter__(self) -> Proxy:
        self._acceptor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._acceptor.join()
        with self._guard:
            links = list(self._links)
            if self._listener is not None:
                self._listener.close()
        for link in links:
            link.cut()
        for link in links:
            link.join()
        self._reserved.close()

    @property
    def mode(self) -> str:
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        kind, _, seconds = mode.partition(":")
        if kind not in ("pass", "blackhole", "refuse", "slow") or (kind == "slow") != bool(seconds):
            raise ValueError("mode is pass, blackhole, refuse or slow:SECONDS")
        float(seconds or 0)
        with self._guard:
            self._mode = mode
            if mode == "refuse" and self._listener is not None:
                # A mere close would have it listen on for as long as the acceptor's `select` holds it.
                self._listener.shutdown(socket.SHUT_RDWR)
                self._listener.close()
                self._listener = None
            elif mode != "refuse" and self._listener is None:
                self._listener = self._listen()
            cut = [link for link in self._links if mode == "refuse" or (mode != "blackhole" and link.swallowed)]
        for link in cut:
            link.cut()

    def swallow(self, count: int) -> None:
        """Count what a connection has lost."""
        with self._guard:
            self.swallowed += count

    def forget(self, link: _Link) -> None:
        with self._guard:
            self._links.discard(link)

    def delay_s(self) -> float:
        kind, _, seconds = self._mode.partition(":")
        return float(seconds) if kind == "slow" else 0.0

    def connect(self) -> socket.socket:
        """A connection to the target. Raises OSError."""
        upstream = socket.create_connection(("127.0.0.1", self._target_port), timeout=5)
        upstream.settimeout(None)
        upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return upstream

    def _listen(self) -> socket.socket:
        listener = _bound(self.port)
        listener.listen(512)
        listener.setblocking(False)
        return listener

    def _accept(self) -> None:
        while not self._closed:
            with self._guard:
                listener = self._listener
            if listener is None:
                time.sleep(LOOK_EVERY_S)
                continue
            # A listener that is closed meanwhile is an error here, and the next turn looks anew.
            with contextlib.suppress(OSError, ValueError):
                if not select.select([listener], [], [], LOOK_EVERY_S)[0]:
                    continue
                client, _ = listener.accept()
                client.setblocking(True)
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                link = _Link(self, client)
                with self._guard:
                    self.connections += 1
                    self._links.add(link)
                link.start()


class _Link:
    """One connection of a client, and the one to the target once there may be one."""

    def __init__(self, proxy: Proxy, client: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._target: socket.socket | None = None
        self._cut = threading.Event()
        self._thread = threading.Thread(target=self._carry, name="proxied", daemon=True)
        self.swallowed = 0

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def cut(self) -> None:
        """End both sides; their peers see a reset or an end."""
        self._cut.set()

    def _carry(self) -> None:
        try:
            ended: set[socket.socket] = set()
            while not self._cut.is_set():
                if self._target is None and self._proxy.mode != "blackhole":
                    self._target = self._proxy.connect()
                both = [end for end in (self._client, self._target) if end is not None]
                live = [end for end in both if end not in ended]
                if not live:
                    self._cut.wait(LOOK_EVERY_S)  # both have ended inside the black hole
                for end in select.select(live, [], [], LOOK_EVERY_S)[0] if live else []:
                    data = end.recv(CHUNK)
                    # Asked after the read: what arrived in the black hole is never forwarded.
                    if self._proxy.mode == "blackhole":
                        self.swallowed += max(1, len(data))
                        self._proxy.swallow(len(data))
                        if not data:
                            ended.add(end)
                        continue
                    if not data:
                        return
                    if (delay_s := self._proxy.delay_s()) and self._cut.wait(delay_s):
                        return
                    if self._target is None:
                        self._target = self._proxy.connect()  # the black hole ended while we waited
                    (self._target if end is self._client else self._client).sendall(data)
        except OSError:
            pass  # a side that is gone ends the other
        finally:
            for end in (self._client, self._target):
                if end is not None:
                    end.close()
            self._proxy.forget(self)


def _bound(port: int) -> socket.socket:
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind(("127.0.0.1", port))
    return found
