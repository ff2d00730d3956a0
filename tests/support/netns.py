"""A network and mounts of its own for one thread and all that it starts: what is broken in them is broken nowhere else.

Linux keeps both for each thread apart, and a new thread or process has its maker's. So a whole test runs in `apart`,
with its servers, workers and clients, and may swallow packets or fill a disk.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

NEW_MOUNTS, NEW_NETWORK = 0x00020000, 0x40000000
PRIVATE, RECURSIVE = 1 << 18, 1 << 14
LOOPBACK = "127.0.0.0/8"


def apart(body: Callable[[], T]) -> T:
    """What `body` returns or raises, called on a thread with a network, of which there is only 127.0.0.1, and mounts.

    Raises PermissionError where this user may not.
    """
    answers: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            _system("unshare", NEW_MOUNTS | NEW_NETWORK)
            _system("mount", None, b"/", None, PRIVATE | RECURSIVE, None)  # what is mounted later stays in here
            _ip("link", "set", "lo", "up")
            answers.append(body())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="apart")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return answers[0]


def mount_small(folder: Path, size: int) -> None:
    """An empty disk of that many bytes at `folder`, within `apart`."""
    folder.mkdir(parents=True, exist_ok=True)
    _system("mount", b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size},mode=0700".encode())


def swallow() -> None:
    """From now on no packet arrives, within `apart`, of old connections and of new ones: nobody is told why."""
    _make_hole()
    _ip("route", "del", "local", LOOPBACK, "dev", "lo", "table", "local")
    _ip("route", "del", "local", "127.0.0.1", "dev", "lo", "table", "local")
    _ip("route", "add", LOOPBACK, "dev", "hole0")


def deliver() -> None:
    """Packets arrive again."""
    _ip("link", "del", "hole0")
    _ip("route", "add", "local", LOOPBACK, "dev", "lo", "table", "local")


def _make_hole() -> None:
    """A cable of which nobody reads the other end: packets for 127.0.0.1 are not welcome there."""
    _ip("link", "add", "hole0", "arp", "off", "type", "veth", "peer", "name", "hole1")
    _ip("link", "set", "hole0", "up")
    _ip("link", "set", "hole1", "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}, check=True, capture_output=True)


def _system(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)
