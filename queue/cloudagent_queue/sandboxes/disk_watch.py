"""A process that watches how much of the disk the sandboxes of one folder take, and ends those that take too much.

Quotas are not to be had on most machines, so that somebody has to look. It is a process of its own, one for a folder of
sandboxes, as it outlives the workers that come and go; it ends when there are no sandboxes any more. In the folder of a
sandbox that it has ended:

    disk.json            how large it was, and the sentence that says why it was ended

Only its processes are ended: what it has written can still be saved, and is deleted with it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import DEVNULL

import cloudagent_storage
from cloudagent_queue.sandboxes import processes, safe_files
from cloudagent_queue.sandboxes.limits import MB, Limits
from cloudagent_storage.errors import CloudAgentError

FLOOR_BYTES, FLOOR_PART = 5_000 * MB, 0.05
"""A disk with less free space than the lesser of these is nearly full: enough for what is under way to be saved."""
SANDBOX_ID = re.compile(r"sbx_[a-z2-7]{26}")
TICK_S = 0.5
"""How often the free space of the disk is looked at."""
MEASURE_S = 15.0
"""How often sandboxes are measured while that changes little."""
_STEP_BYTES = (4 * MB, 256 * MB)
_GROWTH_BYTES = 16 * MB
"""One that has grown by less since the last look is not what fills a disk."""
_MORE_AFTERWARDS = 1.25
"""How much larger one that was ended may become, while its work is saved."""
_BUSY = 10
"""It rests so many times as long as measuring takes."""
_LOCK_PATIENCE_S = 2.0

_SOURCES = (Path(__file__).parents[2], Path(cloudagent_storage.__file__).parents[1])
# Its parent ends at once: whoever starts it has no child to wait for.
_PROGRAM = """
import os, sys
if os.fork():
    os._exit(0)
sys.path += sys.argv[2:]
from cloudagent_queue.sandboxes.disk_watch import watch
watch(sys.argv[1])
"""


def ensure(folder: Path) -> None:
    """See to it that somebody watches a folder of sandboxes, one of which exists. Raises OSError."""
    with _only_watcher(folder, patience_s=0) as nobody_else:
        if not nobody_else:
            return
    sources = [str(source) for source in _SOURCES]
    command = [sys.executable, "-I", "-S", "-c", _PROGRAM, str(folder), *sources]
    processes.launch(command, env={"LANG": "C.UTF-8"}, output=DEVNULL).wait()


def said_of(sandbox: Path) -> str | None:
    """Why a sandbox was ended, if it was."""
    with suppress(OSError, ValueError):
        return json.loads((sandbox / "disk.json").read_text())["why"]
    return None


def watch(path: str) -> None:
    """Watch a folder until there are no sandboxes in it, unless another process does."""
    folder = Path(path)
    while True:
        # Who starts a sandbox holds the lock for a moment, to see whether anybody watches.
        with _only_watcher(folder, patience_s=_LOCK_PATIENCE_S) as nobody_else:
            if not nobody_else:
                return
            eye = Watch(folder)
            while _sandboxes(folder):
                with suppress(OSError):
                    eye.look()
                time.sleep(TICK_S)
        # One that was made since the last look has found the lock held, and relies on us.
        if not _sandboxes(folder):
            return


class Watch:
    """What is known of the sandboxes of a folder since the last look."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sizes: dict[Path, int] | None = None
        self._free = 0
        self._step = 0
        self._next = self._rested = time.monotonic()

    def look(self) -> None:
        """Measure the sandboxes where that is due, and end what is too large. Raises OSError."""
        began = time.monotonic()
        disk = shutil.disk_usage(self._folder)
        is_low = disk.free < min(FLOOR_BYTES, FLOOR_PART * disk.total)
        if began < self._rested or not (is_low or began > self._next or self._free - disk.free > self._step):
            return
        sizes: dict[Path, int] = {}
        rooms = [_STEP_BYTES[1] * 2]
        for sandbox in _sandboxes(self._folder):
            try:
                limits, size = _limits_of(sandbox), safe_files.size_of(sandbox)
            except OSError:
                continue  # it is being deleted
            if size is None:
                _end(sandbox, 0, "Its folders were nested too deep to be measured, and it was ended.")
                continue
            sizes[sandbox] = size
            bound = max(limits.disk_mb * MB, _MORE_AFTERWARDS * _size_at_end(sandbox)) if limits.disk_mb else None
            if bound is not None and size > bound:
                why = f"It took more than {limits.disk_mb} MB of the disk, and was ended (SANDBOX_DISK_MB)."
                _end(sandbox, size, why)
            elif bound is not None:
                rooms.append(int(bound) - size)
        if is_low and self._sizes is not None:  # who writes is not known before the second look
            before = self._sizes
            grown = {sandbox: size - before.get(sandbox, 0) for sandbox, size in sizes.items()}
            fastest = max(grown, key=lambda sandbox: grown[sandbox], default=None)
            if fastest is not None and grown[fastest] > _GROWTH_BYTES:
                why = "The disk of the machine was nearly full, and it went on writing: it was ended."
                _end(fastest, sizes[fastest], why)
        self._sizes, self._free = sizes, disk.free
        self._step = max(_STEP_BYTES[0], min(_STEP_BYTES[1], min(rooms) // 2))
        now = time.monotonic()
        self._next, self._rested = now + MEASURE_S, now + _BUSY * (now - began)


def _end(sandbox: Path, size: int, why: str) -> None:
    draft = sandbox / f".disk_{secrets.token_hex(8)}"
    with suppress(OSError):  # it may be being deleted
        draft.write_text(json.dumps({"size": size, "why": why}))
        draft.rename(sandbox / "disk.json")
    for record in sandbox.glob("*.jsonl"):
        with suppress(CloudAgentError, OSError):
            processes.Record(record, marker=sandbox.name).kill()


def _sandboxes(folder: Path) -> list[Path]:
    with suppress(FileNotFoundError):
        return [folder / name for name in os.listdir(folder) if SANDBOX_ID.fullmatch(name)]
    return []


def _limits_of(sandbox: Path) -> Limits:
    return Limits.kept(json.loads((sandbox / "meta.json").read_text()))


def _size_at_end(sandbox: Path) -> int:
    with suppress(OSError, ValueError):
        return json.loads((sandbox / "disk.json").read_text())["size"]
    return 0


@contextmanager
def _only_watcher(folder: Path, *, patience_s: float) -> Generator[bool]:
    """Hold the lock of whoever watches a folder; False when another does."""
    deadline = time.monotonic() + patience_s
    try:
        file = os.open(folder.with_name(f"{folder.name}.watch"), os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        yield True  # the folder above is gone, and with it all that could be watched
        return
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    yield False
                    return
            time.sleep(0.01)
        yield True
    finally:
        os.close(file)
