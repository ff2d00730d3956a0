"""Submits that race: from many threads of several processes, all beginning at one moment."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from cloudagent_mcp.client import LocalClient
from cloudagent_mcp.settings import Settings
from tests.support.worlds import AppWithoutWorker

START_S = 6.0
"""How long the processes have to get ready."""


@dataclass(frozen=True)
class Raced:
    task_ids: Sequence[str]
    began: float
    ended: float
    """Of the machine's monotonic clock."""


def race(environment: Mapping[str, str], arguments: Mapping[str, Any], count: int, threads: int, at: float) -> Raced:
    """One process's share: submit `count` times from `threads` threads, beginning at that monotonic time."""
    client = LocalClient(AppWithoutWorker(Settings.read(environment), None))
    client.call("list_tasks", limit=1)

    def submit(_: int) -> str:
        return client.call("submit_task", **arguments)["task_id"]

    try:
        with ThreadPoolExecutor(threads) as pool:
            time.sleep(max(0.0, at - time.monotonic()))
            began = time.monotonic()
            task_ids = list(pool.map(submit, range(count)))
            return Raced(task_ids, began, time.monotonic())
    finally:
        client.close()


def race_all(
    environment: Mapping[str, str], arguments: Mapping[str, Any], *, processes: int, count: int, threads: int
) -> list[Raced]:
    """The same from several processes."""
    at = time.monotonic() + START_S
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        racing = [pool.submit(race, environment, arguments, count, threads, at) for _ in range(processes)]
        return [each.result() for each in racing]
