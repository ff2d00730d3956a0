"""Failpoints: a place in the product where a process is made to die, freeze, fail or wait.

They are put in by the program that starts a process of a test (`started.py`), around methods and functions that exist
anyway, so the product knows nothing of them. Each leaves a marker before it acts, so that a test can prove that it did.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import os
import re
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloudagent_storage import errors


@dataclass(frozen=True)
class Failpoint:
    """What happens at the `nth` call of a place, counted in each process by itself."""

    place: str
    """A function or method of the product, such as `cloudagent_storage.store.tasks:Tasks.finish`."""
    when: str = "before"
    """`before` the call or `after` it."""
    nth: int = 1
    action: str = "kill"
    """`kill` (SIGKILL to the process group), `exit`, `freeze` (SIGSTOP), `raise:ErrorName`, `sleep:SECONDS`."""
    once: bool = True
    """Fires in one process of the installation only, however many were started with it."""

    @property
    def name(self) -> str:
        return re.sub(r"\W+", "-", f"{self.place.partition(':')[2]} {self.when} {self.nth} {self.action}")


def install(failpoints: Sequence[Failpoint], markers: Path) -> None:
    """Wrap the places of these failpoints, in this process, for its life."""
    for failpoint in failpoints:
        module, _, path = failpoint.place.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, _wrapped(getattr(owner, name), failpoint, markers / failpoint.name))


def _wrapped(function: Callable[..., Any], failpoint: Failpoint, marker: Path) -> Callable[..., Any]:
    calls = 0
    guard = threading.Lock()

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        with guard:
            calls += 1
            due = calls == failpoint.nth
        if due and failpoint.when == "before":
            _act(failpoint, marker)
        answer = function(*args, **kwargs)
        if due and failpoint.when == "after":
            _act(failpoint, marker)
        return answer

    return wrapper


def _act(failpoint: Failpoint, marker: Path) -> None:
    marker.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_EXCL if failpoint.once else 0)
    try:
        file = os.open(marker, flags)
    except FileExistsError:
        return
    os.write(file, f"{os.getpid()}\n".encode())
    os.close(file)
    kind, _, detail = failpoint.action.partition(":")
    match kind:
        case "kill":
            os.killpg(os.getpgrp(), signal.SIGKILL)
        case "exit":
            os._exit(70)
        case "freeze":
            _wait_for_the_other_threads()
            # To this thread: sent to the process, it would reach another first, and this one would run on for a moment.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        case "raise":
            raise (getattr(errors, detail, None) or getattr(builtins, detail))()
        case "sleep":
            time.sleep(float(detail))
        case _:
            raise ValueError(f"no such action: {failpoint.action}")


def _wait_for_the_other_threads() -> None:
    """Until none of this process writes to a SQLite file: frozen there, it would stop all other processes too."""
    for name in ("DATABASE_URL", "QUEUE_URL"):
        if (url := os.environ[name]).startswith("sqlite:///"):
            connection = sqlite3.connect(url.removeprefix("sqlite:///"), timeout=10, isolation_level=None)
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
            connection.close()
