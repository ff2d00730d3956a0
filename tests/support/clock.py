"""A wall clock that jumps for some processes and not for others, by libfaketime; monotonic clocks go on as they are."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HOUR = 3600.0


class JumpingClock:
    """The clock of whatever is started with `environment`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._file.write_text("+0\n")
        self.environment = {"JUMPING_CLOCK": str(file)}
        if library := _library():
            self.environment |= {
                "LD_PRELOAD": library,
                "FAKETIME_TIMESTAMP_FILE": str(file),
                "FAKETIME_NO_CACHE": "1",
                "DONT_FAKE_MONOTONIC": "1",
                "NO_FAKE_STAT": "1",
            }

    def jump(self, seconds: float) -> None:
        """So far from the true time, from now on."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{seconds:+g}\n")
        fresh.replace(self._file)


def tell_on_signal(given: Mapping[str, Any]) -> None:
    """A hook of `started.py`: at SIGUSR1 the process logs what time it has. Without the library it is made to jump."""

    def tell(*_: object) -> None:
        logging.info("it is %d", time.time())

    if "LD_PRELOAD" not in os.environ:
        # On a machine for which there is no library: what this process's own code asks for the time, and no more.
        file, true_time = Path(os.environ["JUMPING_CLOCK"]), time.time
        time.time = lambda: true_time() + float(file.read_text())
    signal.signal(signal.SIGUSR1, tell)


def _library() -> str | None:
    if sys.platform != "linux" or (found := importlib.util.find_spec("libfaketime")) is None or found.origin is None:
        return None
    return str(Path(found.origin).parent / "vendor/libfaketime/src/libfaketime.so.1")
