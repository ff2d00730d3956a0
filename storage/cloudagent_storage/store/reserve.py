"""A file that takes up space until the disk is full.

On a full disk nothing can be written, and so nothing can be deleted from a database either. The reserve is given up
then: running tasks go on writing, and what is old can be pruned. New tasks are refused until it could be made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from pathlib import Path

log = logging.getLogger(__name__)

RESERVE_BYTES = 64_000_000
SHARE_OF_DISK = 0.05
"""The reserve is at most this part of its disk."""


class Reserve:
    """The reserve on the disk of a database's file. Any number of processes may share it; none of its methods raises.

    A file that is missing was never made; one that is empty was given up because the disk was full.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def keep(self) -> None:
        """Make it, or make it again, where there is room for it and as much beside it."""
        try:
            if not self._whole() and self._free() >= 2 * self._size():
                self._make()
        except OSError as error:
            log.warning("the reserve could not be made (%s)", type(error).__name__)

    def give_up(self) -> None:
        """The disk is full: set its space free."""
        with contextlib.suppress(OSError):
            if self.path.stat().st_size:
                os.truncate(self.path, 0)
                log.warning("the disk is full; the reserve was given up, and no task is accepted until there is space")

    def room(self) -> bool:
        """May new work be accepted? Not below the reserve's size of free space, and not while it is given up."""
        try:
            if self.path.exists() and not self._whole():
                self.keep()
                if not self._whole():
                    return False
            return self._free() >= self._size()
        except OSError:
            return True  # the database itself will tell

    def _size(self) -> int:
        return min(RESERVE_BYTES, int(shutil.disk_usage(self.path.parent).total * SHARE_OF_DISK))

    def _free(self) -> int:
        return shutil.disk_usage(self.path.parent).free

    def _whole(self) -> bool:
        try:
            return self.path.stat().st_size >= self._size() > 0
        except FileNotFoundError:
            return False

    def _make(self) -> None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                # Not a hole: the space is taken now.
                os.posix_fallocate(descriptor, 0, self._size())
            except OSError:
                os.truncate(descriptor, 0)
                raise
        except BlockingIOError:
            pass  # another process makes it at this moment
        finally:
            os.close(descriptor)
