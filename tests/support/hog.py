"""A worker whose machine runs out of memory: a hook of `started.py`, and a control group that makes the kernel act."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.support.worlds import until

MEMORY = Path("/sys/fs/cgroup/memory")
"""The first version of control groups: where it can be written, the kernel's own killer is to be had."""
MARGIN = 32 * 1024 * 1024
TAKEN = 256 * 1024 * 1024


def on_signal(given: Mapping[str, Any]) -> None:
    """At SIGUSR1, take memory until somebody kills us; where nobody does, be killed in the middle of it."""

    def take(*_: object) -> None:
        threading.Thread(target=hog, daemon=True).start()

    signal.signal(signal.SIGUSR1, take)


def hog() -> None:
    taken: list[bytearray] = []
    while len(taken) * 1024 * 1024 < TAKEN:
        taken.append(bytearray(os.urandom(1024)) * 1024)
        time.sleep(0.002)
    os.killpg(os.getpgrp(), signal.SIGKILL)


@contextmanager
def little_memory(pid: int) -> Generator[Path | None]:
    """Put a process, and what it starts from now on, where the kernel kills who takes more.

    The group's file that counts the killed, or None where no group can be made.
    """
    group = MEMORY / f"cloudagent-test-{pid}"
    try:
        group.mkdir()
        in_use = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
        (group / "memory.limit_in_bytes").write_text(str(in_use + MARGIN))
        (group / "cgroup.procs").write_text(str(pid))
    except OSError:
        with suppress(OSError):
            group.rmdir()
        yield None
        return
    yield group / "memory.oom_control"
    until(lambda: not (group / "cgroup.procs").read_text(), "the group is empty")
    group.rmdir()
