"""Starts a process of a test's installation: `python -m tests.support.started worker|server|submit JSON`.

What runs is the product's own `work`, `serve` and client. Before it, the stand-in takes the place of Claude Code, what
else a test scales down is scaled down, and failpoints are put in.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cloudagent_mcp.client import LocalClient
from cloudagent_mcp.serve import serve
from cloudagent_mcp.settings import Settings
from cloudagent_mcp.worker import work
from cloudagent_queue import agents, attempt
from cloudagent_queue.lease import Timers
from cloudagent_queue.sandboxes import local
from tests.support import failpoints
from tests.support.failpoints import Failpoint
from tests.support.standin import TASK, StandIn
from tests.support.worlds import AppWithoutWorker


def main() -> None:
    role, given = sys.argv[1], json.loads(sys.argv[2])
    threading.Thread(target=end_with_starter, daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(threadName)s %(message)s")
    journal = Path(given["journal"])
    StandIn.journal = journal
    agents.AGENTS = {"claude": ("tests.support.standin", "StandIn")}
    # What a dead worker left half made or half deleted is removed after an hour: here, after a lease.
    setattr(local, "_ABANDONED_AFTER_S", given["abandoned_s"])  # noqa: B010
    tell_agents_what_they_are_for()
    tell_agents_who_follows(journal)
    failpoints.install([Failpoint(**fields) for fields in given["failpoints"]], journal / "fired")
    if hook := given.get("hook"):
        module, _, name = hook.partition(":")
        getattr(importlib.import_module(module), name)(given)
    app = AppWithoutWorker(Settings.read(), None)
    if role == "worker":
        work(app, concurrency=given["concurrency"], timers=Timers(**given["timers"]))
    elif role == "server":
        serve(app, host="127.0.0.1", port=given["port"])
    else:
        client = LocalClient(app)
        for arguments in given["tasks"]:
            print(client.call("submit_task", **arguments)["task_id"], flush=True)
        client.close()


def end_with_starter() -> None:
    """However the tests may end: the pipe from them is closed then."""
    while os.read(0, 1):  # a reader object of Python's would be locked when the interpreter ends
        pass
    os._exit(0)


def tell_agents_what_they_are_for() -> None:
    """A stand-in writes its task's journal, in whatever sandbox."""
    start_agent: Callable[[attempt.Attempt], None] = attempt.Attempt.start_agent

    @functools.wraps(start_agent)
    def telling(self: attempt.Attempt) -> None:
        TASK.set(self.task_id)
        start_agent(self)

    attempt.Attempt.start_agent = telling


def tell_agents_who_follows(journal: Path) -> None:
    """A stand-in that is to kill its worker reads here which one that is."""
    follow: Callable[[attempt.Attempt], Any] = attempt.Attempt.follow

    @functools.wraps(follow)
    def telling(self: attempt.Attempt) -> Any:
        if '"die_worker"' in self.spec.prompt:
            fresh = journal / f"{self.task_id}.{os.getpid()}"
            fresh.write_text(str(os.getpid()))
            fresh.replace(journal / f"{self.task_id}.follower")
        return follow(self)

    attempt.Attempt.follow = telling


if __name__ == "__main__":
    main()
